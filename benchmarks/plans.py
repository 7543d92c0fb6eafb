"""What every recipe will compute and hold: the tables of plans, ``benchmarks/plans.py [--write]``.

Each row is what ``train.py ... plan=24`` says. Without ``--write`` the tables are printed; with it
they take the place of those in ``recipes/README.md`` and ``recipes/memory.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAPER_FLOPS_PER_SECOND = 44.2e12  # see fastface_lightning.training.plan
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="names in recipes/paper, all if none is given")
    parser.add_argument("--write", action="store_true", help="replace the tables in recipes/")
    arguments = parser.parse_args()
    recipes = arguments.recipes or sorted(p.stem for p in (ROOT / "recipes/paper").glob("*.yaml"))
    tables = {"recipes/README.md": recipe_table(recipes)}
    if not arguments.recipes:
        tables["recipes/memory.md"] = memory_table()
    for page, table in tables.items():
        print(table, end="\n\n")
        if arguments.write:
            replace_table(ROOT / page, table)


def recipe_table(recipes: list[str]) -> str:
    """A row for each recipe: its data, length, arithmetic, hours and peak memory."""
    lines = [
        "| recipe | what | data | epochs | steps | PFLOP | hours | memory, GiB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for recipe in recipes:
        first = (ROOT / f"recipes/paper/{recipe}.yaml").read_text().splitlines()[1]
        plan, config = planned(f"+paper={recipe}")
        head = plan["heads"][plan["classifier"]]
        epochs, accumulated = config["max_epochs"], config["accumulate_grad_batches"]
        steps = min(-(-plan["batches"] // epochs // accumulated) * epochs, config["max_steps"])
        cells = [
            f"[`{recipe}`](paper/{recipe}.yaml)",
            first.removeprefix("# ").rstrip("."),
            config["data"],
            f"{epochs}",
            f"{steps:,}",
            f"{plan['flops'] / 1e15:,.0f}",
            f"{plan['hours']:.3g}",
            f"{head['peak'] / GIB:.2f} `{plan['classifier']}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table() -> str:
    """A row for each network and data set: peaks with three classifiers, hours of five epochs."""
    lines = [
        "| model | data | identities | activations | class centers | `full` | `chunked` | "
        "`partial` (rate 0.1) | hours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in ("r50", "r100"):
        for data in ("ms1mv3", "webface12m", "webface42m"):
            plan, _ = planned(f"model={model}", f"data={data}", "averaging=none")
            heads = [plan["heads"][name] for name in ("full", "chunked", "partial")]
            peaks = [f"{h['peak'] / GIB:.2f}" + ("" if h["fits"] else " (no)") for h in heads]
            cells = [
                *(model, data, f"{plan['num_classes']:,}"),
                f"{plan['backbone']['activations'] / GIB:.2f}",
                f"{heads[0]['weights'] / GIB:.2f}",
                *(*peaks, f"{plan['hours']:.0f}"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def planned(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``plan.json`` of a run on a GPU of 24 GiB, and its epochs, accumulation and data set."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from fastface_lightning.cli import find_recipes

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *overrides, "plan=24", f"hydra.run.dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        plan = json.loads((Path(folder) / "plan.json").read_text())
    find_recipes(ROOT / "conf")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*overrides])
    trainer = config.trainer
    return plan, {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps if trainer.max_steps >= 0 else math.inf,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "data": config.data.name,
    }


def replace_table(page: Path, table: str) -> None:
    """Put a table in the place of the one between the marks ``plans`` of a page."""
    text, marks = page.read_text(), ("<!-- plans -->", "<!-- /plans -->")
    pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"{page} must have one table between {marks}"
    page.write_text(pattern.sub(lambda _: f"{marks[0]}\n{table}\n{marks[1]}", text))


if __name__ == "__main__":
    main()
