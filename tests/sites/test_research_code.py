"""Networks as people write them: how many sites each has, and that each site gets what its activation reads."""

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.optim.swa_utils import AveragedModel

from capture import check_sites_get_what_activations_read
from mp_lightning.sites import find_sites
from mp_lightning.sites.rules import PLAIN, PRE_ACTIVATION, RESIDUAL, UNNORMALIZED


def conv(a, b, size=3):
    return nn.Conv2d(a, b, size, padding=size // 2)


class PreActivation(nn.Module):
    """With dropout between its convolutions."""

    def __init__(self, c):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.conv1, self.conv2 = conv(c, c), conv(c, c)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.dropout(F.relu(self.bn2(y)), 0.3, self.training))


class SqueezeExcitation(nn.Module):
    """A residual block whose branch is weighted by a gate."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = conv(c, c), conv(c, c)
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(2, c)
        self.down, self.up = nn.Linear(c, 2), nn.Linear(2, c)

    def forward(self, x):
        y = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        return F.silu(x + y * gate[:, :, None, None])


class ChannelsLastNorm(nn.Module):
    """LayerNorm over the channels of maps, as ConvNeXt has it."""

    def __init__(self, c):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class OwnNorm(nn.Module):
    """A normalization that is none of torch's."""

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Tokens(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, c, 4, stride=4), OwnNorm()
        self.up, self.down, self.act = nn.Linear(c, 2 * c), nn.Linear(2 * c, c), nn.GELU()

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return x + self.down(self.act(self.up(self.norm(x))))


class Shared(nn.Module):
    """One block, and one activation, called three times."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.act = conv(c, c), nn.ReLU()

    def forward(self, x):
        for _ in range(3):
            x = self.act(x + self.conv(x))
        return x


class UNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down = nn.Sequential(conv(3, c), nn.BatchNorm2d(c), nn.ReLU())
        self.middle = nn.Sequential(conv(c, 2 * c), nn.BatchNorm2d(2 * c), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.merge = nn.Sequential(conv(2 * c, c), nn.BatchNorm2d(c), nn.ReLU())
        self.head = conv(c, 2, 1)

    def forward(self, x):
        a = self.down(x)
        b = self.up(self.middle(F.max_pool2d(a, 2)))
        return self.head(self.merge(torch.cat([a, b], dim=1)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Sequential(conv(3, 4), PreActivation(4)), nn.Sequential(conv(1, 4), PreActivation(4))

    def forward(self, picture, *, depth=None):
        depth = picture[:, :1] if depth is None else depth
        return {"maps": self.left(picture) + self.right(depth), "depth": depth}


class UnpacksShapes(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = conv(3, 8), SqueezeExcitation(8)

    def forward(self, x):
        b, c, h, w = x.shape
        assert isinstance(x, torch.Tensor) and c == 3
        return self.block(self.stem(x)).reshape(b, -1, h * w).mean(2)


NETWORKS = {
    "pre-activation with dropout": (
        lambda: nn.Sequential(conv(3, 4), PreActivation(4), PreActivation(4)),
        2,
        PRE_ACTIVATION,
    ),
    "squeeze and excitation": (lambda: nn.Sequential(conv(3, 4), SqueezeExcitation(4)), 1, RESIDUAL),
    "layer norm": (lambda: nn.Sequential(conv(3, 4), ChannelsLastNorm(4), ChannelsLastNorm(4)), 2, PRE_ACTIVATION),
    "a norm of its own on tokens": (lambda: Tokens(8), 1, PRE_ACTIVATION),
    "no normalization": (
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ELU(), conv(4, 2)),
        2,
        UNNORMALIZED,
    ),
    "group norm in a sequence": (
        lambda: nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), nn.SiLU(), conv(4, 2)),
        1,
        PLAIN,
    ),
    "one block called three times": (lambda: nn.Sequential(conv(3, 4), Shared(4)), 3, RESIDUAL),
    "U-Net": (lambda: UNet(4), 3, PLAIN),
    "several inputs and a dict": (TwoInputs, 2, PRE_ACTIVATION),
    "unpacks shapes": (UnpacksShapes, 1, RESIDUAL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_of_research_code(name):
    make, count, rule = NETWORKS[name]
    model = make()
    plan = find_sites(model)
    assert (len(plan), {site.rule for site in plan}) == (count, {rule})
    images = torch.rand(2, 3, 16, 16)

    def forward():
        torch.manual_seed(0)
        with torch.no_grad():
            model(images)

    check_sites_get_what_activations_read(plan, model, forward)


class Features(torchmetrics.Metric):
    """A metric with a network of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())

    def update(self, x):
        self.net(x)

    def compute(self):
        return torch.zeros(())


class Training(nn.Module):
    """A network, and beside it what is only there to train or to judge it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv(3, 4), SqueezeExcitation(4))
        self.perceptual = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()).requires_grad_(False)
        self.metric = Features()
        self.teacher = AveragedModel(self.net)

    def forward(self, x):
        self.metric.update(x)
        return self.net(x), self.perceptual(x), self.teacher(x)


def test_metrics_averages_and_frozen_networks_are_left_alone():
    assert all(parameter.requires_grad for parameter in Training().teacher.parameters())
    assert find_sites(Training()).names == ["net.1:silu"]
