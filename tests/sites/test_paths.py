"""The fast path at the sites of whole networks: the same training as by the reference."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from mp_lightning import MetaPerturbCallback
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import Mean
from mp_lightning.perturbation import MetaPerturb, fast, initial_phi
from mp_lightning.sites import attach, attachment_of
from mp_lightning.sites.estimates import Estimates
from research_nets import ResearchResNet

NETS = {
    "resnet20": lambda: build_backbone("resnet20", 10, width=8),
    "conv4": lambda: build_backbone("conv4", 10, width=8),
    "functional": lambda: ResearchResNet(10),
}


def strong_phi():
    return type(initial_phi(0))(*(20 * value for value in initial_phi(0)))


def attached(name, path, **options):
    torch.manual_seed(0)
    model = NETS[name]()
    attach(model, strong_phi(), path=path, seed=3, **options)
    return model


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float32), torch.arange(size) % 10


def step(model, seed=0, forward=None):
    x, y = batch(seed)
    model.zero_grad()
    logits = model(x) if forward is None else forward(x)
    F.cross_entropy(logits.float(), y).backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


def assert_close(actual, expected, tolerance):
    assert (actual.float() - expected.float()).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_torchs_default_dtype_has_no_say(path, dtype):
    """Lightning's precision='bf16-true' sets it while a model is made and while it runs."""
    expected, expected_gradients = step(attached("conv4", path))
    model = attached("conv4", path)
    torch.set_default_dtype(dtype)
    try:
        found, gradients = step(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, other) for value, other in zip(gradients, expected_gradients, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the fast path."""
    seen = []
    original = fast.perturb
    monkeypatch.setattr(fast, "perturb", lambda *a: (seen.append(a[0].dtype), original(*a))[1])
    return seen


@pytest.mark.parametrize("name", NETS)
def test_trains_and_evaluates_as_by_the_reference(name, calls):
    models = {path: attached(name, path, ramp_steps=4) for path in ("auto", "reference")}
    for seed in range(2):
        results = {path: step(model, seed) for path, model in models.items()}
        assert_close(results["auto"][0], results["reference"][0], 1e-4)
        largest = max(float(g.abs().max()) for g in results["reference"][1])
        for a, b in zip(results["auto"][1], results["reference"][1], strict=True):
            assert (a - b).abs().max() <= 1e-4 * largest
        for model in models.values():
            attachment_of(model).step()
    assert calls == [torch.float32] * 2 * len(attachment_of(models["auto"]).sites)
    sites = [attachment_of(model).sites for model in models.values()]
    for a, b in zip(*sites, strict=True):
        assert_close(a.mean, b.mean, 1e-4)
        assert_close(a.var, b.var, 1e-4)
    x, _ = batch(7)
    for inference in (None, Mean()):
        outputs = []
        for model in models.values():
            attachment_of(model).inference, attachment_of(model).estimates = inference, Estimates({})
            with torch.no_grad():
                outputs.append(model.eval()(x))
        assert_close(*outputs, 1e-4)


def test_hits_of_the_bound_are_counted_alike():
    x, _ = batch()
    counts = []
    for path in ("auto", "reference"):
        model = attached("conv4", path, clip=0.5).eval()
        model(x)
        counts.append(int(attachment_of(model).bound_hits))
    assert counts[0] == counts[1] > 0


def test_unknown_path_lists_the_known_ones():
    for refuse in (lambda: attached("conv4", "fast"), lambda: MetaPerturbCallback(path="fast")):
        with pytest.raises(ConfigurationError, match="path='fast' is unknown; use one of auto, reference"):
            refuse()


def test_callback_hands_its_path_on():
    model = NETS["conv4"]()
    assert MetaPerturbCallback(path="reference").attach(model).path == "reference"


def test_a_subclass_that_computes_something_else_is_not_bypassed(calls):
    class Half(MetaPerturb):
        def noise(self, x, phi, eps):
            return 0.5 * super().noise(x, phi, eps)

    model = NETS["conv4"]()
    attach(model, perturbation=Half(strong_phi()))
    model(batch()[0])
    assert calls == []


@pytest.mark.parametrize("name", NETS)
def test_under_autocast_sixteen_bits_go_in_and_out(name, calls):
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = step(attached(name, "auto"))
        expected, _ = step(attached(name, "reference"))
    assert set(calls) == {torch.bfloat16} or name == "resnet20"  # its residual sums are of float32
    assert_close(actual, expected, 5e-2)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in NETS), pytest.param("conv4", "inductor", marks=pytest.mark.slow)],
)
def test_compiles_to_one_graph_that_computes_the_same(name, backend):
    torch._dynamo.reset()
    eager, compiled = attached(name, "auto"), attached(name, "auto")
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    forward = torch.compile(compiled, backend=graphs, fullgraph=True)
    for seed in range(3):
        expected, expected_gradients = step(eager, seed)
        actual, gradients = step(compiled, seed, forward)
        assert_close(actual, expected, 1e-4)
        largest = max(float(g.abs().max()) for g in expected_gradients)
        for a, b in zip(gradients, expected_gradients, strict=True):
            assert (a - b).abs().max() <= 1e-3 * largest
    # The hook on the model itself, outside of its forward, is a graph of its own; no step compiled anything again.
    assert graphs.frame_count == 2
    perturbed = [[n for n in g.graph.nodes if "mp_lightning.perturb" in str(n.target)] for g in graphs.graphs]
    assert sorted(map(len, perturbed)) == [0, len(attachment_of(compiled).sites)]
    for a, b in zip(attachment_of(eager).sites, attachment_of(compiled).sites, strict=True):
        assert_close(b.mean, a.mean, 1e-4)


def test_copies_take_the_fast_path_too(calls):
    model = attached("conv4", "auto")
    copy.deepcopy(model)(batch()[0])
    assert len(calls) == 4


ORDERS = ["plain first", "plain first, both made before", "attached first", "attached after it was compiled"]


@pytest.mark.parametrize("order", ORDERS)
def test_no_compiled_graph_of_another_model_runs_in_place_of_the_sites(order):
    """One cache serves all models of a class, and torch does not guard it against hooks."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as in a process that has attached nothing yet
    torch._dynamo.reset()
    x, _ = batch()
    made_before = attached("conv4", "auto") if order == "plain first, both made before" else None
    torch.manual_seed(0)
    plain = NETS["conv4"]()
    expected = plain(x).detach()

    def compiled(model):
        return torch.compile(model, backend="aot_eager")(x).detach()

    if order == "attached after it was compiled":
        torch.manual_seed(0)
        model = NETS["conv4"]()
        forward = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(forward(x), plain.train()(x))
        attach(model, strong_phi(), seed=3)
        assert_close(forward(x).detach(), attached("conv4", "auto")(x).detach(), 1e-4)
        return
    if order.startswith("plain first"):
        assert_close(compiled(plain), expected, 1e-4)
    assert_close(
        compiled(attached("conv4", "auto") if made_before is None else made_before),
        attached("conv4", "auto")(x).detach(),
        1e-4,
    )
    assert_close(compiled(plain), expected, 1e-4)
