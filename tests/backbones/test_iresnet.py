"""IResNet holds InsightFace's layout, the block's equation and its initialisation."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastface_lightning.backbones import IResNet

BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def insightface_shapes(blocks: tuple[int, ...], embedding_size: int) -> dict[str, tuple[int, ...]]:
    """Every key of InsightFace's state_dict with its shape, written out from the layout."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for key in NORM:
            shapes[f"{name}.{key}"] = () if key == "num_batches_tracked" else (channels,)

    shapes["conv1.weight"] = (64, 3, 3, 3)
    norm("bn1", 64)
    shapes["prelu.weight"] = (64,)
    inside = 64
    for stage, (count, planes) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for index in range(count):
            block = f"layer{stage}.{index}"
            norm(f"{block}.bn1", inside)
            shapes[f"{block}.conv1.weight"] = (planes, inside, 3, 3)
            norm(f"{block}.bn2", planes)
            shapes[f"{block}.prelu.weight"] = (planes,)
            shapes[f"{block}.conv2.weight"] = (planes, planes, 3, 3)
            norm(f"{block}.bn3", planes)
            if index == 0:
                shapes[f"{block}.downsample.0.weight"] = (planes, inside, 1, 1)
                norm(f"{block}.downsample.1", planes)
            inside = planes
    norm("bn2", 512)
    shapes["fc.weight"] = (embedding_size, 512 * 7 * 7)
    shapes["fc.bias"] = (embedding_size,)
    norm("features", embedding_size)
    return shapes


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dict_has_insightface_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=256)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == insightface_shapes(BLOCKS[name], 256)


def plain_block(x: Tensor, p: dict[str, Tensor], stride: int) -> Tensor:
    """The block transcribed: BN, 3x3, BN, PReLU, 3x3 with the stride, BN, plus the shortcut."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        scale = p[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]

    y = norm(F.conv2d(norm(x, "bn1"), p["conv1.weight"], padding=1), "bn2")
    y = torch.where(y > 0, y, p["prelu.weight"][:, None, None] * y)
    y = norm(F.conv2d(y, p["conv2.weight"], stride=stride, padding=1), "bn3")
    if "downsample.0.weight" not in p:
        return y + x
    return y + norm(F.conv2d(x, p["downsample.0.weight"], stride=stride), "downsample.1")


@pytest.mark.parametrize("index", [0, 1])
def test_block_equals_its_equation(index: int) -> None:
    torch.manual_seed(0)
    model = IResNet((2, 1, 1, 1), width=16, num_classes=8).double().eval()
    block = model.layer1[index]
    with torch.no_grad():
        for value in block.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    expected = plain_block(x, block.state_dict(), stride=2 - index)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_initialisation() -> None:
    """Convolutions start N(0, 0.1), batch norms at 1 and 0, PReLU at 0.25."""
    torch.manual_seed(0)
    model = timm.create_model("iresnet_tiny")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.mean().item() == pytest.approx(0, abs=3e-3)
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.03)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)
        if isinstance(module, nn.PReLU):
            assert torch.all(module.weight == 0.25)


def test_the_last_norms_weight_stays_one_and_all_else_learns() -> None:
    torch.manual_seed(0)
    model = timm.create_model("iresnet_tiny", num_classes=8)
    (model(torch.randn(4, 3, 112, 112)) * torch.randn(4, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["features.weight"]
    assert torch.all(model.features.weight == 1)


def test_other_sizes_and_channels_are_built_on_request() -> None:
    model = IResNet((1, 1, 1, 1), 16, num_classes=8, in_chans=1, img_size=(112, 96)).eval()
    assert model(torch.zeros(1, 1, 112, 96)).shape == (1, 8)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("layers", (1, 1, 0, 1), "layers"),
        ("stem_stride", 3, "stem_stride"),
        ("num_classes", -1, "embedding_size"),
        ("img_size", 100, "img_size"),
    ],
)
def test_refuses_an_argument_out_of_range(name: str, value: object, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} must .* got {re.escape(str(value))}"):
        IResNet(**{"layers": (1, 1, 1, 1), "width": 16, name: value})
