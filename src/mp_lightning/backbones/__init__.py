"""Reference networks of the paper, with the names and layouts that its experiments use."""

from mp_lightning.backbones.build import build_backbone, list_backbones
from mp_lightning.backbones.convnet import ConvNet
from mp_lightning.backbones.resnet import ResNet

__all__ = ["ConvNet", "ResNet", "build_backbone", "list_backbones"]
