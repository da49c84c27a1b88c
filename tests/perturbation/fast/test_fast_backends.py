"""Kernels that a compiler made wrongly, or that fail where they run, are not used; it is said once."""

import paths
import pytest
import torch
from torch._subclasses import FakeTensorMode

from mp_lightning.perturbation.fast import backends, cpu


@pytest.fixture
def unknown():
    """Nothing is known yet about what is usable here."""
    backends._cpu_is_usable.cache_clear()
    yield
    backends._cpu_is_usable.cache_clear()


def test_the_kernels_of_this_machine_pass_their_own_check(unknown):
    assert backends.available("cpu", torch.float32)
    assert backends._error_on_a_small_map(cpu, torch.device("cpu")) < 1e-6
    gpu = paths.gpu_kernels()
    assert backends._error_on_a_small_map(gpu, paths.GPU) < 1e-6


def test_the_check_may_come_first_inside_autocast(unknown, recwarn):
    with torch.autocast("cpu", torch.bfloat16):
        assert backends.available("cpu", torch.float32)
    assert len(recwarn) == 0


class AsksFirst(torch.nn.Module):
    def forward(self, x):
        return x + float(backends.available("cpu", torch.float32))


def test_the_check_may_come_first_inside_a_trace(unknown, recwarn):
    with FakeTensorMode():
        assert backends.available("cpu", torch.float32)
    backends._cpu_is_usable.cache_clear()
    x = torch.zeros(2)
    assert torch.equal(torch.export.export(AsksFirst(), (x,), strict=False).module()(x), torch.ones(2))
    backends._cpu_is_usable.cache_clear()
    assert torch.equal(torch.compile(AsksFirst(), backend="aot_eager", fullgraph=True)(x), torch.ones(2))
    assert not [str(w.message) for w in recwarn if "MetaPerturb" in str(w.message)]


def test_wrong_numbers_are_noticed(unknown, monkeypatch):
    original = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *a: (out := original(*a))._replace(y=1.001 * out.y))
    with pytest.warns(UserWarning, match="since its kernels are off by 1.0e-03 on this CPU; path='reference'"):
        assert not backends.available("cpu", torch.float32)
    assert not backends.available("cpu", torch.float32)  # and says nothing more


def test_failing_kernels_are_noticed(unknown, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(cpu, "backward", fail)
    with pytest.warns(UserWarning, match=r"fail on this CPU \(RuntimeError: illegal instruction\); path="):
        assert not backends.available("cpu", torch.float32)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cpu", torch.float16), ("mps", torch.float32)])
def test_what_has_no_fast_path_is_computed_by_the_reference_silently(device, dtype, recwarn):
    assert not backends.available(device, dtype)
    assert len(recwarn) == 0
