"""What is a trained model worth, by the field's own protocols? ``recipes/evaluate.py --help``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from fastface_lightning.backbones.weights import read_about
from fastface_lightning.cli import check_numbers, program
from fastface_lightning.data import FaceDataModule
from fastface_lightning.evaluation import roc_curve
from fastface_lightning.files import write_text
from fastface_lightning.inference.embedder import Embedder, load_embedder
from fastface_lightning.inference.embedding_file import embed_to_file
from fastface_lightning.inference.protocols import Pairs, Protocol, open_protocol
from fastface_lightning.report.curves import plot_curves, plot_scores, thin_curve
from fastface_lightning.report.image_grid import plot_pairs

CONF = Path(__file__).resolve().parents[1] / "conf"
WORST = 24  # pairs on a sheet
# The paper's results (arXiv 2404.11118), by data and backbone; IJB at a false accept rate of 1e-4.
COLUMNS = {
    "lfw": "LFW",
    "cfp_fp": "CFP-FP",
    "agedb_30": "AgeDB-30",
    "ijbb": "IJB-B 1e-4",
    "ijbc": "IJB-C 1e-4",
}
PUBLISHED = {
    ("ms1mv3", "iresnet100"): (99.80, 98.53, 98.12, 95.03, 96.41),
    ("webface4m", "iresnet100"): (99.65, 98.63, 97.57, 94.36, 96.18),
    ("webface8m", "iresnet100"): (99.85, 99.24, 97.90, 95.58, 97.09),
    ("webface12m", "iresnet50"): (99.80, 99.09, 97.92, 95.25, 96.85),
    ("webface12m", "iresnet100"): (99.83, 99.17, 98.02, 95.68, 97.20),
}
Curves = dict[str, tuple[Any, Any]]
Found = dict[str, dict[str, Any]]


@program(config_path=CONF, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate every set, write after each what is known so far, and print the table."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_numbers(cfg, "batch_size", "num_workers")
    if isinstance(cfg.verify, str):
        cfg.verify = [cfg.verify]
    paths = [] if cfg.verify is None else cfg.verify
    if not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"verify must be a list of paths, as [lfw.bin,IJBC], got {cfg.verify}")
    for path in paths:  # before what takes long
        if not Path(path).exists():
            raise ValueError(f"verify must name what is there, as DIR/lfw.bin, got {path}")
    embedder = load_embedder(
        cfg.checkpoint, cfg.network, cfg.device, mirror=cfg.mirror, batch_size=cfg.batch_size
    )
    cache = Path(cfg.cache or Path(cfg.checkpoint).parent / "embeddings")
    found: Found = {}
    curves: Curves = {}
    scores: dict[str, tuple[Any, Any]] = {}
    for protocol in protocols(cfg):
        started = time.perf_counter()
        features = embedded(protocol, embedder, cache, cfg.num_workers)
        found[protocol.name] = protocol.evaluate(features)
        found[protocol.name]["seconds"] = time.perf_counter() - started
        if protocol.scores is not None and protocol.same is not None:
            take_figures(protocol, curves, scores)
        if isinstance(protocol, Pairs):
            draw_worst(protocol, folder / f"worst_{protocol.name}.png")
        text = write(cfg, folder, embedder, found)
    if curves:
        plot_curves(folder / "roc.png", curves)
    if scores:
        plot_scores(folder / "scores.png", scores)
    console = Console()
    console.print(Markdown(text))
    console.print(f"evaluation.json, evaluation.md and figures are in {folder}", soft_wrap=True)


def protocols(cfg: DictConfig) -> Iterator[Protocol]:
    """The sets that are asked for, one at a time; without any, those that the run was verified on.

    Raises:
        ValueError: there is none, or two have one name.
    """
    names = set()
    for protocol in map(_opener(cfg), cfg.verify) if cfg.verify else run_sets(cfg.checkpoint):
        if protocol.name in names:
            raise ValueError(f"sets must have different names, got {protocol.name} twice")
        names.add(protocol.name)
        yield protocol


def _opener(cfg: DictConfig) -> Callable[[str], Protocol]:
    def opened(path: str) -> Protocol:
        try:
            return open_protocol(path, cfg.verify_root)
        except ValueError as error:  # a setting has another name here
            raise ValueError(str(error).replace("image_root", "verify_root")) from error

    return opened


def run_sets(checkpoint: str) -> Iterator[Protocol]:
    """The verification sets of the run that a checkpoint comes from."""
    about = {} if Path(checkpoint).suffix.lower() == ".onnx" else read_about(checkpoint)
    if "config" not in about:
        raise ValueError(
            f"verify must name sets, as [lfw.bin]: {checkpoint} does not say which its run had"
        )
    data: FaceDataModule = instantiate(about["config"]["data"])
    data.setup()
    if not data.sets:
        raise ValueError(f"verify must name sets, as [lfw.bin]: the run of {checkpoint} had none")
    for name, pairs in data.sets.items():
        yield Pairs(name, pairs)


def embedded(protocol: Protocol, embedder: Embedder, cache: Path, num_workers: int) -> Tensor:
    """(count, D) features of a set's images, from their file if this model has met them before."""
    print(f"{protocol.name}: {protocol.count:,} images", flush=True)
    key = hashlib.sha256((embedder.fingerprint + protocol.digest()).encode()).hexdigest()[:16]
    rows = embed_to_file(
        cache / f"{protocol.name}-{key}.npy",
        key,
        protocol.images,
        protocol.count,
        embedder,
        embedder.features,
        0 if isinstance(protocol, Pairs) else num_workers,
        keep=True,
    )
    return torch.from_numpy(rows)


def take_figures(protocol: Protocol, curves: Curves, scores: dict[str, tuple[Any, Any]]) -> None:
    """What the figures show of a set."""
    assert protocol.scores is not None and protocol.same is not None
    same, other = protocol.scores[protocol.same], protocol.scores[~protocol.same]
    scores[protocol.name] = (same.numpy(), other.numpy())
    if len(same) and len(other):
        roc = roc_curve(protocol.scores, protocol.same)
        taken = thin_curve(roc.far)
        curves[protocol.name] = (roc.far[taken], roc.tar[taken])


def draw_worst(protocol: Pairs, file: Path) -> None:
    """A picture of the pairs that the model gets most wrong."""
    worst = protocol.worst(WORST)
    assert protocol.scores is not None and protocol.same is not None
    plot_pairs(
        file,
        [protocol.pairs.images[2 * i : 2 * i + 2] for i in worst],
        [bool(protocol.same[i]) for i in worst],
        [f"pair {i}: {protocol.scores[i]:.3f}" for i in worst],
        f"{protocol.name}: the pairs most mistaken, with their cosines",
    )


def write(cfg: DictConfig, folder: Path, embedder: Embedder, found: Found) -> str:
    """Write evaluation.json and evaluation.md; returns the latter's text."""
    written = {
        "checkpoint": str(cfg.checkpoint),
        "mirror": cfg.mirror,
        "model": embedder.about,
        "sets": found,
    }
    write_text(folder / "evaluation.json", json.dumps(written, indent=2) + "\n")
    how = "" if cfg.mirror else ", without mirror images"
    text = f"# {cfg.checkpoint}{how}\n\n{headline(embedder.about, found)}\n"
    text += "".join(f"\n{details(name, result)}\n" for name, result in found.items())
    write_text(folder / "evaluation.md", text)
    return text


def headline(about: dict[str, Any], found: Found) -> str:
    """The paper's columns, this model and what was published for its data and backbone (or all that
    was), percent; sets that the paper has not come after them."""
    numbers = {name: percent(headline_number(result)) for name, result in found.items()}
    columns = COLUMNS if found.keys() & COLUMNS.keys() else {}
    others = [name for name in found if name not in COLUMNS]
    rows = [["this model", *(numbers.get(name, "") for name in (*columns, *others))]]
    this = (about.get("data"), about.get("network", {}).get("name"))
    for key, published in PUBLISHED.items():
        if columns and (key == this or this not in PUBLISHED):
            label = f"published: {key[1].replace('iresnet', 'r')}, {key[0]}"
            rows.append([label, *(f"{value:.2f}" for value in published), *("" for _ in others)])
    rank_1 = {name for name in others if found[name]["protocol"] == "identities"}
    titles = [f"{name} rank 1" if name in rank_1 else name for name in others]
    return table(["%", *columns.values(), *titles], rows)


def headline_number(result: dict[str, Any]) -> float | None:
    if result["protocol"] == "identities":
        return result["identification"][0]["rank"]["1"]
    return result["accuracy"] if result["protocol"] == "pairs" else result["tar"].get("1e-04")


def details(name: str, result: dict[str, Any]) -> str:
    """One set's results as Markdown."""
    rows = []
    if "pairs" in result:
        rows.append(["pairs", f"{result['pairs']:,}"])
    if result["missing"]:
        rows.append(["left out, see evaluation.json", f"{len(result['missing']):,}"])
    if result.get("pairs_without_images"):
        rows.append(["pairs left out with their templates", f"{result['pairs_without_images']:,}"])
    if "accuracy" in result:
        folds = result["tar_folds"]
        rows.append(["accuracy, ten folds", spread(result["accuracy"], result["std"])])
        if folds:
            rows.append(["TAR at FAR 0.001, ten folds", spread(folds["tar"], folds["std"])])
    for far, tar in result.get("tar", {}).items():
        rows.append([f"TAR at FAR {float(far):g}", f"{percent(tar)} %"])
    if "auc" in result and result["auc"] is None:
        rows.append(["rates", "none: all pairs are of one kind"])
    if result.get("auc") is not None:
        rows.append(["equal error rate", f"{percent(result['eer'])} %"])
        rows.append(["area under the ROC", f"{result['auc']:.5f}"])
    searches = result.get("identification", ())
    for number, search in enumerate(searches, 1):
        rows += search_rows(search, f" {number}" if len(searches) > 1 else "")
    return f"## {name}\n\n{table(['what', 'result'], rows)}"


def spread(mean: float, std: float) -> str:
    return f"{percent(mean)} ± {percent(std)} %"


def search_rows(search: dict[str, Any], number: str) -> list[list[str]]:
    what = f"{search['mated']:,} mated and {search['unmated']:,} unmated probes"
    rows = [[f"gallery{number}", f"{search['gallery']:,} entries; {what}"]]
    rows += [[f"rank {rank}", f"{percent(rate)} %"] for rank, rate in search["rank"].items()]
    tpirs = (search["tpir"] or {}).items()
    return rows + [[f"TPIR at FPIR {fpir}", f"{percent(rate)} %"] for fpir, rate in tpirs]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
