"""The way out: a trained model as plain operations, for ONNX and ``torch.export``, in one of the deterministic modes.

A copy of the model is frozen in its mode: batch norm holds the statistics that were estimated for it, nothing draws
noise, counts or measures. With 'mean' the 82 numbers of phi stay in the graph and are evaluated at each site; with
'fold' a multiplication by one constant for each channel is all that remains of the perturbation.
"""

import copy
import importlib
import math
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mp_lightning.errors import ConfigurationError, one_line
from mp_lightning.inference.mean import Mean
from mp_lightning.sites import Attachment, attachment_of
from mp_lightning.sites.arguments import check_model
from mp_lightning.sites.root import layer_beside

ExportMode = Literal["mean", "fold"]
SUFFIXES = (".onnx", ".pt2")
_TOLERANCE = 1e-2  # beyond rounding, as a share of the largest output


def exportable(model: nn.Module, mode: ExportMode) -> nn.Module:
    """A copy of an attached model that computes one mode of inference by plain operations, in evaluation.

    Args:
        model: attached, trained, and re-estimated for the mode (the callback does that when training ends). Of a
            LightningModule without a forward of its own, the network in it that holds the sites is taken, if it has no
            other layers.
        mode: 'mean' or 'fold'.

    Raises:
        ConfigurationError: the model is not attached or not ready for the mode, or the mode needs samples.
    """
    if mode not in ("mean", "fold"):
        raise ConfigurationError(
            f"mode={mode} cannot be exported, as it draws noise in every forward; use mean or fold"
        )
    check_model(model, "export")
    attachment = attachment_of(model)
    if attachment is None:
        raise ConfigurationError(f"{type(model).__name__} has no perturbation attached; export it as any other model")
    _check_ready(attachment, mode)
    name = _entry(attachment, model)
    frozen = copy.deepcopy(attachment.model).eval()
    own = attachment_of(frozen)
    assert own is not None
    own.freeze(folding=mode == "fold")
    return frozen.get_submodule(name)


def export(model: nn.Module, path: str | Path, images: Tensor, mode: ExportMode = "mean") -> float | None:
    """Write an attached model to a file that needs neither this package nor, as ONNX, torch.

    Args:
        model: as for :func:`exportable`; on the CPU.
        path: ``.onnx``, which needs the packages onnx and onnxscript, or ``.pt2``, for ``torch.export.load``. The size
            of the batch stays free.
        images: (B, C, H, W) float32 with at least two images, of the size that the file shall take.
        mode: 'mean' or 'fold'.

    Returns:
        The largest absolute difference between the outputs of the file and of the model for these images, infinite
        where one of them is not finite and the other is another number; None, for ONNX, where the package onnxruntime
        is missing. A warning says so where it is large.

    Raises:
        ConfigurationError: as :func:`exportable`; or the images are no batch of two, the path is none, or its ending
            unknown, a package is missing, or the model cannot be exported.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"path= is a {type(path).__name__}; give a file name such as model.onnx")
    path = Path(os.path.expanduser(path))
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(f"to={path} cannot be used; give a file name that ends in {' or '.join(SUFFIXES)}")
    frozen = exportable(model, mode)
    if not isinstance(images, Tensor) or images.dim() < 3 or len(images) < 2 or not images.is_floating_point():
        what = f"a {type(images).__name__}"
        if isinstance(images, Tensor):
            what = f"a tensor of shape {tuple(images.shape)} and type {images.dtype}"
        raise ConfigurationError(f"images= is {what}; give a batch (B, C, H, W) of at least two images, float32")
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        with torch.no_grad():
            expected = _output(frozen, images)
            program = torch.export.export(frozen, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            _check_batch_is_free(program, images)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            difference = (_write_onnx if path.suffix == ".onnx" else _write_pt2)(program, partial, images, expected)
            partial.replace(path)
        except OSError as error:
            raise ConfigurationError(f"'{path}' cannot be written ({error.strerror}); choose another place") from error
        return difference
    except ConfigurationError:
        raise
    except Exception as error:  # torch.export raises many kinds for code that it cannot follow
        raise ConfigurationError(
            f"{type(model).__name__} cannot be exported ({type(error).__name__}: "
            f"{one_line(error, 200)}); its forward must be one that torch.export can follow"
        ) from error
    finally:
        if partial.exists():
            partial.unlink()


def _output(model: nn.Module, images: Tensor) -> object:
    try:
        return model(images)
    except Exception as error:  # whatever its layers say
        size = "x".join(map(str, images.shape[1:]))
        raise ConfigurationError(
            f"images of {size} do not pass through {type(model).__name__} as {images.dtype} "
            f"({type(error).__name__}: {one_line(error, 200)}); give images of the shape and type that it takes"
        ) from error


def _check_batch_is_free(program: torch.export.ExportedProgram, images: Tensor) -> None:
    more = torch.cat([images, images[:1]])
    try:
        program.module()(more)
    except Exception as error:  # a guard of the program, of one kind or another
        raise ConfigurationError(
            f"the model can be exported for exactly {len(images)} images only, as its forward reads their number as a "
            "constant, by int(x.shape[0]) or a condition on it; take it from x.shape[0] as it is, or use -1"
        ) from error


def _write_pt2(program: torch.export.ExportedProgram, path: Path, images: Tensor, expected: object) -> float:
    torch.export.save(program, path)
    return _difference(torch.export.load(path).module()(images), expected)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, images: Tensor, expected: object) -> float | None:
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise ConfigurationError(
            f"ONNX needs a package that is missing ({error}): pip install 'mp_lightning[export]'"
        ) from error
    torch.onnx.export(program, (images,), path, dynamo=True, external_data=False, verbose=False)
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return _difference([torch.from_numpy(output) for output in outputs], expected)


def _difference(outputs: object, expected: object) -> float:
    found, wanted = ([leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)] for of in (outputs, expected))
    return max(_largest_difference(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True))


def _largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Infinities and NaN in the same places are no difference; against any other number they are an infinite one."""
    if not found.numel():
        return 0.0
    found, wanted = found.double(), wanted.double()  # of flags and whole numbers too
    same = torch.isclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    apart = (found - wanted).abs().masked_fill(same, 0)
    largest = float(apart.masked_fill(apart.isnan(), math.inf).max())
    size = float(wanted.nan_to_num(0, 0, 0).abs().max())
    if largest > _TOLERANCE * max(1.0, size):
        warnings.warn(
            f"MetaPerturb: an output of the exported file is up to {largest:.1e} away from the model's own, of up to "
            f"{size:.1e}; look at its outputs before it is used",
            stacklevel=2,
        )
    return largest


def _check_ready(attachment: Attachment, mode: str) -> None:
    folded = attachment.estimates is not None and attachment.estimates.constants is not None
    if mode == "fold" and not folded:
        raise ConfigurationError(
            "mode=fold needs constants, which were not estimated; train with inference='fold', or call "
            "mp_lightning.reestimate_batch_norm with fold=True"
        )
    if mode == "mean" and Mean().lacks(attachment) is not None:
        why = "was estimated for mode=fold" if folded else "was not re-estimated since the model was trained"
        raise ConfigurationError(
            f"mode=mean: batch norm {why}; save the checkpoint after fit with inference='mean', or call "
            "mp_lightning.reestimate_batch_norm"
        )


def _entry(attachment: Attachment, asked: nn.Module) -> str:
    """Name of the module whose forward is exported."""
    entries = attachment.entry_modules()
    for name, entry in entries.items():
        if entry is asked and name:
            return name
    if type(attachment.model).forward.__qualname__ not in ("LightningModule.forward", "_forward_unimplemented"):
        return ""
    entries.pop("", None)
    if len(entries) != 1:
        raise ConfigurationError(
            f"{type(attachment.model).__name__} has no forward and holds {len(entries)} networks "
            f"({', '.join(entries)}); give it a forward"
        )
    name, network = next(iter(entries.items()))
    if (rest := layer_beside(attachment.model, network)) is not None:
        raise ConfigurationError(
            f"{type(attachment.model).__name__} has no forward, and layers beside self.{name}, as self.{rest}; give it "
            f"a forward that goes through all that is to be exported, or export self.{name} by itself"
        )
    return name
