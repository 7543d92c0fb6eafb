"""Any backbone by its timm name, ending in an embedding: images (N, 3, 112, 112) in, (N, D) out."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Any

import timm
import torch
from timm.models import parse_model_name, resolve_model_input_args
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from ..files import reason
from ..preprocessing import IMAGE_SHAPE
from .base import (
    FaceBackbone,
    architecture,
    check_batch,
    check_head,
    embedding_norm,
    in_full_precision,
)
from .checkpointing import count_once
from .freeze import Freezable


class EmbeddingNeck(nn.Sequential):
    """BN-dropout-FC-BN: pooled features (N, F) to embeddings (N, D), the last weight fixed at 1.

    Reference: Deng et al., ArcFace, CVPR 2019, arXiv 1801.07698: its head, on pooled features.
    """

    def __init__(self, num_features: int, embedding_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(num_features, embedding_size)
        self.features = embedding_norm(embedding_size)


class TimmEmbedder(Freezable):
    """A timm model without its classifier, and a neck that turns its features into an embedding.

    Shape: float RGB (N, 3, 112, 112) in [-1, 1] to embeddings (N, D), not normalised, float32 under
    autocast.

    Raises:
        ValueError: a training batch of one image, as long as the neck's batch norms train.
    """

    def __init__(self, trunk: Any, neck: EmbeddingNeck) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = neck
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        check_batch(images, self.neck)
        if self.grad_checkpointing:
            count_once(self.trunk)
        return in_full_precision(self.neck, self.trunk(images))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """timm's: from a parameter's name to the number of its layer; the neck is the last one.

        Raises:
            ValueError: timm does not know the layers of this network.
        """
        if not hasattr(self.trunk, "group_matcher"):
            raise ValueError(f"layer_decay must be null for {architecture(self)}: no group_matcher")
        matcher = self.trunk.group_matcher(coarse=coarse)
        named = ((name.removeprefix("trunk."), p) for name, p in self.named_parameters())
        layers = group_with_matcher(named, matcher, reverse=True)
        return lambda name: layers[name.removeprefix("trunk.")]

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that timm keeps from a weight decay."""
        names: set[str] = getattr(self.trunk, "no_weight_decay", set)()
        return {f"trunk.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's stages in backward as timm does it, but count each batch once."""
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:  # how timm says that it cannot
            raise ValueError(
                f"grad_checkpointing must be false for {architecture(self)}"
            ) from error
        self.grad_checkpointing = enable


def build_backbone(
    name: str,
    embedding_size: int = 512,
    pretrained: bool = False,
    dropout: float = 0.0,
    channels_last: bool = False,
    compile: bool = False,
    grad_checkpointing: bool = False,
    freeze: str | Iterable[str] | None = None,
    architecture: Mapping[str, Any] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build a backbone that maps aligned faces to embeddings.

    IResNet and MobileFaceNet end in their own head. Every other timm model gives its pooled
    features to an :class:`EmbeddingNeck`. A model whose image size is fixed is built for 112.

    Args:
        name: a name of ``timm.list_models()``, such as ``iresnet100`` or ``convnext_tiny``; or
            ``hf_hub:OWNER/NAME`` of the Hugging Face Hub, or ``local-dir:PATH`` of such a folder.
        embedding_size: D, at least 1.
        pretrained: start from the weights that timm, the hub or the folder has for ``name``.
        dropout: probability of dropping a feature before the last linear layer, in [0, 1).
        channels_last: store the weights in NHWC order, faster on tensor cores and on processors.
        compile: compile the network by ``torch.compile`` at its first forward. In place: the
            state_dict keeps its keys, so checkpoints load with and without.
        grad_checkpointing: recompute each stage in backward, trading about a third more time for
            memory.
        freeze: parts that stay as they are: no gradient for their parameters, batch norms keep
            their statistics, dropout is off. Submodules or parameters by their names in the
            state_dict: ``layer1``, and within any other timm model ``trunk.stem``; ``all`` is the
            whole backbone.
        architecture: what a ``name`` of the hub or of a folder stands for, as a network built from
            one has it in its ``architecture``; unless ``pretrained``, nothing is looked up then.
        timm_kwargs: passed to ``timm.create_model``, such as ``drop_path_rate``.

    Returns:
        A module from float RGB (N, 3, 112, 112) in [-1, 1] to embeddings (N, D), not normalised. In
        training it takes two images or more, as batch norms do.

    Raises:
        ValueError: an argument out of its range, an unknown name or part, settings or weights that
            cannot be had, a model that does not map 112x112 images to one vector each, or that
            cannot checkpoint its gradients.

    Example:
        >>> model = build_backbone("iresnet18", embedding_size=256, freeze=["conv1", "bn1"]).eval()
        >>> model(torch.zeros(2, 3, 112, 112)).shape
        torch.Size([2, 256])
    """
    check_head(embedding_size, dropout)
    switches = {
        "channels_last": channels_last,
        "compile": compile,
        "grad_checkpointing": grad_checkpointing,
    }
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
    elsewhere = parse_model_name(name)[0] is not None
    if architecture is not None and not elsewhere:
        raise ValueError(f"architecture must be null for a name of timm's own, got {name}")
    try:
        known: dict[str, Any] = {"name": name, **(architecture or {})}
        weights: dict[str, Any] = {}
        if elsewhere and (pretrained or architecture is None):
            known, weights = _look_up(name)
        given = {**known, **(weights if pretrained else {}), **timm_kwargs}
        name_in_timm = given.pop("name")
        model: Any = _create(name_in_timm, embedding_size, pretrained, dropout, given)
    except (OSError, RuntimeError, LookupError) as error:  # of the hub, a folder, timm
        if not (elsewhere or pretrained):
            raise
        raise ValueError(
            f"name must be of a model whose settings and weights can be had, got {name} with "
            f"pretrained={pretrained}: {' '.join(reason(error).split())[:300]}"
        ) from error
    model.architecture = known if elsewhere else None
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    model.freeze(freeze or ())
    if compile:
        model.compile()
    return model


def _look_up(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a name of the hub or of a folder stands for: timm's name and arguments, for images of
    112x112; and what timm finds and converts the weights by."""
    found = resolve_model_input_args(name)
    weights = {key: found.pop(key, None) for key in ("pretrained_cfg", "pretrained_model_args")}
    known = {"name": found.pop("model_name"), **found}
    known.pop("num_classes", None)
    if "img_size" in known or weights["pretrained_cfg"]["fixed_input_size"]:
        known["img_size"] = list(IMAGE_SHAPE[1:])
    return known, weights


def _create(
    name: str, embedding_size: int, pretrained: bool, dropout: float, timm_kwargs: dict[str, Any]
) -> FaceBackbone | TimmEmbedder:
    """The network as timm builds it, behind a neck where it has no face head of its own."""
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=5)
        hint = f", did you mean one of {', '.join(near)}?" if near else ""
        raise ValueError(f"name must be a model timm lists, got {name!r}{hint}")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        timm_kwargs.setdefault("img_size", IMAGE_SHAPE[1:])

    if timm.models.is_model_in_modules(name, {"iresnet", "mobilefacenet"}):
        timm_kwargs.update(num_classes=embedding_size, drop_rate=dropout)
        model = timm.create_model(name, pretrained=pretrained, **timm_kwargs)
        assert isinstance(model, FaceBackbone)
        _output_size(model, name)
        return model
    try:
        trunk = timm.create_model(name, pretrained=pretrained, num_classes=0, **timm_kwargs)
    except (AssertionError, IndexError) as error:  # how some models meet a small img_size
        fault = _first_line(error)
        raise ValueError(f"{name} cannot be built for 3x112x112 images: {fault}") from error
    num_features = _output_size(trunk, name)
    return TimmEmbedder(trunk, EmbeddingNeck(num_features, embedding_size, dropout))


def _output_size(model: nn.Module, name: str) -> int:
    """Length of the vector the model gives for an image, by a forward."""
    parameter = next(chain(model.parameters(), model.buffers()))
    images = torch.zeros(2, *IMAGE_SHAPE, device=parameter.device)
    training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except Exception as error:  # a model's code may fail on a strange size in any way
        fault = _first_line(error)
        raise ValueError(f"{name} cannot take 3x112x112 images: {fault}") from error
    finally:
        model.train(training)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        raise ValueError(f"{name} must give one feature vector an image")
    return output.shape[1]


def _first_line(error: Exception) -> str:
    return reason(error).splitlines()[0]
