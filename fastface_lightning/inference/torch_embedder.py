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


class TorchEmbedder(Embedder):
    """An :class:`Embedder` by a torch backbone, ``network``, which it puts into eval mode."""

    def __init__(self, network: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network = network.to(self.device).eval()

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        return self.network(self._floats(images.to(self.device, non_blocking=True)))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            json.dumps([self.about.get("network"), self.mirror, self.range, self.channels]).encode()
        )
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
    return TorchEmbedder(model, *given)


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
