"""A trained model as a function, whatever file it is in: face images in, unit embeddings out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..preprocessing import IMAGE_SHAPE, normalise


class Embedder(ABC):
    """Aligned faces to unit embeddings, in batches, without gradients; see :func:`load_embedder`.

    Args:
        embedding_size: D.
        about: what is known of the model, plain data; see :func:`about_run`.
        device: where images are embedded.
        mirror: see :func:`load_embedder`.
        batch_size: images embedded at once, and with them on a GPU their mirror images.
        range: lowest and highest value of a pixel; None: -1 and 1.
        channels: see :func:`load_embedder`.
    """

    precision: str | None = None  # see load_embedder

    def __init__(
        self,
        embedding_size: int,
        about: Mapping[str, Any],
        device: torch.device,
        mirror: bool,
        batch_size: int,
        range: Sequence[float] | None = None,
        channels: str = "rgb",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image, got {batch_size}")
        self.embedding_size, self.about = embedding_size, dict(about)
        low, high = (-1.0, 1.0) if range is None else map(float, range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"range must be two numbers, the lowest first, got {range}")
        if channels not in ("rgb", "bgr"):
            raise ValueError(f"channels must be rgb or bgr, got {channels}")
        self.device, self.mirror, self.batch_size = device, mirror, batch_size
        self.range, self.channels = (low, high), channels
        # On a processor one forward of 2N images takes up to 1.8 times as long as two of N.
        self.mirrors_at_once = device.type == "cuda"

    def __call__(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, D) float32, on the CPU, of aligned faces.

        Args:
            images: (N, 3, 112, 112) uint8 RGB in [0, 255]; anything :func:`torch.as_tensor` takes.

        Raises:
            ValueError: images of another shape or dtype.
        """
        return F.normalize(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The embeddings before normalisation, whose length tells of an image's quality; with
        ``mirror`` the sum over the image and its mirror image. See :meth:`__call__`."""
        try:
            images = torch.as_tensor(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"images must be a tensor or array, got {type(images)}") from error
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
            raise ValueError(
                f"images must be uint8 (N, 3, 112, 112), RGB, got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        features = torch.empty(len(images), self.embedding_size, device=self.device)
        if not len(images):
            return features.cpu()
        at_once = self.batch_size * (2 if self.mirror and self.mirrors_at_once else 1)
        batches = (rows.split(self.batch_size) for rows in (images, features))
        for batch, out in zip(*batches, strict=True):
            if self.device.type == "cuda" and batch.device.type == "cpu":
                batch = batch.pin_memory()
            batch = batch.to(self.device, non_blocking=True)
            if self.channels == "bgr":
                batch = batch.flip(1)
            if self.mirror:
                batch = torch.cat([batch, batch.flip(-1)])
            rows = torch.cat([self._forward(part).float() for part in batch.split(at_once)])
            out.copy_(rows[: len(out)] + rows[len(out) :] if self.mirror else rows)
        return features.cpu()  # waits for the device, once

    def _floats(self, images: Tensor) -> Tensor:
        """Images uint8 as float32 in the network's range."""
        low, high = self.range
        pixels = normalise(images)
        return pixels if self.range == (-1.0, 1.0) else (pixels + 1) * ((high - low) / 2) + low

    @abstractmethod
    def _forward(self, images: Tensor) -> Tensor:
        """Embeddings (n, D) of images uint8, both on ``device``, at most ``batch_size`` of them, or
        twice as many where an image and its mirror image go at once."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """What two embedders share only if they embed alike, as far as their weights tell."""


def load_embedder(
    path: str | Path,
    network: str | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    mirror: bool = False,
    batch_size: int = 128,
    range: Sequence[float] | None = None,
    channels: str = "rgb",
    precision: str | None = None,
) -> Embedder:
    """Load a trained model as a function from images to unit embeddings.

    Args:
        path: a checkpoint of ``train.py``, or what ``recipes/export.py`` writes: ``.onnx``,
            ``.safetensors``, InsightFace's ``backbone.pth``; also an ONNX from elsewhere, or any
            state_dict that :func:`fastface_lightning.backbones.load_weights` reads.
        network: its timm name, or all that
            :func:`fastface_lightning.backbones.build_backbone` takes. None is what the file says;
            of bare weights an IResNet or MobileFaceNet is known by its keys and shapes.
        device: where to embed; None is the GPU if there is one.
        mirror: add the mirror image's embedding, as the accuracies in papers are measured; twice
            the work.
        batch_size: images embedded at once, and with them on a GPU their mirror images.
        range: lowest and highest value of a pixel that a model from elsewhere wants; None is
            [-1, 1], as here and at InsightFace's, but [0, 255] for an ONNX that normalises by
            itself.
        channels: ``rgb``, or ``bgr`` for a model that was trained on such images, as AdaFace's.
        precision: None is float32, as accuracies are reported; ``bf16`` and ``fp16`` run a network
            of weights by autocast, channels last, for speed on a GPU; one without bfloat16 takes
            float16. Embeddings are float32 all the same.

    Returns:
        A function from images (N, 3, 112, 112) uint8 RGB to embeddings (N, D) float32 of length 1,
        on the CPU; its ``about`` says what is known of the model.

    Raises:
        ValueError: no such file, one that holds something else, bare weights of an unknown
            network, or a precision for an ONNX, which has its own.

    Example:
        >>> embed = load_embedder("model.onnx")  # doctest: +SKIP
        >>> embed(torch.zeros(2, 3, 112, 112, dtype=torch.uint8)).shape  # doctest: +SKIP
        torch.Size([2, 512])
    """
    path = Path(path)
    if not path.is_file():
        inside = sorted(path.rglob("best.ckpt"))
        hint = f", such as {inside[0]}" if inside else ""
        raise ValueError(f"a model must be a file{hint}, got {path}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device must be one that torch can use here, got {device}") from error
    if path.suffix.lower() == ".onnx":
        if precision is not None:
            raise ValueError(f"precision must be null for an ONNX, got {precision} for {path}")
        from .onnx_embedder import OnnxEmbedder

        return OnnxEmbedder(path, device, mirror, batch_size, range, channels)
    from .torch_embedder import load_torch_embedder  # which takes timm, and seconds

    given = (device, mirror, batch_size, range, channels)
    return load_torch_embedder(path, network, *given, precision=precision)
