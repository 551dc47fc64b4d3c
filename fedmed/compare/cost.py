"""What the runs of a comparison will cost: traffic, training steps, passes, time and memory, estimated from short measurements.

Rounds that a measurement did not reach are taken to be like the last one it saw, queries in them only if both of its last two rounds had some.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from fedmed.compare.plan import Cell
from fedmed.compare.probe import ProbeResult, Sample
from fedmed.config import Config
from fedmed.report.tables import clock, text_table

REPORT_S = 2.0  # report and figures at the end of a run, about


@dataclass(frozen=True)
class Cost:
    """Estimate for one run of an arm in a setting. Bytes are those of arrays, passes are images, per site on average over sites."""

    setting: str
    arm: str
    config_hash: str  # of the run that was measured
    sites: int = 0
    rounds: int = 0
    rounds_seen: int = 0  # by the measurement
    seconds: float = math.nan  # of a run
    steps: float = 0.0  # of training, a site in all rounds
    forward: float = 0.0  # images through the network, a site in all rounds: training, sweeps, queries, scores
    backward: float = 0.0
    down_round: float = 0.0  # bytes to a site in a round with training
    up_round: float = 0.0
    down: float = 0.0  # bytes to a site in all rounds
    up: float = 0.0
    memory: float = 0.0  # bytes, largest
    gpu_memory: float = 0.0
    problem: str = ""  # why there is no estimate


@dataclass
class _Sum:
    """What is added up over the messages of a round."""

    seconds: float = 0.0
    steps: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    down: float = 0.0
    up: float = 0.0

    def plus(self, other: _Sum, times: float = 1.0) -> _Sum:
        """self + times · other."""
        mine, theirs = asdict(self), asdict(other)
        return _Sum(**{key: mine[key] + times * theirs[key] for key in mine})


def full_steps(items: int, config: Config) -> int:
    """Training steps of a site with `items` items in a round: epochs times batches, at most `training.max_steps`."""
    from fedmed.data.loader import num_batches

    steps = config.training.epochs * num_batches(items, config.training.batch_size)
    return steps if config.training.max_steps is None else min(steps, config.training.max_steps)


def projected(sample: Sample, config: Config) -> _Sum:
    """What a message costs with all its training steps: what lies outside the steps once, a step as often as there are steps.

    Images of the steps: epochs times items, or as many full batches as there are steps where these are fewer.
    """
    found = _Sum(sample.seconds, sample.steps, sample.forward, sample.backward, sample.down, sample.up)
    if not sample.steps:
        return found
    steps = full_steps(sample.items, config)
    images = min(config.training.epochs * sample.items, steps * config.training.batch_size)
    part = images / sample.step_images if sample.step_images else 0.0
    found.seconds += (steps - sample.steps) * sample.step_s
    found.steps = steps
    found.forward += part * sample.step_forward
    found.backward += part * sample.step_backward
    return found


def total(samples: Iterable[Sample], config: Config) -> _Sum:
    """Sum over messages."""
    found = _Sum()
    for sample in samples:
        found = found.plus(projected(sample, config))
    return found


def evaluations(config: Config) -> tuple[int, int]:
    """How often sites and coordinator score in a run; scores that ride on training messages are counted there."""
    rounds, every = config.federation.rounds, config.evaluation.every
    times = rounds // every + (rounds % every > 0)
    return (0 if not config.evaluation.sites else times if config.evaluation.mode == "separate" else 1), times


def estimate(cell: Cell, probe: ProbeResult) -> Cost:
    """Put a measurement together to a whole run; see the head of this module for rounds that were not measured."""
    config = cell.config
    seen, rounds = probe.rounds, config.federation.rounds
    train = {
        n: total((s for s in probe.samples if s.kind == "train" and s.round == n), config) for n in range(1, seen + 1)
    }
    asked = {
        n: total((s for s in probe.samples if s.kind == "query" and s.round == n), config) for n in range(1, seen + 1)
    }
    whole = _Sum(seconds=rounds * probe.overhead_s)
    for number in range(1, seen + 1):
        whole = whole.plus(train[number]).plus(asked[number])
    if seen:
        whole = whole.plus(train[seen], rounds - seen)
        always = seen > 1 and asked[seen].seconds and asked[seen - 1].seconds
        whole = whole.plus(asked[seen], rounds - seen if always else 0)
    own, central = evaluations(config)
    whole = whole.plus(total((s for s in probe.scored if s.kind == "evaluate"), config), own)
    by_server = total((s for s in probe.scored if s.kind == "central"), config)
    whole.seconds += central * by_server.seconds  # its passes are not those of a site
    sites = max(probe.sites, 1)
    last = train.get(seen, _Sum())
    asked_sites = sum(s.kind == "train" and s.round == seen for s in probe.samples) or 1
    return Cost(
        cell.setting, cell.arm, cell.config_hash, probe.sites, rounds, seen, probe.startup_s + whole.seconds + REPORT_S,
        whole.steps / sites, whole.forward / sites, whole.backward / sites, last.down / asked_sites, last.up / asked_sites,
        whole.down / sites, whole.up / sites, probe.memory, probe.gpu_memory,
    )  # fmt: skip


# ---------------------------------------------------------------------- tables


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Seconds until all runs are over when they start in order, `jobs` at a time."""
    free = [0.0] * max(1, jobs)
    for duration in seconds:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def cost_text(costs: Sequence[Cost], runs: Mapping[tuple[str, str], int], jobs: int) -> str:
    """The tables of work and traffic for the terminal, how long everything takes, and what the numbers leave out.

    runs: number of runs still to do for each (setting, arm).
    """
    known = [c for c in costs if not c.problem]
    work = [
        [f"{c.setting} {c.arm}", str(runs.get((c.setting, c.arm), 0)), clock(c.seconds), size(c.gpu_memory or c.memory)]
        + [count(v) for n in (c.steps, c.forward, c.backward) for v in (n, n * c.sites)]
        for c in known
    ]
    traffic = [
        [
            f"{c.setting} {c.arm}",
            size(c.down_round),
            size(c.up_round),
            size(c.down),
            size(c.up),
            size((c.down + c.up) * c.sites),
        ]
        for c in known
    ]
    on_gpu = any(c.gpu_memory for c in known)
    header = ["estimate", "runs", "a run", "GPU memory" if on_gpu else "memory"]
    header += [f"{name} {of}" for name in ("steps", "forward", "backward") for of in ("a site", "all")]
    blocks = [text_table(header, work)] if work else []
    columns = ["traffic", "down a round", "up a round", "down a site", "up a site", "all sites"]
    blocks += [text_table(columns, traffic)] if traffic else []
    return "\n\n".join([*blocks, "\n".join(_remarks(costs, runs, jobs))])


def _remarks(costs: Sequence[Cost], runs: Mapping[tuple[str, str], int], jobs: int) -> list[str]:
    """What the tables mean and leave out, a line each."""
    lines = [f"no estimate for {c.setting} {c.arm}: {c.problem}" for c in costs if c.problem]
    known = {(c.setting, c.arm): c for c in costs if not c.problem}
    if not known:
        return lines
    todo = [key for key, number in runs.items() for _ in range(number)]
    seconds = [known[key].seconds for key in todo if key in known]
    unknown = len(todo) - len(seconds)
    without = f", without {unknown} that cannot be estimated" if unknown else ""
    runs_word = "1 run" if len(todo) == 1 else f"{len(todo)} runs"
    lines.append(f"{runs_word}, {jobs} at a time: about {clock(makespan(seconds, jobs))}{without}")
    lines.append(
        "Estimates from a few training steps a round, on the local engine. forward, backward: images through the network; "
        "traffic: bytes of arrays, a round with training and the whole run."
    )
    partly = [c for c in known.values() if c.rounds_seen < c.rounds]
    if partly:
        shown = ", ".join(f"{c.setting} {c.arm} {c.rounds_seen} of {c.rounds}" for c in partly[:4])
        more = f" and {len(partly) - 4} more" if len(partly) > 4 else ""
        lines.append(
            f"Rounds measured: {shown}{more}; later ones count like the last of these, so what a method begins later is not in it."
        )
    return lines


def count(number: float) -> str:
    """A number of steps or images: 950, 12.3k, 4.56M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}" if number < 999.5 * factor else f"{number / factor:.0f}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """A number of bytes: 950 B, 12.3 kB, 4.56 MB (powers of 1000)."""
    return (
        f"{count(number)}B".replace("kB", " kB").replace("MB", " MB").replace("GB", " GB")
        if number >= 1e3
        else f"{number:.0f} B"
    )
