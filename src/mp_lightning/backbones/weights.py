"""How the weights of the reference networks start."""

from torch import nn


def draw_convolutions(net: nn.Module) -> None:
    """Draw every convolution's weight from N(0, 2 / fan_out) (He et al. 2015, arXiv 1502.01852, equation 14).

    Biases, batch norms and the head keep torch's default. The numbers come from torch's global generator.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
