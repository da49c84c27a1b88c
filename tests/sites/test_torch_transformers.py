"""The transformers of torch.nn: their activations are sites, and count like those of any other module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mp_lightning.sites import attach, detach, find_activations, find_sites
from mp_lightning.sites.layout import LAST, SEQUENCE
from mp_lightning.sites.rules import END, PRE_ACTIVATION


class Between(nn.Module):
    """A network with functional activations before an encoder of torch.nn and after it."""

    def __init__(self, batch_first=True, activation="relu"):
        super().__init__()
        self.batch_first = batch_first
        self.patches, self.before = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.conv, self.after, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, image, padded=None):
        x = F.relu(self.before(self.patches(image)))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        tokens = self.encoder(tokens, src_key_padding_mask=padded)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        x = F.relu(self.after(self.conv(tokens.transpose(1, 2).reshape(x.shape))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("find", [find_sites, find_activations])
@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.GELU()])
def test_what_they_call_counts_when_sites_are_found_as_when_the_network_runs(find, activation):
    model = Between(activation=activation)
    given, read = [], []
    layers = model.encoder.layers
    for module in (model.before, layers[0].linear1, layers[1].linear1, model.after):
        module.register_forward_hook(lambda module, args, y: given.append(y.clone()))
    plan = find(model)
    attachment = attach(model, sites=plan, ramp_steps=1)
    for site in attachment.all_sites():
        site.register_forward_pre_hook(lambda site, args: read.append(args[0].clone()))
    for mode in (True, False):
        given.clear(), read.clear()
        with torch.no_grad():
            model.train(mode)(torch.rand(2, 3, 16, 16))
        assert len(read) == len(plan) >= 3
        assert all(torch.equal(x, y) for x, y in zip(read, given[-len(read) :], strict=True))


@pytest.mark.parametrize(("batch_first", "layout"), [(True, LAST), (False, SEQUENCE)])
def test_sites_are_between_the_linear_layers(batch_first, layout):
    layers, end = [*find_sites(Between(batch_first))][:-1], [*find_sites(Between(batch_first))][-1]
    assert [(site.scope, site.channels, site.layout) for site in layers] == [
        ("encoder.layers.0", 16, layout),
        ("encoder.layers.1", 16, layout),
    ]
    assert ({site.rule for site in layers}, end.rule) == ({PRE_ACTIVATION}, END)


def test_decoders_have_sites_too():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.transformer = nn.Conv2d(3, 8, 4, 4), nn.Transformer(8, 2, 1, 1, 16)
            self.query = nn.Parameter(torch.randn(3, 1, 8))

        def forward(self, image):
            tokens = self.patches(image).flatten(2).permute(2, 0, 1)
            return self.transformer(tokens, self.query.expand(-1, tokens.shape[1], -1)).mean(0)

    plan = find_sites(Decodes())
    assert [(site.scope.rpartition("transformer.")[2], site.layout) for site in plan] == [
        ("encoder.layers.0", SEQUENCE),
        ("decoder.layers.0", SEQUENCE),
    ]


@pytest.mark.parametrize("sites", [1.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_computes_the_same_where_torch_has_a_fast_path(sites, masked):
    """Which is taken without gradients alone, and packs what is padded into nested tensors."""
    model = Between()
    attachment = attach(model, sites=sites, strength=1.0)
    model(torch.randn(4, 3, 16, 16))
    model.eval()
    attachment.sampling = False
    image, padded = torch.randn(4, 3, 16, 16), None
    if masked:
        padded = torch.arange(16).expand(4, 16) >= 12
    results = {}
    model.conv.register_forward_pre_hook(
        lambda conv, args: results.update({torch.is_grad_enabled(): args[0].flatten(2)})
    )
    model(image, padded)
    with torch.no_grad():
        model(image, padded)
    kept = slice(None, 12 if masked else None)  # what is padded comes out as it likes
    assert torch.allclose(results[True][..., kept], results[False][..., kept], atol=1e-5)
    copied = copy.deepcopy(model)
    for attached in (model, copied):
        detach(attached)
        assert attached.encoder.use_nested_tensor
