"""Checkpoints: everything a rule may keep comes back, a kill at any point leaves an older one, damage is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmed.errors import UserError
from fedmed.federation.checkpoint import (
    Checkpoint,
    CheckpointStore,
    flatten,
    read_safetensors,
    unflatten,
    write_safetensors,
)
from fedmed.federation.state import State

MODEL = {"w": torch.tensor([[1.0, math.nan], [math.inf, 1e-40]]), "n": torch.tensor(3), "e": torch.empty(0)}


def made(number: int, **strategy: Any) -> Checkpoint:
    return Checkpoint(
        round=number, model=MODEL, strategy=strategy, config_hash="abc", sites={"b": 0, "a": 1}, accepted={"b": number},
        history_bytes=12, best={"round": 1, "value": 0.5}, notes={"k": [1, None]}, elapsed=1.5,
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape and content, NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


KINDS: dict[str, Any] = {
    "none": None,
    "flag": True,
    "int": 2**60,
    "float": 0.1,
    "nan": math.nan,
    "infinite": -math.inf,
    "text": "größe",
    "tensor": torch.tensor([1.0, math.nan], dtype=torch.float64),
    "scalar": torch.tensor(4),
    "bfloat": torch.ones(2, dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "array": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "array 0-d": np.array(1.5),
    "flags": np.array([True, False]),
    "nested": {"site/a": {"w": torch.ones(2)}, "b": [1, (2.5, {"c": np.zeros(2)})], "empty": {}},
    "int keys": {1: torch.ones(1), "1": torch.zeros(1), 2: "x"},
    "slashes": {"a": {"b/c": torch.ones(1)}, "a/b": {"c": torch.zeros(1)}},
    "lists": [[], (), [math.nan]],
}


def test_every_kind_of_state_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoint")
    store.write(made(3, **{k.replace(" ", "_").replace("-", "_"): v for k, v in KINDS.items()}))
    back = store.read()
    assert back is not None
    for name, value in KINDS.items():
        assert same(back.strategy[name.replace(" ", "_").replace("-", "_")], value), name
    assert same({n: back.model[n] for n in MODEL}, MODEL)  # the file format has its own order
    wanted = made(3)
    for name in ("round", "config_hash", "sites", "accepted", "history_bytes", "best", "notes", "elapsed"):
        assert getattr(back, name) == getattr(wanted, name), name


def test_numpy_numbers_become_plain() -> None:
    arrays: State = {}
    assert flatten({"a": np.float32(0.5), "b": np.int64(3)}, arrays) == {"__dict__": [["a", 0.5], ["b", 3]]}
    assert unflatten(flatten((np.float64(0.1),), arrays), arrays) == (0.1,)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", lambda: 0])
def test_what_cannot_be_kept_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(TypeError, match="state at 'rule/k'"):
        flatten({"k": value}, {}, "rule")


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    write_safetensors(tmp_path / "x.safetensors", {"a": base, "b": base, "half": base[:2]})
    back = read_safetensors(tmp_path / "x.safetensors")
    assert back["half"].tolist() == [0.0, 1.0] and torch.equal(back["a"], back["b"])


def test_two_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    assert store.rounds() == [] and store.read() is None
    for number in (1, 2, 5, 10):
        store.write(made(number))
    assert store.rounds() == [5, 10]
    newest = store.read()
    assert newest is not None and newest.round == 10


@pytest.mark.parametrize("stage", ["model.safetensors", "strategy.safetensors", "meta.json", "rename"])
def test_a_kill_at_any_point_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.write(made(1, value=1))

    def kill(path: Path, target: Path) -> Path:
        if path.name.startswith(f".{stage}") or (stage == "rename" and target.name == "round-00002"):
            raise KeyboardInterrupt
        return original(path, target)

    original = Path.replace
    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        store.write(made(2, value=2))
    monkeypatch.undo()
    again = CheckpointStore(tmp_path / "c")
    old = again.read()
    assert again.rounds() == [1] and old is not None and old.strategy == {"value": 1}
    again.write(made(2, value=3))  # the leftover is in nobody's way
    new = again.read()
    assert new is not None and new.strategy == {"value": 3}


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "strategy.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damage_is_a_user_error_that_says_what_to_do(tmp_path: Path, name: str, damage: str) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.write(made(1, table=np.ones(3)))
    path = tmp_path / "c" / "round-00001" / name
    if damage == "gone" and name == "meta.json":
        path.unlink()
        assert store.read() is None  # without it the folder is no checkpoint
        return
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"{}")
    with pytest.raises(UserError, match="remove this folder to go on from the one before"):
        store.read()
