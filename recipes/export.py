"""Write a trained model to ONNX, InsightFace's weights or safetensors: ``export.py --help``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fastface_lightning.cli import program

CONF = Path(__file__).resolve().parents[1] / "conf"


@program(config_path=CONF, config_name="export")
def main(cfg: DictConfig) -> None:
    """Export, print what is in the file, leave export.json."""
    from fastface_lightning.evaluation import thresholds_of
    from fastface_lightning.inference.embedder import load_embedder
    from fastface_lightning.inference.export import check_target, export
    from fastface_lightning.inference.torch_embedder import TorchEmbedder

    target = Path(cfg.target)
    check_target(target, cfg.uint8)
    evaluation = None if cfg.evaluation is None else read_evaluation(cfg.evaluation)
    mirror = evaluation is not None and evaluation["mirror"]
    embedder = load_embedder(cfg.checkpoint, cfg.network, device="cpu", mirror=mirror)
    if evaluation is not None:
        if evaluation["fingerprint"] != embedder.fingerprint:
            raise ValueError(
                f"evaluation must be of this file of weights, in float32 and of RGB in [-1, 1], "
                f"got {cfg.evaluation}, of {evaluation['checkpoint']}"
            )
        # Templates of many images have other thresholds than two images.
        pairs = {k: v for k, v in evaluation["sets"].items() if v["protocol"] == "pairs"}
        embedder.about["thresholds"] = thresholds_of(pairs, mirror, evaluation["precision"])
    if not isinstance(embedder, TorchEmbedder):
        raise ValueError(f"checkpoint must hold weights, got {cfg.checkpoint}, which is an ONNX")
    about = export(embedder, target, cfg.uint8)
    folder = Path(HydraConfig.get().runtime.output_dir)
    written = {"checkpoint": str(cfg.checkpoint), "target": str(target), **about}
    (folder / "export.json").write_text(json.dumps(written, indent=2) + "\n")
    for key, value in about.items():
        print(f"  {key:14}{shown(value)}")
    print(f"  {'file':14}{target}, {target.stat().st_size / 2**20:,.1f} MiB")


def read_evaluation(file: str) -> dict[str, Any]:
    """What evaluate.py has written."""
    try:
        evaluation = json.loads(Path(file).read_text(encoding="utf-8"))
        keys = ("checkpoint", "mirror", "precision", "fingerprint", "sets")
        return {key: evaluation[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"evaluation must be the evaluation.json of recipes/evaluate.py, got {file}"
        ) from error


def shown(value: Any) -> str:
    """Plain data as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
