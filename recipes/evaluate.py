"""What is a trained model worth, by the field's own protocols? ``recipes/evaluate.py --help``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from fastface_lightning.cli import check_numbers, program

if TYPE_CHECKING:
    from torch import Tensor

    from fastface_lightning.data import People, VerificationPairs
    from fastface_lightning.inference.embedder import Embedder
    from fastface_lightning.inference.protocols import Outcome, Pairs, Protocol

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
Results = dict[str, dict[str, Any]]


@program(config_path=CONF, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate every set, write after each what is known so far, and print the table."""
    check_numbers(cfg, {"batch_size": 1, "num_workers": 0})
    paths = verify_paths(cfg)

    from rich.console import Console
    from rich.markdown import Markdown

    from fastface_lightning.inference.embedder import load_embedder
    from fastface_lightning.inference.protocols import Pairs

    folder = Path(HydraConfig.get().runtime.output_dir)
    embedder = load_embedder(
        cfg.checkpoint,
        cfg.network,
        cfg.device,
        mirror=cfg.mirror,
        batch_size=cfg.batch_size,
        range=cfg.range,
        channels=cfg.channels,
        precision=cfg.precision,
    )
    cache = Path(cfg.cache or Path(cfg.checkpoint).parent / "embeddings")
    results: Results = {}
    outcomes: dict[str, Outcome] = {}
    people = people_of(cfg.checkpoint)
    for protocol in protocols(cfg, paths, people):
        shown = protocol.people
        trained = people.warn_of_trained(protocol.name, shown) if shown else 0
        started = time.perf_counter()
        features = embedded(protocol, embedder, cache, cfg.num_workers)
        outcome = outcomes[protocol.name] = protocol.evaluate(features)
        seconds = time.perf_counter() - started
        who = {"people": protocol.num_people, "trained_people": trained}
        results[protocol.name] = {**outcome.results, **who, "seconds": seconds}
        if isinstance(protocol, Pairs):
            draw_worst(protocol, outcome, folder / f"worst_{protocol.name}.png")
        text = write(cfg, folder, embedder, results)
    draw_figures(outcomes, folder)
    Console().print(Markdown(text))
    print(f"evaluation.json, evaluation.md and figures are in {folder}")


def verify_paths(cfg: DictConfig) -> list[str]:
    """The sets that the command names, before anything takes long."""
    paths = [cfg.verify] if isinstance(cfg.verify, str) else cfg.verify or []
    if not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"verify must be a list of paths, as [lfw.bin,IJBC], got {cfg.verify}")
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"verify must name what is there, as DIR/lfw.bin, got {path}")
    return list(paths)


def protocols(cfg: DictConfig, paths: Sequence[str], people: People) -> Iterator[Protocol]:
    """The sets at ``paths``, one at a time; without any, those that the run was verified on."""
    names = set()
    sets = opened(paths, cfg.verify_root) if paths else run_sets(cfg.checkpoint, people)
    for protocol in sets:
        if protocol.name in names:
            raise ValueError(f"sets must have different names, got {protocol.name} twice")
        names.add(protocol.name)
        yield protocol


def opened(paths: Sequence[str], verify_root: str | None) -> Iterator[Protocol]:
    from fastface_lightning.inference.protocols import open_protocol

    for path in paths:
        try:
            yield open_protocol(path, verify_root)
        except ValueError as error:  # the setting has another name here
            raise ValueError(str(error).replace("image_root", "verify_root")) from error


def is_onnx(file: str) -> bool:
    return Path(file).suffix.lower() == ".onnx"


def people_of(checkpoint: str) -> People:
    """Whom a model was trained on, as far as its file tells."""
    from fastface_lightning.backbones.weights import read_file
    from fastface_lightning.data import People

    content = None if is_onnx(checkpoint) else read_file(checkpoint)
    return People.in_checkpoint(content) or People(())


def run_sets(checkpoint: str, people: People) -> Iterator[Protocol]:
    """The verification sets of the run that a checkpoint comes from."""
    from fastface_lightning.backbones.weights import read_about
    from fastface_lightning.inference.protocols import Pairs

    sets = {}
    about = {} if is_onnx(checkpoint) else read_about(checkpoint)
    if "config" in about:
        data = instantiate(about["config"]["data"])
        data.verify_people = people.held_out  # whoever else is there now may have been trained on
        data.setup()
        sets = data.sets
    if not sets:
        raise ValueError(f"verify must name sets, as [lfw.bin]: {checkpoint} names none")
    for name, pairs in sets.items():
        yield Pairs(name, pairs)


def embedded(protocol: Protocol, embedder: Embedder, cache: Path, num_workers: int) -> Tensor:
    """(count, D) features of a set's images, from their file if this model has embedded them."""
    import torch

    from fastface_lightning.inference.embedding_file import embed_to_file, embedding_key
    from fastface_lightning.inference.protocols import Pairs

    print(f"{protocol.name}: {protocol.count:,} images", flush=True)
    key = embedding_key(embedder, protocol.digest())
    file, embed = cache / f"{protocol.name}-{key}.npy", embedder.features
    workers = 0 if isinstance(protocol, Pairs) else num_workers
    rows = embed_to_file(
        file, key, protocol.images, protocol.count, embedder, embed, workers, keep=True
    )
    return torch.from_numpy(rows)


def draw_figures(outcomes: dict[str, Outcome], folder: Path) -> None:
    """roc.png and scores.png of the sets that have pairs."""
    from fastface_lightning.evaluation import roc_curve
    from fastface_lightning.report.curves import plot_curves, plot_scores, thin_curve

    curves, scores = {}, {}
    thresholds = {}
    for name, (results, cosines, same) in outcomes.items():
        if len(cosines):
            scores[name] = (cosines[same].numpy(), cosines[~same].numpy())
            thresholds[name] = results["cosine_thresholds"]
        if same.any() and not same.all():
            far, tar, _ = roc_curve(cosines, same)
            taken = thin_curve(far)
            curves[name] = (far[taken], tar[taken])
    if curves:
        plot_curves(folder / "roc.png", curves)
    if scores:
        plot_scores(folder / "scores.png", scores, thresholds)


def draw_worst(protocol: Pairs, outcome: Outcome, file: Path) -> None:
    """A picture of the pairs that the model gets most wrong."""
    from fastface_lightning.inference.protocols import worst_pairs
    from fastface_lightning.report.image_grid import plot_pairs

    worst, index = worst_pairs(outcome, WORST), protocol.pairs.pairs()
    plot_pairs(
        file,
        [protocol.pairs.images[index[i]] for i in worst],
        [bool(outcome.same[i]) for i in worst],
        [caption(protocol.pairs, i, float(outcome.scores[i])) for i in worst],
        f"{protocol.name}: the pairs most mistaken, with their cosines",
    )


def caption(pairs: VerificationPairs, number: int, score: float) -> str:
    """The cosine of a pair, and its images by name."""
    if not pairs.names:
        return f"pair {number}: {score:.3f}"
    first, second = (pairs.names[i] for i in pairs.pairs()[number].tolist())
    return f"{score:.3f}: {first}, {second}"


def write(cfg: DictConfig, folder: Path, embedder: Embedder, results: Results) -> str:
    """Write evaluation.json and evaluation.md; returns the latter's text."""
    from fastface_lightning.files import write_text

    precision = embedder.precision or "float32"
    written = {"checkpoint": str(cfg.checkpoint), "mirror": cfg.mirror, "precision": precision}
    written |= {"fingerprint": embedder.fingerprint, "model": embedder.about, "sets": results}
    write_text(folder / "evaluation.json", json.dumps(written, indent=2) + "\n")
    how = "" if cfg.mirror else ", without mirror images"
    how += "" if embedder.precision is None else f", in {precision}"
    text = f"# {cfg.checkpoint}{how}\n\n{headline(embedder.about, results)}\n"
    text += "".join(f"\n{details(name, result)}\n" for name, result in results.items())
    write_text(folder / "evaluation.md", text)
    return text


def headline(about: dict[str, Any], results: Results) -> str:
    """The paper's columns, this model and what was published for its data and backbone (or all that
    was), percent; sets that the paper has not come after them."""
    numbers = {name: percent(headline_number(result)) for name, result in results.items()}
    columns = COLUMNS if results.keys() & COLUMNS.keys() else {}
    others = [name for name in results if name not in COLUMNS]
    rows = [["this model", *(numbers.get(name, "") for name in (*columns, *others))]]
    model = (about.get("data"), about.get("network", {}).get("name"))
    for key, published in PUBLISHED.items():
        if columns and (key == model or model not in PUBLISHED):
            label = f"published: {key[1].replace('iresnet', 'r')}, {key[0]}"
            rows.append([label, *(f"{value:.2f}" for value in published), *("" for _ in others)])
    rank_1 = {name for name in others if results[name]["protocol"] == "identities"}
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
        rows.append(["pairs", f"{result['pairs']:,}, {result['impostors']:,} of two people"])
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
        threshold = result["cosine_thresholds"][far]
        accepts = "" if threshold is None else f", cosine {threshold:.4f} or more"
        rows.append([f"TAR at FAR {float(far):g}", f"{percent(tar)} %{accepts}"])
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
