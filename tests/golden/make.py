"""Short federated runs whose metrics are stored beside this file: `python tests/golden/make.py [METHOD ...]` makes them again, the slow tests compare.

Each `<method>.json` names the experiment and its overrides; for a new method write the two keys, then run this script with its name.

Metrics are compared within the tolerance stored with them (another version of a library may move them a little); bit-equality is asked only
within one machine, elsewhere.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TOLERANCE = 0.05  # absolute, on metrics of 0..1 over about 100 test items


def stored(name: str) -> dict[str, Any]:
    """What is stored for a method: experiment, overrides, metrics, their tolerance and the versions they were made with."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def names() -> list[str]:
    """The methods that have a golden run."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def measure(name: str, out: Path) -> dict[str, float]:
    """Run one golden experiment in folder `out`: the last round's mean training loss and scores (central if there are any, else the sites' mean)."""
    from fedmed.config import load_config
    from fedmed.engines import run

    golden = stored(name)
    summary = run(load_config(golden["experiment"], [*golden["overrides"], "seed=3", f"out={out}"]))
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    last = [r["metrics"]["train_loss"] for r in records if r["phase"] == "train" and r["round"] == summary["rounds"]]
    central = {
        k: v
        for k, v in summary["central"]["last"].items()
        if k.startswith("test/") and not k.endswith("both_empty") and not re.search(r"_\d+$", k)
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


def main(chosen: list[str]) -> None:
    """Measure and store."""
    for name in chosen or names():
        with tempfile.TemporaryDirectory() as folder:
            content = {**stored(name), "tolerance": TOLERANCE, "versions": versions()}
            content["metrics"] = measure(name, Path(folder) / "run")
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(name, content["metrics"])


if __name__ == "__main__":
    main(sys.argv[1:])
