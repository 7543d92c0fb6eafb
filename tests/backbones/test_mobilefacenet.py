"""MobileFaceNet holds InsightFace's layout, the block's equation and its initialisation."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastface_lightning.backbones import MobileFaceNet
from fastface_lightning.backbones.mobilefacenet import DepthWise


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=256)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def depthwise(prefix: str, inside: int, outside: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Convolution weights of one DepthWise block."""
    return {
        f"{prefix}.layers.0.layers.0.weight": (groups, inside, 1, 1),
        f"{prefix}.layers.1.layers.0.weight": (groups, 1, 3, 3),
        f"{prefix}.layers.2.layers.0.weight": (outside, groups, 1, 1),
    }


@pytest.mark.parametrize(
    ("name", "blocks", "k"),
    [("mobilefacenet", (1, 4, 6, 2), 2), ("mobilefacenet_large", (2, 8, 12, 4), 4)],
)
def test_convolutions_have_insightface_keys_and_shapes(
    name: str, blocks: tuple[int, ...], k: int
) -> None:
    narrow, wide = 64 * k, 128 * k
    expected = {"layers.0.layers.0.weight": (narrow, 3, 3, 3)}
    if blocks[0] == 1:
        expected["layers.1.layers.0.weight"] = (narrow, narrow // 64, 3, 3)
    runs = [(1, narrow, 128), (3, narrow, 128), (5, wide, 256), (7, wide, 256)]
    for (index, channels, groups), count in zip(runs, blocks, strict=True):
        if index == 1 and count == 1:
            continue
        for i in range(count):
            expected |= depthwise(f"layers.{index}.layers.{i}", channels, channels, groups)
    expected |= depthwise("layers.2", narrow, narrow, 128)
    expected |= depthwise("layers.4", narrow, wide, 256)
    expected |= depthwise("layers.6", wide, wide, 512)
    expected["conv_sep.layers.0.weight"] = (512, wide, 1, 1)
    expected["features.layers.0.layers.0.weight"] = (512, 1, 7, 7)
    got = {key: shape for key, shape in shapes(name).items() if len(shape) == 4}
    assert got == expected


def test_small_parts_have_insightface_keys() -> None:
    by_key = shapes("mobilefacenet")
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {
        "layers.1.layers.0.weight",
        *(f"layers.1.layers.1.{key}" for key in norm),
        "layers.1.layers.2.weight",
        "layers.2.layers.2.layers.0.weight",
        *(f"layers.2.layers.2.layers.1.{key}" for key in norm),
        "features.layers.0.layers.0.weight",
        *(f"features.layers.0.layers.1.{key}" for key in norm),
        "features.layers.2.weight",
        *(f"features.layers.3.{key}" for key in norm),
    }
    parts = ("layers.1.", "layers.2.layers.2.", "features.")
    assert {key for key in by_key if key.startswith(parts)} == expected
    assert by_key["features.layers.2.weight"] == (256, 512)


def plain_depthwise(x: Tensor, p: dict[str, Tensor], stride: int) -> Tensor:
    """1x1, depthwise 3x3, 1x1, each with its batch norm, PReLU after the first two."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        scale = p[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]

    def prelu(x: Tensor, slope: Tensor) -> Tensor:
        return torch.where(x > 0, x, slope[:, None, None] * x)

    y = norm(F.conv2d(x, p["layers.0.layers.0.weight"]), "layers.0.layers.1")
    y = prelu(y, p["layers.0.layers.2.weight"])
    filters = p["layers.1.layers.0.weight"]
    y = F.conv2d(y, filters, stride=stride, padding=1, groups=len(filters))
    y = prelu(norm(y, "layers.1.layers.1"), p["layers.1.layers.2.weight"])
    return norm(F.conv2d(y, p["layers.2.layers.0.weight"]), "layers.2.layers.1")


@pytest.mark.parametrize(("stride", "residual"), [(2, False), (1, True)])
def test_depthwise_block_equals_its_equation(stride: int, residual: bool) -> None:
    torch.manual_seed(0)
    block = DepthWise(6, 6, groups=10, stride=stride, residual=residual).double().eval()
    with torch.no_grad():
        for value in block.state_dict().values():
            if value.is_floating_point():
                value.uniform_(-0.5, 1.5).abs_()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = plain_depthwise(x, block.state_dict(), stride) + (x if residual else 0)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_initialisation_is_kaiming_over_outputs() -> None:
    """std = sqrt(2 / fan_out), where fan_out is outputs times kernel area, and 1 is the norm's."""
    torch.manual_seed(0)
    for module in timm.create_model("mobilefacenet").modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 10_000:
            fan_out = len(module.weight) * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)


def test_other_sizes_are_built_on_request() -> None:
    model = MobileFaceNet(num_classes=8, img_size=(112, 96)).eval()
    assert model(torch.zeros(1, 3, 112, 96)).shape == (1, 8)
    assert model.features.layers[0].layers[0].weight.shape == (512, 1, 7, 6)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("blocks", (1, 4, 6), "blocks"),
        ("scale", 0, "scale"),
        ("drop_rate", -0.1, "dropout"),
    ],
)
def test_refuses_an_argument_out_of_range(name: str, value: object, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} must .* got {re.escape(str(value))}"):
        MobileFaceNet(**{name: value})
