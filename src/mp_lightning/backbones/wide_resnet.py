"""The wide residual networks of Zagoruyko and Komodakis (2016, arXiv 1605.07146), without dropout."""

from torch import Tensor, nn

from mp_lightning.backbones.weights import draw_convolutions


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice, beside a shortcut; nothing acts on their sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the normalized and activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        activated = self.relu1(self.bn1(x))
        branch: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return branch + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """A 3x3 stem, three stages of pre-activation blocks, batch norm and ReLU, mean, linear head.

    The stages have ``widen``, 2 and 4 times ``widen`` as many channels as the stem.

    The authors of MetaPerturb use WRN-28-2, but did not publish where they perturb it. Here the rule is the one of all
    residual networks, 'before the last activation of the block', and that activation is ``relu2``, inside the branch:
    what follows the sum is the residual stream, which no site multiplies. So each block has one site, with the
    channels of its stage, and so has the last activation of the network, where the stream has ended; the stem and
    ``relu1`` have none.

    Args:
        blocks: blocks in each stage; the depth is ``6 * blocks + 4``, so 4 blocks give WRN-28.
        widen: the widening factor.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        width: channels of the stem.
    """

    def __init__(self, blocks: int, widen: int, num_classes: int, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            out_channels = widen * width * 2**stage
            for block in range(blocks):
                stages.append(PreActivationBlock(channels, out_channels, stride=2 if stage > 0 and block == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, num_classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W) of any size."""
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
