"""Checkpoints of the server: model, strategy state and bookkeeping, written atomically, read without executing code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.state import State
from fedmed.files import write_text

_KEEP = 2  # the newest, and the one before it in case the newest proves unreadable


@dataclass(frozen=True)
class Checkpoint:
    """Everything the server needs to go on after `round`."""

    round: int
    model: State
    strategy: dict[str, Any]  # fields of the strategy's State
    config_hash: str
    sites: dict[str, int] = field(default_factory=dict)  # site -> index
    accepted: dict[str, int] = field(default_factory=dict)  # site -> last round whose reply was accepted
    history_bytes: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # model selection: round and value
    notes: dict[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0


def write_safetensors(path: Path, state: State) -> None:
    """Write a state atomically (temporary file, fsync, rename). Tensors that share memory are stored apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, temporary)
    _sync(temporary)
    temporary.replace(path)


def read_safetensors(path: Path) -> State:
    """Read a state. Raises `UserError` for a missing or damaged file."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(value: Any, arrays: State, place: str = "") -> Any:
    """Turn numbers, strings, arrays, and dicts, lists, tuples of them into JSON plus named tensors. Raises `TypeError` for anything else.

    NaN and ±inf keep their value (Python's JSON writes them); float64 survives exactly.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        key = place if place not in arrays else f"{place}#{len(arrays)}"  # {1: a, "1": b} and names with a slash
        if isinstance(value, Tensor):
            arrays[key] = value
            return {"__tensor__": key}
        arrays[key] = torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
        return {"__array__": key}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"__dict__": [[flatten(k, arrays), flatten(v, arrays, f"{place}/{k}")] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        kind = "__tuple__" if isinstance(value, tuple) else "__list__"
        return {kind: [flatten(v, arrays, f"{place}/{i}") for i, v in enumerate(value)]}
    raise TypeError(
        f"strategy state at {place!r}: expected numbers, strings, arrays and dicts of them, got {type(value).__name__}"
    )


def unflatten(tree: Any, arrays: State) -> Any:
    """Undo `flatten`."""
    if not isinstance(tree, dict):
        return tree
    (kind, value), *_ = tree.items()
    if kind == "__tensor__":
        return arrays[value]
    if kind == "__array__":
        return arrays[value].numpy()
    if kind == "__dict__":
        return {unflatten(k, arrays): unflatten(v, arrays) for k, v in value}
    items = [unflatten(v, arrays) for v in value]
    return tuple(items) if kind == "__tuple__" else items


class CheckpointStore:
    """The `checkpoint/` folder of a run: one folder per round, the two newest kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, checkpoint: Checkpoint) -> None:
        """Write atomically: a killed process leaves the checkpoint before this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"round-{checkpoint.round:05d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        arrays: State = {}
        tree = {name: flatten(value, arrays, name) for name, value in checkpoint.strategy.items()}
        write_safetensors(temporary / "model.safetensors", checkpoint.model)
        write_safetensors(temporary / "strategy.safetensors", arrays)
        values = {
            f.name: getattr(checkpoint, f.name)
            for f in dataclasses.fields(checkpoint)
            if f.name not in ("model", "strategy")
        }
        write_text(
            temporary / "meta.json", json.dumps({**values, "strategy": tree}, indent=1) + "\n"
        )  # NaN keeps its value
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in self.rounds()[:-_KEEP]:
            shutil.rmtree(self.folder / f"round-{old:05d}", ignore_errors=True)

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, ascending."""
        return sorted(
            int(p.name.removeprefix("round-")) for p in self.folder.glob("round-*") if (p / "meta.json").is_file()
        )

    def read(self) -> Checkpoint | None:
        """The newest checkpoint, or None. Raises `UserError` for a damaged one."""
        rounds = self.rounds()
        if not rounds:
            return None
        folder = self.folder / f"round-{rounds[-1]:05d}"
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            arrays = read_safetensors(folder / "strategy.safetensors")
            strategy = {name: unflatten(tree, arrays) for name, tree in meta.pop("strategy").items()}
            return Checkpoint(model=read_safetensors(folder / "model.safetensors"), strategy=strategy, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(
                f"the checkpoint {folder} is damaged ({error}); remove this folder to go on from the one before"
            ) from error
