"""Networks of the libraries that people take theirs from, and where each of them is perturbed."""

import pytest
import timm
import torchvision

from mp_lightning.sites.rules import END, PLAIN, PRE_ACTIVATION, RESIDUAL, UNNORMALIZED

# Every classifier of torchvision. Residual blocks; inverted residuals with a shortcut and blocks of transformers;
# normalized convolutions; convolutions.
_TORCHVISION = {
    RESIDUAL: {
        **{"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50},
        **{"resnext50_32x4d": 16, "resnext101_32x8d": 33, "resnext101_64x4d": 33},
        **{"wide_resnet50_2": 16, "wide_resnet101_2": 33},
        **{"regnet_x_400mf": 22, "regnet_x_800mf": 16, "regnet_x_1_6gf": 18, "regnet_x_3_2gf": 25},
        **{"regnet_x_8gf": 23, "regnet_x_16gf": 22, "regnet_x_32gf": 23},
        **{"regnet_y_400mf": 16, "regnet_y_800mf": 14, "regnet_y_1_6gf": 27, "regnet_y_3_2gf": 21},
        **{"regnet_y_8gf": 17, "regnet_y_16gf": 18, "regnet_y_32gf": 20, "regnet_y_128gf": 27},
    },
    PRE_ACTIVATION: {
        **{"efficientnet_b0": 9, "efficientnet_b1": 16, "efficientnet_b2": 16, "efficientnet_b3": 19},
        **{"efficientnet_b4": 25, "efficientnet_b5": 32, "efficientnet_b6": 38, "efficientnet_b7": 48},
        **{"efficientnet_v2_s": 35, "efficientnet_v2_m": 51, "efficientnet_v2_l": 73},
        **{"mnasnet0_5": 10, "mnasnet0_75": 10, "mnasnet1_0": 10, "mnasnet1_3": 10},
        **{"mobilenet_v2": 10, "mobilenet_v3_small": 6, "mobilenet_v3_large": 10},
        **{"convnext_tiny": 18, "convnext_small": 36, "convnext_base": 36, "convnext_large": 36},
        **{"swin_t": 12, "swin_s": 24, "swin_b": 24, "swin_v2_t": 12, "swin_v2_s": 24, "swin_v2_b": 24},
        **{"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 24, "vit_l_32": 24, "vit_h_14": 32},
        "maxvit_t": 33,
    },
    PLAIN: {
        **{"vgg11_bn": 8, "vgg13_bn": 10, "vgg16_bn": 13, "vgg19_bn": 16},
        **{"densenet121": 59, "densenet161": 79, "densenet169": 83, "densenet201": 99},
        **{"shufflenet_v2_x0_5": 37, "shufflenet_v2_x1_0": 37, "shufflenet_v2_x1_5": 37, "shufflenet_v2_x2_0": 37},
        **{"googlenet": 57, "inception_v3": 94},  # without their auxiliary classifiers, which act in training alone
    },
    UNNORMALIZED: {
        **{"alexnet": 5, "vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16},
        **{"squeezenet1_0": 1 + 3 * 8, "squeezenet1_1": 1 + 3 * 8},
    },
}
# Those whose features end in a normalized convolution and an activation, after the residual stream.
_WITH_END = ("efficientnet", "mnasnet", "mobilenet")
_SIZES = {"alexnet": 63, "googlenet": 128, "inception_v3": 299, "maxvit_t": 224}

# A small network of each family of timm, its sites by rule, and how many of them have the channels last.
_TIMM = {
    "byobnet": ("test_byobnet", {RESIDUAL: 4}, 0),
    "cait": ("cait_xxs24_224", {PRE_ACTIVATION: 26}, 26),
    "coat": ("coat_tiny", {PRE_ACTIVATION: 14}, 14),
    "convit": ("convit_tiny", {PRE_ACTIVATION: 12}, 12),
    "convnext": ("test_convnext", {PRE_ACTIVATION: 9}, 9),
    "crossvit": ("crossvit_tiny_240", {PRE_ACTIVATION: 15}, 15),
    "cspnet": ("cs3darknet_focus_s", {PRE_ACTIVATION: 9, END: 1}, 0),
    "cspnext": ("cspnext_tiny", {PRE_ACTIVATION: 3, END: 1}, 0),
    "deit": ("deit_tiny_patch16_224", {PRE_ACTIVATION: 12}, 12),
    "dla": ("dla46x_c", {RESIDUAL: 12}, 0),
    "dpn": ("dpn48b", {PRE_ACTIVATION: 16, END: 1}, 0),
    "edgenext": ("edgenext_xx_small", {PRE_ACTIVATION: 12}, 12),
    "efficientformer": ("efficientformer_l1", {PRE_ACTIVATION: 15}, 1),
    "efficientformer_v2": ("efficientformerv2_s0", {PRE_ACTIVATION: 16, RESIDUAL: 3}, 0),
    "efficientnet": ("mnasnet_small", {PRE_ACTIVATION: 10, END: 1}, 0),
    "efficientvim": ("efficientvim_m1", {PRE_ACTIVATION: 12}, 0),
    "efficientvit_mit": ("efficientvit_b0", {PRE_ACTIVATION: 11, END: 1}, 0),
    "efficientvit_msra": ("efficientvit_m0", {PRE_ACTIVATION: 22}, 0),
    "eva": ("eva02_tiny_patch14_224", {PRE_ACTIVATION: 12}, 12),
    "fasternet": ("fasternet_t0", {PRE_ACTIVATION: 13}, 0),
    "fastvit": ("fastvit_t8", {RESIDUAL: 6, PRE_ACTIVATION: 10}, 0),
    "gcvit": ("gcvit_xxtiny", {PRE_ACTIVATION: 23}, 12),
    "ghostnet": ("ghostnet_050", {PRE_ACTIVATION: 16, END: 1}, 0),
    "hardcorenas": ("hardcorenas_b", {PRE_ACTIVATION: 12, END: 1}, 0),
    "inception_next": ("inception_next_atto", {PRE_ACTIVATION: 12}, 0),
    "iformer": ("iformer_t", {PRE_ACTIVATION: 16}, 0),
    "lcnetv2": ("lcnetv2_small", {RESIDUAL: 6, PRE_ACTIVATION: 1}, 0),
    "levit": ("levit_128s", {PRE_ACTIVATION: 20}, 20),
    "lowformer": ("lowformer_b0", {PRE_ACTIVATION: 14, END: 1}, 0),
    "mambaout": ("test_mambaout", {PRE_ACTIVATION: 6}, 6),
    "maxxvit": ("test_coatnet", {PRE_ACTIVATION: 5}, 0),
    "metaformer": ("poolformerv2_s12", {PRE_ACTIVATION: 12}, 0),
    "mlp_mixer": ("gmlp_ti16_224", {PRE_ACTIVATION: 30}, 30),
    "mobilenetv3": ("mobilenetv3_small_050", {PRE_ACTIVATION: 7, END: 1}, 0),
    "mobilevit": ("mobilevit_xxs", {PRE_ACTIVATION: 12, END: 1}, 9),
    "mvitv2": ("mvitv2_tiny", {PRE_ACTIVATION: 10}, 10),
    "nest": ("nest_tiny", {PRE_ACTIVATION: 12}, 12),
    "nfnet": ("test_nfnet", {RESIDUAL: 3, PRE_ACTIVATION: 1}, 0),
    "pit": ("pit_ti_224", {PRE_ACTIVATION: 12}, 12),
    "pvt_v2": ("pvt_v2_b0", {PRE_ACTIVATION: 8}, 8),
    "regnet": ("regnetx_004_tv", {RESIDUAL: 22}, 0),
    "repghost": ("repghostnet_050", {RESIDUAL: 16}, 0),
    "repvit": ("repvit_m1", {PRE_ACTIVATION: 26}, 0),
    "resnest": ("resnest14d", {RESIDUAL: 4}, 0),
    "resnet": ("test_resnet", {RESIDUAL: 4}, 0),
    "resnetv2": ("resnetv2_18", {PRE_ACTIVATION: 8, END: 1}, 0),
    "rexnet": ("rexnet_100", {PRE_ACTIVATION: 11, END: 1}, 0),
    "senet": ("legacy_seresnet18", {RESIDUAL: 8}, 0),
    "shvit": ("shvit_s1", {PRE_ACTIVATION: 24}, 0),
    "sknet": ("skresnet18", {RESIDUAL: 8}, 0),
    "starnet": ("starnet_s050", {PRE_ACTIVATION: 6}, 0),
    "swiftformer": ("swiftformer_xs", {PRE_ACTIVATION: 20}, 0),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {PRE_ACTIVATION: 12}, 12),
    "tiny_vit": ("tiny_vit_5m_224", {RESIDUAL: 2, PRE_ACTIVATION: 10}, 10),
    "twins": ("twins_svt_small", {PRE_ACTIVATION: 18}, 18),
    "visformer": ("visformer_tiny", {PRE_ACTIVATION: 15}, 0),
    "vision_transformer": ("test_vit", {PRE_ACTIVATION: 6}, 6),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {PRE_ACTIVATION: 12}, 12),
    "vision_transformer_relpos": ("test_vit_relpos", {PRE_ACTIVATION: 9}, 9),
    "vovnet": ("ese_vovnet19b_slim_dw", {PLAIN: 22}, 0),
    "xcit": ("xcit_nano_12_p8_224", {PRE_ACTIVATION: 26}, 14),
}

# Small networks by the configurations of transformers: sites, and how many have the channels last.
_TRANSFORMERS = {
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}, {RESIDUAL: 5}, 0),
    "convnext": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}, {PRE_ACTIVATION: 5}, 5),
    "vit": (
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
        {PRE_ACTIVATION: 3},
        3,
    ),
    "swin": ({"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 4}, {PRE_ACTIVATION: 4}, 4),
}

# Name in our configurations, sites by rule, and how many have the channels last (None: not counted).
NETWORKS: dict[str, tuple[dict[str, int], int | None]] = {
    **{
        f"torchvision:{name}": ({rule: n, **({END: 1} if name.startswith(_WITH_END) else {})}, None)
        for rule, counts in _TORCHVISION.items()
        for name, n in counts.items()
    },
    **{f"timm:{name}": (rules, last) for name, rules, last in _TIMM.values()},
    **{f"transformers:{name}": (rules, last) for name, (_, rules, last) in _TRANSFORMERS.items()},
}


def build(name):
    """The network with random weights, and the size of its images (C, H, W)."""
    library, _, name = name.partition(":")
    return {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library](name)


def _torchvision(name):
    size, settings = _SIZES.get(name, 64), {}
    if name in ("googlenet", "inception_v3"):
        settings = {"init_weights": False}
    elif name.startswith("vit"):
        size = 2 * int(name.rpartition("_")[2])
        settings = {"image_size": size}
    return torchvision.models.get_model(name, weights=None, **settings), (3, size, size)


def _timm(name):
    model = timm.create_model(name)
    return model, model.pretrained_cfg["input_size"]


def _transformers(name):
    transformers = pytest.importorskip("transformers")
    settings = {**_TRANSFORMERS[name][0], "num_labels": 3, "image_size": 64, "patch_size": 4}
    config = transformers.AutoConfig.for_model(name, **settings)
    return transformers.AutoModelForImageClassification.from_config(config), (3, 64, 64)
