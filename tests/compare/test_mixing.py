"""Changed batches, as the training step of a module gets them."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from manual import ManualOptimization
from restored import trace
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_modules import BATCH, Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, attach, attachment_of, find_sites
from mp_lightning.compare.mixing import BatchTransform, LabelSmoothing, ManifoldMixup, MixUp
from mp_lightning.compare.site_layers import Identity
from mp_lightning.errors import ConfigurationError


class Recorder(Classifier):
    """Keeps the batches and outputs of its training steps."""

    def __init__(self, **options):
        super().__init__(**options)
        self.batches, self.outputs = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        logits = self(batch[0])
        self.outputs.append(logits.detach())
        return F.cross_entropy(logits, batch[1])


def first_batch():
    x, y = digits()
    return x[:BATCH], y[:BATCH]


def test_the_step_gets_what_torchvisions_mixup_makes(tmp_path):
    net = module(Recorder)
    state = []

    class State(MixUp):
        def _around(self, step, batch, *args, **kwargs):
            state.append(torch.get_rng_state())
            return super()._around(step, batch, *args, **kwargs)

    trainer(tmp_path, [State(10, alpha=0.4)], max_epochs=1).fit(net, loader(1))
    torch.set_rng_state(state[0])
    x, y = v2.MixUp(alpha=0.4, num_classes=10)(*first_batch())
    assert torch.equal(net.batches[0][0], x) and torch.equal(net.batches[0][1], y)
    assert not torch.equal(x, first_batch()[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_cross_entropy(tmp_path, smoothing):
    net = module(Recorder)
    trainer(tmp_path, [LabelSmoothing(10, smoothing)], max_epochs=1).fit(net, loader(1))
    x, y = first_batch()
    assert torch.equal(net.batches[0][0], x)
    ours = F.cross_entropy(net.outputs[0], net.batches[0][1])
    torch.testing.assert_close(ours, F.cross_entropy(net.outputs[0], y, label_smoothing=smoothing))


class Labelled(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor


@pytest.mark.parametrize("kind", [list, tuple, Labelled])
def test_a_batch_stays_what_it_is_and_keeps_the_rest(tmp_path, kind):
    x, y = first_batch()
    batch = (x, y, torch.arange(BATCH))
    data = [Labelled(*batch) if kind is Labelled else kind(batch)]
    net = module(Recorder)
    trainer(tmp_path, [MixUp(10)], max_epochs=1).fit(net, DataLoader(data, batch_size=None, collate_fn=lambda b: b))
    assert type(net.batches[0]) is kind and len(net.batches[0]) == 3
    assert torch.equal(net.batches[0][2], torch.arange(BATCH))
    assert net.batches[0][1].shape == (BATCH, 10)


def test_two_transforms_act_in_their_order(tmp_path):
    def double(x, y):
        return 2 * x, y

    def add(x, y):
        return x + 1, y

    net = module(Recorder)
    callbacks = [BatchTransform("double", double, 10), BatchTransform("add", add, 10)]
    trainer(tmp_path, callbacks, max_epochs=1).fit(net, loader(1))
    assert torch.equal(net.batches[0][0], 2 * first_batch()[0] + 1)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": torch.zeros(2, 3, 16, 16)},
        [torch.zeros(2, 3, 16, 16)],
        [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)],
        [torch.zeros(2, 3, 16, 16), torch.zeros(2)],
        [torch.zeros(2, 3, 16, 16), torch.zeros(3, dtype=torch.int64)],
        [torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)],
        [torch.zeros(2, 3, 16, 16), "labels"],
    ],
    ids=["a dict", "no labels", "integer images", "float labels", "too many labels", "no images", "words"],
)
def test_a_batch_of_another_kind_is_described(tmp_path, batch):
    net = module()
    with pytest.raises(ConfigurationError, match=r"^mixup needs batches of images .* and got (dict|list of)"):
        trainer(tmp_path, [MixUp(10)]).fit(net, DataLoader([batch], batch_size=None, collate_fn=lambda b: b))
    assert "training_step" not in vars(net)


@pytest.mark.parametrize("classes", [5, 9])
def test_labels_that_are_no_classes_are_named(tmp_path, classes):
    message = f"label_smoothing: a batch has labels from 0 to 9, .*num_classes={classes}"
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path, [LabelSmoothing(classes)]).fit(module(), loader(1))


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: MixUp(10, alpha=0), "mixup: alpha=0"),
        (lambda: ManifoldMixup(10, alpha=-1), "manifold_mixup: alpha=-1"),
        (lambda: LabelSmoothing(10, smoothing=1.0), "smoothing=1.0"),
        (lambda: MixUp(1), "num_classes=1"),
    ],
)
def test_values_out_of_range_are_named(make, culprit):
    with pytest.raises(ConfigurationError, match=culprit):
        make()


class Manual(ManualOptimization, Recorder):
    pass


@pytest.mark.parametrize("cls", [Recorder, Manual])
@pytest.mark.parametrize("make", [lambda: MixUp(10), lambda: LabelSmoothing(10), lambda: ManifoldMixup(10)])
def test_after_fit_the_module_is_as_it_was_twice(tmp_path, cls, make):
    net = module(cls)
    trainer(tmp_path, max_epochs=1).fit(net, loader(1))
    before = trace(net)
    callback = make()
    for fits in range(2):
        trainer(tmp_path, [callback], max_epochs=1).fit(net, loader(2))
        assert trace(net) == before and attachment_of(net) is None
        assert all(batch[1].shape == (BATCH, 10) for batch in net.batches[1 + 2 * fits :])
        assert len(net.batches) == 3 + 2 * fits


class Forced(ManifoldMixup):
    """Manifold mixup of weights, places and permutations that are given."""

    def __init__(self, place, **options):
        super().__init__(10, **options)
        self.place = place

    def draw(self, places, batch):
        self.places = places
        return 0.7, self.place, torch.arange(batch).flip(0)


def mixed(values):
    return 0.7 * values + 0.3 * values.flip(0)


def by_hand(net, x, place):
    """The forward of conv4 in training mode, mixed at one place."""
    names = find_sites(net).names
    attachment = attach(net, perturbation=Identity(), input_size=1)
    if place:
        site = attachment.sites[place - 1]
        assert site.spec.name == names[place - 1]
        site.register_forward_hook(lambda site, args, y: mixed(y))
    out = net(x if place else mixed(x))
    attachment.detach()
    return out


@pytest.mark.parametrize("place", range(5))
def test_manifold_mixup_mixes_at_one_place_and_the_labels_alike(tmp_path, place):
    net, twin = module(Recorder), module(Recorder)
    callback = Forced(place)
    trainer(tmp_path, [callback], max_epochs=1).fit(net, loader(1))
    x, y = first_batch()
    assert callback.places == 5
    assert torch.equal(net.batches[0][1], mixed(F.one_hot(y, 10).float()))
    torch.testing.assert_close(net.outputs[0], by_hand(twin.train(), x, place))


def test_a_mixed_forward_is_another_than_a_plain_one():
    twin = module(Recorder).train()
    outputs = [by_hand(twin, first_batch()[0], place) for place in range(5)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_manifold_mixup_draws_all_places_and_weights_of_its_distribution():
    torch.manual_seed(0)
    callback = ManifoldMixup(10, alpha=2.0)
    drawn = [callback.draw(3, 4) for _ in range(2000)]
    weights = torch.tensor([weight for weight, _, _ in drawn])
    assert weights.mean().item() == pytest.approx(0.5, abs=0.02)
    assert weights.var().item() == pytest.approx(1 / 20, rel=0.1)  # of Beta(2, 2)
    counts = torch.bincount(torch.tensor([place for _, place, _ in drawn]))
    assert len(counts) == 3 and counts.min() > 580
    assert all(sorted(permutation.tolist()) == [0, 1, 2, 3] for _, _, permutation in drawn[:20])


def test_beside_metaperturb_perturbed_features_are_mixed(tmp_path):
    net = module(Recorder)
    before, after = [], []

    class Watch(Forced):
        def on_train_batch_start(self, trainer, pl_module, *args):
            site = attachment_of(pl_module).sites[1]  # the last of all four
            site.register_forward_hook(lambda site, args, y: before.append((args[0], y)), prepend=True)
            site.register_forward_hook(lambda site, args, y: after.append(y))

    watch = Watch(4)
    trainer(tmp_path, [watch, MetaPerturbCallback(ramp_steps=10, full_strength_at=1)], max_epochs=1).fit(net, loader(2))
    assert watch.places == 5, "phi takes a share of the sites, and mixup all"
    x, perturbed = before[1]  # in the first step the ramp is at zero
    assert not torch.equal(x, perturbed)
    assert torch.equal(after[1], mixed(perturbed))


class Twice(Recorder):
    """Two forwards in a step."""

    def training_step(self, batch, batch_idx):
        first, second = self(batch[0]), self(batch[0])
        self.outputs += [first.detach(), second.detach()]
        return F.cross_entropy(first + second, batch[1])


def test_only_the_first_call_of_a_site_is_mixed(tmp_path):
    net, twin = module(Twice), module(Twice).train()
    trainer(tmp_path, [Forced(1)], max_epochs=1).fit(net, loader(1))
    x, _ = first_batch()
    torch.testing.assert_close(net.outputs[0], by_hand(twin, x, 1))
    torch.testing.assert_close(net.outputs[1], twin(x))


class Part(Classifier):
    """A step that leaves the network out."""

    def training_step(self, batch, batch_idx):
        return next(self.parameters()).sum()


class Crops(Classifier):
    """Two crops of each image, in one batch."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(torch.cat([batch[0], batch[0]])), torch.cat([batch[1], batch[1]]))


class Checkpointed(Classifier):
    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Part, "which training_step does not reach"),
        (Crops, "has a batch of 32 where there are 16 images"),
        (Checkpointed, "activation checkpointing"),
    ],
)
def test_a_site_that_cannot_be_mixed_is_named(tmp_path, cls, message):
    net = module(cls)
    site = find_sites(net).names[1]
    with pytest.raises(ConfigurationError, match=f"'{site}'.*{message}"):
        trainer(tmp_path, [Forced(2)]).fit(net, loader(1))
    assert attachment_of(net) is None and "training_step" not in vars(net)
