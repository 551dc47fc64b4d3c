"""The store of a site: which rounds it keeps, rolling back, nothing half-written."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from fedmed.errors import UserError
from fedmed.federation.personal import PersonalStore


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(value), "optimizer/w/step": torch.tensor(3.0)}


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nothing_kept_is_none(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    assert store.read(0) is None and store.read(3) is None
    store.write(1, state(1.0), 0)
    assert store.read(0) is None and store.read(2) is None


def test_the_accepted_round_and_the_newest_stay(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    store.write(1, state(1.0), 0)
    store.write(2, state(2.0), 1)
    store.write(3, state(3.0), 1)  # the reply of round 2 was lost
    assert kept(store.folder) == ["round-00001", "round-00003"]
    back = store.read(1)
    assert back is not None and back["w"].item() == 1.0 and back["optimizer/w/step"].item() == 3.0


def test_what_the_newest_checkpoint_of_the_server_needs_stays(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    for number in range(1, 5):
        store.write(number, state(float(number)), number - 1, 1)
    assert kept(store.folder) == ["round-00001", "round-00003", "round-00004"]


def test_a_round_done_again_replaces_what_was_kept(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    store.write(1, state(1.0), 0)
    store.write(2, state(2.0), 1)
    store.write(2, state(5.0), 1)
    back = store.read(2)
    assert back is not None and back["w"].item() == 5.0


def test_only_the_owner_may_look_inside(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    store.write(1, state(1.0))
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_damage_is_a_user_error_with_the_path(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "personal")
    store.write(1, state(1.0))
    path = store.folder / "round-00001" / "personal.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"personal\.safetensors"):
        store.read(1)
