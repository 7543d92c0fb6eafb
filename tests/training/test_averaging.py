"""WeightAverage: the average obeys its equation, is judged and saved; training never sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from watching import Killed, RaiseAt

from fastface_lightning import WeightAverage
from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
)
from fastface_lightning.classifiers.shards import Shard
from fastface_lightning.training.checkpoints import LastAndBest
from fastface_lightning.training.module import FaceModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated",
    "ignore:You're resuming from a checkpoint that ended before",
    "ignore:Checkpoint directory .* exists and is not empty",
)
BATCHES = 12


class Net(LightningModule):
    """Regression; remembers every step's raw weights and what each evaluation saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.head = nn.Linear(3, 1)
        self.raw: dict[int, dict[str, Tensor]] = {}
        self.judged: list[dict[str, Tensor]] = []
        self.fails = False

    def embed(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Of noise by its number: a plain loader begins anew at a resume.
        g = torch.Generator().manual_seed(1000 * self.global_rank + self.trainer.global_step)
        x = batch.new_tensor(torch.randn(8, 4, generator=g).tolist())
        return (self.head(self.embed(x)) - x.sum(1, keepdim=True)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step:
            self.raw.setdefault(self.trainer.global_step, weights_of(self))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.judged.append(weights_of(self))
        if self.fails:
            raise RuntimeError("in the validation")

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)


def weights_of(module: nn.Module, part: str = "backbone") -> dict[str, Tensor]:
    """As they stand, copied."""
    module = module.get_submodule(part)
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name: value.detach().clone() for name, value in tensors}


def loader(batches: int = BATCHES) -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(torch.randn(8 * batches, 4), batch_size=8)


def trainer_of(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    settings = {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0} | settings
    if any(isinstance(callback, Checkpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = True
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **quiet | settings)


def fit(
    root: Path,
    *callbacks: Callback,
    module: Any = None,
    ckpt_path: Any = None,
    expects: Any = None,
    **settings: Any,
) -> tuple[Any, Trainer]:
    """Two epochs of twelve batches, validated after each."""
    module, trainer = module or Net(), trainer_of(root, *callbacks, **settings)
    with pytest.raises(expects) if expects else nullcontext():
        trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return module, trainer


def averaged(callback: WeightAverage, part: str = "backbone", make: Any = Net) -> dict[str, Tensor]:
    module = make()
    callback.copy_to(module)
    return weights_of(module, part)


def same(a: dict[str, Tensor], b: dict[str, Tensor], floats: bool = False) -> bool:
    names = [name for name in a if not floats or a[name].is_floating_point()]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in names)


def wide(w: Tensor) -> Tensor:
    return w.to(torch.complex128 if w.is_complex() else torch.float64)


def twin(
    raw: dict[int, dict[str, Tensor]], length: Callable[[int], float], every: int = 1
) -> dict[str, Tensor]:
    """Weights after each step, one by one and in float64, averaged over ``length(step)``: those of
    the first step, of each that ``every`` divides and of the last."""
    average: dict[str, Tensor] = {}
    updated = 0
    for n, weights in raw.items():
        if n not in (min(raw), max(raw)) and n % every:
            continue
        updated, gain = n, min(1, (n - updated) / min(length(n), n))
        for name, w in weights.items():
            if w.is_floating_point() or w.is_complex():
                before = average.get(name, wide(w))
                average[name] = before + gain * (wide(w) - before)
    return average


def assert_is(average: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(wide(average[name]), value, atol=1e-6, rtol=1e-6)


# The equation ------------------------------------------------------------------------------------

RULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "default": ({}, lambda n: 0.05 * n),
    "share": ({"window": 0.4}, lambda n: 0.4 * n),
    "steps": ({"window": 5}, lambda n: 5),
    "decay": ({"decay": 0.9}, lambda n: 10),
    "rarely": ({"window": 0.4, "every_n_steps": 3}, lambda n: 0.4 * n),
    "rarely, steps": ({"window": 10, "every_n_steps": 5}, lambda n: 10),
    "once": ({"window": 100, "every_n_steps": 50}, lambda n: 100),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_average_is_that_of_a_plain_twin(tmp_path: Path, rule: str) -> None:
    settings, length = RULES[rule]
    callback = WeightAverage(**settings)
    module, _ = fit(tmp_path, callback)
    assert list(module.raw) == list(range(1, 2 * BATCHES + 1))
    assert_is(averaged(callback), twin(module.raw, length, settings.get("every_n_steps", 1)))


def test_averages_with_a_name(tmp_path: Path) -> None:
    """A window that is not yet full is a mean; half of the run weighs step i by i - 1."""
    for settings, weight in (({"window": 100}, lambda i: 1.0), ({"window": 0.5}, lambda i: i - 1)):
        module, _ = fit(tmp_path, callback := WeightAverage(**settings))
        total = sum(weight(i) for i in module.raw)
        name = "0.weight"
        mean = sum(weight(i) / total * w[name].double() for i, w in module.raw.items())
        assert_is(averaged(callback), {name: mean})


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = WeightAverage(window=0.4)
    module, trainer = fit(tmp_path, callback, accumulate_grad_batches=5)
    assert trainer.global_step == 6 == len(module.raw)
    assert_is(averaged(callback), twin(module.raw, lambda n: 0.4 * n))


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.02) for part in (self.backbone, self.head)]


def test_the_steps_of_several_optimizers_are_counted_as_the_trainer_does(tmp_path: Path) -> None:
    callback = WeightAverage(window=0.4)
    module, _ = fit(tmp_path, callback, module=TwoOptimizers())
    assert list(module.raw) == list(range(2, 4 * BATCHES + 1, 2))
    assert_is(averaged(callback), twin(module.raw, lambda n: 0.4 * n))


# What is averaged --------------------------------------------------------------------------------


class Stranger(Net):
    """No backbone; two linear layers share one weight; a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"trunk": self.backbone, "tied": nn.Linear(6, 3)})
        del self.backbone
        self.net["tied"].weight = self.net["trunk"][2].weight
        self.register_buffer("fixed", torch.ones(2), persistent=False)

    def embed(self, x: Tensor) -> Tensor:
        return self.net["trunk"](x)

    def on_train_batch_end(self, *_: Any) -> None:
        self.raw[self.trainer.global_step] = weights_of(self, "")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("name", [None, "", "net.trunk"])
def test_all_or_a_part_is_averaged(tmp_path: Path, name: str | None) -> None:
    callback = WeightAverage(window=0.4, module=name)
    module, trainer = fit(tmp_path, callback, module=Stranger())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    prefix, expected = name or "", twin(module.raw, lambda n: 0.4 * n)
    assert expected.pop("fixed").tolist() == [1, 1] and "fixed" not in saved
    assert_is(saved, {key: value for key, value in expected.items() if key.startswith(prefix)})
    assert torch.equal(saved["net.tied.weight"], saved["net.trunk.2.weight"])
    assert torch.equal(saved["head.weight"], module.head.weight) == bool(name)
    # And a resume has the raw ones, the tied among them.
    again = Stranger()
    fit(tmp_path, WeightAverage(0.4, module=name), module=again, ckpt_path=tmp_path / "last.ckpt")
    assert same(weights_of(again, ""), weights_of(module, ""))


def test_a_part_that_is_not_there_or_has_no_weights_is_refused(tmp_path: Path) -> None:
    for name in ("trunk", "backbone.7"):
        with pytest.raises(MisconfigurationException, match=name):
            fit(tmp_path, WeightAverage(module=name))
    module = Net()
    module.empty = nn.Identity()
    with pytest.raises(MisconfigurationException, match="empty"):
        fit(tmp_path, WeightAverage(module="empty"), module=module)


def test_a_backbone_is_averaged_with_its_head(tmp_path: Path) -> None:
    """By default: an averaged backbone under a raw head is neither network."""
    module, trainer = fit(tmp_path, callback := WeightAverage(window=0.4))
    assert not torch.equal(averaged(callback, "head")["weight"], module.head.weight)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["current_model_state"]
    assert same(saved, weights_of(module, ""))


class Kinds(Net):
    """Parameters and buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.turn = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.backbone.register_buffer("queue", torch.randn(4))
        self.backbone.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        nn.utils.parametrizations.spectral_norm(self.backbone[2])

    def embed(self, x: Tensor) -> Tensor:
        self.backbone.queue = torch.cat((self.backbone.queue[1:], x[0, :1]))
        self.backbone.count += 1
        y: Any = self.backbone[2](self.backbone[1](self.backbone[0](x)))
        return (y * self.backbone.turn).real


def test_of_other_buffers_the_newest_count_and_frozen_weights_stay(tmp_path: Path) -> None:
    module = Kinds()
    module.backbone[0].requires_grad_(False)
    before = weights_of(module)
    _, trainer = fit(tmp_path, WeightAverage(window=0.4), module=module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(module, loader(1), verbose=False)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    judged, raw = module.judged[-1], weights_of(module)
    newest = {k for k in raw if k.endswith(("queue", "count", "_u", "_v", "num_batches_tracked"))}
    assert len(newest) == 5
    expected = twin(module.raw, lambda n: 0.4 * n)
    for name, value in raw.items():
        assert torch.equal(judged[name], saved[f"backbone.{name}"])
        if name in newest:
            assert torch.equal(judged[name], value)
        else:
            assert_is(judged, {name: expected[name]})
    assert torch.equal(judged["0.weight"], before["0.weight"])
    assert not torch.equal(judged["turn"], raw["turn"])
    assert not torch.equal(judged["1.running_mean"], raw["1.running_mean"])


def test_weights_of_which_none_is_trained_are_said_to_be_so(tmp_path: Path) -> None:
    module = Net()
    module.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="gradient"):
        fit(tmp_path, WeightAverage(module="backbone"), module=module)


def another_linear(module: Net) -> None:
    module.backbone[2] = nn.Linear(6, 3)


def another_parameter(module: Net) -> None:
    module.backbone[2].weight = nn.Parameter(torch.ones(3, 6))


def one_more(module: Net) -> None:
    module.backbone[2].weight_of_2 = nn.Parameter(torch.ones(2))


def wider(module: Net) -> None:
    module.backbone[2].weight.data = torch.ones(5, 6)
    module.backbone[2].weight.grad = None
    module.backbone[2].bias, module.head = None, nn.Linear(5, 1)


@pytest.mark.parametrize("change", [another_linear, another_parameter, one_more, wider])
@pytest.mark.parametrize("step", [4, BATCHES])
def test_a_parameter_that_another_takes_the_place_of(
    tmp_path: Path, change: Callable[[Net], None], step: int
) -> None:
    """The average begins anew, be it at the next step or in the validation before it."""

    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.optimizers[0].state.clear()
                change(pl_module)

    callback = WeightAverage(window=0.9, module="backbone")
    with pytest.warns(UserWarning, match=r"another backbone\.2\.(weight|bias)"):
        module, _ = fit(tmp_path, callback, Changes())
    later = {n - step: w for n, w in module.raw.items() if n > step}
    assert_is(
        {k.removeprefix("backbone."): v for k, v in callback._average.items()},
        twin(later, lambda n: 0.9 * (n + step)),
    )


def test_low_precision_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    """Where 1 + 1/500 is 1, an average over 1,000 steps would stand still."""
    callback = WeightAverage(window=1000)
    module, trainer = fit(tmp_path, callback, precision="bf16-true")
    expected = twin(module.raw, lambda n: 1000)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_is(saved, {f"backbone.{name}": value for name, value in expected.items()})
    trainer.validate(module, loader(1), verbose=False)
    assert torch.equal(module.judged[-1]["0.weight"], saved["backbone.0.weight"].bfloat16())


# Where it stands ---------------------------------------------------------------------------------


def test_it_is_judged_in_place_and_training_goes_on_without_it(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path)
    module = Net()
    places = {id(p): p.data_ptr() for p in module.parameters()}
    callback = WeightAverage(window=0.4)
    _, trainer = fit(tmp_path, callback, module=module, num_sanity_val_steps=1)
    assert {id(p): p.data_ptr() for p in module.parameters()} == places
    assert all(same(module.raw[step], plain.raw[step]) for step in plain.raw)
    # The sanity check sees the first weights; the end of each epoch the average; the rest is raw.
    assert same(module.judged[0], weights_of(Net()))
    after_one = {step: module.raw[step] for step in range(1, BATCHES + 1)}
    assert_is(module.judged[1], twin(after_one, lambda n: 0.4 * n))
    assert same(module.judged[2], averaged(callback), floats=True)
    assert same(weights_of(module), module.raw[2 * BATCHES])
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(module, loader(1))
        assert same(module.judged[-1], averaged(callback), floats=True)
        assert same(weights_of(module), module.raw[2 * BATCHES])
    module.fails = True
    with pytest.raises(RuntimeError, match="in the validation"), callback.judging_raw():
        trainer.validate(module, loader(1), verbose=False)
    assert same(module.judged[-1], weights_of(module))
    module.fails = False
    trainer.validate(module, loader(1), verbose=False)
    assert same(module.judged[-1], averaged(callback), floats=True)
    trainer.validate(other := Net(), loader(1), verbose=False)  # another module's own weights
    assert same(other.judged[-1], weights_of(Net()))


@pytest.mark.parametrize("where", ["fit", "validate"])
def test_an_exception_leaves_the_raw_weights(tmp_path: Path, where: str) -> None:
    module, trainer = fit(tmp_path, WeightAverage(0.5), max_epochs=1)
    module.fails = True
    trainer.fit_loop.max_epochs = 2
    go = (
        partial(trainer.fit, module, loader())
        if where == "fit"
        else partial(trainer.validate, module)
    )
    with pytest.raises(RuntimeError, match="in the validation"):
        go(loader(1))
    assert not same(module.judged[-1], weights_of(module))
    assert same(weights_of(module), module.raw[max(module.raw)])
    module.fails = False
    trainer.validate(module, loader(1), verbose=False)  # the average is still there
    assert not same(module.judged[-1], weights_of(module))


def test_before_the_first_step_there_is_none(tmp_path: Path) -> None:
    callback, module = WeightAverage(), Net()
    trainer = trainer_of(tmp_path, callback)
    trainer.validate(module, loader(1), verbose=False)
    assert same(module.judged[-1], weights_of(module))
    with pytest.raises(ValueError, match="average"):
        callback.copy_to(module)


def test_a_loaded_checkpoint_is_judged_as_it_is(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, WeightAverage(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    first = module.judged[-1]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(1))
    assert not same(module.judged[-1], first)
    for callbacks in ([], [WeightAverage()], trainer.callbacks):
        trainer = trainer if callbacks is trainer.callbacks else trainer_of(tmp_path, *callbacks)
        trainer.validate(module, loader(1), ckpt_path=tmp_path / "first.ckpt", verbose=False)
        assert same(module.judged[-1], first)
        trainer.test(module, loader(1), verbose=False)
        assert same(module.judged[-1], first)


def test_copy_to_says_what_became_of_the_average(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, callback := WeightAverage(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer.test(module, loader(1), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    with pytest.raises(ValueError, match=r"first\.ckpt"):
        callback.copy_to(module)


def loaded(module: Net) -> None:
    module.load_state_dict(Net().state_dict())


def trained_elsewhere(module: Net) -> None:
    batch = torch.randn(8, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.embed(batch).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [loaded, trained_elsewhere, another_linear])
@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_that_others_change_after_fit_are_judged_and_saved_as_they_are(
    tmp_path: Path, change: Callable[[Net], None], evaluated: bool
) -> None:
    module, trainer = fit(tmp_path, callback := WeightAverage(), max_epochs=1)
    if evaluated:  # the average's own coming and going is no change
        trainer.validate(module, loader(1), verbose=False)
        assert same(module.judged[-1], averaged(callback), floats=True)
    change(module)
    with pytest.warns(UserWarning, match="changed after fit"):
        trainer.validate(module, loader(1), verbose=False)
    assert same(module.judged[-1], weights_of(module))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(saved["state_dict"], module.state_dict()) and "current_model_state" not in saved
    with pytest.raises(ValueError, match="changed after fit"):
        callback.copy_to(module)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*changed after fit")
def test_ddp_that_writes_the_weights_anew_changes_none(tmp_path: Path) -> None:
    """As at the start of an evaluation, and of another fit; what others change is told."""

    def check(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        callback = WeightAverage(window=0.4)
        module, trainer = fit(tmp_path, callback, strategy="ddp", devices=1, max_epochs=1)
        for _ in range(2):
            trainer.validate(module, loader(1), verbose=False)
            assert same(module.judged[-1], averaged(callback), floats=True)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        assert_is(averaged(callback), twin(module.raw, lambda n: 0.4 * n))
        loaded(module)
        with pytest.warns(UserWarning, match="changed after fit"):
            trainer.validate(module, loader(1), verbose=False)
        assert same(module.judged[-1], weights_of(module))

    (tmp_path / "meet").mkdir()
    on_ranks(check, tmp_path / "meet", ranks=1)


def test_a_second_fit_of_changed_weights_averages_these_alone(tmp_path: Path) -> None:
    callback, module = WeightAverage(window=0.9), Net()
    _, trainer = fit(tmp_path, callback, module=module, max_epochs=1)
    module.load_state_dict(Net().state_dict())
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="changed after fit"):
        trainer.fit(module, loader(), loader(1))
    later = {n - BATCHES: w for n, w in module.raw.items() if n > BATCHES}
    assert_is(averaged(callback), twin(later, lambda n: 0.9 * (n + BATCHES)))


def test_a_second_fit_goes_on_or_begins_anew(tmp_path: Path) -> None:
    callback, module = WeightAverage(window=0.4), Net()
    _, trainer = fit(tmp_path, callback, module=module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(1))
    assert_is(averaged(callback), twin(module.raw, lambda n: 0.4 * n))
    module.raw = {}
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert list(module.raw) == list(range(1, BATCHES + 1))
    assert_is(averaged(callback), twin(module.raw, lambda n: 0.4 * n))


class Spoils(Callback):
    """Weights that are not finite at one step, and as before after it."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        weight = pl_module.backbone[0].weight.data
        if trainer.global_step == 3:
            self.kept = weight.clone()
            weight.fill_(float("nan"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            pl_module.backbone[0].weight.data.copy_(self.kept)
            for tensor in (*pl_module.parameters(), *pl_module.buffers()):
                if tensor.is_floating_point():
                    tensor.data.nan_to_num_()
            for state in trainer.optimizers[0].state.values():
                state["momentum_buffer"].nan_to_num_()


def test_weights_that_are_not_finite_do_not_stay(tmp_path: Path) -> None:
    callback = WeightAverage(window=0.9)
    with pytest.warns(UserWarning, match="finite"):
        module, _ = fit(tmp_path, callback, Spoils(), max_epochs=2)
    assert not module.raw[4]["0.weight"].isfinite().all()
    assert module.raw[12]["0.weight"].isfinite().all()
    # Dropped at the first validation, begun anew after it.
    later = {n - BATCHES: w for n, w in module.raw.items() if n > BATCHES}
    assert_is(averaged(callback), twin(later, lambda n: 0.9 * (n + BATCHES)))


def test_no_checkpoint_holds_an_average_that_is_not_finite(tmp_path: Path) -> None:
    spoils, files = Spoils(), LastAndBest(tmp_path, every_n_steps=6)
    with pytest.warns(UserWarning, match="finite"):
        fit(tmp_path, WeightAverage(window=0.9), spoils, files, RaiseAt(8), expects=Killed)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(w.isfinite().all() for w in saved["state_dict"].values())
    assert "WeightAverage" not in saved["callbacks"]
    with pytest.warns(UserWarning, match="begins at step 6"):
        fit(tmp_path, WeightAverage(), ckpt_path=tmp_path / "last.ckpt")


# The end of fit ----------------------------------------------------------------------------------


def test_validations_change_no_average(tmp_path: Path) -> None:
    """Nor does one that comes before the average is due."""
    ends = []
    for every in (1, 2, 5, BATCHES):
        callback = WeightAverage(window=30, every_n_steps=7)
        module, _ = fit(tmp_path, callback, val_check_interval=every)
        ends.append(averaged(callback))
        assert not same(module.judged[-1], module.raw[2 * BATCHES])
    assert all(same(end, ends[0]) for end in ends)


def test_a_run_that_is_stopped_early_is_not_brought_up_to_date(tmp_path: Path) -> None:
    """Else it would not go on as if it had not been stopped."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 16

    module, _ = fit(tmp_path, callback := WeightAverage(window=30, every_n_steps=7), Stops())
    raw = {n: w for n, w in module.raw.items() if n <= 14}
    assert max(module.raw) == 16
    assert_is(averaged(callback), twin(raw, lambda n: 30, 7))


@pytest.mark.parametrize(("every", "told"), [(1, False), (2, False), (3, True), (20, True)])
def test_an_average_that_is_the_newest_weights_is_said_to_be(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, every: int, told: bool
) -> None:
    module, _ = fit(tmp_path, callback := WeightAverage(0.1, every_n_steps=every))
    assert told == any("newest weights" in str(each.message) for each in recwarn)
    assert told == same(averaged(callback), module.raw[2 * BATCHES], floats=True)


class BehindItsBack(TwoOptimizers):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()


def test_steps_that_lightning_does_not_see_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"global_step"):
        module, _ = fit(tmp_path, callback := WeightAverage(), module=BehindItsBack())
    with pytest.raises(ValueError, match="no step"):
        callback.copy_to(module)


# Checkpoints -------------------------------------------------------------------------------------


class Saves(Callback):
    """Within the validation; and puts the module's own state where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "inside.ckpt")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        before = weights_of(pl_module, "")
        pl_module.load_state_dict(pl_module.state_dict())
        assert same(weights_of(pl_module, ""), before)


def test_a_checkpoint_holds_the_average_and_the_raw_weights(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, "full", enable_version_counter=False)
    callback = WeightAverage(window=0.4, module="backbone")
    module, trainer = fit(tmp_path, callback, Saves(tmp_path), files)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    average = {f"backbone.{k}": v for k, v in twin(module.raw, lambda n: 0.4 * n).items()}
    raw = {f"backbone.{k}": v for k, v in module.raw[2 * BATCHES].items()}
    for name in ("full", "inside", "after"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert list(saved["state_dict"]) == list(Net().state_dict())
        assert_is(saved["state_dict"], average)
        assert torch.equal(saved["state_dict"]["head.weight"], module.head.weight)
        assert same(saved["current_model_state"], raw)
    loaded = Net.load_from_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    assert_is({f"backbone.{k}": v for k, v in weights_of(loaded).items()}, average)


def test_checkpoints_of_weights_alone(tmp_path: Path) -> None:
    """They would hold the raw weights; by hand, after copy_to, the average."""
    light = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(MisconfigurationException, match="save_weights_only"):
        fit(tmp_path, WeightAverage(), light)
    module, trainer = fit(tmp_path, callback := WeightAverage(window=0.4))
    average = averaged(callback, "")
    callback.copy_to(module)
    trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    assert same(torch.load(tmp_path / "light.ckpt", weights_only=True)["state_dict"], average, True)
    # It stays, with what is measured anew in it.
    module.backbone[1].running_mean.fill_(2)
    trainer.validate(module, loader(1), verbose=False)
    assert same(module.judged[-1], weights_of(module))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert same(saved["state_dict"], weights_of(module, "")) and "current_model_state" not in saved
    assert same(averaged(callback, ""), average)
    fresh = Net()
    with pytest.warns(UserWarning, match=f"begins at step {2 * BATCHES}"):
        fit(tmp_path, WeightAverage(), module=fresh, ckpt_path=tmp_path / "whole.ckpt")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["share", "decay", "rarely"])
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    tmp_path: Path, seed: int, rule: str
) -> None:
    settings = {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 3}
    whole = WeightAverage(**RULES[rule][0])
    expected, _ = fit(tmp_path, whole, **settings)
    every = 1 + seed
    generator = torch.Generator().manual_seed(seed)
    kills = torch.randint(every, 3 * BATCHES, (3,), generator=generator).sort().values.tolist()
    last = tmp_path / "last.ckpt"
    for kill in (*kills, -1):
        files = LastAndBest(tmp_path, every)
        callback, module = WeightAverage(**RULES[rule][0]), Net()
        try:
            resumed = last if last.exists() else None
            fit(
                tmp_path,
                RaiseAt(kill),
                callback,
                files,
                module=module,
                ckpt_path=resumed,
                **settings,
            )
        except Killed:
            continue
    assert same(module.raw[3 * BATCHES], expected.raw[3 * BATCHES])
    assert same(averaged(callback), averaged(whole))
    assert module.judged or kills[-1] > 3 * BATCHES - 5
    for seen, known in zip(module.judged[::-1], expected.judged[::-1], strict=False):
        assert same(seen, known)


def resumable(root: Path, *callbacks: Callback, module: Any = None) -> Path:
    _, trainer = fit(root, *callbacks, module=module, max_epochs=1)
    trainer.save_checkpoint(root / "one.ckpt")
    return root / "one.ckpt"


def test_changed_settings_at_a_resume(tmp_path: Path) -> None:
    file = resumable(tmp_path, WeightAverage(window=0.4))
    first = torch.load(file, weights_only=True)
    with pytest.warns(UserWarning, match="window=0.4.*decay=0.5"):
        module, _ = fit(tmp_path, callback := WeightAverage(decay=0.5), ckpt_path=file)
    average = {k: first["state_dict"][f"backbone.{k}"].double() for k in weights_of(module)}
    for weights in module.raw.values():
        average = {k: (a + weights[k].double()) / 2 for k, a in average.items()}
    assert_is(averaged(callback), {k: v for k, v in average.items() if "num_" not in k})
    with pytest.raises(ValueError, match=r"''.*'head'"):
        fit(tmp_path, WeightAverage(module="head"), ckpt_path=file)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"decay": 0.9}, {"window": 10}),
        ({"window": 0.05}, {"module": ""}),
        ({}, {"every_n_steps": 1}),
    ],
)
def test_settings_that_say_the_same_are_not_changed(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, before: Any, after: Any
) -> None:
    file = resumable(tmp_path, WeightAverage(**before))
    fit(tmp_path, WeightAverage(**after), ckpt_path=file)
    assert not [each for each in recwarn if "WeightAverage(" in str(each.message)]


@pytest.mark.parametrize("gone", [["backbone.2.bias"], None])
def test_a_checkpoint_without_all_raw_weights_is_refused(
    tmp_path: Path, gone: list[str] | None
) -> None:
    file = resumable(tmp_path, WeightAverage(module="backbone"))
    saved = torch.load(file, weights_only=True)
    for key in gone or list(saved["current_model_state"]):
        del saved["current_model_state"][key]
    torch.save(saved, file)
    with pytest.raises(ValueError, match=gone[0] if gone else "backbone.0.weight"):
        fit(tmp_path, WeightAverage(module="backbone"), ckpt_path=file)


def test_an_average_that_begins_at_a_resume(tmp_path: Path) -> None:
    file = resumable(tmp_path)
    with pytest.warns(UserWarning, match=f"begins at step {BATCHES}"):
        module, _ = fit(tmp_path, callback := WeightAverage(window=0.9), ckpt_path=file)
    later = {n - BATCHES: w for n, w in module.raw.items()}
    assert_is(averaged(callback), twin(later, lambda n: 0.9 * (n + BATCHES)))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_run_of_lightnings_averaging_goes_on_from_its_raw_weights(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, EMAWeightAveraging(), LastAndBest(tmp_path), max_epochs=1)
    raw = {f"backbone.{k}": v for k, v in module.raw[BATCHES].items()}
    fresh = Net()
    fit(tmp_path, WeightAverage(), module=fresh, ckpt_path=tmp_path / "last.ckpt", max_epochs=1)
    assert same({f"backbone.{k}": v for k, v in weights_of(fresh).items()}, raw)


# Faces -------------------------------------------------------------------------------------------


def batches_for(classifier: nn.Module) -> DataLoader[Any]:
    """Nine batches of noise."""
    g = torch.Generator().manual_seed(0)
    sizes = {None: 8}
    if isinstance(classifier, MomentumClassifier):
        sizes = {name: len(labels) for name, (_, labels) in classifier.sample_batch(4).items()}
    batches = []
    for _ in range(9):
        parts = {
            name: (torch.randint(0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=g), labels)
            for name, size in sizes.items()
            for labels in [torch.arange(size) // 3]
        }
        batches.append(parts.get(None, parts))
    return DataLoader(batches, batch_size=None)


def faces(classifier: nn.Module) -> FaceModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5))
    return FaceModule(backbone, classifier, partial(torch.optim.SGD, lr=0.1), augment=nn.Identity())


@pytest.mark.parametrize("kind", [DynamicClassPool, AttentionClassifier])
def test_a_momentum_encoder_follows_the_raw_weights(tmp_path: Path, kind: Any) -> None:
    runs = []
    for callbacks in ([], [WeightAverage(window=0.5, module="backbone")]):
        size = {"pool_size": 8} if kind is DynamicClassPool else {"queue_size": 8}
        module = faces(kind(10, 5, momentum=0.5, **size))
        trainer = trainer_of(tmp_path, *callbacks, max_epochs=1)
        trainer.fit(module, batches_for(module.classifier))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        runs.append((module, torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]))
    (plain, raw), (_, saved) = runs
    assert same(plain.classifier.state_dict(), runs[1][0].classifier.state_dict())
    for key, value in raw.items():
        assert torch.equal(value, saved[key]) == (key.startswith("classifier") or "num_" in key)


def test_a_run_without_averaging_goes_on_from_the_raw_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(*callbacks: Callback, epochs: int, file: Path | None = None) -> Any:
        trainer = trainer_of(tmp_path, *callbacks, max_epochs=epochs)
        module = faces(FullClassifier(10, 5))
        trainer.fit(module, batches_for(module.classifier), ckpt_path=file)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    train(WeightAverage(), epochs=1)
    whole = train(epochs=2)
    assert "raw" not in caplog.text
    assert same(weights_of(train(epochs=2, file=tmp_path / "1.ckpt")), weights_of(whole))
    assert "raw" in caplog.text
    averaged_file = torch.load(tmp_path / "1.ckpt", weights_only=True)
    started = faces(FullClassifier(10, 5))
    started.start_from(tmp_path / "1.ckpt")  # weights=FILE
    for name, value in weights_of(started).items():
        assert torch.equal(value, averaged_file["state_dict"][f"backbone.{name}"])


# Two ranks, refusals, the other package ----------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_have_one_average(tmp_path: Path) -> None:
    """Also of batch norm's statistics, which a rank takes of its own images."""

    def check(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        callback = WeightAverage(window=0.4)
        module, trainer = fit(tmp_path, callback, strategy="ddp", devices=2)
        average = trainer.strategy.broadcast(found := averaged(callback))
        assert same(found, average, floats=True)
        assert_is(found, {k: v for k, v in twin(module.raw, lambda n: 0.4 * n).items()
                          if rank == 0 or "running" not in k})  # fmt: skip
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert same({k.removeprefix("backbone."): v for k, v in saved.items() if "bone" in k},
                    found, floats=True)  # fmt: skip

    (tmp_path / "meet").mkdir()
    on_ranks(check, tmp_path / "meet")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"window": 0.0}, "0.0"),
        ({"window": 1.5}, "1.5"),
        ({"window": 0}, "window.*0"),
        ({"window": True}, "True"),
        ({"decay": 1.0}, "decay.*1.0"),
        ({"decay": 0}, "0"),
        ({"window": 10, "every_n_steps": 10}, "10.*10"),
        ({"decay": 0.5, "every_n_steps": 3}, "2.*3"),
        ({"window": 5, "decay": 0.9}, "5.*0.9"),
        ({"every_n_steps": 0}, "every_n_steps.*0"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WeightAverage(**settings)


class AnotherAverage(WeightAverage):
    """Lightning itself refuses two of one class."""


class FSDPStrategy(SingleDeviceStrategy):
    pass


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    for rival in (AnotherAverage(), EMAWeightAveraging()):
        with pytest.raises(MisconfigurationException, match=type(rival).__name__):
            fit(tmp_path, WeightAverage(), rival)
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        fit(tmp_path, WeightAverage(), strategy=FSDPStrategy(torch.device("cpu")))
    for strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        trainer = trainer_of(tmp_path, callback := WeightAverage(), strategy=strategy, devices=2)
        with pytest.raises(MisconfigurationException, match="ddp_spawn"):
            callback.setup(trainer, Net(), "fit")
    module = Net()
    module.classifier = ChunkedClassifier(7, 4)
    module.classifier.split = Shard(0, 2, 7)
    with pytest.raises(MisconfigurationException, match=r"classifier\.weight, which is split"):
        WeightAverage().on_train_start(trainer, module)


def test_pytorch_lightnings_trainer(tmp_path: Path) -> None:
    """The package under its other name: other classes of the same names."""
    package = pytest.importorskip("pytorch_lightning")
    body = {name: value for name, value in vars(Net).items() if callable(value)}

    def start(self: Any) -> None:
        package.LightningModule.__init__(self)
        self.backbone = Net().backbone
        self.head, self.raw, self.judged, self.fails = Net().head, {}, [], False

    kind = type("Twin", (package.LightningModule,), {**body, "__init__": start})
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callback, module = WeightAverage(window=0.4), kind()
    trainer = package.Trainer(
        callbacks=[callback], accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, loader(), loader(1))
    expected = twin(module.raw, lambda n: 0.4 * n)
    assert_is(module.judged[-1], expected)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert_is(saved["state_dict"], {f"backbone.{k}": v for k, v in expected.items()})
    assert [b - a for a, b in pairwise(module.raw)] == [1] * (BATCHES - 1)
