"""Every example in a docstring runs and prints what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import fastface_lightning

PACKAGE = Path(fastface_lightning.__file__).parent
PUBLIC = ["autowu", "callback", "fastface", "lr_scheduler", "mhlr", "replay"]
MODULES = sorted(
    f"fastface_lightning.{part}.{file.stem}"
    for part in ("schedule", "margins", "evaluation")
    for file in (PACKAGE / part).glob("[!_]*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_parts_of_the_schedule_have_an_example(name: str) -> None:
    assert doctest.testmod(import_module(f"fastface_lightning.schedule.{name}")).attempted > 0
