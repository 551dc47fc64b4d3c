"""What a site keeps between rounds: one folder per round, written atomically before the reply leaves.

A message carries `personal_round`, the last round whose reply the server accepted from this site (0: none). The site goes on from exactly
that one, so a reply that was lost, a restart and a resume all follow one rule. A server that checkpoints every few rounds and dies goes back to
its newest checkpoint, so what was accepted then (`durable_round`) is kept too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedmed.federation.checkpoint import read_safetensors, write_safetensors
from fedmed.federation.state import State


class PersonalStore:
    """The personal state of one site in one run. The folder (0700) may hold patient-derived arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:05d}" / "personal.safetensors"

    def read(self, round_number: int) -> State | None:
        """What was kept in `round_number`; None if nothing was (then the site begins anew)."""
        path = self._path(round_number)
        return read_safetensors(path) if round_number > 0 and path.is_file() else None

    def write(self, round_number: int, state: State, *keep: int) -> None:
        """Keep `state` under `round_number`; of the others only the rounds `keep` stay."""
        path = self._path(round_number)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        write_safetensors(path, state)
        kept = {f"round-{number:05d}" for number in (round_number, *keep)}
        for old in self.folder.glob("round-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
