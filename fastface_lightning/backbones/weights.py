"""A backbone's weights in a file: InsightFace's, safetensors, or a checkpoint of ``train.py``."""

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import METADATA_KEY
from .base import architecture

# DistributedDataParallel and DataParallel; torch.compile; what others call the network in theirs.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
SAFETENSORS = ".safetensors"
# The last batch norm of MobileFaceNet, of any other timm model behind a neck, and of IResNet.
LAST_BIASES = ("features.layers.3.bias", "neck.features.bias", "features.bias")


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Fill a backbone with the weights in a file: with all of them or, on any error, with none.

    The file holds a state_dict with the model's keys and shapes, such as InsightFace's
    ``backbone.pth`` and ``model.pt``, with or without the prefix that a wrapper puts before every
    key; or a ``.safetensors`` of the same; or a Lightning checkpoint of ``train.py``, whose
    ``backbone.`` keys are taken. No code in the file runs. Weights take the dtype, device and
    memory format of the model's own. Counts of batches, which old files lack, may be missing.

    Args:
        model: what :func:`build_backbone` gives for the file's architecture and embedding size.
        file: written by ``torch.save``, or a ``.safetensors``.

    Raises:
        ValueError: no such file, one that holds something else, keys or shapes that are not the
            model's, or a number that is not finite in the model's dtype. The model is as it was.

    Example:
        >>> load_weights(build_backbone("iresnet100"), "backbone.pth")  # doctest: +SKIP
    """
    weights = read_weights(file)
    expected = model.state_dict()
    if differences := _differences(weights, expected):
        raise ValueError(f"weights must match {architecture(model)}, got {differences} in {file}")
    weights = {key: value.to(expected[key].dtype) for key, value in weights.items()}
    check_finite(weights, file)
    model.load_state_dict(weights, strict=False)  # only counts of batches may be missing


def check_finite(weights: Mapping[str, Tensor], file: str | Path) -> None:
    """Refuse weights of a file that are not all finite, naming the key and the value."""
    for key, value in weights.items():
        bad = value[~value.isfinite()]
        if len(bad) > 0:
            raise ValueError(f"weights must be finite, got {bad[0].item()} in {key} of {file}")


def read_weights(file: str | Path, part: str = "backbone.") -> dict[str, Tensor]:
    """A part's state_dict in a file, on the CPU, its keys without the prefixes of wrappers.

    ``part`` is what its keys begin with in a checkpoint of ``train.py``; a file of a backbone alone
    has nothing of another part.
    """
    content = read_file(file)
    if isinstance(content, Mapping) and "state_dict_backbone" in content:  # of arcface_torch
        content = content["state_dict_backbone"]
    is_checkpoint = isinstance(content, Mapping) and "state_dict" in content
    state = content["state_dict"] if is_checkpoint else content
    if state == {}:
        raise _refused(file, "holds no tensors")
    if not isinstance(state, Mapping):
        raise _refused(file, f"holds an object of type {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise _refused(file, f"holds an object of type {type(value).__name__} under {key!r}")
    weights = _unwrapped(state)
    if not is_checkpoint:
        return weights if part == "backbone." else {}
    weights = _unwrapped(_under(part, weights))
    if not weights and part == "backbone.":
        raise _refused(file, "is a checkpoint without keys that begin with 'backbone.'")
    return weights


def read_about(file: str | Path) -> dict[str, Any]:
    """What a file says of its weights: the ``run`` of a checkpoint of ``train.py``, or the metadata
    of a ``.safetensors``, or beside a ``.pth``, that ``recipes/export.py`` has written; nothing, of
    bare weights."""
    path = Path(file)
    if path.suffix == SAFETENSORS:
        read_file(path)  # refuses what is none
        with safe_open(path, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    content = read_file(path)
    beside = path.with_name(path.name + ".json")
    if path.suffix == ".pth" and beside.is_file():
        about = json.loads(beside.read_text(encoding="utf-8"))  # a ValueError, if it is none
        return about if isinstance(about, dict) else {}
    run = content.get("run") if isinstance(content, Mapping) else None
    return dict(run) if isinstance(run, Mapping) else {}


def embedding_size_of(weights: Mapping[str, Tensor]) -> int | None:
    """D of a backbone's state_dict, None where its last batch norm has another name."""
    return next((weights[key].numel() for key in LAST_BIASES if key in weights), None)


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the IResNet or MobileFaceNet that a state_dict fills, None if there is none."""
    size = embedding_size_of(weights)
    for name in timm.list_models(module="iresnet") + timm.list_models(module="mobilefacenet"):
        with torch.device("meta"):
            expected = timm.create_model(name, num_classes=size or 512).state_dict()
        if not _differences(weights, expected):
            return name
    return None


def read_file(file: str | Path) -> Any:
    """What a file of weights holds, its tensors on the CPU; no code in it runs.

    Raises:
        ValueError: there is no such file, or it is damaged or of another format.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"weights must be a file, got {path}")
    try:
        if path.suffix == SAFETENSORS:
            return load_file(path)
        # Only files of the zip format, torch's since 1.6, can be mapped into memory.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError as error:
        raise ValueError(f"weights must be a file that may be read, got {path}") from error
    except Exception as error:  # there is no end to what a damaged pickle may raise
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"also holds {foreign[1]}" if foreign else "is damaged or of another format"
        raise _refused(path, fault) from error


def _refused(file: str | Path, fault: str) -> ValueError:
    return ValueError(f"weights must be a state_dict or a checkpoint, got {file}, which {fault}")


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part whose keys begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers have put before every key."""
    for prefix in WRAPPERS:
        if weights and all(key.startswith(prefix) for key in weights):
            return _unwrapped(_under(prefix, weights))
    return dict(weights)


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps ``weights`` from loading, a phrase for each kind of fault; none if they fit."""
    faults = defaultdict[str, list[str]](list)
    for key, wanted in expected.items():
        value = weights.get(key)
        if value is None:
            if not key.endswith("num_batches_tracked"):
                faults["missing"].append(key)
        elif value.shape != wanted.shape:
            faults["mis-shaped"].append(f"{key} {tuple(value.shape)} for {tuple(wanted.shape)}")
        elif value.is_floating_point() != wanted.is_floating_point():
            faults["mistyped"].append(f"{key} {value.dtype} for {wanted.dtype}")
    faults["unexpected"] = [key for key in weights if key not in expected]
    return ", ".join(
        f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for fault, keys in faults.items()
        if keys
    )
