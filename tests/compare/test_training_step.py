"""Things around a training step, put and taken in any order."""

import functools

import pytest
from restored import trace

from lightning_modules import Classifier, loader, module, trainer
from mp_lightning.compare.mixing import LabelSmoothing, MixUp
from mp_lightning.compare.training_step import WrappedStep


class WithoutIndex(Classifier):
    """A step that takes the batch alone, as Lightning allows."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


def named(word, order):
    def around(step, *args, **kwargs):
        order.append(word)
        return step(*args, **kwargs)

    return around


@pytest.mark.parametrize("leaving", [(0, 1), (1, 0)])
def test_what_came_first_is_outermost_and_they_leave_in_any_order(leaving):
    net = module()
    before = trace(net)
    order = []
    arounds = [named("first", order), named("second", order)]
    for around in arounds:
        WrappedStep.put(net, around)
    batch = next(iter(loader(1)))
    net.log = lambda *args, **kwargs: None
    net.training_step(batch, 0)
    assert order == ["first", "second"]
    WrappedStep.take(net, arounds[leaving[0]])
    net.training_step(batch, 0)
    assert order[2:] == [["first", "second"][leaving[1]]]
    WrappedStep.take(net, arounds[leaving[1]])
    WrappedStep.take(net, arounds[leaving[1]])
    del net.log
    assert trace(net) == before


def test_nothing_is_around_the_step_in_evaluation_mode():
    net = module().eval()
    order = []
    WrappedStep.put(net, named("around", order))
    net.log = lambda *args, **kwargs: None
    net.training_step(next(iter(loader(1))), 0)
    assert order == []


def test_a_step_of_the_instance_comes_back():
    net = module()
    own = functools.partial(net.training_step)
    net.training_step = own
    around = named("around", [])
    WrappedStep.put(net, around)
    assert net.training_step is not own
    WrappedStep.take(net, around)
    assert net.training_step is own


def test_a_step_without_an_index_gets_none(tmp_path):
    net = module(WithoutIndex)
    trainer(tmp_path, [MixUp(10), LabelSmoothing(10)], max_epochs=1).fit(net, loader(2))
    assert "training_step" not in vars(net)
