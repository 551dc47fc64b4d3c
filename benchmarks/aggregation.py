"""Aggregation of K replies: the streaming mean against a naive loop, Flower's own averaging and the memory bandwidth.

    python benchmarks/aggregation.py            K = 10 states of a U-Net with 7.8 million parameters
    python benchmarks/aggregation.py --tiny     small states, equality check only

Limit: the time of the memory traffic that any streaming sum has, whatever its arithmetic: the first state is read and written once
(`copy_`), for every other one the sum and the state are read and the sum is written (`add_`). It is measured on flat float32 tensors of
the same volume. Memory is measured in a fresh process as the growth of the peak resident size over one aggregation whose replies are made
one by one, the global model counted in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import common
import torch
from torch import Tensor

from fedmed.federation import buffers
from fedmed.federation.state import State, clone_state, num_bytes, weighted_mean
from fedmed.models.unet import UNet

K = 10


def make_state(base_width: int) -> State:
    """The state of a U-Net, with counters as after some training."""
    torch.manual_seed(0)
    state = clone_state(UNet(1, 1, base_width=base_width).state_dict())
    return {name: value if value.is_floating_point() else value + 7 for name, value in state.items()}


def replies(base: State, count: int) -> Iterator[tuple[int, State]]:
    """`count` pairs (number of examples, state), each made when asked for, as a site packs its reply, and not held afterwards."""
    for k in range(count):
        yield 100 + 37 * k, _reply(base, k)


def _reply(base: State, k: int) -> State:
    state = clone_state(base)
    for value in state.values():
        if value.is_floating_point():
            value.mul_(1.0 + 0.03 * k).add_(0.001 * k)  # in place: no memory beside the reply's own
        else:
            value.add_(k)
    return state


def streaming(weighted: Iterable[tuple[int, State]]) -> State:
    """FedMed: one running sum."""
    result = weighted_mean(weighted)
    assert result is not None
    return result


def naive(weighted: list[tuple[int, State]]) -> State:
    """What one writes first: per entry, stack the K tensors, multiply by the weights, sum."""
    shares = torch.tensor([float(weight) for weight, _ in weighted])
    shares = shares / shares.sum()
    out: State = {}
    for name, first in weighted[0][1].items():
        stacked = torch.stack([state[name] for _, state in weighted])
        if first.is_floating_point():
            out[name] = (stacked * shares.view(-1, *(1,) * first.ndim)).sum(dim=0)
        else:
            out[name] = stacked.amax(dim=0)
    return out


class FlowerAveraging:
    """Flower's own record averaging, on records that hold Flower's own arrays (serialised, as they arrive); encoding is not timed."""

    def __init__(self, weighted: list[tuple[int, State]]) -> None:
        from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

        self._average = aggregate_arrayrecords
        self._records = []
        for weight, state in weighted:
            arrays = ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})
            self._records.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})}))

    def __call__(self) -> object:
        return self._average(self._records, "num-examples")

    def state(self) -> dict[str, Tensor]:
        """One average as tensors."""
        return {
            name: torch.from_numpy(array.numpy())
            for name, array in self._average(self._records, "num-examples").items()
        }


class BandwidthLimit:
    """The memory traffic of a streaming sum over flat tensors of the same volume."""

    def __init__(self, num_elements: int, count: int) -> None:
        self._sum = torch.zeros(num_elements)
        self._terms = [torch.full((num_elements,), float(k)) for k in range(count)]

    def __call__(self) -> None:
        self._sum.copy_(self._terms[0])
        for term in self._terms[1:]:
            self._sum.add_(term)


def check(weighted: list[tuple[int, State]], flower: FlowerAveraging) -> None:
    """All ways must give the same state: to rounding for floats; counters by maximum (Flower averages them, so they are left out there)."""
    ours, plain, theirs = streaming(weighted), naive(weighted), flower.state()
    require_close(ours, plain, ours.keys(), "streaming mean = naive loop (floats to 1e-6, counters exactly)")
    floats = [name for name, value in ours.items() if value.is_floating_point()]
    require_close(ours, theirs, floats, "streaming mean = Flower's averaging (floats to 1e-6)")
    first = weighted[0][1]
    common.require(all(ours[n].dtype == first[n].dtype for n in first), "dtypes go in as they come out")


def require_close(a: State, b: State, names: object, what: str) -> None:
    """End the benchmark unless the named entries agree."""
    names = list(names)  # type: ignore[call-overload]
    common.require(all(torch.allclose(a[n].double(), b[n].double(), rtol=1e-6, atol=1e-6) for n in names), what)


def measure_memory(base_width: int, count: int) -> None:
    """Run in a fresh process: aggregate twice with replies made one by one; print bytes of a state, growth of the peak, what was held before.

    Linux: the peak resident size is reset before. Elsewhere `growth` is null.
    """
    base = make_state(base_width)
    streaming(replies(base, 2))  # imports and whatever is kept for the next time; the measurement counts it, see below
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    growth = None
    if reset.exists():
        before = _status_bytes(status, "VmRSS") - _kept_bytes()
        reset.write_text("5")
        mean = streaming(replies(base, count))
        growth = _status_bytes(status, "VmHWM") - before
        assert mean
    print(json.dumps({"state": num_bytes(base), "growth": growth}))


def _kept_bytes() -> int:
    """Memory that FedMed keeps from earlier states and gives out again: resident already, so the growth would not show it."""
    return sum(block.nbytes for blocks in buffers._free.values() for block in blocks)


def _status_bytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def show_memory(base_width: int, count: int) -> None:
    """Measure in a child process and print."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--memory",
        "--base-width",
        str(base_width),
        "--count",
        str(count),
    ]
    # glibc would otherwise keep freed memory, and what is kept already would hide what is taken.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output.splitlines()[-1])
    if found["growth"] is None:
        print("memory: measured on Linux only")
        return
    one, total = found["state"], found["state"] + found["growth"]
    print(
        f"memory: {total / one:.2f} states of {one / 1e6:.1f} MB at the peak (global model, running sum, the reply in hand), {count} replies; "
        f"target <= 3 (2 and one reply); holding all replies takes {count + 2}"
    )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small states, equality check only")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--base-width", type=int, default=43, help="of the U-Net; 43 gives 7.8 million parameters")
    parser.add_argument("--count", type=int, default=K, help="number of replies")
    parser.add_argument("--memory", action="store_true", help="measure memory only (used by the script itself)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        measure_memory(options.base_width, options.count)
        return
    base = make_state(4 if options.tiny else options.base_width)
    weighted = list(replies(base, options.count))
    flower = FlowerAveraging(weighted)
    check(weighted, flower)
    if options.tiny:
        return
    num_elements = num_bytes(base) // 4
    print(f"{common.machine()}; {options.count} states of {len(base)} entries, {num_bytes(base) / 1e6:.1f} MB each")
    limit = BandwidthLimit(num_elements, options.count)
    cases = {
        "bandwidth limit": limit,
        "streaming mean": lambda: streaming(weighted),
        "naive loop": lambda: naive(weighted),
        "Flower": flower,
    }
    times = common.interleave(cases, options.repetitions)
    common.show_times(times)
    common.show_ratio("streaming mean / limit", times["streaming mean"], times["bandwidth limit"], "<= 2")
    common.show_ratio("Flower / streaming mean", times["Flower"], times["streaming mean"], ">= 5")
    common.show_ratio("naive loop / streaming mean", times["naive loop"], times["streaming mean"], "none")
    show_memory(options.base_width, options.count)


if __name__ == "__main__":
    main()
