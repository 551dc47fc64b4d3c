"""Short federated runs whose metrics are stored beside this file: `python tests/golden/make.py` makes them again, the slow tests compare.

Metrics are compared within the tolerance stored with them (another version of a library may move them a little); bit-equality is asked only
within one machine, elsewhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TOLERANCE = 0.05  # absolute, on metrics of 0..1 over about 100 test items

_CLASSIFICATION = [
    "data.path=phantom:classification",
    "data.phantom={num_sites: 4, images_per_site: 200, image_size: 32}",
    "model.args.widths=[8,16,32]",
    "training.epochs=3",
    "federation.rounds=10",
    "optimizer.lr=0.003",
]
_SEGMENTATION = [
    "data.phantom={num_sites: 4, images_per_site: 60, image_size: 32}",
    "data.resize=32",
    "data.partition.args.num_clients=6",
    "data.corruption.args={mean_low: 1.0, mean_high: 3.0, std: 1.0, num_shrinkers: 2, clip: 5.0, even_spacing: true}",
    "model.args.base_width=4",
    "federation.rounds=6",
    "strategy.args.warmup_rounds=3",
    "optimizer.lr=0.005",
]
_NOISY = [
    "data.partition.args.num_clients=8",
    "strategy.args={warmup_rounds: 5, ramp_begin: 5, ramp_end: 9, kd_cap: 0.8}",
]
RUNS: dict[str, tuple[str, list[str]]] = {
    "fedavg": ("fedavg", _CLASSIFICATION),
    "fedprox": ("fedprox", _CLASSIFICATION),
    "fedbn": ("fedbn", _CLASSIFICATION),
    "fedavgm": ("fedavgm", _CLASSIFICATION),
    "fedadam": ("fedadam", _CLASSIFICATION),
    "fednoro": ("fednoro", [*_CLASSIFICATION, *_NOISY]),
    "feda3i": ("feda3i", _SEGMENTATION),
}


def measure(name: str, out: Path) -> dict[str, float]:
    """Run one golden experiment in folder `out`: the last round's mean training loss and scores (central if there are any, else the sites' mean)."""
    from fedmed.config import load_config
    from fedmed.engines import run

    experiment, words = RUNS[name]
    summary = run(load_config(experiment, [*words, "seed=3", f"out={out}"]))
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    last = [r["metrics"]["train_loss"] for r in records if r["phase"] == "train" and r["round"] == summary["rounds"]]
    central = {
        k: v for k, v in summary["central"]["last"].items() if k.startswith("test/") and not k.endswith("both_empty")
    }
    scores = central or {f"mean/{summary['main_metric']}": summary["mean"]}
    return {"train_loss": sum(last) / len(last), **scores}


def versions() -> dict[str, str]:
    """The versions the stored metrics were made with."""
    import numpy
    import sklearn
    import torch

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


def main(names: list[str]) -> None:
    """Measure and store."""
    for name in names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            stored: dict[str, Any] = {
                "tolerance": TOLERANCE,
                "versions": versions(),
                "metrics": measure(name, Path(folder) / "run"),
            }
        (FOLDER / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
        print(name, stored["metrics"])


if __name__ == "__main__":
    main(sys.argv[1:])
