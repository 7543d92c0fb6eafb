"""AutoWU: its test against scikit-learn's Gaussian process, and the rate that it then chooses."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from scripted import LR, LearningRates, Scripted, StopAt, batches, by_hand, quiet_trainer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastface_lightning import AutoWU, FastFace, FastFaceCallback, FastFaceLR, replay
from fastface_lightning.schedule import Schedule, states
from fastface_lightning.schedule.autowu import AutoWUState, posterior, valley
from fastface_lightning.schedule.base import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")
X = np.linspace(0, 1, 60, endpoint=False)
NOISE = np.random.default_rng(0).standard_normal(len(X))
CURVES = {
    "valley": 5 - 4 * np.minimum(X, 0.6) + 6 * np.maximum(X - 0.6, 0) + 0.2 * NOISE,
    "early turn": 5 - 8 * np.minimum(X, 0.3) + 5 * np.maximum(X - 0.3, 0) + 0.5 * NOISE,
    "shallow": 5 - np.minimum(X, 0.7) + 2 * np.maximum(X - 0.7, 0) + 0.5 * NOISE,
    "fall": 5 - 4 * X + 0.3 * NOISE,
    "plateau": 1 + 4 * np.exp(-8 * X) + 0.3 * NOISE,
    "rise": 5 + 4 * X + 0.3 * NOISE,
    "noise": 5 + NOISE,
}
TURNS = {"valley", "early turn"}


# The test against its slow twin ------------------------------------------------------------------


def standardized(losses: np.ndarray) -> np.ndarray:
    return (losses - losses.mean()) / losses.std()


def probability(mean: np.ndarray, covariance: np.ndarray) -> float:
    """That some value lies below both an earlier one and the last: of each pair, in turn."""

    def below(i: int, j: int) -> float:
        variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
        return float(NormalDist().cdf((mean[j] - mean[i]) / math.sqrt(variance + 1e-4)))

    return max(min(below(i, j), below(i, -1)) for i in range(len(mean)) for j in range(i))


@pytest.mark.parametrize("name", CURVES)
def test_the_posterior_is_that_of_the_likeliest_fixed_kernel(name: str) -> None:
    """One fit of scikit-learn's for each ratio of noise to signal, in float64."""
    y, fits = standardized(CURVES[name]), []
    gram = RBF(0.2)(X[:, None])
    for ratio in np.logspace(-4, 4, 41):
        signal = y @ np.linalg.solve(gram + ratio * np.eye(len(y)), y) / len(y)
        kernel = ConstantKernel(signal) * RBF(0.2)
        process = GaussianProcessRegressor(kernel, alpha=ratio * signal, optimizer=None)
        fits.append(process.fit(X[:, None], y))
    likeliest = max(fits, key=lambda process: process.log_marginal_likelihood_value_)
    expected = likeliest.predict(X[:, None], return_cov=True)
    mean, covariance = posterior(y)
    assert mean == pytest.approx(expected[0], abs=1e-8)
    assert covariance == pytest.approx(expected[1], abs=1e-8)


@pytest.mark.parametrize("name", CURVES)
def test_it_decides_as_a_freely_fitted_process_does(name: str) -> None:
    y = standardized(CURVES[name])
    kernel = ConstantKernel(1.0, (1e-6, 1e4)) * RBF(0.2, "fixed") + WhiteKernel(0.1, (1e-6, 1e2))
    process = GaussianProcessRegressor(kernel).fit(X[:, None], y)
    mean, covariance = process.predict(X[:, None], return_cov=True)
    covariance -= process.kernel_.k2.noise_level * np.eye(len(y))
    found, lowest = valley(CURVES[name].tolist())
    twin = probability(mean, covariance)
    assert (found > 0.95) == (twin > 0.95) == (name in TURNS)
    assert posterior(y)[0] == pytest.approx(mean, abs=0.1)
    if name in TURNS:
        assert found == pytest.approx(twin, abs=0.01)
        assert lowest == pytest.approx(int(mean.argmin()), abs=1)


@pytest.mark.parametrize("name", CURVES)
def test_it_knows_no_unit_of_the_loss(name: str) -> None:
    found, lowest = valley(CURVES[name].tolist())
    other, same = valley((1e-3 * CURVES[name] - 7).tolist())
    assert other == pytest.approx(found, abs=1e-6) and same == lowest


def test_an_explosion_leaves_the_fall_in_sight() -> None:
    losses = CURVES["valley"][:45].tolist()
    for height in (20.0, 1e6, 1e288):
        found, lowest = valley([*losses, *[height] * 5])
        assert found > 0.95 and 25 < lowest < 45
    for flat in ([], [3.0], [3.0] * 9, [1.0, 1e289]):
        assert valley(flat)[0] <= 0.5


# The rate ----------------------------------------------------------------------------------------


def run(schedule: AutoWU, steps: int, loss: Callable[[int, float], float]) -> list[AutoWUState]:
    """The states of a run whose loss answers to the scale that a step is taken with."""
    bound = schedule.bind(steps)
    trace = [bound.init()]
    for step in range(steps):
        trace.append(bound.update(trace[-1], loss(step, trace[-1].scale)))
    return trace


def test_a_loss_that_never_turns_up_has_the_whole_growth_and_then_the_cosine() -> None:
    trace = [state.scale for state in run(AutoWU(), 1000, lambda step, scale: 5 - step / 300)]
    growth = [1e-5 ** (1 - k / 500) for k in range(500)]
    cosine = [(1 + math.cos(math.pi * k / 500)) / 2 for k in range(501)]
    assert trace == pytest.approx([*growth, *cosine]) and trace[-1] == 0


def test_the_cosine_may_come_after_a_constant_rate() -> None:
    trace = run(AutoWU(cosine_steps=0.2), 1000, lambda step, scale: 5 - step / 300)
    assert [state.scale for state in trace[500:801]] == [1.0] * 301
    assert trace[900].scale == pytest.approx(0.5) and trace[1000].scale == 0
    assert AutoWU(max_warmup=0).bind(10).init().scale == 1  # no growth at all


@pytest.mark.parametrize("name", ["fall", "plateau", "rise", "noise"])
def test_without_a_valley_the_growth_goes_on(name: str) -> None:
    smooth = {"fall": lambda x: -4 * x, "plateau": lambda x: 4 * math.exp(-30 * x)}
    smooth |= {"rise": lambda x: 4 * x, "noise": lambda x: 0.0}
    for seed in range(5):
        noise = 0.3 * np.random.default_rng(seed).standard_normal(600)
        trace = run(AutoWU(), 600, lambda step, _, n=noise: 5 + smooth[name](step / 600) + n[step])
        assert trace[-1].peak == 1 and trace[-1].peak_step == 300


@pytest.mark.parametrize("steps", [1000, 3000])
def test_the_rate_ends_below_the_one_at_which_sgd_diverges(steps: int) -> None:
    """SGD on a noisy quadratic of curvature 1, its gradient clipped: above a rate of 2 each step
    leads away, until the clipping holds it."""
    highest, critical = 500.0, 2.0
    for seed in range(4):
        random, x = np.random.default_rng(seed), 5.0

        def loss(_: int, scale: float, random: Any = random) -> float:
            nonlocal x
            before = x * x / 2 * (1 + 0.1 * random.standard_normal())
            x -= highest * scale * float(np.clip(x + 0.1 * random.standard_normal(), -1, 1))
            return before

        trace = run(AutoWU(), steps, loss)
        assert 0.01 * critical < highest * trace[-1].peak < critical
        assert x * x / 2 < 0.1


def test_a_loss_that_rises_first_is_not_trained_at_the_lowest_rate() -> None:
    """Whether or not it then falls below where it began."""
    for depth in (5, 15):

        def loss(step: int, scale: float, depth: float = depth) -> float:
            up, down = min(step, 100) / 10, depth * min(max(step - 100, 0), 200) / 200
            return 10 + up - down + 1000 * max(scale - 0.01, 0)

        trace = run(AutoWU(), 1000, loss)
        assert trace[300].positives == 0 and not trace[300].peak
        assert 3e-3 < trace[-1].peak <= 0.02


def test_three_tests_in_a_row_end_the_growth_at_once() -> None:
    """Nothing but that is a change of the rate."""

    def loss(step: int) -> float:
        return 5 - step / 50 if step < 100 else 3 + (step - 100) / 20

    bound = AutoWU().bind(600)
    losses = [loss(step) for step in range(600)]
    trace = list(states(losses, bound))
    end = trace[-1].peak_step
    tests = [state.probability > 0.95 for state in trace[29:end:30]]
    assert tests[-3:] == [True] * 3 and tests.count(True) == 3
    (change,) = replay(losses, AutoWU(), 600, lr=0.5)
    peak = trace[-1].peak
    assert change.step == 30 * len(tests) - 1 == end - 1
    assert change.lr == pytest.approx(0.5 * peak) and change.factor < 1
    assert 1e-5 ** (1 - 85 / 300) < peak < 1e-5 ** (1 - 115 / 300)
    patient = replay(losses, AutoWU(positive_tests=5), 600, lr=0.5)
    assert patient[0].step == change.step + 60
    assert replay(losses, AutoWU(positive_tests=math.inf), 600, lr=0.5) == []


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 129])
def test_short_runs_end_as_long_ones_do(steps: int) -> None:
    losses = np.random.default_rng(steps).random(2 * steps).tolist()
    trace = list(states(losses, AutoWU().bind(steps)))  # twice as long as it was bound to
    assert all(0 <= state.scale <= 1 for state in trace)
    assert trace[steps - 1].scale == trace[-1].scale == 0


# State -------------------------------------------------------------------------------------------

TURN = [5 - min(k, 90) / 30 + max(k - 90, 0) / 30 + 0.1 * math.sin(37 * k) for k in range(300)]


def through(text: bool, saved: Any) -> Any:
    """Written and read again, as JSON or as a checkpoint that may hold no code."""
    if text:
        return json.loads(json.dumps(saved))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(cuts=st.sets(st.integers(0, 300), max_size=4), text=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_resumed_schedule_goes_on_bit_for_bit(cuts: set[int], text: bool) -> None:
    progress = Progress.start(AutoWU(), 300)
    whole = [state.scale for state in states(TURN, progress.bound)]
    assert 0 < whole[149] < 0.1  # it does switch
    for step, loss in enumerate(TURN):
        if step in cuts:
            progress, changed = Progress.load(through(text, progress.dump()), AutoWU())
            assert not changed
        before = repr(progress.state)
        after = progress.update(loss)
        assert repr(progress.state) == before
        assert repr(progress.update(loss).state) == repr(after.state)
        progress = after
        assert progress.state.scale == whole[step]


def test_a_loss_that_is_none_stands_still_and_too_many_are_refused() -> None:
    schedule = AutoWU(max_nonfinite=3).bind(300)
    odd = [math.nan, math.inf, -math.inf]
    losses = [*TURN[:40], *odd, *TURN[40:160], *odd, *TURN[160:]]
    *_, state = states(losses, schedule)
    *_, plain = states(TURN, schedule)
    assert (state.nonfinite, state.nonfinite_run) == (6, 0)
    assert state._replace(nonfinite=0) == plain
    with pytest.raises(ValueError, match="max_nonfinite=3"):
        list(states([1.0, *odd, math.nan], schedule))
    assert schedule.remarks(plain, plain._replace(nonfinite=1), math.nan)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("start_scale", v) for v in (0.0, 1.0, math.nan)),
        *(("max_warmup", v) for v in (-1, 1.5, math.inf)),
        *(("test_every", v) for v in (0, 0.0, 1.0, True)),
        *(("confidence", v) for v in (0.5, 1.0, "high")),
        *(("positive_tests", v) for v in (0, -1)),
        *(("cosine_steps", v) for v in (-1, 2.5)),
        ("max_nonfinite", 0),
        ("total_steps", 0),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must.*got {value!r}"):
        AutoWU(**{name: value})


def test_bound_and_unbound() -> None:
    bound = AutoWU(test_every=7, confidence=0.9).bind(1000)
    assert bound.bind(5) == bound and (bound.max_warmup, bound.test_every) == (500, 7)
    assert "test_every=7" in repr(AutoWU(test_every=7)) and "None" not in repr(AutoWU())
    with pytest.raises(ValueError, match=r"bind\(total_steps\)"):
        AutoWU().init()
    assert bound.cautions() == [] and len(AutoWU().bind(4).cautions()) == 1
    assert len(AutoWU(max_warmup=0.1).bind(1000).cautions()) == 1
    for meant in ({"max_warmup": 0}, {"positive_tests": math.inf}, {"max_warmup": 999}):
        assert AutoWU(**meant).bind(1000).cautions() == []
    for warmup in (1000, 5000):
        unended = AutoWU(max_warmup=warmup).bind(1000)
        (caution,) = unended.cautions()
        assert f"max_warmup={warmup}" in caution and "total_steps=1000" in caution
        *_, state = states([5 - step / 300 for step in range(999)], unended)
        assert not state.peak  # before the last step the rate still grows
    saved = Progress.start(AutoWU(), 100).dump()
    assert Progress.load(saved, AutoWU(confidence=0.9))[1]
    with pytest.raises(ValueError, match="start_scale"):
        Progress.load(saved, AutoWU(start_scale=1e-3))


# In a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [AutoWU(), FastFace(warmup_steps=20)], ids=repr)
def test_a_floor_does_not_lift_the_growth(schedule: Schedule, tmp_path: Path) -> None:
    """No decay goes below it, but a warm-up may begin there."""
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)
    scheduler = FastFaceLR(optimizer, 100, schedule, min_lr=LR / 4)
    callback, rates = FastFaceCallback(schedule, min_lr=LR / 4), LearningRates()
    quiet_trainer(tmp_path, [callback, rates], max_steps=100).fit(Scripted(), batches(10))
    for step in range(50):
        assert scheduler.get_last_lr() == pytest.approx([rates.first_group[step]])
        optimizer.step()
        scheduler.step(5.0 - step / 20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR)
    if isinstance(schedule, AutoWU):
        assert rates.first_group[0] < 1e-4 * LR and callback.get_last_lr() == [LR / 4]


@pytest.mark.parametrize(
    ("schedule", "steps", "read_every"),
    [(AutoWU(), 300, 32), (AutoWU(start_scale=0.1), 800, 8)],
    ids=["grows fast", "grows slowly"],
)
def test_blocks_are_left_where_the_scale_moves_fast(
    tmp_path: Path, schedule: AutoWU, steps: int, read_every: int
) -> None:
    """No rate is 5 % from what it would be if every loss were read, but in the block of the switch;
    where the scale moves slowly, losses are still read in blocks."""
    module = Scripted(lambda step, micro: TURN[step * 300 // steps])
    callback, rates = FastFaceCallback(schedule, read_every=read_every), LearningRates()
    with pytest.MonkeyPatch.context() as patch:
        sizes: list[int] = []
        read = FastFaceCallback._read

        def counted(self: FastFaceCallback) -> None:
            sizes.append(len(self._unread))
            read(self)

        patch.setattr(FastFaceCallback, "_read", counted)
        quiet_trainer(tmp_path, [callback, rates], max_steps=steps).fit(module, batches(10))
    losses = [float(torch.tensor(TURN[step * 300 // steps])) for step in range(steps)]
    expected = by_hand(losses, schedule.bind(steps))  # type: ignore[arg-type]
    (change,) = callback.changes
    for step, rate in rates.first_group.items():
        if not change.step < step <= change.step + read_every:
            assert rate == pytest.approx(expected[step], rel=0.05)
    assert sum(sizes) == steps and sizes.count(1) > 20
    assert max(sizes) == (read_every if schedule.start_scale else 1)


WEIGHT_NOISE = 0.1 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("min_lr", [0.0, 1e-9])
def test_a_run_made_longer_stays_where_the_cosine_ended(tmp_path: Path, min_lr: float) -> None:
    rates = LearningRates()
    for steps, file in ((30, None), (50, tmp_path / "a.ckpt")):
        callback = FastFaceCallback(AutoWU(), min_lr=min_lr)
        trainer = quiet_trainer(tmp_path, [callback, rates], max_steps=steps)
        trainer.fit(Scripted(), batches(10), ckpt_path=file)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert {rates.first_group[step] for step in range(30, 50)} == {min_lr}


class Quadratic(LightningModule):
    """A few noisy quadratics, trained by SGD: too high a rate really diverges, up to a clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(1, 2, 4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((self.weight - WEIGHT_NOISE[self.trainer.global_step]) ** 2).sum()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=100.0, momentum=0.5)


@pytest.mark.parametrize(
    ("schedule", "read_every"),
    [(AutoWU(), 32), (AutoWU(start_scale=0.01, test_every=21), 2)],
    ids=["every loss is read", "in blocks"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, schedule: AutoWU, read_every: int
) -> None:
    """Within a block as well, be it the one whose reading for the checkpoint ends the growth."""

    def fit(*callbacks: Any, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        module, rates = Quadratic(), LearningRates()
        watching = FastFaceCallback(schedule, read_every=read_every)
        trainer = quiet_trainer(
            tmp_path, [watching, rates, *callbacks], max_steps=400, gradient_clip_val=1.0
        )
        trainer.fit(module, batches(25), ckpt_path=ckpt_path)
        return trainer, rates.at, module.weight.tolist(), watching

    _, rates, weights, watching = fit()
    (change,) = watching.changes
    assert sum(weight**2 for weight in weights) < 1
    assert (change.step + 1) % 2 == (read_every == 2)
    for stop in (11, change.step + 1, change.step + 2, 394):
        trainer, *_ = fit(StopAt(stop))
        file = tmp_path / f"{stop}.ckpt"
        trainer.save_checkpoint(file)
        _, again, resumed, other = fit(ckpt_path=file)
        assert again == {step: lr for step, lr in rates.items() if step >= stop}
        assert resumed == weights and other.changes == watching.changes
