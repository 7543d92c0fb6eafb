"""Weights as an embedder: a checkpoint of ``train.py``, safetensors, InsightFace's backbone.pth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import build_backbone, load_weights
from ..backbones.weights import embedding_size_of, read_about, read_weights, recognise
from .embedder import Embedder

# Settings of a run's model that are none of the network's.
_OF_TRAINING = {
    *("_target_", "channels_last", "compile", "freeze", "grad_checkpointing", "pretrained")
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEmbedder(Embedder):
    """An :class:`Embedder` by a torch backbone, ``network``, which it puts into eval mode.

    Args:
        network: images (N, 3, 112, 112) in its range to embeddings (N, D).
        precision: see :func:`load_embedder`.
        args, kwargs: of :class:`Embedder`.
    """

    def __init__(
        self, network: nn.Module, *args: Any, precision: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if precision not in (None, *_DTYPES):
            raise ValueError(f"precision must be null, bf16 or fp16, got {precision}")
        if precision == "bf16" and self.device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        self.precision = precision
        self.network = network.to(self.device).eval()
        if precision is not None:
            self.network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        pixels = self._floats(images)
        if self.precision is None:
            return self.network(pixels)
        with torch.autocast(self.device.type, _DTYPES[self.precision]):
            return self.network(pixels.contiguous(memory_format=torch.channels_last))

    @cached_property
    def fingerprint(self) -> str:
        settings = [self.mirror, self.range, self.channels, self.precision]
        digest = hashlib.sha256(json.dumps([self.about.get("network"), *settings]).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_torch_embedder(
    path: Path,
    network: str | Mapping[str, Any] | None,
    device: torch.device,
    mirror: bool,
    batch_size: int,
    range: Sequence[float] | None = None,
    channels: str = "rgb",
    precision: str | None = None,
) -> TorchEmbedder:
    """:func:`load_embedder` of a file of weights."""
    about = read_about(path)
    if "config" in about:
        try:
            about = about_run(about)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"a checkpoint must say of its run what train.py writes, got another run in {path}"
            ) from error
    spec = _spec(path, network, about)
    model = build_backbone(**spec)
    load_weights(model, path)
    about["network"] = spec
    given = (spec["embedding_size"], about, device, mirror, batch_size, range, channels)
    return TorchEmbedder(model, *given, precision=precision)


def about_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What to know of a model, from the ``run`` that a checkpoint holds.

    Returns:
        Plain data: ``network`` (what ``build_backbone`` takes), ``data``, ``margin``, ``scale``,
        ``steps`` trained, ``commit``, ``verification``, the accuracy of each set, and
        ``thresholds``, see :func:`fastface_lightning.evaluation.thresholds_of`.
    """
    config = run["config"]
    data, margin = config["data"], dict(config["margin"])
    margin_class = margin.pop("_target_").rpartition(".")[2]
    return {
        "network": {k: v for k, v in config["model"].items() if k not in _OF_TRAINING},
        "data": data.get("name") or data["_target_"].rpartition(".")[2],
        "margin": f"{margin_class}({', '.join(f'{k}={v}' for k, v in margin.items())})",
        "scale": config["classifier"]["scale"],
        "steps": run["steps"],
        "commit": run["commit"],
        "verification": run["verification"],
        "thresholds": run.get("thresholds", {}),
    }


def _spec(
    path: Path, network: str | Mapping[str, Any] | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What to build for a file's weights: what the caller says, the file says, or its keys fit."""
    if isinstance(network, str):
        network = {"name": network}
    settings = about.get("network") or {} if network is None else network
    spec = {key: value for key, value in settings.items() if key not in _OF_TRAINING}
    if "name" in spec and "embedding_size" in spec:
        return spec
    weights = read_weights(path)
    if "name" not in spec:
        name = recognise(weights)
        if name is None:
            raise ValueError(
                f"network must be given with {path}, whose weights are of none that is known: "
                f"network=NAME, its name in timm"
            )
        spec["name"] = name
    return {**spec, "embedding_size": embedding_size_of(weights) or 512}
