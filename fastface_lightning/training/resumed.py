"""A resumed run has the settings of its command where a checkpoint would bring back the old."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

# What a torch scheduler counts and computes; all else in its state is what it was made with.
COUNTED = {
    *("last_epoch", "_step_count", "_last_lr", "base_lrs", "max_lrs", "T_cur", "T_i", "best"),
    *("num_bad_epochs", "cooldown_counter", "mode_worse", "_get_lr_called_within_step"),
    *("_is_initial", "_initial_step", "_schedulers"),
}


def optimizer_record(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must say of an optimizer that nothing has scheduled yet: its class, and the
    base learning rate and the parameters, by their names in a module, of each group."""
    names = {p: name for name, p in module.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    lrs = [float(group["lr"]) for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "lrs": lrs, "groups": groups}


def set_optimizer(checkpoint: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Write an optimizer's settings into the states of a checkpoint that it will be filled with.

    Every learning rate, and what a torch scheduler takes as its base, is multiplied by new base
    over old base, so that a schedule goes on from where it stands.

    Args:
        checkpoint: Lightning's, with :func:`optimizer_record` under ``"optimizer"``.
        optimizer: as the run would make it anew.
        module: whose parameters it has.

    Returns:
        What is new, a phrase each.

    Raises:
        MisconfigurationException: it is of another class than the checkpoint's, or has the
            parameters in other groups.
    """
    (saved,), record = checkpoint["optimizer_states"], checkpoint["optimizer"]
    now = optimizer_record(optimizer, module)
    if now["class"] != record["class"]:
        raise MisconfigurationException(
            f"the checkpoint must come from the same optimizer, got one written with "
            f"{record['class']} for {now['class']}: resume with optimizer=NAME as it was"
        )
    if now["groups"] != record["groups"]:
        was = {name: k for k, group in enumerate(record["groups"]) for name in group}
        here = {name: k for k, group in enumerate(now["groups"]) for name in group}
        names = sorted(was.keys() | here.keys())
        moved = next((name for name in names if was.get(name) != here.get(name)), names[0])
        raise MisconfigurationException(
            f"a resumed run must have its parameters in the groups of the checkpoint, got {moved} "
            f"in another place: resume with optimizer.no_decay, optimizer.layer_decay and "
            f"model.freeze as they were, and classifier.lr null or a number as it was"
        )
    changes: dict[str, str] = {}
    factors: list[float] = []
    for group, new, base, lr in zip(
        saved["param_groups"], optimizer.param_groups, record["lrs"], now["lrs"], strict=True
    ):
        factors.append(lr / base if base else 1.0)
        if lr != base:
            if not any(math.isclose(factors[-1], earlier) for earlier in factors[:-1]):
                changes[f"lr {lr:g}, was {base:g}"] = ""  # of a factor's first group
            for key in [key for key in group if key == "lr" or key.endswith("_lr")]:
                group[key] = group[key] * factors[-1] if base else lr
        scheduled = {"momentum", "betas"} if "max_momentum" in group else set()
        for key in new.keys() - {"params", "lr"} - scheduled:
            if key in group and group[key] != new[key]:
                changes[f"{key} {new[key]}, was {group[key]}"] = ""
            group[key] = new[key]
    for state in _with_nested(checkpoint.get("lr_schedulers", ())):
        for key in {"base_lrs", "max_lrs", "_last_lr"} & state.keys():
            state[key] = [lr * factor for lr, factor in zip(state[key], factors, strict=False)]
    return list(changes)


def _with_nested(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states of schedulers, and of those that they are made of."""
    inside = [_with_nested(state.get("_schedulers", ())) for state in states]
    return [*states, *chain(*inside)]


def check_schedulers(saved: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> None:
    """Refuse to fill torch schedulers with the states of others.

    Args:
        saved: states in a checkpoint.
        now: states of the run's schedulers before anything is restored.

    Raises:
        MisconfigurationException: names the first setting that differs, of which a run's length is
            the usual one.
    """
    for before, after in zip(_with_nested(saved), _with_nested(now), strict=False):
        for key in after.keys() - COUNTED:
            if key in before and before[key] != after[key]:
                raise MisconfigurationException(
                    f"a torch schedule goes on as it was made, for one length of the run: {key} "
                    f"must be {before[key]}, got {after[key]}; give the schedule and trainer's "
                    f"max_epochs or max_steps as they were, or begin anew with weights=FILE"
                )
