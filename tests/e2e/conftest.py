"""Whole runs on the local engine over tiny synthetic sites: `lab.run(...)`, and readers of what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from fedmed.config import Config, from_tree
from fedmed.engines import run
from fedmed.federation.checkpoint import read_safetensors
from fedmed.files import read_history

TINY: dict[str, Any] = {
    "data.path": "phantom:classification",
    "data.phantom": {"num_sites": 3, "images_per_site": 20, "image_size": 16},
    "model.args": {"widths": [4, 4]},
    "optimizer.lr": 0.01,
    "training.batch_size": 7,
    "federation.rounds": 3,
    "evaluation.central": "none",
    "engine.device": "cpu",
}  # fmt: skip
SEGMENTATION: dict[str, Any] = {
    "data.path": "phantom:segmentation",
    "data.phantom": {"num_sites": 3, "images_per_site": 20, "image_size": 32},
    "model.name": "unet",
    "model.args": {"base_width": 4},
    "model.activation": "sigmoid",
}  # fmt: skip
Call = Callable[[], Message]


class Stop:
    """Interrupts the run (as Ctrl-C does) when one of these rounds is over; none named: after the first."""

    def __init__(self, *rounds: int) -> None:
        self.rounds = rounds

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Nothing."""

    on_record = on_end = on_start

    def on_round(self, round_number: int, records: Any, elapsed: float) -> None:
        """Interrupt."""
        if not self.rounds or round_number in self.rounds:
            raise KeyboardInterrupt


class Fault:
    """Stands between server and site in one kind of message, some rounds and one site (`partition`), and misbehaves.

    `act(call)` gives the reply; it is called in place of the site and may call it.
    """

    def __init__(
        self, act: Callable[[Call], Message | None], *rounds: int, partition: int | None = 1, kind: str = "train"
    ) -> None:
        self.act, self.rounds, self.partition, self.kind = act, rounds, partition, kind

    def __call__(self, message: Message, call: Call) -> Message | None:
        """Let the message through, or misbehave."""
        node = message.metadata.dst_node_id - 1000
        chosen = self.partition is None or node == self.partition
        timely = not self.rounds or int(message.metadata.group_id or 0) in self.rounds
        if message.metadata.message_type.startswith(self.kind) and chosen and timely:
            return self.act(call)
        return call()


def tampered(change: Callable[[RecordDict], None]) -> Callable[[Call], Message]:
    """A reply whose content was changed on the way; `change` must put new records, not write into tensors."""

    def act(call: Call) -> Message:
        reply = call()
        change(reply.content)
        return reply

    return act


class Lab:
    """Runs and what they leave. Overrides are dotted keys."""

    stop, fault, tampered = Stop, Fault, staticmethod(tampered)
    segmentation = SEGMENTATION

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self._count = 0

    def new(self) -> Path:
        """A run folder that does not exist yet."""
        self._count += 1
        return self.root / f"run{self._count}"

    def config(self, out: Path | None = None, **overrides: Any) -> Config:
        """A configuration; `a__b=1` or `**{"a.b": 1}` set the key a.b."""
        tree: dict[str, Any] = {}
        flat = {**TINY, "data.cache_dir": str(self.cache), "out": str(out or self.new())}
        for key, value in {**flat, **{k.replace("__", "."): v for k, v in overrides.items()}}.items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return from_tree(tree)

    def run(
        self, out: Path | None = None, *, options: Mapping[str, Any] | None = None, **overrides: Any
    ) -> tuple[Path, dict[str, Any]]:
        """Run and give folder and summary; `options` go to `fedmed.engines.run`."""
        config = self.config(out, **overrides)
        return Path(config.out), run(config, **(options or {}))

    def stopped(self, out: Path, *rounds: int, resume: bool = False, **overrides: Any) -> None:
        """Run until interrupted after a round."""
        with pytest.raises(KeyboardInterrupt):
            self.run(out, options={"callbacks": [Stop(*rounds)], "resume": resume}, **overrides)

    @staticmethod
    def model(out: Path) -> bytes:
        """The file of the final model."""
        return (out / "model.safetensors").read_bytes()

    @staticmethod
    def state(out: Path) -> dict[str, torch.Tensor]:
        """The final model."""
        return read_safetensors(out / "model.safetensors")

    @staticmethod
    def history(out: Path, **wanted: Any) -> list[dict[str, Any]]:
        """Records of a run without times; `wanted`: only those with these values."""
        records = [dict(r) for r in read_history(out / "history.jsonl")]
        for record in records:
            del record["seconds"]
            record["metrics"] = {k: v for k, v in record["metrics"].items() if k != "seconds"}
        return [r for r in records if all(r[k] == v for k, v in wanted.items())]

    @staticmethod
    def summary(out: Path) -> dict[str, Any]:
        """The file summary.json."""
        content: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return content


@pytest.fixture
def lab(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A place for runs; the synthetic sites are made once per session."""
    return Lab(tmp_path / "runs", tmp_path_factory.getbasetemp() / "cache")
