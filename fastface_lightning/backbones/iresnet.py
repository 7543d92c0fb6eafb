"""IResNet: the residual network face recognition is trained with, under InsightFace's names.

The state_dict keys and shapes are InsightFace's, so its published weights load strictly::

    load_weights(build_backbone("iresnet100"), "backbone.pth")

References:
    Deng et al., ArcFace, CVPR 2019, arXiv 1801.07698, section 3.1: the block (from pyramidal
    residual networks, arXiv 1610.02915) and the BN-dropout-FC-BN head.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import FaceBackbone, create, embedding_norm, face_cfg, in_full_precision


class IBasicBlock(nn.Module):
    r"""Two 3x3 convolutions between batch norms, with no activation after the sum.

    .. math::
        y = \mathrm{BN}_3(W_2 *_s \mathrm{PReLU}(\mathrm{BN}_2(W_1 * \mathrm{BN}_1(x)))) + S(x)

    :math:`*` is a 3x3 convolution with padding 1, :math:`*_s` the same at stride :math:`s`; the
    shortcut :math:`S` is the identity, or a 1x1 convolution of stride :math:`s` and a batch norm
    where the shape changes.

    Shape: (N, in_channels, H, W) to (N, channels, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(FaceBackbone):
    """A 3x3 stem at full resolution, four stages that each halve it, and a flattened linear head.

    Args:
        layers: blocks in each of the four stages; the first block of a stage has stride 2.
        width: channels of the stem and the first stage, each later stage doubling them; keep it a
            multiple of 16, which vector units want (torch 2.14's strided 1x1 convolution crashes in
            backward on processors with AVX-512 and channels_last otherwise).
        stem_stride: 1, or 2 to halve every map, which quarters the cost; the final map is then
            H/32 x W/32, rounded up, instead of H/16 x W/16.
        num_classes, in_chans, img_size, drop_rate: as :class:`FaceBackbone`.

    Shape: float RGB (N, 3, 112, 112) in [-1, 1] to embeddings (N, D), float32 under autocast.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int = 64,
        stem_stride: int = 1,
        num_classes: int = 512,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 112,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, drop_rate)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must hold four block counts of at least 1, got {layers}")
        if width < 1:
            raise ValueError(f"width must be at least 1 channel, got {width}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
        map_height, map_width = (-(-pixels // stem_stride) for pixels in self.map_size)
        self.map_size = (map_height, map_width)
        self.num_features = 8 * width
        self.head_hidden_size = self.num_features * map_height * map_width

        self.conv1 = nn.Conv2d(in_chans, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.layer1 = _stage(width, width, layers[0])
        self.layer2 = _stage(width, 2 * width, layers[1])
        self.layer3 = _stage(2 * width, 4 * width, layers[2])
        self.layer4 = _stage(4 * width, 8 * width, layers[3])
        self.bn2 = nn.BatchNorm2d(self.num_features)
        self.dropout = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's: parameters by their layers, a block each, or with ``coarse`` a stage each."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1|prelu)\.", "blocks": blocks}

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        self.features = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.head_hidden_size, num_classes)
            self.features = embedding_norm(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to the final map (N, 8 width, ...), its size ``map_size``."""
        self.check_images(images)
        x = self.prelu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self.run(block, x)
        return self.bn2(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(features).flatten(1)
        if pre_logits or not self.num_classes:
            return x
        return in_full_precision(self.features, in_full_precision(self.fc, x))


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = IBasicBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IBasicBlock(channels, channels) for _ in range(blocks - 1)))


NAMES = ("iresnet_tiny", *(f"iresnet{depth}" for depth in (18, 34, 50, 100, 200)))
default_cfgs = generate_default_cfgs({name: face_cfg("conv1", "fc") for name in NAMES})


@register_model
def iresnet_tiny(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """One block a stage on half-size maps, 16 to 128 channels: for processors and trials."""
    kwargs = {"width": 16, "stem_stride": 2} | kwargs
    return create(IResNet, "iresnet_tiny", pretrained, layers=(1, 1, 1, 1), **kwargs)


@register_model
def iresnet18(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """IResNet-18: 24.0 M parameters at D = 512."""
    return create(IResNet, "iresnet18", pretrained, layers=(2, 2, 2, 2), **kwargs)


@register_model
def iresnet34(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """IResNet-34: 34.1 M parameters at D = 512."""
    return create(IResNet, "iresnet34", pretrained, layers=(3, 4, 6, 3), **kwargs)


@register_model
def iresnet50(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """IResNet-50: 43.6 M parameters at D = 512."""
    return create(IResNet, "iresnet50", pretrained, layers=(3, 4, 14, 3), **kwargs)


@register_model
def iresnet100(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """IResNet-100: 65.2 M parameters at D = 512, the network of most published results."""
    return create(IResNet, "iresnet100", pretrained, layers=(3, 13, 30, 3), **kwargs)


@register_model
def iresnet200(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """IResNet-200: 118.8 M parameters at D = 512, twice the blocks of IResNet-100."""
    return create(IResNet, "iresnet200", pretrained, layers=(6, 26, 60, 6), **kwargs)
