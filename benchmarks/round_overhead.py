"""What FedMed adds to the training itself: a FedAvg round of the local engine against a bare PyTorch loop, and an empty round.

    python benchmarks/round_overhead.py           10 clients x 200 images of 28x28 pixels, batch 20, a CNN of 0.58 million parameters
    python benchmarks/round_overhead.py --tiny    a small case, equality check only

Engine and loop take turns, round by round, inside one run: same initial model, same batches, same optimiser, so their models must be
equal bit for bit. That is checked before anything is timed, and again on the timed rounds. The loop does nothing but load, train and
average, on images that were decoded once before it starts. In the timed rounds nothing is evaluated and no checkpoint is written.
In an empty round the clients do not train: what remains is sending, loading, copying each reply, checking it for NaN, averaging and
writing the history, here at 7.8 million parameters; beside it stands the part that no engine can do without, loading and averaging.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmed.config import Config, from_tree
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.engines import run
from fedmed.federation.client import Client
from fedmed.federation.seeding import torch_rng
from fedmed.federation.site import make_model
from fedmed.models.output import Output

IMAGE, NUM_CLASSES, BATCH, LR = 28, 10, 20, 0.05
State = dict[str, Tensor]


class BenchmarkCNN(nn.Module):
    """Two 3x3 convolutions with pooling and two linear layers: 0.58 million parameters at 28x28 pixels and 10 classes."""

    def __init__(self, in_channels: int, num_outputs: int, hidden: int = 178) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, hidden)
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, images: Tensor) -> Output:
        """Give logits (B, num_outputs) and features (B, hidden) of images (B, in_channels, 28, 28)."""
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        features = F.relu(self.hidden(maps.flatten(1)))
        return Output(self.head(features), features)


class Idle(Client):
    """A client that trains nothing."""

    def fit(self) -> dict[str, float]:
        """Leave the model as it came."""
        return {}


class Turns:
    """Follows a run: times its rounds from callback to callback, and runs and times `other` after each of them.

    The first round of both (imports, first allocations) and the last one of the run (checkpoint) are not timed.
    """

    def __init__(self, rounds: int, other: Callable[[int], Any]) -> None:
        self.engine, self.other = common.Times(), common.Times()
        self._rounds, self._run_other = rounds, other
        self._watch: common.Stopwatch | None = None
        self.done = 0

    def on_start(self, info: dict[str, Any]) -> None:
        """Nothing to do yet."""

    def on_record(self, record: dict[str, Any]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing left to do."""

    def on_round(self, round_number: int, records: Any, elapsed: float) -> None:
        """The engine has finished a round: stop its clock, let the other side do the same round, go on."""
        if self._watch is not None and round_number < self._rounds:
            self._watch.stop(self.engine)
        watch = common.Stopwatch()
        self._run_other(round_number)
        if 1 < round_number < self._rounds:
            watch.stop(self.other)
        self.done = round_number
        self._watch = common.Stopwatch()


def write_sites(path: Path, num_sites: int, images_per_site: int) -> Path:
    """A site file of random labelled images, all for training."""
    rng = np.random.default_rng(0)
    sites = [
        SiteArrays(
            name=f"site-{k:02d}",
            image=rng.integers(0, 256, (images_per_site, IMAGE, IMAGE), dtype=np.uint8),
            annotations={"label": rng.integers(0, NUM_CLASSES, images_per_site)},
            splits={"train": np.arange(images_per_site)},
        )
        for k in range(num_sites)
    ]
    meta = {
        "task": "classification",
        "classes": [f"class {c}" for c in range(NUM_CLASSES)],
        "channels": ["grey"],
        "image_size": [IMAGE, IMAGE],
    }
    return write_site_file(path, meta, sites)


def write_mask_sites(path: Path, num_sites: int) -> Path:
    """A site file of a few tiny images with masks: enough to build a U-Net for."""
    shape = (4, 16, 16)
    sites = [
        SiteArrays(
            f"site-{k:02d}", np.zeros(shape, np.uint8), {"mask": np.zeros(shape, np.uint8)}, {"train": np.arange(4)}
        )
        for k in range(num_sites)
    ]
    meta = {"task": "segmentation", "classes": ["background", "target"], "channels": ["grey"], "image_size": [16, 16]}
    return write_site_file(path, meta, sites)


def make_config(folder: Path, path: Path, rounds: int, **sections: dict[str, Any]) -> Config:
    """A FedAvg run without evaluation and checkpoints."""
    return from_tree(
        {
            "name": "overhead", "seed": 1, "out": str(folder / "run"),
            "data": {"path": str(path), "cache_dir": str(folder / "cache")},
            "strategy": {"name": "fedavg"}, "client": {"name": "supervised"},
            "optimizer": {"name": "sgd", "lr": LR},
            "federation": {"rounds": rounds, "checkpoint_every": 1_000_000},
            "evaluation": {"every": 1_000_000, "sites": False, "central": "none"},
            "engine": {"name": "local", "device": "cpu", "threads": 1},
            **sections,
        }
    )  # fmt: skip


class BareLoop:
    """FedAvg in plain PyTorch."""

    def __init__(self, config: Config, path: Path) -> None:
        import h5py

        self.config = config
        self.sites: list[tuple[str, Tensor, Tensor]] = []
        with h5py.File(path) as file:
            for key in sorted(k for k in file if k.startswith("site_")):
                images = torch.from_numpy(file[key]["image"][:])[:, None].to(torch.float32).div_(255.0)
                labels = torch.from_numpy(file[key]["label"][:].astype(np.int64))
                self.sites.append((str(file[key].attrs["site_name"]), images, labels))
        self.model, _ = make_model(config, "classification", NUM_CLASSES, 1, (IMAGE, IMAGE))
        self.state: State = {name: value.clone() for name, value in self.model.state_dict().items()}

    def round(self, number: int) -> None:
        """One round over all sites."""
        mean: State = {}
        total = 0
        for site, images, labels in self.sites:
            self.model.load_state_dict(self.state)
            self.train(images, labels, torch_rng(self.config.seed, number, site, "batches"))
            count = len(images)
            total += count
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    if name in mean:
                        mean[name].add_(value, alpha=count)
                    else:
                        mean[name] = value * count
        self.state = {name: value.div_(total) for name, value in mean.items()}

    def train(self, images: Tensor, labels: Tensor, rng: torch.Generator) -> None:
        """The local epochs of one site."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.model.train()
        for _ in range(self.config.training.epochs):
            order = torch.randperm(len(images), generator=rng)
            for start in range(0, len(images), BATCH):
                rows = order[start : start + BATCH]
                loss = F.cross_entropy(self.model(images[rows]).logits, labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def compare(num_sites: int, images: int, epochs: int, rounds: int, hidden: int) -> Turns:
    """Run engine and loop in turns and demand equal final models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_sites(folder / "sites.h5", num_sites, images)
        config = make_config(
            folder, path, rounds,
            model={"name": "round_overhead:BenchmarkCNN", "args": {"hidden": hidden}},
            training={"epochs": epochs, "batch_size": BATCH},
        )  # fmt: skip
        loop = BareLoop(config, path)
        turns = Turns(rounds, loop.round)
        run(config, callbacks=[turns])
        if turns.done != rounds:
            raise SystemExit(f"the bare loop stopped in round {turns.done + 1} of {rounds}; see the warning above")
        ours = load_file(folder / "run" / "model.safetensors")
        same = ours.keys() == loop.state.keys() and all(torch.equal(ours[n], loop.state[n]) for n in ours)
        common.require(
            same,
            f"engine = bare loop, bit for bit, after {rounds} rounds of {num_sites} clients x {images // BATCH * epochs} steps",
        )
    return turns


class LoadAndSum:
    """What an empty round cannot do without: load the state once a client, add each reply."""

    def __init__(self, config: Config, num_sites: int) -> None:
        self._model, _ = make_model(config, "segmentation", 2, 1, (16, 16))
        self._state = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._sum = {name: value.clone() for name, value in self._state.items() if value.is_floating_point()}
        self._num_sites = num_sites

    def __call__(self, number: int) -> None:
        with torch.no_grad():
            for _ in range(self._num_sites):
                for name, value in self._model.state_dict().items():
                    value.copy_(self._state[name])
                for name, value in self._sum.items():
                    value.add_(self._state[name], alpha=1e-9)


def empty_rounds(num_sites: int, base_width: int, rounds: int) -> Turns:
    """Rounds in which no client trains."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(
            folder, write_mask_sites(folder / "sites.h5", num_sites), rounds,
            client={"name": "round_overhead:Idle"}, model={"name": "unet", "args": {"base_width": base_width}},
        )  # fmt: skip
        turns = Turns(rounds, LoadAndSum(config, num_sites))
        run(config, callbacks=[turns])
        model, _ = make_model(config, "segmentation", 2, 1, (16, 16))
        after = load_file(folder / "run" / "model.safetensors")
        worst = max(float((after[n] - value).abs().max()) for n, value in model.state_dict().items())
        common.require(
            worst < 1e-5, f"{rounds} empty rounds of {num_sites} clients leave the model as it was (to rounding)"
        )
    return turns


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small case, equality check only")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds of each comparison")
    parser.add_argument("--clients", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare(3, 2 * BATCH, epochs=2, rounds=3, hidden=16)
    if options.tiny:
        empty_rounds(2, base_width=8, rounds=3)
        return
    print(common.machine())
    for epochs, target in ((10, "<= 1.03"), (1, "<= 1.15")):
        turns = compare(options.clients, 200, epochs, options.rounds + 2, hidden=178)
        common.show_times({"engine": turns.engine, "bare loop": turns.other})
        common.show_ratio(f"{10 * epochs} steps a client: engine / bare loop", turns.engine, turns.other, target)
    turns = empty_rounds(options.clients, base_width=43, rounds=options.rounds + 2)
    print(f"empty round, {options.clients} clients, 7.8 million parameters; target <= 80 ms")
    common.show_times({"empty round": turns.engine, "load and sum": turns.other})
    common.show_ratio("empty round / load and sum", turns.engine, turns.other, "none")


if __name__ == "__main__":
    main()
