"""Measures what a run costs in a fresh process: the real configuration and data with all sites, a few training steps a round.

Run as a module: `python -m fedmed.compare.probe REQUEST RESULT` reads what `ProbeRequest` holds as JSON and writes what `ProbeResult` holds.
Two short runs: the first is ended after its first evaluation, the second has none and is ended when its time is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.compare.meter import Meter, Sample, array_bytes, metered
from fedmed.config import Config, from_yaml
from fedmed.files import write_json

STEPS = 4  # of training a round at each site: three differences of times, and the first step for whatever it prepares
BUDGET_S = 6.0  # of the second run; at least two rounds
MIN_ROUNDS = 2
KINDS = {"train": "train", "evaluate": "evaluate", "query.method": "query"}  # Flower's message type -> ours


@dataclass(frozen=True)
class ProbeRequest:
    """What to measure: a configuration as YAML, and when the process was asked for (seconds since 1970)."""

    config: str
    asked: float
    steps: int = STEPS
    budget_s: float = BUDGET_S


@dataclass
class ProbeResult:
    """All samples; `samples` are those of the second run, `scored` of the first evaluation. Seconds and bytes."""

    sites: int = 0
    startup_s: float = 0.0  # from asking for the process to its first training message
    memory: int = 0  # largest resident size
    gpu_memory: int = 0  # largest size of all tensors on the GPU
    rounds: int = 0  # whole rounds of the second run
    overhead_s: float = 0.0  # median time of a round outside all messages
    samples: list[Sample] = field(default_factory=list)
    scored: list[Sample] = field(default_factory=list)


class Enough(BaseException):
    """Ends a run that has shown what was asked; nothing that handles errors of sites takes it for one."""


class Listener:
    """Stands between server and sites of the local engine and samples every message; ends the run when it has lasted long enough."""

    def __init__(self, meter: Meter, rounds: int, budget_s: float) -> None:
        self.samples: list[Sample] = []
        self.sites, self.first_message = 0, 0.0
        self.begun: dict[int, float] = {}  # round -> when its first message went out
        self.stopped = False  # in the first message of the last round begun
        self._meter, self._rounds, self._budget_s = meter, rounds, budget_s

    def __call__(self, message: Any, call: Callable[[], Any]) -> Any:
        """Pass one message on. Raises `Enough` at the first message after the last round wanted."""
        kind = KINDS.get(message.metadata.message_type)
        if kind is None:
            self.sites += message.metadata.message_type == "query.identify"
            return call()
        number = _round_of(message)
        now = time.perf_counter()
        self.first_message = self.first_message or time.time()
        if number not in self.begun:
            self.begun[number] = now
            spent = now - next(iter(self.begun.values()))
            if len(self.begun) > self._rounds and spent >= self._budget_s:
                self.stopped = True
                raise Enough
        self._meter.reset()
        reply = call()
        sample = self._meter.sample(kind, number, message.metadata.dst_node_id, time.perf_counter() - now)
        sample.down = array_bytes(message.content)
        if not reply.has_error():
            sample.up = array_bytes(reply.content)
            sample.items = int(dict(reply.content.get("metrics") or {}).get("num-examples", 0))
        self.samples.append(sample)
        self._meter.reset()
        return reply

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Take what the coordinator scored itself from the history."""
        if record["phase"] == "central":
            self.samples.append(self._meter.sample("central", record["round"], -1, record["seconds"]))

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Hear the other events of a run without doing anything."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *_: None

    def overhead_s(self) -> float:
        """Median time that whole rounds spend outside their messages, 0 without a whole round."""
        starts = sorted(self.begun.items())
        spent = {n: sum(s.seconds for s in self.samples if s.round == n) for n, _ in starts}
        pairs = itertools.pairwise(starts)
        return statistics.median([max(0.0, after - at - spent[n]) for (n, at), (_, after) in pairs] or [0.0])


def _round_of(message: Any) -> int:
    values: dict[str, Any] = dict(message.content.get("config") or {})
    return int(values["round"] if "round" in values else values.get("server-round", 0))


def measure(request: ProbeRequest, folder: Path) -> ProbeResult:
    """Do both short runs in `folder`. Raises what a run raises."""
    import torch

    from fedmed.federation.site import choose_device

    config = from_yaml(request.config)
    cuda = choose_device(config.engine.device).type == "cuda"
    meter = Meter(torch.cuda.synchronize if cuda else lambda: None)
    with metered(config, meter):
        first = _listen(config, {"every": 1}, folder / "scored", meter, request.steps, 1, 0.0)
        never = config.federation.rounds + 1
        second = _listen(
            config, {"every": never}, folder / "rounds", meter, request.steps, MIN_ROUNDS, request.budget_s
        )
    whole = len(second.begun) - second.stopped
    return ProbeResult(
        sites=first.sites, startup_s=first.first_message - request.asked, memory=peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated() if cuda else 0, rounds=whole, overhead_s=second.overhead_s(),
        samples=[s for s in second.samples if s.kind in ("train", "query") and s.round <= whole],
        scored=[s for s in first.samples if s.kind in ("evaluate", "central") and s.round == 1],
    )  # fmt: skip


def _listen(
    config: Config, evaluation: Mapping[str, Any], folder: Path, meter: Meter, steps: int, rounds: int, budget_s: float
) -> Listener:
    """One short run of `rounds` rounds, and more while there is time."""
    from fedmed.engines import run

    limit = min(steps, config.training.max_steps or steps)
    short = dataclasses.replace(
        config,
        out=str(folder),
        training=dataclasses.replace(config.training, max_steps=limit),
        evaluation=dataclasses.replace(config.evaluation, **evaluation),
        engine=dataclasses.replace(config.engine, name="local"),
    )
    listener = Listener(meter, rounds, budget_s)
    with contextlib.suppress(Enough):
        run(short, callbacks=[listener], intercept=listener)
    return listener


def peak_memory() -> int:
    """Largest resident size of this process in bytes; on Linux since it was loaded, where getrusage would count what its parent held."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_result(path: Path) -> ProbeResult:
    """Read what `main` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in ("samples", "scored"):
        found[key] = [Sample(**sample) for sample in found[key]]
    return ProbeResult(**found)


def main(request: Path, result: Path) -> int:
    """Measure one configuration; exit code 2 with a line on stderr for what a run would refuse."""
    from fedmed.errors import FedMedError

    with tempfile.TemporaryDirectory(prefix="fedmed-probe-") as place:
        try:
            found = measure(ProbeRequest(**json.loads(request.read_text(encoding="utf-8"))), Path(place))
        except FedMedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        write_json(result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
