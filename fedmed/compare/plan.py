"""A comparison with everything decided: its settings, and every run with its configuration, folder and command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmed.config import Config, nearest
from fedmed.errors import UserError

DEPLOYMENT = "deployment"  # the engine
Key = tuple[str, str, int]  # setting, arm, seed


@dataclass(frozen=True)
class Setting:
    """One table: the arms shown, baseline first, and the seeds. `against`: the setting whose baseline it borrows."""

    name: str
    title: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    against: str | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. `folder`: relative to that of the comparison; `words`: all its KEY=VALUE; `command`: as for a shell."""

    setting: str
    arm: str
    seed: int
    folder: str
    words: tuple[str, ...]
    config: Config
    config_hash: str
    command: str

    @property
    def key(self) -> Key:
        """What names a run inside a comparison."""
        return self.setting, self.arm, self.seed

    @property
    def label(self) -> str:
        """The same for people."""
        return f"{self.setting} {self.arm} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison with everything decided: what is run, where it lies, what is read from it."""

    name: str
    variant: str
    description: str
    task: str
    base: str
    data: str
    engine: str
    out: Path
    metrics: tuple[str, ...]  # the first judges
    seed_metrics: tuple[str, ...]
    last_rounds: int
    baseline: str
    findings: tuple[str, ...]
    settings: tuple[Setting, ...]
    cells: tuple[Cell, ...]
    coordinator: str | None = None
    command: str = ""  # that made it, as for a shell
    _by_key: dict[Key, Cell] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._by_key.update({cell.key: cell for cell in self.cells})

    def cell(self, setting: str, arm: str, seed: int) -> Cell | None:
        """The run that stands for (setting, arm, seed): that of another setting where a baseline is borrowed, None if there is none."""
        found = self._by_key.get((setting, arm, seed))
        if found is not None or arm != self.baseline:
            return found
        other = next((s.against for s in self.settings if s.name == setting), None)
        return None if other is None else self._by_key.get((other, arm, seed))

    def folder(self, setting: str, arm: str, seed: int) -> Path:
        """Folder of that run; one that never exists where the plan has no such run."""
        found = self.cell(setting, arm, seed)
        return self.out / (found.folder if found is not None else folder_of(setting, arm, seed))

    def select(self, only: Sequence[str] = (), arms: Sequence[str] = ()) -> set[Key]:
        """Keys of the runs of some settings (a name without its level means all levels) and arms; empty: of all.

        With `only`, borrowed baselines are among them. Raises `UserError` for a name the plan does not have.
        """
        names = [setting.name for setting in self.settings]
        for word in only:
            if not any(_meant(name, word) for name in names):
                raise UserError(f"--only: no setting {word!r}{nearest(word, names)}")
        known = list(dict.fromkeys(cell.arm for cell in self.cells))
        for word in arms:
            if word not in known:
                raise UserError(f"--arms: no arm {word!r}{nearest(word, known)}")
        chosen = [s for s in self.settings if not only or any(_meant(s.name, word) for word in only)]
        found = {
            cell.key
            for setting in chosen
            for arm in setting.arms
            if not arms or arm in arms
            for seed in setting.seeds
            if (cell := self.cell(setting.name, arm, seed)) is not None
        }
        if not found:
            raise UserError("--only and --arms leave nothing to run: none of these settings has one of these arms")
        return found

    def restricted(self, keys: Iterable[Key]) -> Plan:
        """The same comparison with these runs only; settings of which no arm but a borrowed baseline is left are left out."""
        kept = set(keys)
        cells = tuple(cell for cell in self.cells if cell.key in kept)
        settings = []
        for setting in self.settings:
            own = {arm for name, arm, _ in kept if name == setting.name}
            borrowers = {s.name for s in self.settings if s.against == setting.name}
            lent = own == {self.baseline} and any(name in borrowers for name, _, _ in kept)
            if own and not lent:
                arms = tuple(arm for arm in setting.arms if arm in own or arm == self.baseline)
                settings.append(dataclasses.replace(setting, arms=arms))
        return dataclasses.replace(self, cells=cells, settings=tuple(settings), _by_key={})


def folder_of(setting: str, arm: str, seed: int) -> str:
    """Folder of a run below that of its comparison."""
    return f"{setting}/{arm}-{seed}"


def _meant(setting: str, word: str) -> bool:
    return setting == word or setting.rpartition("-")[0] == word
