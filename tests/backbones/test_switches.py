"""compile, grad_checkpointing and freeze: each changes how a backbone trains, never what it is."""

import copy

import pytest
import torch
from devices import needs_compiler
from torch import Tensor, nn

from fastface_lightning.backbones import build_backbone

State = dict[str, Tensor]


@pytest.fixture
def images() -> Tensor:
    """Float64 (4, 3, 112, 112) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 112, 112, generator=generator, dtype=torch.float64) * 2 - 1


def one_step(model: nn.Module, images: Tensor) -> tuple[Tensor, State, State]:
    """Embeddings, gradients and buffers of one training forward and backward."""
    model.zero_grad()
    torch.manual_seed(0)
    embeddings = model(images)
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return embeddings.detach(), gradients, {k: b.clone() for k, b in model.named_buffers()}


def assert_same_step(first: nn.Module, second: nn.Module, images: Tensor) -> None:
    for a, b in zip(one_step(first, images), one_step(second, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_traced_network_trains_and_embeds_as_it_does_otherwise(images: Tensor) -> None:
    """All of compiling but the code generation, which alone needs a C++ compiler."""
    plain = build_backbone("iresnet_tiny", 8).double()
    traced = copy.deepcopy(plain)
    traced.compile(backend="aot_eager_decomp_partition")
    assert_same_step(plain, traced, images)
    plain.eval()
    traced.eval()
    for n in (1, 3):
        torch.testing.assert_close(traced(images[:n]), plain(images[:n]), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@needs_compiler
def test_compile_gives_the_same_embeddings_gradients_and_keys(images: Tensor) -> None:
    torch.manual_seed(0)
    compiled = build_backbone("iresnet_tiny", 8, channels_last=True, compile=True).double()
    plain = build_backbone("iresnet_tiny", 8, channels_last=True).double()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(compiled.state_dict())
    assert_same_step(plain, compiled, images)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_compile_compiles_the_network_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    for name in ("iresnet_tiny", "test_resnet"):
        assert build_backbone(name, 8) not in compiled
        assert build_backbone(name, 8, compile=True) is compiled[-1]


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", pytest.param("levit_128s", marks=pytest.mark.slow)]
)
def test_checkpointing_a_timm_trunk_changes_no_gradient_and_no_statistic(
    name: str, images: Tensor
) -> None:
    """timm's recomputation alone would count each batch twice."""
    torch.manual_seed(0)
    plain = build_backbone(name, 8).double()
    checkpointed = build_backbone(name, 8, grad_checkpointing=True).double()
    checkpointed.load_state_dict(plain.state_dict())
    for _ in range(2):
        assert_same_step(plain, checkpointed, images)


def recomputations(model: nn.Module, norm: nn.Module, images: Tensor) -> int:
    calls: list[nn.Module] = []
    handle = norm.register_forward_pre_hook(lambda module, _: calls.append(module))
    one_step(model, images)
    handle.remove()
    return len(calls) - 1


@pytest.mark.parametrize(
    ("name", "inner"),
    [("test_resnet", "layer1.0.bn1"), ("test_vit", "blocks.0.norm1")],
)
def test_checkpointing_recomputes_a_timm_trunk(name: str, inner: str, images: Tensor) -> None:
    model = build_backbone(name, 8, grad_checkpointing=True).double()
    norm = model.trunk.get_submodule(inner)
    assert recomputations(model, norm, images) == 1
    model.set_grad_checkpointing(False)
    assert recomputations(model, norm, images) == 0


def test_a_copy_of_a_checkpointed_trunk_counts_its_own_batches(images: Tensor) -> None:
    model = build_backbone("test_resnet", 8, grad_checkpointing=True).double()
    one_step(model, images)
    twin = copy.deepcopy(model)
    one_step(twin, images)
    with torch.no_grad():
        twin(images)
    assert model.trunk.bn1.num_batches_tracked == 1 and twin.trunk.bn1.num_batches_tracked == 3
    assert model.trunk.layer1[0].bn1.num_batches_tracked == 1
    assert twin.trunk.layer1[0].bn1.num_batches_tracked == 3
    assert twin.trunk.layer1[0].bn1.momentum == 0.1


def test_norms_that_are_put_in_later_count_once_too(images: Tensor) -> None:
    """As Lightning puts SyncBatchNorm in, once the network is built."""
    model = build_backbone("test_resnet", 8, grad_checkpointing=True).double()
    block = model.trunk.layer1[0]
    for _ in range(2):
        block.bn1 = nn.BatchNorm2d(block.bn1.num_features).double()
        one_step(model, images)
        assert block.bn1.num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iresnet_tiny", "test_resnet"])
def test_compiled_checkpointing_counts_once(name: str, images: Tensor) -> None:
    plain = build_backbone(name, 8).double()
    traced = build_backbone(name, 8, grad_checkpointing=True).double()
    traced.load_state_dict(plain.state_dict())
    assert_same_step(plain, traced, images)  # leaves hooks on the norms of a timm trunk
    traced.compile(backend="aot_eager_decomp_partition")
    assert_same_step(plain, traced, images)


def test_a_model_that_cannot_checkpoint_says_so() -> None:
    with pytest.raises(ValueError, match=r"^grad_checkpointing must be false for pit_ti_224"):
        build_backbone("pit_ti_224", 8, grad_checkpointing=True)


FROZEN = {
    "iresnet_tiny": ["conv1", "bn1", "prelu", "layer1"],
    "mobilefacenet": ["layers.0", "layers.1", "features.layers.0"],
    "test_resnet": ["trunk.conv1", "trunk.bn1", "trunk.layer1", "neck.dropout"],
    "test_vit": ["trunk.patch_embed", "trunk.pos_embed", "trunk.blocks.0"],
}


def within(key: str, names: list[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "mobilefacenet" else []) for n in FROZEN],
)
def test_frozen_parts_stand_still_and_the_others_train(
    name: str, checkpointing: bool, images: Tensor
) -> None:
    names = FROZEN[name]
    model = build_backbone(name, 8, freeze=names, grad_checkpointing=checkpointing).double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    one_step(model, images)
    optimizer.step()
    for key, value in model.state_dict().items():
        if within(key, names):
            assert torch.equal(value, before[key]), key
        elif key.endswith("running_mean"):
            assert not torch.equal(value, before[key]), key
    for key, parameter in model.named_parameters():
        fixed = within(key, names) or key.endswith("features.weight")
        assert (parameter.grad is None) == fixed, key
    for key, module in model.named_modules():
        assert module.training != within(key, names), key


def test_frozen_parts_stay_in_eval_whatever_mode_follows() -> None:
    model = build_backbone("iresnet_tiny", 8, freeze=["layer1"])
    whole = nn.Sequential(model, nn.Linear(8, 2))
    for _ in range(2):
        whole.train()
        assert model.training and model.layer2.training and not model.layer1[0].bn1.training
        whole.eval()
        assert not model.training and not model.layer2.training
    twin = copy.deepcopy(model).train()
    assert not twin.layer1.training and twin.layer2.training


@pytest.mark.parametrize("name", ["iresnet_tiny", "test_resnet"])
def test_a_whole_backbone_can_be_frozen(name: str, images: Tensor) -> None:
    """Also with one image, for which a batch norm that trains would be no use."""
    model = build_backbone(name, 8, freeze="all", grad_checkpointing=True).double().train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = copy.deepcopy(model.state_dict())
    embeddings = model(images[:1])
    assert embeddings.shape == (1, 8) and not embeddings.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_freezing_adds_up_and_a_replaced_head_trains_again() -> None:
    model = build_backbone("iresnet_tiny", 8, freeze=["layer1"])
    model.freeze(["fc", "features"])
    assert not model.layer1.training and not model.fc.weight.requires_grad
    model.reset_classifier(4)
    assert model.train().fc.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "part", "hint"),
    [("iresnet_tiny", "", "conv1, bn1, prelu, layer1"), ("test_resnet", "layer1", "trunk.layer1")],
)
def test_an_unknown_part_is_met_with_known_ones(name: str, part: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^freeze must .*{hint}.* got '{part}'"):
        build_backbone(name, 8, freeze=[part])


@pytest.mark.parametrize("switch", ["channels_last", "compile", "grad_checkpointing"])
def test_a_switch_is_true_or_false(switch: str) -> None:
    with pytest.raises(ValueError, match=f"^{switch} must .* got 'auto'"):
        build_backbone("iresnet_tiny", 8, **{switch: "auto"})


@pytest.mark.parametrize("name", ["iresnet_tiny", "test_resnet"])
def test_a_training_batch_of_one_is_refused_before_anything_changes(
    name: str, images: Tensor
) -> None:
    model = build_backbone(name, 8).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        model(images[:1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.eval()(images[:1]).shape == (1, 8)


def test_one_image_trains_where_the_norms_of_the_head_do_not(images: Tensor) -> None:
    model = build_backbone("iresnet_tiny", 8, freeze=["features"]).double()
    model(images[:1]).sum().backward()
    assert build_backbone("test_resnet", 8, freeze=["neck"]).double()(images[:1]).requires_grad
    bare = build_backbone("iresnet_tiny", 8).double()
    bare.reset_classifier(0)
    assert bare.train()(images[:1]).shape == (1, bare.head_hidden_size)
