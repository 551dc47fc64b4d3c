"""How long the command line takes to answer, and a run to reach its first training step.

    python benchmarks/startup.py

Each number is the median over fresh processes, in wall time and CPU time. The first step is reported by a client that ends the process there;
which heavy packages were imported up to that point is listed, because each costs about a second.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clients.supervised import Supervised
from fedmed.data.split import Batch

HEAVY = ("monai", "sklearn", "matplotlib", "wandb", "ray", "tensorboard", "scipy", "pandas", "sympy", "torch._dynamo")
_DONE = 77  # exit code of a process that reached its first step
FEDMED = [sys.executable, "-m", "fedmed.cli.main"]


class FirstStep(Supervised):
    """A client that ends the process at its first training step and writes down what is imported."""

    def train_step(self, batch: Batch, step: int) -> dict[str, object]:  # type: ignore[override]
        """Report and leave at once."""
        loaded = [name for name in HEAVY if name in sys.modules]
        Path(os.environ["FEDMED_STARTUP_REPORT"]).write_text(" ".join(loaded), encoding="utf-8")
        os._exit(_DONE)


def measure(command: list[str], expected: int, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process. Ends the benchmark if it exits with another code than `expected`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}, expected {expected}:\n{done.stderr[-2000:]}"
        )
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(label: str, times: list[tuple[float, float]], target: str) -> None:
    """Print medians and the range of the wall times."""
    walls, cpus = [t[0] for t in times], [t[1] for t in times]
    print(
        f"{label}: {statistics.median(walls):.2f} s ({min(walls):.2f}..{max(walls):.2f}), "
        f"CPU {statistics.median(cpus):.2f} s; target {target}"
    )


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "imported"
        path = os.pathsep.join(p for p in (str(here), os.environ.get("PYTHONPATH", "")) if p)
        environment = {**os.environ, "PYTHONPATH": path, "FEDMED_STARTUP_REPORT": str(report)}
        answers = [measure([*FEDMED, "--help"], 0, environment) for _ in range(options.repetitions + 1)][1:]
        steps = []
        for i in range(options.repetitions + 1):  # the first one makes the synthetic site file
            words = [
                "run",
                "fedavg",
                "client.name=startup:FirstStep",
                f"data.cache_dir={name}/cache",
                "--out",
                f"{name}/run{i}",
            ]
            steps.append(measure([*FEDMED, *words], _DONE, environment))
        show("fedmed --help", answers, "< 0.6 s")
        show("fedmed run fedavg to the first training step", steps[1:], "< 8 s")
        show("  the same with a site file still to be made", steps[:1], "none")
        print(f"  heavy packages imported by then: {report.read_text(encoding='utf-8') or 'none'}")


if __name__ == "__main__":
    main()
