"""load_weights fills a backbone from a file whole, or says in one sentence why it cannot."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastface_lightning.backbones import build_backbone, load_weights

State = dict[str, Tensor]


def trained(name: str, embedding_size: int = 8) -> nn.Module:
    """A backbone whose every number is its own, statistics and counts too."""
    torch.manual_seed(0)
    model = build_backbone(name, embedding_size)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.uniform_(0.5, 1.5) if value.is_floating_point() else value.fill_(7)
    return model


def assert_equal(state: State, expected: State) -> None:
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def save(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return build_backbone("iresnet_tiny", 8)


def refused(model: nn.Module, file: Path, message: str) -> None:
    """The error is one line, and the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(model, file)
    assert "\n" not in str(raised.value) and file.name in str(raised.value)
    assert_equal(model.state_dict(), before)


LARGE = ("iresnet34", "iresnet50", "iresnet100", "iresnet200", "mobilefacenet_large")


@pytest.mark.parametrize(
    "name",
    [
        *("iresnet_tiny", "iresnet18", "mobilefacenet", "test_resnet", "test_vit"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE),
    ],
)
def test_a_state_dict_round_trips(name: str, tmp_path: Path) -> None:
    source = trained(name)
    file = save(source.state_dict(), tmp_path / "backbone.pth")
    torch.manual_seed(1)
    model = build_backbone(name, 8)
    load_weights(model, file)
    file.unlink()
    assert_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.", "net."])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_prefixes_of_wrappers_are_dropped(
    prefix: str, checkpoint: bool, model: nn.Module, tmp_path: Path
) -> None:
    source = trained("iresnet_tiny").state_dict()
    if checkpoint:
        weights = {f"backbone.{prefix}{key}": value for key, value in source.items()}
        content = {"state_dict": weights | {"classifier.weight": torch.ones(3, 8)}, "epoch": 1}
    else:
        content = {f"{prefix}{key}": value for key, value in source.items()}
    load_weights(model, save(content, tmp_path / "model.pt"))
    assert_equal(model.state_dict(), source)


def test_a_checkpoint_of_arcface_torch_gives_its_backbone(model: nn.Module, tmp_path: Path) -> None:
    source = trained("iresnet_tiny").state_dict()
    content = {"epoch": 1, "global_step": 2, "state_dict_backbone": source}
    content |= {"state_dict_softmax_fc": {"weight": torch.ones(3, 8)}, "state_optimizer": {}}
    load_weights(model, save(content, tmp_path / "checkpoint_gpu_0.pt"))
    assert_equal(model.state_dict(), source)


@pytest.mark.parametrize("name", ["iresnet_tiny", "test_resnet"])
def test_a_checkpoint_gives_its_backbone(name: str, tmp_path: Path) -> None:
    source = trained(name)
    whole = nn.ModuleDict({"backbone": source, "classifier": nn.Linear(8, 3)})
    content = {"state_dict": whole.state_dict(), "optimizer_states": [{"lr": 0.1}], "loops": {}}
    model = build_backbone(name, 8)
    load_weights(model, save(content, tmp_path / "last.ckpt"))
    assert_equal(model.state_dict(), source.state_dict())


def test_files_of_torch_before_1_6_are_read(model: nn.Module, tmp_path: Path) -> None:
    source = trained("iresnet_tiny").state_dict()
    torch.save(source, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert_equal(model.state_dict(), source)


def test_old_files_without_counts_of_batches_are_read(model: nn.Module, tmp_path: Path) -> None:
    source = trained("iresnet_tiny").state_dict()
    weights = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    load_weights(model, save(weights, tmp_path / "old.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights.get(key, torch.tensor(0))), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_take_the_models_dtype_and_format(
    dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    weights = trained("iresnet_tiny").to(dtype).state_dict()
    model.to(memory_format=torch.channels_last)
    load_weights(model, save(weights, tmp_path / "half.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype)), key
    assert model.conv1.weight.dtype == torch.float32
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def drop(*keys: str) -> Callable[[State], None]:
    def change(weights: State) -> None:
        for key in keys:
            del weights[key]

    return change


def put(**values: Tensor) -> Callable[[State], None]:
    def change(weights: State) -> None:
        weights.update({key.replace("__", "."): value for key, value in values.items()})

    return change


FITS = "^weights must match iresnet_tiny, got "


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (drop("fc.weight", "bn2.bias"), r"2 missing \(bn2.bias, fc.weight\) in "),
        (put(other__weight=torch.ones(2)), r"1 unexpected \(other.weight\) in "),
        (
            put(fc__weight=torch.ones(4, 2048)),
            r"1 mis-shaped \(fc.weight \(4, 2048\) for \(8, 2048\)\) in ",
        ),
        (
            put(fc__bias=torch.ones(8, dtype=torch.int8)),
            r"1 mistyped \(fc.bias torch.int8 for torch.float32\) in ",
        ),
    ],
)
def test_every_key_that_does_not_fit_is_named(
    change: Callable[[State], None], fault: str, model: nn.Module, tmp_path: Path
) -> None:
    weights = trained("iresnet_tiny").state_dict()
    change(weights)
    refused(model, save(weights, tmp_path / "b.pth"), FITS + fault)


def test_another_architecture_is_told_by_counts(model: nn.Module, tmp_path: Path) -> None:
    other = trained("test_resnet").state_dict()
    file = save(other, tmp_path / "other.pth")
    expected = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    counts = rf"{len(expected)} missing .*, \.\.\.\), {len(other)} unexpected"
    refused(model, file, FITS + counts)


@pytest.mark.parametrize(
    ("key", "value", "dtype"),
    [
        ("layer2.0.conv1.weight", float("nan"), torch.float32),
        ("features.running_var", float("inf"), torch.float16),
        ("fc.bias", 1e300, torch.float64),  # infinite in the model's float32
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    key: str, value: float, dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    weights = trained("iresnet_tiny").to(dtype).state_dict()
    weights[key].view(-1)[-1] = value
    printed = "nan" if value != value else "inf"
    refused(model, save(weights, tmp_path / "b.pth"), f"finite, got {printed} in {key} of ")


RULE = "^weights must be a state_dict or a checkpoint, got .*, which "


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (nn.Linear(2, 2), "also holds torch.nn.modules.linear.Linear$"),
        ([torch.ones(2)], "type list$"),
        ({}, "no tensors$"),
        ({"weights": {"a": torch.ones(1)}}, "type dict under 'weights'$"),
        ({"state_dict": {"net.weight": torch.ones(1)}}, r"without keys .* 'backbone\.'$"),
    ],
)
def test_other_contents_are_refused(
    content: object, fault: str, model: nn.Module, tmp_path: Path
) -> None:
    refused(model, save(content, tmp_path / "b.pth"), f"{RULE}.*{fault}")


def truncated(share: float, zipped: bool) -> bytes:
    """The first part of a file of weights, in torch's format of today or that before 1.6."""
    file = io.BytesIO()
    torch.save(trained("iresnet_tiny").state_dict(), file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()[: int(share * len(file.getvalue()))]


@pytest.mark.parametrize(
    "content",
    [
        *((share, zipped) for share in (0.5, 0.999) for zipped in (True, False)),
        *(b"", b"some text\n" * 9, b"PK\x03\x04"),
    ],
)
def test_a_damaged_file_or_another_format_is_refused(
    content: bytes | tuple[float, bool], model: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "b.pth"
    file.write_bytes(content if isinstance(content, bytes) else truncated(*content))
    refused(model, file, f"{RULE}is damaged")


def test_code_in_a_file_does_not_run(model: nn.Module, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    refused(model, save({"fc.weight": Harmful()}, tmp_path / "b.pth"), RULE)
    assert not (tmp_path / "ran").exists()
