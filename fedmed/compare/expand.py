"""From a comparison file and a command line to a plan."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedmed.compare.findings import columns_of
from fedmed.compare.identity import config_hash
from fedmed.compare.plan import DEPLOYMENT, Cell, Plan, Setting, folder_of
from fedmed.compare.spec import FOLDER_NAME, Comparison, apply_variant, find_comparison, read_comparison
from fedmed.compare.values import split_metric
from fedmed.config import Config, find_experiment, load_config, nearest, parse_overrides
from fedmed.errors import UserError

_BY_OPTION = {"data.path": "--data FILE", "seed": "--seeds N", "out": "--out DIR"}


@dataclass(frozen=True)
class Options:
    """What the command line adds to a comparison file."""

    variant: str | None = None  # None: the first of the file
    words: tuple[str, ...] = ()  # KEY=VALUE, after those of the file
    data: str | None = None  # site file; None: the one the file names
    seeds: int | None = None  # in the place of the variant's number; a setting that has fewer keeps its own
    engine: str | None = None  # None: as configured
    coordinator: str | None = None  # its folder, engine deployment
    out: str | None = None  # None: runs/compare/<name>-<variant>


def make_plan(name: str, options: Options, command: str = "") -> Plan:
    """Read the comparison `name` (or the file of that path) and resolve every run of it. Raises `UserError`."""
    path = find_comparison(name)
    variant, comparison = apply_variant(read_comparison(path), options.variant)
    _check_words(options.words)
    try:
        _check_file(comparison)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    data = options.data or comparison.data
    if not data and options.engine != DEPLOYMENT:
        raise UserError(f"{path.name} names no data of its own; say which site file to use: --data FILE")
    base = _base(comparison.base, path)
    settings = _settings(comparison, options.seeds)
    out = _out(options, path.stem, variant)
    cells = _Cells(comparison, options, base, data, out).make(settings)
    baseline, engine = next(iter(comparison.arms)), cells[0].config.engine.name
    if (engine == DEPLOYMENT) != (options.coordinator is not None):
        raise UserError("--coordinator DIR and --engine deployment belong together; give both or neither")
    return Plan(
        name=path.stem, variant=variant, description=comparison.description, task=comparison.task, base=comparison.base,
        data="" if engine == DEPLOYMENT else data, engine=engine, out=out, metrics=tuple(comparison.metrics),
        seed_metrics=tuple(comparison.seed_metrics or comparison.metrics), last_rounds=comparison.last_rounds,
        baseline=baseline, findings=tuple(comparison.findings), settings=tuple(settings), cells=tuple(cells),
        coordinator=options.coordinator, command=command,
    )  # fmt: skip


def _check_words(words: Sequence[str]) -> None:
    """Refuse overrides that an option stands for, since it would win over them. Raises `UserError`."""
    parse_overrides(words)
    for word in words:
        key = word.partition("=")[0].strip()
        if key in _BY_OPTION:
            raise UserError(f"{word}: a comparison sets {key} itself; use {_BY_OPTION[key]}")


def _check_file(comparison: Comparison) -> None:
    """Refuse what would show only after hours: names of no metric or finding, and keys that the command sets. Raises `UserError`."""
    columns_of(comparison.findings)
    for key, metrics in (("metrics", comparison.metrics), ("seed_metrics", comparison.seed_metrics or [])):
        for metric in metrics:
            split_metric(metric)
            if metrics.count(metric) > 1:
                raise UserError(f"{key}: {metric!r} is named twice")
            if metric not in comparison.metrics:
                raise UserError(f"{key}: {metric!r} is not among metrics{nearest(metric, comparison.metrics)}")
    lists = [comparison.overrides, *comparison.arms.values(), *comparison.levels.values.values()]
    for word in (w for words in [*lists, *(s.overrides for s in comparison.settings.values())] for w in words):
        if word.partition("=")[0].strip() in _BY_OPTION:
            raise UserError(
                f"{word}: a comparison sets this key itself and the line would be without effect; take it out"
            )


def _base(name: str, near: Path) -> str:
    """The experiment as `fedmed run` takes it: a name, or the path of a YAML file, which may lie beside the comparison."""
    beside = near.parent / name
    if name.endswith((".yaml", ".yml")) and beside.is_file():
        return str(beside)
    find_experiment(name)
    return name


def _out(options: Options, name: str, variant: str) -> Path:
    """Folder of the results. Over real sites it lies by default among the runs of the coordinator, which must be one."""
    root = Path("runs")
    if options.coordinator is not None:
        from fedmed.deployment.coordinator_folder import CoordinatorFolder

        root = CoordinatorFolder.open(options.coordinator).runs
    return Path(options.out) if options.out else root / "compare" / f"{name}-{variant}"


def _settings(comparison: Comparison, seeds: int | None) -> list[Setting]:
    """The tables in order: settings, each at every level. A setting has at most as many seeds as the one whose baseline it borrows."""
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds: expected a number >= 1, got {seeds}")
    arms, wanted = list(comparison.arms), seeds or comparison.seeds
    count = {key: min(wanted, spec.seeds or wanted) for key, spec in comparison.settings.items()}
    found = []
    for key, spec in comparison.settings.items():
        own = spec.arms or arms
        borrows = spec.against is not None and arms[0] not in own
        number = min(count[key], count[spec.against]) if borrows and spec.against else count[key]
        shown = (arms[0], *(arm for arm in arms[1:] if arm in own))
        for suffix, words in _suffixes(comparison):
            against = f"{spec.against}{suffix}" if borrows else None
            title = f"{spec.title or key}{words}"
            if not FOLDER_NAME.fullmatch(f"{key}{suffix}"):
                raise UserError(
                    f"levels: {key + suffix!r} cannot name a folder; use letters, digits, '_', '-', '.' and '+'"
                )
            found.append(Setting(f"{key}{suffix}", title, shown, tuple(range(number)), against))
    names = [setting.name for setting in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(
            f"settings: with its level one setting would be called {double!r} like another; rename one of them"
        )
    return found


def _suffixes(comparison: Comparison) -> list[tuple[str, str]]:
    """What each level adds to the name and to the title of a setting; one empty pair without levels."""
    levels = comparison.levels
    return [(f"-{value}", f", {levels.name} {value}") for value in levels.values] or [("", "")]


class _Cells:
    """Makes the runs of a comparison. Overrides come in the order file and variant, setting, level, arm, command line, data, seed."""

    def __init__(self, comparison: Comparison, options: Options, base: str, data: str, out: Path) -> None:
        self._comparison, self._options, self._base, self._out = comparison, options, base, out
        self._where = [] if options.engine == DEPLOYMENT or not data else [f"data.path={data}"]
        engine = ["--engine", options.engine] if options.engine else []
        self._ending = [*engine, *(["--coordinator", options.coordinator] if options.coordinator else [])]
        self._engine_words = [f"engine.name={options.engine}"] if options.engine else []

    def make(self, settings: Sequence[Setting]) -> list[Cell]:
        """All runs, setting by setting, arm by arm, seed by seed."""
        per_level = len(_suffixes(self._comparison))
        keys = [key for key in self._comparison.settings for _ in range(per_level)]
        levels = list(self._comparison.levels.values.values()) or [[]]
        cells: list[Cell] = []
        for index, setting in enumerate(settings):
            spec = self._comparison.settings[keys[index]]
            shared = [*self._comparison.overrides, *spec.overrides, *levels[index % per_level]]
            for arm in self._comparison.arms:
                if arm not in (spec.arms or self._comparison.arms):
                    continue
                words = [*shared, *self._comparison.arms[arm], *self._options.words, *self._where]
                cells += self._seeds(setting, arm, words)
        return cells

    def _seeds(self, setting: Setting, arm: str, words: Sequence[str]) -> list[Cell]:
        """The runs of one arm. Reading a configuration takes longer than all else, so one is read where only the seed is another."""
        try:
            first = self._load([*words, f"seed={setting.seeds[0]}"])
            apart = not self._seed_is_a_key_of_its_own or any("${" in word for word in words)
            configs = [
                self._load([*words, f"seed={seed}"]) if apart else dataclasses.replace(first, seed=seed)
                for seed in setting.seeds
            ]
        except UserError as error:
            raise UserError(f"setting {setting.name}, arm {arm}: {error}") from error
        pairs = zip(setting.seeds, configs, strict=True)
        return [self._cell(setting.name, arm, seed, (*words, f"seed={seed}"), config) for seed, config in pairs]

    def _load(self, words: Sequence[str]) -> Config:
        return load_config(self._base, [*words, *self._engine_words])

    @cached_property
    def _seed_is_a_key_of_its_own(self) -> bool:
        """Whether no other key of the experiment is made from the seed."""
        return dataclasses.replace(self._load(["seed=0"]), seed=1) == self._load(["seed=1"])

    def _cell(self, setting: str, arm: str, seed: int, words: tuple[str, ...], config: Config) -> Cell:
        folder = folder_of(setting, arm, seed)
        command = ["fedmed", "run", self._base, *words, *self._ending, "--out", str(self._out / folder)]
        return Cell(setting, arm, seed, folder, words, config, config_hash(config), shlex.join(command))
