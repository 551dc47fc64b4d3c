"""What a round costs over real sites: a coordinator and three sites on this machine, TLS and keys on, by the commands users type.

    python benchmarks/deployment.py            twenty rounds, seconds and memory; then a model of 30 M parameters
    python benchmarks/deployment.py --tiny     two rounds, equality check only

First the final model is checked against that of the local engine, bit for bit. A round is one train message to each site, which scores the
received model too (`evaluation.mode=before`). Its time is split into what the sites worked, and the rest: Flower's polling, transport, TLS,
storing. Start-up is what passes before the first train message: handing in, taking the task, identifying the sites. Memory is the resident
size of each process at the end of a round, of sites the executor, which holds model and data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "deployment"))
from loopback import Loopback, Process, cut, loopback

from fedmed.data.phantom import make_phantom
from fedmed.files import read_history

NAMES = ("alpha", "beta", "gamma")
SMALL = ("training.epochs=1", "evaluation.mode=before", "federation.min_sites=3", "seed=1")
LARGE = (
    *SMALL,
    "federation.rounds=2",
    "model.name=unet",
    "model.args={base_width: 85}",
    "model.activation=softmax",
    "training.max_steps=1",
)
MIB = 2**20


def resident(pid: int) -> float:
    """Resident memory of a process in MiB; NaN when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024


class Memory(threading.Thread):
    """Notes the memory of named processes whenever a round has ended."""

    def __init__(self, out: Path, processes: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.out, self.processes, self.by_round = out, processes, dict[int, dict[str, float]]()
        self._done = threading.Event()

    def run(self) -> None:
        """Watch the history."""
        while not self._done.wait(0.5):
            found = rounds_trained(self.out)
            if found and found[-1] not in self.by_round:
                self.by_round[found[-1]] = {name: resident(pid) for name, pid in self.processes.items()}

    def stop(self) -> None:
        """End."""
        self._done.set()
        self.join(5)


def rounds_trained(out: Path) -> list[int]:
    """Rounds of which all three answers are in."""
    path = out / "history.jsonl"
    records = list(read_history(path)) if path.exists() else []
    counts: dict[int, int] = {}
    for record in records:
        if record["phase"] == "train":
            counts[record["round"]] = counts.get(record["round"], 0) + 1
    return sorted(number for number, count in counts.items() if count == len(NAMES))


@contextmanager
def federation(root: Path, task: str, **phantom: Any) -> Iterator[tuple[Loopback, dict[str, Process]]]:
    """Coordinator and sites with synthetic images, running."""
    source = make_phantom(root / "all.h5", task, num_sites=len(NAMES), **phantom)
    with loopback(root / "federation", cut(source, root / "sites", NAMES)) as made:
        yield made, made.start_all()


def pids(made: Loopback, sites: dict[str, Process], run: Process) -> dict[str, int]:
    """Process ids by what they are."""
    coordinator = next(p for p in made.processes if p.words[0] == "coordinator")
    found = {"superlink": coordinator.children("deployment.superlink")[0], "run": run.popen.pid}
    for name, process in sites.items():
        found[f"site {name}"] = process.children("deployment.executor")[0]
        found[f"supernode {name}"] = process.children("deployment.supernode")[0]
    return found


def timed_run(made: Loopback, sites: dict[str, Process], out: Path, words: tuple[str, ...]) -> tuple[Memory, float]:
    """Run; gives the memory by round, and the seconds in all."""
    started = time.monotonic()
    run = made.begin_run(out, words[0], *words[1:])
    memory = Memory(out, pids(made, sites, run))
    memory.start()
    code = run.wait(1200)
    whole = time.monotonic() - started
    memory.stop()
    common.require(code == 0, f"the run ended well ({run.text[-500:] if code else 'exit code 0'})")
    return memory, whole


def round_times(out: Path) -> tuple[list[float], list[float]]:
    """For each round but the first: seconds from its first message to its last answer, and the longest work of a site."""
    records = [r for r in read_history(out / "history.jsonl") if r["phase"] == "train"]
    rounds = sorted({r["round"] for r in records})[1:]
    took = [max(r["seconds"] for r in records if r["round"] == n) for n in rounds]
    work = [max(r["metrics"]["seconds"] for r in records if r["round"] == n) for n in rounds]
    return took, work


def report(title: str, out: Path, memory: Memory, whole: float) -> None:
    """Print times and memory of a run."""
    took, work = round_times(out)
    rest = [a - b for a, b in zip(took, work, strict=True)]
    rounds = max(memory.by_round, default=0)
    print(f"{title}: {whole:.0f} s for {rounds} rounds, start and end included")
    if took:
        print(
            f"  seconds a round: {common.spread(took)}; sites' work {common.spread(work)}; the rest {common.spread(rest)}"
        )
        print(
            f"  outside of rounds (start, identification, final scores, report): {whole - sum(took) * rounds / len(took):.1f} s"
        )
    shown = sorted({min(memory.by_round, default=0), min(5, rounds), min(10, rounds), rounds} & set(memory.by_round))
    print("  MiB after round  " + "  ".join(f"{n:>6}" for n in shown))
    for name in next(iter(memory.by_round.values()), {}):
        print(f"  {name:16} " + "  ".join(f"{memory.by_round[n][name]:6.0f}" for n in shown))


def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two rounds, equality check only")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rounds = 2 if options.tiny else options.rounds
    with tempfile.TemporaryDirectory(prefix="fedmed-") as folder:
        root = Path(folder)
        with federation(root / "small", "classification", images_per_site=60, image_size=32) as (made, sites):
            out, words = root / "deployed", ("fedavg", *SMALL, f"federation.rounds={rounds}")
            memory, whole = timed_run(made, sites, out, words)
            made.simulate(root / "local", *words)
            models = [(place / "model.safetensors").read_bytes() for place in (out, root / "local")]
            common.require(models[0] == models[1], "model over real sites = model of the local engine, bit for bit")
            if options.tiny:
                return
            print(common.machine())
            report("small CNN, three sites", out, memory, whole)
        with federation(root / "large", "segmentation", images_per_site=12, image_size=32) as (made, sites):
            out = root / "large-run"
            memory, whole = timed_run(made, sites, out, ("fedavg", *LARGE))
            size = (out / "model.safetensors").stat().st_size
            report(f"U-Net of {size / 4e6:.1f} M parameters ({size / MIB:.0f} MiB), three sites", out, memory, whole)
            database = sum(p.stat().st_size for p in (made.coordinator_dir / "state").rglob("*") if p.is_file())
            print(f"  SuperLink's database after the run: {database / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
