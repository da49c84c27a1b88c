"""Reference networks of the paper, with the names and layouts that its experiments use, and others by name."""

from mp_lightning.backbones.build import build_backbone, list_backbones
from mp_lightning.backbones.convnet import ConvNet
from mp_lightning.backbones.resnet import ResNet
from mp_lightning.backbones.wide_resnet import WideResNet

__all__ = ["ConvNet", "ResNet", "WideResNet", "build_backbone", "list_backbones"]
