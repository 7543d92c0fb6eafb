"""What every registered backbone holds, by timm's words: one test, each network."""

import pytest
import timm
import torch
from torch import Tensor, nn

import fastface_lightning.backbones  # noqa: F401  registers the names

LIGHT = ["iresnet_tiny", "mobilefacenet"]
LARGE = ("iresnet34", "iresnet50", "iresnet100", "iresnet200", "mobilefacenet_large")
ALL = [*LIGHT, "iresnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=LIGHT)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=16)


@pytest.mark.parametrize("name", ALL)
def test_is_listed_with_a_face_configuration(name: str) -> None:
    assert name in timm.list_models()
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == (3, 112, 112) and cfg.num_classes == 512
    assert cfg.mean == cfg.std == (0.5, 0.5, 0.5)
    with torch.device("meta"):
        model = timm.create_model(name)
        assert model(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert model.get_submodule(cfg.first_conv).in_channels == 3


@pytest.mark.parametrize("name", ["iresnet100", "mobilefacenet"])
def test_pretrained_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"pretrained must be false for {name}"):
        timm.create_model(name, pretrained=True)


def test_forward_is_head_after_features(model: nn.Module, images: Tensor) -> None:
    model.eval()
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, *model.map_size)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


def test_reset_classifier_changes_the_head_alone(model: nn.Module, images: Tensor) -> None:
    model.eval()
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(24)
    assert model.eval()(images).shape == (2, 24) and model.num_classes == 24
    assert model.get_classifier().out_features == 24
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model.eval()(images), pooled)
    bare = timm.create_model(model.default_cfg["architecture"], num_classes=0).eval()
    assert bare(images).shape == pooled.shape


def test_dropout_acts_in_training_only(images: Tensor) -> None:
    for name in LIGHT:
        model = timm.create_model(name, drop_rate=0.5, num_classes=16)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_embeddings_are_float32_under_autocast(model: nn.Module, images: Tensor) -> None:
    """The head computes in float32, and gradients reach the trunk through it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.forward_features(images)
        embeddings = model.forward_head(features)
    assert features.dtype == torch.bfloat16 and embeddings.dtype == torch.float32
    expected = model.eval().forward_head(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.forward_head(features), expected)
    embeddings.sum().backward()


def test_other_dtypes_pass_through(model: nn.Module, images: Tensor) -> None:
    assert model.double().eval()(images.double()).dtype == torch.float64
    assert model.bfloat16().eval()(images.bfloat16()).dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient_and_no_statistic(
    model: nn.Module, images: Tensor
) -> None:
    """Recomputing in backward gives equal gradients, and counts every batch once."""
    model.double()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for enable in (False, True):
        model.load_state_dict(start)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        (model(images.double()) * torch.arange(32.0).view(2, 16)).sum().backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append((gradients, {k: b.clone() for k, b in model.named_buffers()}))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def test_checkpointing_recomputes_each_stage_once(model: nn.Module, images: Tensor) -> None:
    calls: list[nn.Module] = []
    norm = (
        next(m for m in model.layer1.modules() if isinstance(m, nn.BatchNorm2d))
        if hasattr(model, "layer1")
        else model.layers[0].layers[1]
    )
    norm.register_forward_hook(lambda module, *_: calls.append(module))
    model.set_grad_checkpointing()
    model(images).sum().backward()
    assert len(calls) == 2 and norm.momentum == 0.1 and norm.num_batches_tracked == 1


@pytest.mark.slow
def test_exports_as_one_graph(model: nn.Module, images: Tensor) -> None:
    model.eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    more = torch.cat([images, images])
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


def test_refuses_other_images(model: nn.Module, images: Tensor) -> None:
    for wrong in (images[..., :96], images[:, :1], images[0], images.byte()):
        with pytest.raises(ValueError, match=r"^images must be floats .* got torch"):
            model(wrong)
