"""The plateau rule, held on a detector so plain that a test chooses both response and level."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning import MHLR, FastFace
from fastface_lightning.schedule.plateau import Checkpointed, PlateauSchedule, PlateauState


@dataclass(frozen=True, kw_only=True, repr=False)
class Drop(PlateauSchedule):
    """Level: the loss itself. Response: how far it fell since the last one, 0 at the first."""

    threshold: float | None = 0.5
    patience: int | float | None = 0
    arm_after: int | float = 0
    window: float = 0.0

    def _resolve(self, total_steps: int) -> "Drop":
        return self

    def _detect(self, state: PlateauState, loss: float) -> PlateauState:
        response = 0.0 if math.isnan(state.level) else state.level - loss
        return self._decide(state, loss, response, self.window)

    def _windows(self) -> str:
        return "no window"


def run(schedule: PlateauSchedule, losses: Iterable[float], total_steps: int = 100) -> list[Any]:
    """The states after each loss."""
    schedule = schedule.bind(total_steps)
    state, states = schedule.init(), []
    for loss in losses:
        state = schedule.update(state, loss)
        states.append(state)
    return states


def scales(schedule: PlateauSchedule, losses: Iterable[float], total_steps: int = 100) -> list[Any]:
    return [state.scale for state in run(schedule, losses, total_steps)]


# Patience, factor, cap ---------------------------------------------------------------------------


@given(st.integers(0, 12))
def test_divides_at_exactly_patience_plus_one_flat_steps(patience: int) -> None:
    states = run(Drop(patience=patience), [1.0] * (patience + 2))
    assert [state.scale for state in states[:patience]] == [1.0] * patience
    assert states[patience].scale == 0.5
    # The count starts anew with the division.
    assert states[patience].plateau_steps == 0
    assert states[patience + 1].plateau_steps == (1 if patience else 0)


def test_one_step_above_the_threshold_starts_the_count_anew() -> None:
    flat, fall = [5.0] * 3, [4.0] * 4
    assert [s.plateau_steps for s in run(Drop(patience=3), flat + fall)] == [1, 2, 3, 0, 1, 2, 3]


def test_response_equal_to_the_threshold_is_not_flat() -> None:
    # The rule counts E < lambda, strictly.
    assert scales(Drop(arm_after=1), [3.0, 2.5, 2.0, 1.5]) == [1.0] * 4


def test_patience_as_a_share_of_the_run_is_rounded_down() -> None:
    # int(tau T): 0.05 of 119 steps are 5.
    assert Drop(patience=0.05).bind(119).patience == 5
    assert Drop(patience=5).bind(119).patience == 5


@given(st.floats(0.01, 0.99))
def test_each_division_multiplies_by_factor(factor: float) -> None:
    schedule = Drop(factor=factor, restart_after=None)
    assert scales(schedule, [1.0] * 3) == [
        factor,
        factor * factor,
        factor * factor * factor,
    ]


@pytest.mark.parametrize("max_decays", [0, 1, 3])
def test_no_more_than_max_decays_divisions(max_decays: int) -> None:
    last = run(Drop(max_decays=max_decays), [1.0] * 10)[-1]
    assert (last.decays, last.scale) == (max_decays, 0.5**max_decays)


def test_no_limit_on_divisions_unless_asked_for() -> None:
    assert run(Drop(), [1.0] * 60)[-1].scale == 0.5**60


# Restart -----------------------------------------------------------------------------------------


def test_restart_replaces_the_fourth_division_in_a_row() -> None:
    schedule = Drop(restart_after=4, restart_factor=4.0)
    assert scales(schedule, [1.0] * 8) == [0.5, 0.25, 0.125, 0.5, 0.25, 0.125, 0.0625, 0.25]
    last = run(schedule, [1.0] * 8)[-1]
    assert (last.decays, last.restarts, last.plateaus) == (6, 2, 0)


def test_plateaus_are_in_a_row_only_without_a_fall_between_them() -> None:
    schedule = Drop(restart_after=3)
    losses = [9.0, 9.0, 8.0, 8.0, 8.0, 8.0]
    assert scales(schedule, losses) == [0.5, 0.25, 0.25, 0.125, 0.0625, 0.25]


def test_restarts_go_on_after_the_last_division() -> None:
    assert scales(Drop(restart_after=3, max_decays=1), [1.0] * 6) == [0.5, 0.5, 2.0, 2.0, 2.0, 8.0]


# Arming ------------------------------------------------------------------------------------------


def test_flat_and_rising_losses_do_not_count_before_the_rule_is_armed() -> None:
    rise = [10.0 + step / 10 for step in range(30)]
    states = run(Drop(arm_after=0.9), rise)
    assert not any(state.armed for state in states)
    assert {state.scale for state in states} == {1.0}


def test_armed_once_the_level_has_lost_five_percent_of_its_peak() -> None:
    # The peak is 20, so 19 arms and 19.01 does not, although both lie above the first loss.
    states = run(Drop(arm_after=99), [10.0, 20.0, 19.01, 19.0, 19.0])
    assert [state.armed for state in states] == [False, False, False, True, True]
    assert [state.scale for state in states] == [1.0, 1.0, 1.0, 0.5, 0.25]


def test_stays_armed_when_the_loss_rises_again() -> None:
    assert [s.armed for s in run(Drop(arm_after=99), [10.0, 9.0, 30.0])] == [False, True, True]


@pytest.mark.parametrize(("arm_after", "steps"), [(0, 0), (7, 7), (0.2, 20), (0.999, 99)], ids=str)
def test_armed_after_arm_after_steps_at_the_latest(arm_after: int | float, steps: int) -> None:
    armed = [state.armed for state in run(Drop(arm_after=arm_after), [1.0] * 100)]
    assert armed == [step >= steps for step in range(100)]


def test_peak_is_taken_from_half_a_window_on() -> None:
    # One loss is no average yet: at window 4 the first two losses are not in the peak.
    states = run(Drop(arm_after=99, window=4.0), [100.0, 50.0, 10.0, 10.0, 9.0])
    assert [state.peak for state in states] == [-math.inf, -math.inf, 10.0, 10.0, 10.0]
    assert [state.armed for state in states] == [False, False, False, False, True]


# Threshold ---------------------------------------------------------------------------------------


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
    states = run(schedule, [40.0, 38.0, 5.0, 4.0])[1:]
    assert [state.plateau_steps > 0 for state in states] == flat


@pytest.mark.parametrize(("mode", "threshold"), [("abs", 0.1), ("rel", 0.3), ("peak", 0.4)])
def test_threshold_at_is_in_the_responses_unit(mode: Any, threshold: float) -> None:
    schedule = Drop(threshold=0.1, threshold_mode=mode).bind(10)
    assert schedule.threshold_at(run(schedule, [4.0, 3.0])[-1]) == pytest.approx(threshold)


# Warm-up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [1, 5, 0.25])
def test_warmup_is_linear(warmup_steps: int | float) -> None:
    # Optimizer step t runs at (t + 1) / W: the scale before the first loss is 1 / W.
    schedule = Drop(warmup_steps=warmup_steps, patience=50).bind(20)
    width = schedule.warmup_steps
    before = [schedule.init().scale, *scales(schedule, [1.0] * 9)]
    assert before == [min(1.0, (step + 1) / width) for step in range(10)]


def test_detector_sees_nothing_until_warmup_ends() -> None:
    # However wild the warm-up, the states after it are those of a run that starts there.
    schedule = Drop(warmup_steps=4, patience=2, arm_after=1)
    rest = [3.0, 3.0, 2.9, 2.0, 2.0, 2.0, 2.0]
    warm = run(schedule, [50.0, math.e, 1e9, -7.0, *rest])
    assert all(math.isnan(state.level) and state.plateau_steps == 0 for state in warm[:4])
    cold = run(replace(schedule, warmup_steps=0), rest)
    assert [state._replace(step=state.step - 4) for state in warm[4:]] == cold


@pytest.mark.parametrize("detector", [FastFace(), FastFace(literal=True), MHLR(haar_window=4)])
def test_real_detectors_see_nothing_until_warmup_ends(detector: PlateauSchedule) -> None:
    rest = [10 / (1 + step) for step in range(40)]
    warm = run(replace(detector, warmup_steps=3), [9.0, 99.0, 999.0, *rest])[-1]
    cold = run(detector, rest)[-1]
    assert warm._replace(step=cold.step, memory=()) == cold._replace(memory=())


# Losses that are no number -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "schedule",
    [Drop(), Drop(warmup_steps=9), FastFace(), FastFace(released=True), MHLR(haar_window=2)],
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
    with pytest.raises(
        ValueError,
        match=r"at most max_nonfinite=2 losses in a row may be NaN or infinite, got 3 "
        r"\(the last is nan, after 1 finite ones\)",
    ):
        run(schedule, [1.0] + [math.nan] * 3)


# Binding -----------------------------------------------------------------------------------------

SCHEDULES = [
    FastFace(),
    FastFace(literal=True),
    FastFace(released=True, patience=10),
    FastFace(alpha=0.003, haar_window=7, threshold=0.1, threshold_mode="rel"),
    FastFace(ema_window=49, warmup_steps=0.1, arm_after=3),
    MHLR(),
    MHLR(beta=1 / 49, patience=0.2),
    MHLR(haar_window=5, max_decays=3, restart_after=None),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_binding_again_changes_nothing(schedule: PlateauSchedule) -> None:
    bound = schedule.bind(12_345)
    assert bound.bind(12_345) == bound
    assert bound.bind(500) == bound


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("total_steps", [1, 2, 10])
def test_binds_to_the_shortest_runs(schedule: PlateauSchedule, total_steps: int) -> None:
    run(schedule, [3.0] * total_steps, total_steps)


@pytest.mark.parametrize("total_steps", [0, -5, 10.0, math.inf, True, None])
def test_total_steps_must_be_a_positive_whole_number(total_steps: Any) -> None:
    with pytest.raises(ValueError, match=r"total_steps must be at least 1 step, got"):
        FastFace().bind(total_steps)


@pytest.mark.parametrize(
    "schedule",
    [
        FastFace(),
        MHLR(),
        FastFace(threshold=0.1, threshold_mode="abs", patience=3, arm_after=0),
        MHLR(threshold_mode="abs", patience=3, arm_after=0),
        MHLR(haar_window=2, threshold_mode="abs", patience=3, warmup_steps=0.1),
        MHLR(haar_window=2, threshold_mode="abs", patience=3, arm_after=0.2),
    ],
    ids=repr,
)
def test_init_asks_for_bind_while_a_setting_is_open(schedule: PlateauSchedule) -> None:
    with pytest.raises(ValueError, match=r"init\(\) needs a bound schedule, got .*: call bind"):
        schedule.init()


# Refusals at the door ----------------------------------------------------------------------------

REFUSALS = [
    ({"threshold": -0.1}, "threshold must be at least 0 and finite, got -0.1"),
    ({"threshold": math.inf}, "threshold must be at least 0 and finite, got inf"),
    ({"threshold": math.nan}, "threshold must be at least 0 and finite, got nan"),
    ({"threshold_mode": "max"}, "threshold_mode must be 'abs', 'rel' or 'peak', got 'max'"),
    ({"factor": 0.0}, r"factor must lie in \(0, 1\), got 0.0"),
    ({"factor": 1.0}, r"factor must lie in \(0, 1\), got 1.0"),
    ({"factor": math.nan}, r"factor must lie in \(0, 1\), got nan"),
    ({"restart_factor": 0.9}, "restart_factor must be at least 1, got 0.9"),
    ({"restart_factor": math.inf}, "restart_factor must be at least 1, got inf"),
    ({"max_decays": -1}, "max_decays must be at least 0, got -1"),
    ({"max_decays": 1.5}, "max_decays must be a whole number, got 1.5"),
    ({"restart_after": 0}, "restart_after must be at least 1, got 0"),
    ({"max_nonfinite": 0}, "max_nonfinite must be at least 1, got 0"),
    ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    *(
        (
            {name: value},
            f"{name} must be a whole number of steps or a share of the run below 1, got {value}",
        )
        for name in ("patience", "arm_after", "warmup_steps")
        for value in (-1, -0.5, 1.0, 7.5, math.nan, True)
    ),
]


@pytest.mark.parametrize("detector", [FastFace, MHLR])
@pytest.mark.parametrize(("setting", "message"), REFUSALS, ids=lambda case: str(case)[:40])
def test_refuses_a_setting_out_of_its_range(
    detector: type[PlateauSchedule], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        detector(**setting)


@pytest.mark.parametrize(
    ("detector", "setting", "message"),
    [
        (FastFace, {"ema_window": 0}, "ema_window must be at least 1 step, got 0"),
        (FastFace, {"haar_window": 2.5}, "haar_window must be a whole number, got 2.5"),
        (FastFace, {"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0.0"),
        (FastFace, {"beta": 1.5}, r"beta must lie in \(0, 1\], got 1.5"),
        (
            FastFace,
            {"alpha": 0.3, "ema_window": 10},
            "give ema_window or alpha = 1/ema_window, not both, got ema_window=10, alpha=0.3",
        ),
        (
            FastFace,
            {"literal": True, "released": True},
            "literal and released exclude each other, got both True",
        ),
        (MHLR, {"haar_window": 1}, "haar_window must be at least 2 steps, got 1"),
        (MHLR, {"beta": 0.6}, r"beta must lie in \(0, 0.5\], got 0.6"),
        (
            MHLR,
            {"beta": 0.1, "haar_window": 11},
            "give haar_window or beta = 1/haar_window, not both, got haar_window=11, beta=0.1",
        ),
    ],
    ids=str,
)
def test_refuses_a_window_out_of_its_range(
    detector: type[PlateauSchedule], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        detector(**setting)


@pytest.mark.parametrize("name", ["warmup_steps", "max_nonfinite"])
def test_none_is_refused_where_it_has_no_meaning(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        FastFace(**{name: None})  # type: ignore[arg-type]


def test_bind_resolves_every_none() -> None:
    # To the detector's own default where there is one.
    assert FastFace(patience=None).bind(1000).patience == 50
    assert MHLR(threshold=None).bind(1000).threshold == 0.06


@pytest.mark.parametrize(
    "given",
    [
        {"threshold_mode": "rel"},
        {"threshold_mode": "rel", "literal": True},
        {"arm_after": 50, "literal": True},
    ],
    ids=str,
)
def test_bind_changes_nothing_that_was_given(given: dict[str, Any]) -> None:
    # A setting is used as given or refused, never replaced in silence.
    try:
        schedule = FastFace(**given).bind(1000)
    except ValueError:
        return
    assert {name: getattr(schedule, name) for name in given} == given


# What people see ---------------------------------------------------------------------------------


def test_repr_shows_what_was_given() -> None:
    assert repr(FastFace()) == "FastFace()"
    assert repr(MHLR(haar_window=4000, patience=0.1)) == "MHLR(patience=0.1, haar_window=4000)"
    assert eval(repr(FastFace(literal=True, factor=0.1))) == FastFace(literal=True, factor=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_describe_is_one_line_for_the_log(schedule: PlateauSchedule) -> None:
    line = schedule.bind(5000).describe()
    assert line.startswith(type(schedule).__name__) and "\n" not in line


# Checkpoints -------------------------------------------------------------------------------------


def checkpoint(given: PlateauSchedule) -> dict[str, Any]:
    bound = given.bind(1000)
    return Checkpointed(given, bound, bound.init()).dump()


def test_checkpoint_keeps_the_settings_its_run_was_bound_to() -> None:
    loaded = Checkpointed.load(checkpoint(FastFace()), FastFace())
    assert loaded.bound == FastFace().bind(1000)
    assert loaded.given == FastFace()


@pytest.mark.parametrize(
    ("wrote", "given", "named"),
    [
        (MHLR(), FastFace(), "MHLR"),
        (FastFace(patience=7), FastFace(), "patience=7"),
        (FastFace(), FastFace(literal=True), "literal=False"),
        (MHLR(haar_window=10), MHLR(haar_window=20), "haar_window=10"),
    ],
    ids=repr,
)
def test_checkpoint_of_another_schedule_is_refused_by_name(
    wrote: PlateauSchedule, given: PlateauSchedule, named: str
) -> None:
    with pytest.raises(
        ValueError, match=r"the checkpoint was written by another schedule \((.+)\) than (.+): "
    ) as refusal:
        Checkpointed.load(checkpoint(wrote), given)
    assert f"({named}) than {given!r}" in str(refusal.value)


def test_an_older_checkpoint_has_the_defaults_of_settings_that_it_does_not_know() -> None:
    saved = checkpoint(FastFace())
    del saved["given"]["total_steps"], saved["bound"]["total_steps"], saved["state"]["restarts"]
    loaded = Checkpointed.load(saved, FastFace())
    assert loaded.bound == replace(FastFace().bind(1000), total_steps=None)
    assert loaded.state == FastFace().bind(1000).init()
    with pytest.raises(ValueError, match=r"another schedule \(total_steps=None\) than"):
        Checkpointed.load(saved, FastFace(total_steps=9))


def test_checkpoint_names_a_setting_that_the_schedule_does_not_have() -> None:
    saved = checkpoint(FastFace())
    saved["given"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"another schedule \(momentum=0.9\) than"):
        Checkpointed.load(saved, FastFace())


def test_bound_settings_are_primitives() -> None:
    for schedule in SCHEDULES:
        assert all(
            isinstance(value, int | float | str | None)
            for value in asdict(schedule.bind(9)).values()
        )
