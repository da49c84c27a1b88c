"""Monte Carlo inference: probabilities averaged over noisy forwards."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules import Classifier, digits, loader, module, trainer
from mp_lightning import MetaPerturbCallback, MonteCarlo, attach, attachment_of
from mp_lightning.backbones import build_backbone
from mp_lightning.errors import ConfigurationError
from mp_lightning.inference import OutputAverage
from mp_lightning.inference.mc import output_kind

HEADS = {
    "logits": lambda logits: logits,
    "probabilities": lambda logits: logits.softmax(1),
    "log_probabilities": lambda logits: logits.log_softmax(1),
}


class Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.net = build_backbone("conv4", 10, width=8, image_size=16)
        self.head = head
        self.halves = False  # its input, in place

    def forward(self, x):
        return self.head(self.net(x.mul_(0.5) if self.halves else x))


def attached(head, *, samples=5, output=None):
    model = Net(head)
    attachment = attach(model, ramp_steps=0, full_strength_at=1)
    with torch.no_grad():
        for _ in range(3):
            model(digits()[0][:32])
            attachment.step(1.0)
    model.eval()
    attachment.inference = MonteCarlo(samples, output)
    return model, attachment


def by_hand(model, attachment, x, samples):
    """The published loop, through the attachment's counter of evaluations."""
    inference, attachment.inference = attachment.inference, None
    attachment.evaluations.zero_()
    found = torch.stack([model.net(x).softmax(1) for _ in range(samples)])
    assert int(attachment.evaluations) == samples
    attachment.evaluations.zero_()
    attachment.inference = inference
    return found


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_averages_probabilities(kind, declared):
    model, attachment = attached(HEADS[kind], output=kind if declared else None)
    x = digits()[0][:12]
    with torch.no_grad():
        samples = by_hand(model, attachment, x, 5)
        assert (samples[0] - samples[1]).abs().max() > 1e-3  # there is noise to average
        out = model(x)
    assert int(attachment.evaluations) == 5
    assert attachment.inference.output == kind
    mean = samples.mean(0)
    found = {"logits": lambda o: o.softmax(1), "probabilities": lambda o: o, "log_probabilities": torch.exp}[kind](out)
    assert torch.allclose(found, mean, atol=1e-6)
    if kind == "logits":  # cross-entropy of the averaged output is that of the mean probability
        labels = digits()[1][:12]
        assert F.cross_entropy(out, labels) == pytest.approx(float(F.nll_loss(mean.log(), labels)), rel=1e-5)


def test_one_sample_is_one_forward():
    model, attachment = attached(HEADS["logits"], samples=1)
    x = digits()[0][:4]
    with torch.no_grad():
        samples = by_hand(model, attachment, x, 1)
        assert torch.allclose(model(x).softmax(1), samples[0], atol=1e-6)


def test_half_precision_stays_so():
    model, _ = attached(HEADS["logits"])
    out = model.bfloat16()(digits()[0][:4].bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_training_is_not_averaged():
    model, attachment = attached(HEADS["logits"])
    before = int(attachment.forwards)
    model.train()(digits()[0][:4])
    assert int(attachment.forwards) == before + 1 and attachment.inference.calls == 0


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (lambda logits: logits[:, :1], r"shape \(4, 1\)"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: logits[:, :, None, None].expand(-1, -1, 2, 2), r"shape \(4, 10, 2, 2\)"),
        (lambda logits: logits[:, 0], r"shape \(4,\)"),
        (lambda logits: logits.argmax(1, keepdim=True).expand(-1, 2), r"shape \(4, 2\)"),
        (lambda logits: logits.sigmoid(), "from 0 to 1"),
    ],
)
@pytest.mark.parametrize("output", [None, "logits"])
def test_what_cannot_be_averaged_is_refused_by_name(head, what, output):
    model, attachment = attached(head, output=output)
    if output is not None and what == "from 0 to 1":
        return  # declared, it is believed
    with pytest.raises(ConfigurationError, match=f"Net gives.*{what}.*inference='mean'"):
        model(digits()[0][:4])
    assert attachment.depth == 0 and attachment.sampling
    attachment.inference = None
    model(digits()[0][:4])  # and nothing is left in progress


def test_a_few_small_logits_are_no_probabilities():
    """An untrained net may give numbers between 0 and 1; a small batch is too little to judge by."""
    assert output_kind(torch.full((2, 2), 0.3), "Net") == "logits"
    one_hot = torch.eye(3)
    assert output_kind(one_hot, "Net") == "probabilities"
    assert output_kind(one_hot.log_softmax(1), "Net") == "log_probabilities"
    assert output_kind(torch.randn(50, 3), "Net") == "logits"
    assert output_kind(torch.zeros(50, 3), "Net") == "logits"  # of a new head that starts at zero, as torchvision's ViT


def test_a_batch_without_an_image_has_no_outputs():
    model, _ = attached(HEADS["logits"], samples=2)
    assert model(digits()[0][:0]).shape == (0, 10)
    assert model.train()(digits()[0][:0]).shape == (0, 10)


def test_logits_far_apart_stay_finite():
    """Of which a probability is 0 in float32."""
    model, _ = attached(lambda logits: torch.tensor([[1000.0, 0.0]]).expand(len(logits), 2))
    out = model(digits()[0][:4])
    assert out.isfinite().all() and out.argmax(1).eq(0).all()


def test_a_small_batch_is_too_little_to_settle_what_the_output_holds():
    model, attachment = attached(HEADS["logits"])
    with torch.no_grad():
        model(digits()[0][:1])
        assert attachment.inference.output is None
        model(digits()[0][:4])
    assert attachment.inference.output == "logits"


@pytest.mark.parametrize("samples", [0, -1])
def test_needs_a_sample(samples):
    with pytest.raises(ConfigurationError, match="at least one"):
        MonteCarlo(samples)


def test_outputs_of_unknown_meaning_are_averaged_as_they_are():
    """A map as a dense regression gives it, which has no class probabilities."""
    model, attachment = attached(lambda logits: 100 * logits[:, :, None, None])
    attachment.inference = OutputAverage(3)
    x = digits()[0][:4]
    with torch.no_grad():
        averaged = model(x)
        attachment.inference = None
        attachment.evaluations.zero_()
        by_hand = torch.stack([model(x) for _ in range(3)]).mean(0)
    torch.testing.assert_close(averaged, by_hand)
    assert averaged.shape == (4, 10, 1, 1)


def test_outputs_in_double_precision_are_averaged_in_it():
    """As targets of a regression that are far from 0."""
    model, attachment = attached(lambda logits: logits.double() + 1e9)
    x = digits()[0][:4]
    with torch.no_grad():
        attachment.inference = OutputAverage(1)
        averaged = model(x)
        attachment.evaluations.zero_()
        attachment.inference = None
        assert torch.equal(averaged, model(x))


def test_one_object_finds_out_what_each_model_gives():
    shared = MonteCarlo(3)
    x = digits()[0][:32]
    for kind in ("logits", "probabilities", "logits"):
        model, attachment = attached(HEADS[kind])
        attachment.inference = shared
        with torch.no_grad():
            total = model(x).sum(1)
        assert shared.output == kind
        assert torch.allclose(total, torch.ones(32)) == (kind == "probabilities")
    declared = MonteCarlo(3, "logits")
    for _ in range(2):
        model, attachment = attached(HEADS["probabilities"])
        attachment.inference = declared
        with torch.no_grad():
            model(x)
        assert declared.output == "logits"


@pytest.mark.parametrize("inference", [MonteCarlo(4, "logits"), OutputAverage(4)])
def test_a_model_that_changes_its_input_is_averaged_over_what_it_was_given(inference):
    """As one that normalizes its images in place."""
    images = digits()[0][:4]
    model, attachment = attached(HEADS["logits"])
    attachment.inference = inference
    with torch.no_grad():
        expected = model(0.5 * images)
        attachment.evaluations.zero_()
        model.halves = True
        got = model(images.clone())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("inference", [MonteCarlo(4, "probabilities"), OutputAverage(4)])
def test_a_model_that_uses_its_output_again_is_averaged_over_all_forwards(inference):
    """As one that fills a buffer, or that a CUDA graph replays."""
    images = digits()[0][:4]
    model, attachment = attached(HEADS["probabilities"])
    attachment.inference = inference
    buffer = torch.empty(4, 10)
    with torch.no_grad():
        expected = model(images)
        attachment.evaluations.zero_()
        model.head = lambda logits: buffer.copy_(logits.softmax(1))
        got = model(images)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_kinds_of_output_are_told_in_half_precision(kind, dtype):
    logits = 3 * torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
    assert output_kind(HEADS[kind](logits).to(dtype), "Net") == kind


def test_tensors_in_a_dictionary_are_averaged_each():
    model, attachment = attached(lambda logits: {"scores": logits, "more": (logits[:, :2].half(), None, "text")})
    attachment.inference = OutputAverage(3)
    x = digits()[0][:4]
    with torch.no_grad():
        averaged = model(x)
        attachment.inference = None
        attachment.evaluations.zero_()
        by_hand = [model(x) for _ in range(3)]
    torch.testing.assert_close(averaged["scores"], torch.stack([one["scores"] for one in by_hand]).mean(0))
    half, none, text = averaged["more"]
    expected = torch.stack([one["more"][0].float() for one in by_hand]).mean(0).half()
    torch.testing.assert_close(half, expected)
    assert half.dtype == torch.float16 and (none, text) == (None, "text")


def boxes(logits):
    """As of a detector: as many rows as there are scores above a threshold, which differ with the noise."""
    return {"boxes": logits[logits > logits.mean() + 0.1 * logits.sum().frac()]}


def sometimes(logits):
    """With a part that is there in some forwards only."""
    return {"scores": logits, "more": logits if (1000 * logits.sum()).frac().abs() > 0.5 else None}


@pytest.mark.parametrize(
    "head",
    [lambda logits: {"scores": logits, "classes": logits.argmax(1)}, lambda logits: str(logits), boxes, sometimes],
    ids=["integers", "no tensor", "other shapes", "other parts"],
)
def test_outputs_without_an_average_fall_back_to_the_expected_noise(head):
    model, attachment = attached(head)
    x = digits()[0][:4]
    attachment.inference = None
    with torch.no_grad():
        drawn = [str(model(x)) for _ in range(6)]
        attachment.inference = OutputAverage(6)
        first, second = str(model(x)), str(model(x))
    assert len(set(drawn)) == 6
    assert first == second and attachment.sampling


def test_a_forward_that_raises_leaves_the_next_one_right():
    model, attachment = attached(HEADS["logits"])
    x = digits()[0][:4]
    with torch.no_grad():
        expected = by_hand(model, attachment, x, 5).mean(0)
        calls = []

        def fail_once(module, args):
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("third sample")

        handle = model.net.fc.register_forward_pre_hook(fail_once)
        with pytest.raises(ValueError, match="third sample"):
            model(x)
        handle.remove()
        attachment.evaluations.zero_()
        assert torch.allclose(model(x).softmax(1), expected, atol=1e-6)


class CallsNet(Classifier):
    """self.net(x) in place of self(x): wrapping the module's own forward sees nothing."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    validation_step = test_step


class OwnLayers(pl.LightningModule):
    """Layers directly on the module, and a forward of its own."""

    def __init__(self):
        super().__init__()
        net = build_backbone("conv4", 10, width=8, image_size=16)
        self.conv_layers, self.fc = net.conv_layers, net.fc

    def forward(self, x):
        return self.fc(self.conv_layers(x).flatten(1))

    training_step = Classifier.training_step
    _evaluate, test_step = Classifier._evaluate, Classifier.test_step
    configure_optimizers = Classifier.configure_optimizers


@pytest.mark.parametrize("cls", [Classifier, CallsNet, OwnLayers])
def test_in_a_users_module(tmp_path, cls):
    model = module(cls)
    run = trainer(tmp_path, [MetaPerturbCallback(inference="mc", samples=4, fit_samples=2, full_strength_at=1)])
    run.fit(model, loader(4), loader(2) if cls is not OwnLayers else None)
    attachment = attachment_of(model)
    assert int(attachment.forwards) == 8
    (metrics,) = run.test(model, loader(2), verbose=False)
    assert int(attachment.evaluations) == 2 * 4
    # By hand over samples, with the same counter.
    attachment.evaluations.zero_()
    attachment.inference = None
    model.eval()
    losses = []
    with torch.no_grad():
        for x, y in loader(2):
            losses.append(F.nll_loss(torch.stack([model(x).softmax(1) for _ in range(4)]).mean(0).log(), y))
    assert metrics["test_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


class LayerByLayer(CallsNet):
    """No module that holds all sites is ever called in its test step."""

    def test_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.net.conv_layers:
            x = layer(x)
        self.log("test_loss", F.cross_entropy(self.net.fc(x.flatten(1)), batch[1]))


@pytest.mark.parametrize("inference", ["mc", "mean"])
def test_a_test_step_that_never_calls_the_model_is_refused(tmp_path, inference):
    model = module(LayerByLayer)
    run = trainer(tmp_path, [MetaPerturbCallback(inference=inference, full_strength_at=1)])
    run.fit(model, loader(2), loader(2))
    with pytest.raises(ConfigurationError, match=r"self\.net.*as a whole"):
        run.test(model, loader(2), verbose=False)


@pytest.mark.parametrize("inference", ["mc", "mean"])
def test_outputs_that_cannot_be_averaged_in_a_users_module(tmp_path, inference):
    class GivesDict(Classifier):
        def forward(self, x):
            return {"logits": self.net(x)}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self(batch[0])["logits"], batch[1]))

        test_step = validation_step

    model = module(GivesDict)
    run = trainer(tmp_path, [MetaPerturbCallback(inference=inference, full_strength_at=1)])
    if inference == "mc":
        with pytest.raises(ConfigurationError, match="GivesDict gives a dict"):
            run.fit(model, loader(2), loader(2))
    else:
        run.fit(model, loader(2), loader(2))
        assert run.test(model, loader(2), verbose=False) == run.test(model, loader(2), verbose=False)
