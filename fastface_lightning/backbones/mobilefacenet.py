"""MobileFaceNet: inverted residuals and a learned global pooling, small enough for a phone.

The state_dict keys and shapes are InsightFace's, so its published weights load strictly.

References:
    Chen et al., MobileFaceNets, CCBR 2018, arXiv 1804.07573: table 1 and the global depthwise
    convolution. The widths are InsightFace's ``mbf`` and ``mbf_large``.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import FaceBackbone, create, face_cfg, in_full_precision


class ConvBlock(nn.Module):
    """Convolution, batch norm and PReLU: (N, in, H, W) to (N, out, H', W').

    Without the PReLU if ``linear``; ``conv`` holds further arguments of ``nn.Conv2d``: stride,
    padding, groups.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        linear: bool = False,
        **conv: Any,
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(in_channels, channels, kernel, bias=False, **conv)
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(channels))
        if not linear:
            self.layers.append(nn.PReLU(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DepthWise(nn.Module):
    r"""Inverted bottleneck: widen, filter every channel apart, narrow without an activation.

    .. math::
        y = \mathrm{BN}(W_3\, \phi(W_2 *_s \phi(W_1 x))) \; [+\, x], \qquad
        \phi = \mathrm{PReLU} \circ \mathrm{BN}

    :math:`W_1` (to ``groups`` channels) and :math:`W_3` are 1x1, :math:`*_s` is a depthwise 3x3
    convolution of stride :math:`s`; :math:`x` is added where ``residual``.

    Shape: (N, in_channels, H, W) to (N, channels, H/stride, W/stride).
    """

    def __init__(
        self, in_channels: int, channels: int, groups: int, stride: int = 2, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBlock(in_channels, groups),
            ConvBlock(groups, groups, kernel=3, stride=stride, padding=1, groups=groups),
            ConvBlock(groups, channels, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class Residual(nn.Module):
    """A run of DepthWise blocks of stride 1, each around an identity: the shape stays."""

    def __init__(self, channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(DepthWise(channels, channels, groups, stride=1, residual=True) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GDC(nn.Module):
    """Global depthwise convolution: a learned weight for every position of every channel, in place
    of an average, then a linear layer and a batch norm.

    Shape: (N, channels, H, W) maps of exactly ``map_size`` to (N, embedding_size), or to
    (N, channels) where ``embedding_size`` is 0.
    """

    def __init__(self, channels: int, map_size: tuple[int, int], embedding_size: int) -> None:
        super().__init__()
        pool = ConvBlock(channels, channels, map_size, linear=True, groups=channels)
        self.layers = nn.Sequential(pool, nn.Flatten())
        if embedding_size:
            self.layers.append(nn.Linear(channels, embedding_size, bias=False))
            self.layers.append(nn.BatchNorm1d(embedding_size))

    @property
    def pool(self) -> nn.Sequential:
        """The part before the linear layer: maps to (N, channels)."""
        return self.layers[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(FaceBackbone):
    """A strided stem, three strided DepthWise blocks with residual runs between, and a GDC head.

    Args:
        blocks: blocks in each of the four runs; a first run of one is a plain grouped convolution.
        scale: k, widths of 64k and 128k channels outside the bottlenecks.
        num_classes, in_chans, img_size, drop_rate: as :class:`FaceBackbone`; without a head it
            gives the 512 pooled features.

    Shape: float RGB (N, 3, 112, 112) in [-1, 1] to embeddings (N, D), float32 under autocast.
    """

    num_features = 512
    head_hidden_size = 512
    features: GDC

    def __init__(
        self,
        blocks: Sequence[int] = (1, 4, 6, 2),
        scale: int = 2,
        num_classes: int = 512,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 112,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, drop_rate)
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must hold four block counts of at least 1, got {blocks}")
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        narrow, wide = 64 * scale, 128 * scale
        first = (
            ConvBlock(narrow, narrow, 3, padding=1, groups=64)
            if blocks[0] == 1
            else Residual(narrow, blocks[0], groups=128)
        )
        self.layers = nn.ModuleList(
            [
                ConvBlock(in_chans, narrow, 3, stride=2, padding=1),
                first,
                DepthWise(narrow, narrow, groups=128),
                Residual(narrow, blocks[1], groups=128),
                DepthWise(narrow, wide, groups=256),
                Residual(wide, blocks[2], groups=256),
                DepthWise(wide, wide, groups=512),
                Residual(wide, blocks[3], groups=256),
            ]
        )
        self.conv_sep = ConvBlock(wide, self.num_features)
        self.dropout = nn.Dropout(drop_rate)
        self.features = GDC(self.num_features, self.map_size, num_classes)
        self.apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's: parameters by their layers, of which each run of blocks is one."""
        return {"stem": r"^layers\.0\.", "blocks": r"^layers\.(\d+)\.", "last": r"^conv_sep\."}

    def reset_classifier(self, num_classes: int) -> None:
        pool = self.features.pool
        self.num_classes = num_classes
        self.features = GDC(self.num_features, self.map_size, num_classes).apply(_init_weights)
        self.features.pool.load_state_dict(pool.state_dict())

    def get_classifier(self) -> nn.Module:
        return self.features.layers[2] if self.num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        x = images
        for layer in self.layers:
            x = self.run(layer, x)
        return self.conv_sep(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        head = self.features.pool if pre_logits else self.features
        return in_full_precision(head, self.dropout(features))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


NAMES = ("mobilefacenet", "mobilefacenet_large")
default_cfgs = generate_default_cfgs(
    {name: face_cfg("layers.0.layers.0", "features.layers.2") for name in NAMES}
)


@register_model
def mobilefacenet(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """MobileFaceNet, InsightFace's ``mbf``: 2.1 M parameters at D = 512."""
    return create(
        MobileFaceNet, "mobilefacenet", pretrained, blocks=(1, 4, 6, 2), scale=2, **kwargs
    )


@register_model
def mobilefacenet_large(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """Twice the width and depth, InsightFace's ``mbf_large``: 6.3 M parameters at D = 512."""
    return create(
        MobileFaceNet, "mobilefacenet_large", pretrained, blocks=(2, 8, 12, 4), scale=4, **kwargs
    )
