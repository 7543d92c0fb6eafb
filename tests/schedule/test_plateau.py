"""The plateau rule, held on a detector so plain that a test chooses both response and level."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from fastface_lightning import MHLR, FastFace
from fastface_lightning.schedule import PlateauSchedule, PlateauState, Schedule, states
from fastface_lightning.schedule.base import Progress


@dataclass(frozen=True, kw_only=True, repr=False)
class Drop(PlateauSchedule):
    """Level: the loss itself. Response: how far it fell since the last one, 0 at the first."""

    window: float = 0.0

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {"threshold": 0.5, "patience": 0, "arm_after": 0}
    }

    def detect(self, state: PlateauState, loss: float) -> PlateauState:
        response = 0.0 if math.isnan(state.level) else state.level - loss
        return self.decide(state, loss, response, self.window)


def run(schedule: PlateauSchedule, losses: Iterable[float], total_steps: int = 100) -> list[Any]:
    """The states after each loss."""
    return list(states(losses, schedule.bind(total_steps)))


def scales(schedule: PlateauSchedule, losses: Iterable[float], total_steps: int = 100) -> list[Any]:
    return [state.scale for state in run(schedule, losses, total_steps)]


# The rule ---------------------------------------------------------------------------------------


def test_response_equal_to_the_threshold_is_not_flat() -> None:
    # The rule counts E < lambda, strictly.
    assert scales(Drop(arm_after=1), [3.0, 2.5, 2.0, 1.5]) == [1.0] * 4


def test_no_more_than_max_decays() -> None:
    assert scales(Drop(max_decays=2, factor=0.25), [1.0] * 4) == [0.25] + [0.0625] * 3
    assert run(Drop(max_decays=math.inf), [1.0] * 60)[-1].scale == 0.5**60


def test_plateaus_are_in_a_row_only_without_a_fall_between_them() -> None:
    schedule = Drop(restart_after=3)
    losses = [9.0, 9.0, 8.0, 8.0, 8.0, 8.0]
    assert scales(schedule, losses) == [0.5, 0.25, 0.25, 0.125, 0.0625, 0.25]


@pytest.mark.parametrize(
    ("arm_after", "steps"), [(0, 0), (7, 7), (0.2, 20), (math.inf, 100)], ids=str
)
def test_armed_after_arm_after_steps_at_the_latest(arm_after: int | float, steps: int) -> None:
    armed = [state.armed for state in run(Drop(arm_after=arm_after), [1.0] * 100)]
    assert armed == [step >= steps for step in range(100)]


@pytest.mark.parametrize(
    ("mode", "threshold", "flat"),
    [
        ("abs", 1.5, [False, False, True]),
        ("rel", 0.1, [True, False, False]),  # 0.1 x the level: 3.8, then 0.5, then 0.4
        ("rel", 0.3, [True, False, True]),  # 11.4, 1.5, 1.2
        ("peak", 0.04, [False, False, True]),  # 0.04 x 40, however far the level has fallen
    ],
)
def test_threshold_modes(mode: Any, threshold: float, flat: list[bool]) -> None:
    # The drops are 2, 33 and 1, onto levels of 38, 5 and 4, from a peak of 40.
    schedule = Drop(threshold=threshold, threshold_mode=mode, patience=50)
    after = run(schedule, [40.0, 38.0, 5.0, 4.0])
    assert [state.plateau_steps > 0 for state in after[1:]] == flat
    in_units = {"abs": 1.0, "rel": 5.0, "peak": 40.0}[mode] * threshold
    assert schedule.bind(100).threshold_at(after[2]) == pytest.approx(in_units)


@pytest.mark.parametrize("warmup_steps", [1, 0.25])
def test_warmup_is_linear(warmup_steps: int | float) -> None:
    # Optimizer step t runs at (t + 1) / W: the scale before the first loss is 1 / W.
    schedule = Drop(warmup_steps=warmup_steps, patience=50).bind(20)
    width = schedule.warmup_steps
    before = [schedule.init().scale, *scales(schedule, [1.0] * 9)]
    assert before == [min(1.0, (step + 1) / width) for step in range(10)]


@pytest.mark.parametrize("detector", [FastFace(), FastFace(variant="paper"), MHLR(haar_window=4)])
def test_real_detectors_see_nothing_until_warmup_ends(detector: PlateauSchedule) -> None:
    rest = [10 / (1 + step) for step in range(40)]
    warm = run(replace(detector, warmup_steps=3), [9.0, 99.0, 999.0, *rest])[-1]
    cold = run(detector, rest)[-1]
    assert warm._replace(step=cold.step, memory=()) == cold._replace(memory=())


# Losses that are no number -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "schedule",
    [Drop(), Drop(warmup_steps=9), FastFace(), FastFace(variant="released"), MHLR(haar_window=2)],
    ids=repr,
)
def test_nonfinite_loss_changes_only_its_counters(schedule: PlateauSchedule, bad: float) -> None:
    losses = [5.0, 4.0, 3.5, 3.5, 3.4, 3.4]
    clean = run(schedule, losses)
    dirty = run(schedule, [*losses[:3], bad, bad, *losses[3:]])
    assert [(s.nonfinite, s.nonfinite_run) for s in dirty[2:6]] == [(0, 0), (1, 1), (2, 2), (2, 0)]
    without = {"nonfinite": 0, "nonfinite_run": 0}
    assert repr(dirty[4]._replace(**without)) == repr(clean[2])
    assert repr(dirty[-1]._replace(**without)) == repr(clean[-1])


def test_too_many_nonfinite_losses_in_a_row_end_the_run() -> None:
    schedule = Drop(max_nonfinite=2).bind(10)
    apart = run(schedule, [1.0, math.nan, math.nan, 1.0, math.nan, math.nan, 1.0])[-1]
    assert (apart.nonfinite, apart.nonfinite_run) == (4, 0)
    with pytest.raises(ValueError, match=r"max_nonfinite=2 .* got 3"):
        run(schedule, [1.0] + [math.nan] * 3)


# Binding -----------------------------------------------------------------------------------------

SCHEDULES = [
    FastFace(),
    FastFace(variant="released", patience=10),
    FastFace(alpha=0.003, haar_window=7, threshold=0.1, threshold_mode="rel"),
    FastFace(ema_window=49, warmup_steps=0.1, arm_after=3),
    MHLR(),
    MHLR(haar_window=6, max_decays=3, restart_after=math.inf),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_binding_resolves_every_none_and_again_changes_nothing(schedule: PlateauSchedule) -> None:
    bound = schedule.bind(12_345)
    assert all(isinstance(value, int | float | str) for value in vars(bound).values())
    assert bound.bind(500) == bound
    assert eval(repr(schedule), globals() | {"inf": math.inf}) == schedule
    for total_steps in (1, 2, 10):
        run(schedule, [3.0] * total_steps, total_steps)


COMMON = {"factor": 0.5, "restart_factor": 4.0, "cooldown": 0, "warmup_steps": 0,
          "max_nonfinite": 100}  # fmt: skip
DEFAULTS = [
    (
        FastFace(),
        {"patience": 500, "max_decays": 8, "restart_after": math.inf, "arm_after": 2000}
        | {"threshold": 0.4 / 10_000, "threshold_mode": "peak", "ema_window": 271},
    ),
    *(
        (
            FastFace(variant=variant),  # type: ignore[arg-type]
            {"patience": 500, "max_decays": 8, "restart_after": math.inf, "arm_after": 0}
            | {"threshold": 5e-5, "threshold_mode": "abs", "ema_window": 1000},
        )
        for variant in ("paper", "released")
    ),
    (
        MHLR(),  # a loss that falls by s a step has the response s m / 4
        {"patience": 500, "max_decays": 8, "restart_after": math.inf, "arm_after": 2000}
        | {"threshold": 0.4 / 10_000 * 272 / 4, "threshold_mode": "peak", "haar_window": 272},
    ),
    (
        MHLR(variant="paper"),
        {"patience": 300, "max_decays": math.inf, "restart_after": 4, "arm_after": 0}
        | {"threshold": 0.06, "threshold_mode": "abs", "haar_window": 150},
    ),
]
GIVEN = {"patience": 7, "factor": 0.25, "max_decays": 2, "restart_after": 5, "restart_factor": 1.5,
         "cooldown": 4, "arm_after": 3, "warmup_steps": 9, "max_nonfinite": 2, "threshold": 0.01,
         "haar_window": 12}  # fmt: skip


@pytest.mark.parametrize(("schedule", "settings"), DEFAULTS, ids=repr)
def test_none_is_the_variants_own_default_and_a_value_wins_over_it(
    schedule: PlateauSchedule, settings: dict[str, Any]
) -> None:
    nulls = dict.fromkeys(vars(schedule)) | {"variant": schedule.variant}  # as YAML has them
    for bound in (schedule.bind(10_000), type(schedule)(**nulls).bind(10_000)):
        assert {name: getattr(bound, name) for name in settings | COMMON} == settings | COMMON
    given = replace(schedule, **GIVEN).bind(1000)
    assert {name: getattr(given, name) for name in GIVEN} == GIVEN
    assert type(schedule)(variant=None) == type(schedule)()


BOUND = FastFace().bind(100)


@pytest.mark.parametrize(
    "schedule",
    [MHLR(), replace(BOUND, patience=0.05), replace(BOUND, max_decays=None)],
    ids=repr,
)
def test_init_asks_for_bind_while_a_setting_is_open(schedule: PlateauSchedule) -> None:
    with pytest.raises(ValueError, match="bind"):
        schedule.init()


@dataclass(frozen=True, kw_only=True, repr=False)
class Bare(Drop):
    """A detector of one's own that says no more than a threshold, of the loss's own size."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    def of_length(self, total_steps: int) -> dict[str, Any]:
        return {"threshold": 1 / total_steps, "threshold_mode": "peak"}


def test_a_detector_of_ones_own_has_every_default() -> None:
    bound = Bare().bind(100)
    assert (bound.patience, bound.threshold, bound.threshold_mode) == (5, 0.01, "peak")
    assert Bare(threshold=0.5).bind(100).threshold_mode == "abs"
    assert Bare(threshold=0.5, threshold_mode="rel").bind(100).threshold_mode == "rel"
    for incomplete in (Schedule, PlateauSchedule):
        with pytest.raises(TypeError, match="abstract"):
            incomplete()  # type: ignore[abstract]


@dataclass(frozen=True, kw_only=True, repr=False)
class Thresholdless(Bare):
    def of_length(self, total_steps: int) -> dict[str, Any]:
        return {}


def test_a_detector_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold must be given"):
        Thresholdless().bind(100)


# Refusals ----------------------------------------------------------------------------------------

REFUSALS: list[dict[str, Any]] = [
    {"variant": "literal"},
    {"threshold": math.nan},
    {"threshold": "low"},
    {"threshold_mode": "rel"},
    {"factor": 1.0},
    {"restart_factor": 8.1, "restart_after": 4},
    {"max_decays": 1.5},
    {"restart_after": 0},
    *({"patience": value} for value in (-1, 1.0, 7.5, True, math.inf)),
    {"haar_window": 2.5},
    {"beta": 1.5},
    {"haar_window": 11, "beta": 0.1},
    {"total_steps": 0},
]


@pytest.mark.parametrize("detector", [FastFace, MHLR])
@pytest.mark.parametrize("setting", REFUSALS, ids=str)
def test_refuses_a_setting_out_of_its_range(
    detector: type[PlateauSchedule], setting: dict[str, Any]
) -> None:
    key, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        detector(**setting)


def test_refuses_what_one_detector_cannot_have() -> None:
    for odd in (
        {"haar_window": 101},
        {"beta": 0.003},
    ):  # its response is low by a share of the loss
        with pytest.raises(ValueError, match=r"haar_window must be even.*(101|333)"):
            MHLR(**odd).bind(4000)
    with pytest.raises(ValueError, match="haar_window must be at least 2 steps, got 1"):
        MHLR(haar_window=1)
    with pytest.raises(ValueError, match=r"released.*rel"):
        FastFace(variant="released", threshold=0.1, threshold_mode="rel")
    with pytest.raises(ValueError, match="variant='paper'"):
        FastFace(literal=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="total_steps"):
        FastFace().bind(10.0)  # type: ignore[arg-type]


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrote", "given", "named"),
    [
        (MHLR(), FastFace(), "MHLR("),
        (FastFace(haar_window=7), FastFace(), "haar_window=7"),
        (FastFace(), FastFace(variant="paper"), "variant='scaled'"),
        (MHLR(), MHLR(variant="paper"), "variant='scaled'"),
        (MHLR(warmup_steps=9), MHLR(), "warmup_steps=9"),
    ],
    ids=repr,
)
def test_checkpoint_of_another_schedule_is_refused_by_name(
    wrote: PlateauSchedule, given: PlateauSchedule, named: str
) -> None:
    with pytest.raises(ValueError, match="weights alone") as refusal:
        Progress.load(Progress.start(wrote, 1000).dump(), given)
    assert named in str(refusal.value) and repr(given) in str(refusal.value)


def test_a_checkpoint_of_an_earlier_release_is_refused() -> None:
    bound = FastFace().bind(100)
    earlier = {"schedule": "FastFace", "settings": {}, "bound": vars(bound), "state": {"step": 3}}
    with pytest.raises(ValueError, match=r"earlier release.*weights alone"):
        Progress.load(earlier, FastFace())


def test_a_checkpoint_goes_on_with_new_settings_that_its_state_allows() -> None:
    before = Progress.start(Drop(patience=9), 100)
    for loss in [1.0] * 8:
        before = before.update(loss)
    new = Drop(patience=0.03, threshold=0.25, factor=0.1, max_decays=1, cooldown=2)
    after, changed = Progress.load(before.dump(), new)
    assert after.bound == new.bind(100) and after.state == before.state
    assert [phrase.split()[0] for phrase in changed] == [
        "threshold", "patience", "factor", "max_decays", "cooldown",
    ]  # fmt: skip
    assert after.update(1.0).state.scale == pytest.approx(0.1)
    same, none = Progress.load(before.dump(), replace(Drop(patience=9), total_steps=100))
    assert same.state == before.state and none == []


# What a run is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "total_steps", "named"),
    [
        (MHLR(haar_window=4000), 600, "8000"),
        (MHLR(variant="paper", haar_window=100), 400, "patience 200"),
        (FastFace(variant="paper"), 2000, "2000"),
        (FastFace(patience=99, warmup_steps=280), 350, "patience 99"),
        (FastFace(), 60, "60 steps"),
        (FastFace(max_decays=0), 5000, "max_decays"),
    ],
    ids=repr,
)
def test_says_what_cannot_act_in_a_run(
    schedule: PlateauSchedule, total_steps: int, named: str
) -> None:
    (caution,) = schedule.bind(total_steps).cautions()
    assert named in caution
    assert schedule.bind(100 * total_steps).cautions() == [] or schedule.max_decays == 0


@pytest.mark.parametrize("schedule", [FastFace(), MHLR(), MHLR(variant="paper", haar_window=4000)])
def test_says_nothing_of_a_run_that_fits(schedule: PlateauSchedule) -> None:
    assert [schedule.bind(steps).cautions() for steps in (20_000, 202_320)] == [[], []]


@pytest.mark.parametrize(
    ("total_steps", "most"), [(20, 0), (60, 0), (150, 0), (299, 0), (300, 1), (624, 4), (999, 7)]
)
@pytest.mark.parametrize("detector", [FastFace, MHLR])
def test_a_short_run_decays_less_often(
    detector: type[PlateauSchedule], total_steps: int, most: int
) -> None:
    """Hardly trained, its loss is flat by the default threshold, which is none of the user's."""
    flat = [3.0] * total_steps
    assert run(detector(), flat, total_steps)[-1].decays == most
    assert run(detector(patience=0), [3.0] * 5000, 5000)[-1].decays == 8
    assert run(detector(patience=0, threshold=1.0), flat, total_steps)[-1].decays == 8


# Losses of any sign ------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", [FastFace, MHLR])
def test_a_negative_loss_decays_where_it_goes_flat(detector: type[PlateauSchedule]) -> None:
    """Its fall has a size of its own: from -1 to -11, through zero, or down to zero."""
    fall = [-10 * (1 - math.exp(-step / 100)) for step in range(2000)]
    decayed = []
    for start in (10.5, 5.0, 0.0, -1.0, -40.0):
        after = run(detector(), [start + drop for drop in fall], 2000)
        assert after[-1].decays == 8
        decayed.append(next(step for step, state in enumerate(after) if state.decays))
    assert all(300 < step < 900 for step in decayed), decayed


def test_relative_thresholds_take_the_size_of_a_negative_loss() -> None:
    rel = Drop(threshold=0.1, threshold_mode="rel").bind(100)
    peak = replace(rel, threshold_mode="peak")
    lowest = PlateauState(level=-30.0, peak=-10.0)
    assert rel.threshold_at(lowest) == pytest.approx(3.0)
    assert peak.threshold_at(lowest) == pytest.approx(2.0)  # it has fallen by 20
    assert peak.threshold_at(lowest._replace(level=-11.0)) == pytest.approx(1.0)
    assert peak.threshold_at(lowest._replace(peak=-math.inf)) == -math.inf


# Cooldown ----------------------------------------------------------------------------------------


def test_cooldown_steps_after_a_decay_do_not_count() -> None:
    flat = scales(Drop(cooldown=3, patience=1), [1.0] * 12)
    # Flat steps 1 and 2 decay; 3 are left out; then 2 again.
    assert flat == [1.0] + [0.5] * 5 + [0.25] * 5 + [0.125]
    assert scales(Drop(cooldown=0, patience=1), [1.0] * 6) == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    # A fall in the cooldown ends a row of plateaus all the same.
    schedule = Drop(cooldown=2, restart_after=2, restart_factor=2.0)
    assert scales(schedule, [9.0, 9.0, 9.0, 9.0]) == [0.5, 0.5, 0.5, 1.0]
    assert scales(schedule, [9.0, 8.0, 8.0, 8.0]) == [0.5, 0.5, 0.5, 0.25]
    assert schedule.bind(100).metrics(run(schedule, [9.0, 9.0])[-1])["plateau"] == 0
