"""A face backbone in timm's terms: a fixed image size, features, a head, and checkpointing."""

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .checkpointing import count_once
from .freeze import Freezable

BackboneT = TypeVar("BackboneT", bound="FaceBackbone")


class FaceBackbone(Freezable, ABC):
    """Aligned face images to embeddings, :math:`z = h(f(x))`.

    :math:`f` is ``forward_features``, (N, C, H, W) to (N, ``num_features``, *``map_size``);
    :math:`h` is ``forward_head``, maps to embeddings (N, D), computed in the head's own dtype even
    under autocast, since half precision is too coarse for cosines. ``num_classes`` is timm's word
    for the width of the last layer: here the embedding size D.

    A subclass defines what is abstract here, runs its stages by ``run``, and names
    ``features`` the end of its head, where batch norms see one vector an image.

    Args:
        num_classes: embedding size D; 0 leaves the head out and gives the flattened features.
        in_chans: channels of an image, 3 for RGB.
        img_size: pixels, one number or (height, width), multiples of 16. The head holds one weight
            for every position of the final map, so it serves no other size.
        drop_rate: probability of dropping an element of the final map, in [0, 1).

    Raises:
        ValueError: an argument out of its range, images that do not fit, or a training batch of one
            while the head's batch norms train.
    """

    num_features: int
    features: nn.Module

    def __init__(
        self, num_classes: int, in_chans: int, img_size: int | tuple[int, int], drop_rate: float
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if min(height, width) < 16 or height % 16 or width % 16:
            raise ValueError(f"img_size must be a multiple of 16 pixels, got {img_size}")
        check_head(num_classes, drop_rate, minimum=0)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.map_size = (height // 16, width // 16)
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Float images (N, C, H, W) in [-1, 1] to embeddings (N, D), not normalised."""
        check_batch(images, self.features)
        return self.forward_head(self.forward_features(images))

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Float images (N, C, H, W) in [-1, 1] to the final map (N, num_features, *map_size)."""

    @abstractmethod
    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The final map to embeddings (N, D), or with ``pre_logits`` to the last layer's input."""

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """Start a new last layer of embedding size ``num_classes``; 0 for none."""

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """The layer whose output width is the embedding size."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in backward, trading about a third more time for memory."""
        self.grad_checkpointing = enable

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """``stage(x)``, recomputed in backward when checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            count_once(stage)
            return checkpoint(stage, x, use_reentrant=False)
        return stage(x)

    def check_images(self, images: Tensor) -> None:
        expected = (self.in_chans, *self.img_size)
        if images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [-1, 1], each {expected}, "
                f"got {images.dtype} {tuple(images.shape)}"
            )


def check_head(embedding_size: int, dropout: float, minimum: int = 1) -> None:
    """Refuse an embedding size or a dropout out of its range."""
    if embedding_size < minimum:
        raise ValueError(f"embedding_size must be at least {minimum}, got {embedding_size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def check_batch(images: Tensor, head: nn.Module) -> None:
    """Refuse a training batch of one image, which has no variance for a batch norm of the head."""
    # A SyncBatchNorm, which sees the images of every process, has its own check.
    norms = (m for m in head.modules() if isinstance(m, _BatchNorm) and m.training)
    if images.shape[0] < 2 and any(not isinstance(m, nn.SyncBatchNorm) for m in norms):
        raise ValueError(f"a training batch must hold at least 2 images, got {len(images)}")


def architecture(model: nn.Module) -> str:
    """What a message calls a model: its name in timm, or its class outside of timm."""
    network: Any = getattr(model, "trunk", model)
    cfg = getattr(network, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(network).__name__


def create(cls: type[BackboneT], name: str, pretrained: bool, **kwargs: Any) -> BackboneT:
    """Build a registered backbone as timm does, refusing weights that nobody hosts for timm."""
    if pretrained:
        raise ValueError(f"pretrained must be false for {name}, which has none")
    return build_model_with_cfg(cls, name, pretrained=False, **kwargs)


def face_cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    """timm's default_cfg of a model for aligned faces: 112x112 RGB scaled to [-1, 1]."""
    return {
        "input_size": (3, 112, 112),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "num_classes": 512,
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": first_conv,
        "classifier": classifier,
    }


def embedding_norm(embedding_size: int) -> nn.BatchNorm1d:
    """BatchNorm1d whose weight stays 1: a coordinate cannot be scaled up to dominate the cosine."""
    norm = nn.BatchNorm1d(embedding_size)
    norm.weight.requires_grad_(False)
    return norm


def in_full_precision(head: nn.Module, x: Tensor) -> Tensor:
    """``head(x)`` in the dtype of its parameters, autocast or not: float32 for a float32 model."""
    x = x.to(next(head.parameters()).dtype)
    device = x.device.type
    # The meta device has no autocast to ask about or to switch off.
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return head(x)
    with torch.autocast(device, enabled=False):
        return head(x)
