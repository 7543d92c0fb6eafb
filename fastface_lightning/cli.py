"""A command-line program: Hydra's config in, bad input answered in one sentence."""

from __future__ import annotations

import difflib
import functools
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)
Task = Callable[[DictConfig], Any]
BAD_INPUT = (
    ValueError,
    OSError,  # absent files, full disks, places where one may not write
    ModuleNotFoundError,
    HydraException,
    OmegaConfBaseException,
)
FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c"),
)
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning's, in its order


def program(
    config_path: Path, config_name: str, resumes: bool = False, files: str | None = None
) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a config a program.

    ``key=value`` overrides the config, ``--help`` explains it, ``-m`` sweeps. Bad input ends the
    program with one sentence on stderr and exit code 2; ``HYDRA_FULL_ERROR=1`` shows the traceback
    instead. A sweep goes on past jobs that fail, and leaves ``sweep.json`` and ``sweep.png``.

    Args:
        config_path: folder of configs, absolute.
        config_name: the program's own config in it.
        resumes: whether ``resume=auto`` and ``resume=FILE`` are composed of what the run was
            composed of, its ``overrides.yaml``, with the command's settings on top.
        files: the setting that takes, as a list, the arguments that are no ``key=value``.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            find_recipes(config_path)
            stderr, hydra_stderr = sys.stderr, io.StringIO()
            sweeps: list[Path] = []  # the folder of the sweep, once a job of one has started

            @functools.wraps(task)
            def job(config: DictConfig) -> Any:
                with redirect_stderr(stderr):
                    check_additions(config, config_name)
                    if HydraConfig.get().mode != RunMode.MULTIRUN:
                        return task(config)
                    sweeps[:] = [Path(HydraConfig.get().sweep.dir)]
                    return sweep_job(task, config)

            error: Exception | None = None
            if files is not None:
                sys.argv[1:] = with_files(sys.argv[1:], files)
            sys.argv[1:] = [as_typed(argument) for argument in sys.argv[1:]]
            if resumes:
                sys.argv[1:] = with_earlier_settings(sys.argv[1:], config_path, config_name)
            try:
                # Hydra prints an error in its own way and exits: what it prints is kept back.
                with redirect_stderr(hydra_stderr):
                    hydra.main(str(config_path), config_name, version_base="1.3")(job)()
            except SystemExit as end:
                if end.code != 1 or not isinstance(end.__context__, Exception):
                    raise
                error = end.__context__
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            finally:
                if error is None:
                    stderr.write(hydra_stderr.getvalue())
                if sweeps and is_first_rank():  # also when jobs failed, or the sweep was stopped
                    from .report.sweep import report_sweep

                    report_sweep(sweeps[0])
            if error is not None:
                text = sentence(error)
                if text is None:  # a fault of the program
                    raise error
                if hint := did_you_mean(text, config_path, config_name):
                    text = text.rstrip(".") + hint
                print(f"error: {text}", file=sys.stderr)
                write_to_logs(text)
                sys.exit(2)

        return main

    return decorate


def write_to_logs(text: str) -> None:
    """Put an error that the console has been told into the run's log file, where there is one."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def sweep_job(task: Task, config: DictConfig) -> Any:
    """Run a job of a sweep; why it failed is left in its folder, as ``failure.txt``."""
    failure = Path(HydraConfig.get().runtime.output_dir) / "failure.txt"
    if is_first_rank():
        failure.unlink(missing_ok=True)
    try:
        return task(config)
    except BaseException as error:
        answer = sentence(error)
        line = answer or " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        fault = answer is None and isinstance(error, Exception)
        log.error("this job failed: %s", line, exc_info=fault)
        if is_first_rank():
            failure.write_text(line + "\n", encoding="utf-8")
        raise
    finally:
        if is_first_rank():  # a sweep that is killed leaves what its jobs achieved so far
            from .report.sweep import record_jobs

            record_jobs(Path(HydraConfig.get().sweep.dir))


def is_first_rank() -> bool:
    """Whether this process is the only one or the first of those that train together."""
    return next((os.environ[key] for key in RANKS if key in os.environ), "0") == "0"


def confirm(sentence: str) -> None:
    """Say what is going to happen, and where somebody sits at a terminal ask for a yes.

    Raises:
        ValueError: the answer is no.
    """
    log.warning(sentence)
    asks = is_first_rank() and sys.stdin is not None and sys.stdin.isatty()
    if asks and not input("Go on? [y/N] ").strip().lower().startswith("y"):
        raise ValueError(f"{sentence}, which was not confirmed")


class Recipes(SearchPathPlugin):
    """Puts ``folder`` on Hydra's search path: its folders are groups, ``+paper=f2c_ms1m``.

    ``hydra.searchpath`` will not do: a config that includes another may not inherit it.
    """

    folder: Path

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("recipes", str(self.folder))


def find_recipes(config_path: Path) -> None:
    """Let commands name the recipes that lie beside a folder of configs, wherever one works."""
    Recipes.folder = config_path.parent / "recipes"
    Plugins.instance().register(Recipes)


def as_typed(argument: str) -> str:
    """An argument ``key=PATH`` as Hydra takes it, quoted where the path has characters that its
    grammar has another use for, such as blanks, commas or brackets; ``~`` is the home folder.

    A path is known by a file or folder that is there, or by its ``~``.
    """
    if argument.startswith("-"):
        return argument
    key, equals, value = argument.partition("=")
    path = os.path.expanduser(value)
    plain = re.fullmatch(r"[\w./:+-]*", path, re.ASCII)
    if not equals or "${" in value or (plain and path == value) or not value[:1].strip("\"'"):
        return argument
    if path == value and not (os.path.exists(path) or key in ("hydra.run.dir", "hydra.sweep.dir")):
        return argument
    return f"{key}={path}" if plain else f"{key}={quoted(path)}"


def quoted(text: str) -> str:
    """A string as Hydra's grammar takes it, whatever is in it."""
    inside = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{inside}'"


def with_files(arguments: list[str], key: str) -> list[str]:
    """The arguments, those that name files as one ``key=[…]``."""
    names: list[str] = []
    others: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        of_flag = argument[:1] == "-" or before in FLAGS_WITH_VALUE
        is_file = "=" not in argument or os.path.exists(argument)
        (names if is_file and not of_flag else others).append(argument)
    return [*others, f"{key}=[{','.join(map(quoted, names))}]"] if names else arguments


def with_earlier_settings(arguments: list[str], config_path: Path, config_name: str) -> list[str]:
    """The arguments of a run that is gone on with, under those of this command.

    With ``resume=auto`` they are the run folder's, with ``resume=FILE`` those beside the file. What
    another option of a group does not know is left out, and said. A sweep's jobs are composed of
    its command alone.
    """
    options = [text for text in arguments if text.startswith("-")]
    given = {text.partition("=")[0]: text for text in arguments if text not in options}
    resume, run = (_value(given.get(key)) for key in ("resume", "hydra.run.dir"))
    if not resume or (resume == "auto" and not run) or {"-m", "--multirun"} & {*options}:
        return arguments
    folder = Path(run) if resume == "auto" else Path(resume).parent.parent
    earlier = folder / "overrides.yaml"
    if not earlier.is_file():
        if resume != "auto" or (folder / "checkpoints").exists():
            print(f"no settings in {earlier}: composed of this command alone", file=sys.stderr)
        return arguments
    before = {text.partition("=")[0]: text for text in map(str, OmegaConf.load(earlier))}
    # Another option for a group may not have all the settings of the one before.
    changed = {group for group, text in given.items() if before.get(group) != text}
    doubtful = {key for key in before if "." in key and key.split(".")[0] in changed} - {*given}
    kept = {key: text for key, text in before.items() if key not in doubtful | given.keys()}
    groups = [text for key, text in given.items() if re.fullmatch(r"[\w+/@]+", key)]

    def composes(*more: str) -> bool:
        try:
            compose(config_name, [*kept.values(), *groups, *more])
        except HydraException:
            return False
        return True

    with initialize_config_dir(str(config_path), version_base="1.3"):
        if doubtful and composes():  # else Hydra says what is wrong
            for key in sorted(doubtful):
                if composes(before[key]):
                    kept[key] = before[key]
                else:
                    part = given[key.split(".")[0]]
                    text = f"{before[key]} is left out: {part} has no such setting"
                    print(text, file=sys.stderr)
    return [*options, *kept.values(), *given.values()]


def _value(argument: str | None) -> str:
    """The value of ``key=value`` as Hydra reads it; empty where there is none."""
    if argument is None:
        return ""
    try:
        value = OverridesParser.create().parse_override(argument).value()
        return str(OmegaConf.to_container(OmegaConf.create([value]), resolve=True)[0])  # type: ignore[index]
    except (HydraException, OmegaConfBaseException):
        return ""


def check_additions(config: DictConfig, config_name: str) -> None:
    """Refuse what ``+key=value`` adds where no object is built that would heed it."""
    overrides = list(HydraConfig.get().overrides.task)
    unheeded: dict[str, str] = {}
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if not text.startswith("+") or not _has(config, key):
            continue  # not added, or a group
        parts = key.split(".")
        nodes = [OmegaConf.select(config, ".".join(parts[: end + 1])) for end in range(len(parts))]
        if not any(isinstance(node, DictConfig) and "_target_" in node for node in nodes):
            unheeded[text] = key
    if unheeded:
        plain = compose(config_name, [text for text in overrides if text not in unheeded])
        for text, key in unheeded.items():
            if not _has(plain, key):
                raise ValueError(f"no setting is called {key}, got {text}{nearest(key, plain)}")


def _has(config: DictConfig, key: str) -> bool:
    """Whether a config has a key, whatever its value."""
    inside, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, inside) if inside else config
    return isinstance(parent, DictConfig) and name in parent


def did_you_mean(text: str, config_path: Path, config_name: str) -> str:
    """What may help with an error of Hydra's: the key nearest to one it does not know, the quotes
    around a value that it cannot read."""
    if "hydra.cc/docs" in text and "override_grammar" in text:
        return ", or put quotes around the value, as in 'data.root=\"/my faces, (all)\"'"
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown is None:
        return ""
    others = [text for text in sys.argv[1:] if not text.startswith(f"{unknown[1]}=")]
    groups = [text for text in others if re.match(r"[\w@+/]+=", text)]
    try:
        with initialize_config_dir(str(config_path), version_base="1.3"):
            return nearest(unknown[1], compose(config_name, groups))
    except (HydraException, OmegaConfBaseException):
        return ""


def nearest(key: str, config: DictConfig) -> str:
    """The setting whose name is nearest to ``key``, as a question; nothing where none is."""

    def names(node: Any, prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")

    known = [name for name in names(OmegaConf.to_container(config)) if not key.startswith(name)]
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def check_numbers(config: DictConfig, least: Mapping[str, float]) -> None:
    """Refuse words where a program itself needs a number, and numbers below the least allowed."""
    for key, bound in least.items():
        value = OmegaConf.select(config, key)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{key} must be a number, got {value!r}")
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{key} must be at least {bound:g} and finite, got {value}")


def sentence(error: BaseException) -> str | None:
    """What to tell of bad input, in one line; None of any other error."""
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    # A setting that the object built from it does not know shows as TypeError: at once, or when
    # what is built in two parts (_partial_) gets its last arguments.
    unknown = isinstance(cause, TypeError) and (
        cause is not error or "unexpected keyword argument" in str(cause)
    )
    # Known by its name, since nothing here loads Lightning.
    misconfigured = type(cause).__name__ == "MisconfigurationException"
    if not (isinstance(cause, BAD_INPUT) or unknown or misconfigured):
        return None
    from .files import printable

    text = str(cause).split("\n    full_key:")[0].split("\nConfig search path:")[0]
    text = text.rpartition("\nValueError: ")[2]  # what a loader's worker died of
    text = re.sub(r"\s+To append to your config use \S+", "", text)  # would not help
    return printable(" ".join(text.split()))
