"""Layers at the sites of a model, in plain PyTorch."""

import copy

import pytest
import torch
import torchvision
from restored import trace
from seen import Seen
from torch import nn

from lightning_modules import module
from mp_lightning import MetaPerturbCallback, attachment_of, find_sites
from mp_lightning.compare.layers import DropBlock, InformationDropout
from mp_lightning.compare.site_layers import SiteLayers
from mp_lightning.errors import ConfigurationError, SiteError
from research_nets import ResearchResNet


def test_in_evaluation_the_module_computes_what_it_does_without_layers():
    net = module().eval()
    x = torch.randn(2, 3, 16, 16)
    plain = net(x)
    layers = SiteLayers(net, lambda channels: nn.Dropout(0.5), "dropout")
    assert torch.equal(net(x), plain)
    net.train()
    assert all(part.training for part in layers.modules())
    assert not torch.equal(net(x), net(x))
    layers.remove()


def test_a_layer_follows_the_perturbation(tmp_path):
    inputs = []

    class Record(nn.Module):
        def forward(self, x):
            inputs.append(x.detach().clone())
            return torch.zeros_like(x)

    net = module()
    attachment = MetaPerturbCallback(ramp_steps=0, seed=0).attach(net)
    outputs = []
    handle = attachment.sites[0].register_forward_hook(lambda site, args, y: outputs.append((args[0], y)))
    layers = SiteLayers(
        net, lambda channels: Record(), "record", sites=find_sites(module()).only(attachment.plan.names[0])
    )
    after = []
    attachment.sites[0].register_forward_hook(lambda site, args, y: after.append(y))
    net.train()(torch.randn(2, 3, 16, 16))
    handle.remove()
    assert torch.equal(inputs[0], outputs[0][1]) and not torch.equal(inputs[0], outputs[0][0])
    assert not after[0].any()
    layers.remove()
    assert attachment_of(net) is attachment


def test_functional_activations_are_sites_too():
    net = ResearchResNet()
    layers = SiteLayers(net, lambda channels: Seen(), "dropout")
    net.train()(torch.randn(2, 3, 8, 8))
    assert all(len(layer.dropped) == 1 for layer in layers.layers())


@pytest.mark.parametrize("make", [lambda channels: DropBlock(0.3, 3), lambda channels: InformationDropout(channels)])
def test_layers_read_tokens_as_maps(make):
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    layers = SiteLayers(model, make, "layers")
    images = torch.rand(2, 3, 16, 16)
    assert model(images).shape == (2, 3) and len(layers.layers()) == 2
    assert not torch.equal(model(images), model(images))  # they draw
    layers.remove()
    assert torch.equal(model(images), model(images))


def test_a_copy_of_the_module_has_layers_of_its_own():
    net = module()
    SiteLayers(net, lambda channels: Seen(), "dropout")
    twin = copy.deepcopy(net).train()
    twin(torch.randn(2, 3, 16, 16))
    counts = [[len(part.dropped) for part in of.modules() if isinstance(part, Seen)] for of in (net, twin)]
    assert counts == [[0] * 4, [1] * 4]


def test_weights_load_while_layers_are_there():
    net = module()
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    SiteLayers(net, InformationDropout, "information_dropout")
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


class Activating(nn.Module):
    """A layer with an activation function of its own, which is no call of the network's."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return torch.relu(x) - torch.relu(-x)


@pytest.mark.parametrize("make", [module, ResearchResNet])
@pytest.mark.parametrize("last", [True, False])
def test_beside_a_perturbation_at_some_sites_layers_act_at_all(make, last):
    net = make().train()
    x = torch.randn(2, 3, 16, 16)
    plan = find_sites(net)
    chosen = plan.only(plan.names[-1] if last else plan.names[0])
    MetaPerturbCallback(sites=chosen, ramp_steps=0, seed=0).attach(net)
    attachment = attachment_of(net)

    def output():
        attachment.forwards.zero_()
        torch.manual_seed(0)
        return net(x)

    before, plain = trace(net), output()
    inputs = []
    layers = SiteLayers(net, lambda channels: Activating(inputs), "layer")
    assert torch.equal(output(), plain), "phi acts as without the layers, which change nothing"
    assert len(inputs) == len(plan) == len(layers.layers()) > len(attachment.plan)
    assert attachment_of(net) is attachment
    layers.remove()
    assert trace(net) == before
    dropout = SiteLayers(net, lambda channels: Seen(), "dropout")
    twin = copy.deepcopy(net)
    twin(x)
    assert [[len(part.dropped) for part in of.modules() if isinstance(part, Seen)] for of in (net, twin)] == [
        [0] * len(plan),
        [1] * len(plan),
    ]
    dropout.remove()


def test_a_plan_of_another_model_is_refused_beside_a_perturbation():
    net = module()
    MetaPerturbCallback().attach(net)
    before = trace(net)
    with pytest.raises(SiteError, match="does not fit"):
        SiteLayers(net, lambda channels: nn.Dropout(), "dropout", sites=find_sites(ResearchResNet()))
    assert trace(net) == before


def test_two_of_one_name_are_refused_and_a_failing_layer_leaves_nothing_behind():
    net = module()
    before = trace(net)
    with pytest.raises(ZeroDivisionError):
        SiteLayers(net, lambda channels: 1 / 0, "dropout")
    assert trace(net) == before
    SiteLayers(net, lambda channels: nn.Dropout(), "dropout")
    with pytest.raises(ConfigurationError, match="layers 'dropout'"):
        SiteLayers(net, lambda channels: nn.Dropout(), "dropout")
