"""Which way to train recognises most at a quarter of the images? ``benchmarks/compare.py --help``.

A small network at 32 x 32 pixels, its learning rate tuned for every way in the same manner, is
judged on people it was not trained on; its averaged weights too, in the same run.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compared_report import Line, report
from compared_run import (
    MOST,
    PAIRS,
    RAW,
    TUNING_SHARE,
    Row,
    Run,
    lfw,
    synthetic_faces,
    train,
)
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from fastface_lightning.cli import program
from fastface_lightning.files import write_text
from fastface_lightning.schedule.plateau import check_count

CONF = Path(__file__).resolve().parents[1] / "conf"
TUNING = 1_000  # the seed of the runs that choose a learning rate; those that count begin at 0
SECONDS = 0.04  # of a step, before any run is known


@program(config_path=CONF, config_name="compare")
def main(cfg: DictConfig) -> None:
    """Tune the learning rates, make the runs that count, and report."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the workers too
    ways = check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    kept = Kept(folder / "compare.json", cfg)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "faces.pt"
        faces = synthetic_faces(**cfg.synthetic) if cfg.root is None else lfw(Path(cfg.root))
        torch.save([(part.images, torch.from_numpy(part.labels)) for part in faces], file)
        settings = {"epochs": cfg.epochs, "batch_size": cfg.batch_size, "file": file}
        job = functools.partial(train, **settings, averages=kept.settings["averages"])
        steps = len(faces.seen) // cfg.batch_size * cfg.epochs
        tuned = dict.fromkeys(kept.tuned_as(way) for way in ways)
        tuning = [Run(way, lr, TUNING) for way in tuned for lr in kept.grid(way)]
        kept.plan(tuning, ways, steps)
        kept.add(tuning, job, cfg.jobs)
        chosen = {way: kept.choose(way) for way in ways}
        runs = [
            Run(way, lr, seed)
            for seed, way in product(range(cfg.seeds), ways)
            for lr in dict.fromkeys(lr for lr, _ in chosen[way].values())
        ]
        kept.add(runs, job, cfg.jobs)
    lines = {
        f"{way} + {kind}" if kind != RAW else way: Line(
            kept.of(runs, way, lr), weights, lr in (min(kept.grid(way)), max(kept.grid(way)))
        )
        for way in ways
        for kind, (lr, weights) in chosen[way].items()
    }
    report(lines, list(cfg.rivals), list(cfg.plotted), folder)


def check(cfg: DictConfig) -> list[str]:
    """The ways to compare.

    Raises:
        ValueError: a setting is not what the program needs.
    """
    synthetic = (f"synthetic.{key}" for key in cfg.synthetic)
    for key in ("epochs", "batch_size", "seeds", "jobs", *synthetic):
        check_count(key, OmegaConf.select(cfg, key), 3 if key == "synthetic.unseen" else 1)
    ways = list(cfg.ways) if cfg.only is None else cfg.only
    if isinstance(ways, str) or not ways or not set(ways) <= set(cfg.ways):
        raise ValueError(f"only must be a list of some of {', '.join(cfg.ways)}, got {ways}")
    kinds = ["", *(f" + {kind_of(name)}" for name in cfg.averages)]
    for key, of in (("plotted", cfg.ways), ("rivals", ways)):
        names = {way + kind for way, kind in product(of, kinds)}
        if not set(cfg[key]) <= names:
            raise ValueError(f"{key} must be of {', '.join(sorted(names))}, got {cfg[key]}")
    for key in ("rates_of", "times", "tuned_as"):
        names = set(cfg[key])
        names |= set(cfg.tuned_as.values()) if key == "tuned_as" else set()
        if not names <= set(cfg.ways):
            raise ValueError(f"{key} must be of some of {', '.join(cfg.ways)}, got {cfg[key]}")
    grids = {"rates": cfg.rates} | {f"rates_of.{way}": grid for way, grid in cfg.rates_of.items()}
    for key, grid in grids.items():
        rates = grid if isinstance(grid, ListConfig) else []
        if not rates or not all(type(lr) in (int, float) and 0 < lr < math.inf for lr in rates):
            raise ValueError(f"{key} must be a list of learning rates above 0, got {grid}")
    for way in ways:
        times = cfg.times.get(way, 1)
        epochs = cfg.epochs * times
        if round(epochs) < 1 or abs(epochs - round(epochs)) > 0.01:
            raise ValueError(f"times.{way} must make whole epochs of {cfg.epochs}, got {times}")
    return list(dict.fromkeys(ways))


class Kept:
    """The runs in a file, each kept as soon as it is through.

    Args:
        file: made at the first run.
        cfg: what the runs are of; a file of other runs is not added to.

    Raises:
        ValueError: the file's runs had other data, epochs, averages or schedules.
    """

    def __init__(self, file: Path, cfg: DictConfig) -> None:
        self.file, self.cfg = file, cfg
        self.settings: dict[str, Any] = {
            "faces": "lfw" if cfg.root is not None else OmegaConf.to_container(cfg.synthetic),
            "epochs": cfg.epochs,
            "batch_size": cfg.batch_size,
            "averages": OmegaConf.to_container(cfg.averages),
            "judged": [TUNING_SHARE, MOST, PAIRS],
        }
        ways: Any = OmegaConf.to_container(cfg.ways, resolve=False)
        ways = {way: [each, float(cfg.times.get(way, 1))] for way, each in ways.items()}
        before = self._read()
        self.rows: list[Row] = before["runs"]
        self.ways: dict[str, Any] = before["ways"] | ways
        was = before.get("settings", self.settings) | before["ways"]
        for name, value in (self.settings | ways).items():
            if was.get(name, value) != value:
                raise ValueError(
                    f"{file} has runs with {name}={was[name]}, got {value}: give another "
                    f"hydra.run.dir"
                )

    def plan(self, tuning: Sequence[Run], ways: Sequence[str], steps: int) -> None:
        """Print what is to come: the tuning runs, and of each way and seed a run for its last
        weights and one for each kind of average that wants another rate."""
        kinds = 1 + len({kind_of(name) for name in self.settings["averages"]})
        seeds = [run for run in map(key, self.rows) if run.seed != TUNING]
        wanted = {
            "tuning": [run.way for run in tuning if run not in map(key, self.rows)],
            "seeds, at least": [way for way in ways for _ in range(self.cfg.seeds)],
        }
        wanted["seeds, at most"] = kinds * wanted["seeds, at least"]
        taken = [row["seconds"] / row["steps"] for row in self.rows]
        second = median(taken) if taken else SECONDS
        for name, of in wanted.items():
            hours = sum(steps * self.ways[way][1] * second for way in of) / 3600
            made = "" if name == "tuning" else f", {len(seeds)} of them made"
            print(f"{name}: {len(of)} runs, about {hours:.1f} core-hours{made}", flush=True)

    def add(self, runs: Sequence[Run], job: Callable[..., Row], jobs: int) -> None:
        """Make the runs that are not there, so many at a time, the longest first."""
        done = {key(row) for row in self.rows}
        todo = sorted((r for r in runs if r not in done), key=lambda run: -self.ways[run.way][1])
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            started = [pool.submit(job, run, *self.ways[run.way]) for run in todo]
            for number, done_job in enumerate(as_completed(started), 1):
                row = done_job.result()
                self._keep(row)
                ended = ", ".join(
                    f"{weights} {100 * figures['accuracy']:.1f} {100 * figures['tar']:.1f}"
                    for weights, figures in row["points"][-1][1].items()
                )
                print(
                    f"{number} of {len(todo)}: {row['way']}, lr {row['lr']:g}, seed {row['seed']}, "
                    f"{row['seconds']:.0f} s, accuracy and TAR: {ended}",
                    flush=True,
                )
        except BaseException:  # also Ctrl-C: what is under way is made anew by the same command
            for worker in active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self) -> dict[str, Any]:
        return (
            json.loads(self.file.read_text()) if self.file.is_file() else {"runs": [], "ways": {}}
        )

    def _keep(self, row: Row) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another program may add to it
            before = self._read()
            self.rows = [*before["runs"], row]
            content = {"settings": self.settings, "ways": before["ways"] | self.ways}
            # Without blanks: files of results are a tenth smaller.
            lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
            write_text(self.file, f'{json.dumps(content)[:-1]}, "runs": [\n{lines}\n]}}\n')

    def tuned_as(self, way: str) -> str:
        """The way whose tuning runs choose for this one."""
        return self.cfg.tuned_as.get(way, way)

    def grid(self, way: str) -> list[float]:
        """Learning rates that a way may have."""
        return list(dict.fromkeys(self.cfg.rates_of.get(self.tuned_as(way), self.cfg.rates)))

    def choose(self, way: str) -> dict[str, tuple[float, str]]:
        """By the kind of weights, the rate and the weights with which the tuning people were
        recognised best."""
        grid, tuned_as = self.grid(way), self.tuned_as(way)
        kinds: dict[str, dict[tuple[float, str], float]] = {}
        for row in self.rows:
            if row["way"] == tuned_as and row["seed"] == TUNING and row["lr"] in grid:
                for weights, figures in row["points"][-1][1].items():
                    kind = kinds.setdefault(kind_of(weights), {})
                    kind[row["lr"], weights] = figures["tuning_tar"]
        return {name: max(kind, key=lambda choice: kind[choice]) for name, kind in kinds.items()}

    def of(self, runs: Sequence[Run], way: str, lr: float) -> list[Row]:
        """The rows of those runs that have a way and a rate."""
        rows = {key(row): row for row in self.rows}
        return [rows[run] for run in runs if (run.way, run.lr) == (way, lr)]


def kind_of(weights: str) -> str:
    """Which kind of average has a name: ``power`` of ``power_10``; or raw weights."""
    return weights.partition("_")[0]


def key(row: Row) -> Run:
    """Which run a row is of."""
    return Run(*(row[name] for name in Run._fields))


if __name__ == "__main__":
    main()
