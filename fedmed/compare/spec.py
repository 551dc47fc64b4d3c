"""The comparison file: what its keys mean, where it is found, and what is wrong with one that cannot be run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.config import build, experiment_dirs, nearest
from fedmed.errors import UserError

ONLY_VARIANT = "full"  # name of the variant of a file that declares none
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")  # settings and arms become folders


@dataclass(frozen=True)
class SettingSpec:
    """One setting: data and schedule that its arms share."""

    title: str = ""  # of its table
    overrides: list[str] = field(default_factory=list)
    seeds: int | None = None  # at most so many, whatever the comparison says
    arms: list[str] | None = None  # those that run here; None: all
    against: str | None = None  # setting whose baseline is the baseline here


@dataclass(frozen=True)
class Levels:
    """Steps of one quantity: every setting is run at each of them."""

    name: str = "level"  # in titles: "<title>, <name> <value>"
    values: dict[str, list[str]] = field(default_factory=dict)  # value -> overrides


@dataclass(frozen=True)
class Variant:
    """A size of the comparison: selects settings and arms, adds overrides, replaces the rest where it says something."""

    seeds: int | None = None
    settings: list[str] | None = None
    arms: list[str] | None = None
    overrides: list[str] = field(default_factory=list)  # after those of the file, before those of a setting
    levels: Any = None  # as `levels` of the file, or a list of its values to keep
    metrics: list[str] | None = None
    seed_metrics: list[str] | None = None
    last_rounds: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The keys of a comparison file. The first arm is the baseline, the first metric the one that judges."""

    base: str = ""  # experiment every run starts from
    description: str = ""
    task: str = ""  # of the site file it needs: its first word is checked
    data: str = ""  # used without --data
    overrides: list[str] = field(default_factory=list)  # of all runs
    metrics: list[str] = field(default_factory=list)
    seed_metrics: list[str] | None = None  # of the table by seed; None: all metrics
    last_rounds: int = 1  # a value of a run is the mean over its last evaluations
    seeds: int = 3
    arms: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    settings: dict[str, SettingSpec] = field(default_factory=dict)
    levels: Levels = field(default_factory=Levels)
    findings: list[str] = field(default_factory=lambda: ["noisy"])
    variants: dict[str, Variant] = field(default_factory=dict)  # the first is the default


def comparison_files() -> dict[str, Path]:
    """The comparisons known by name, in the order of their names."""
    found: dict[str, Path] = {}
    for folder in experiment_dirs():
        for path in sorted((folder / "compare").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_comparison(name: str) -> Path:
    """Find a comparison by name or by the path of a YAML file. Raises `UserError` naming the nearest."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = comparison_files()
    if name not in known:
        raise UserError(f"no comparison {name!r}: neither a YAML file nor a known name{nearest(name, known)}")
    return known[name]


def read_comparison(path: Path) -> Comparison:
    """Read and check a comparison file. Raises `UserError` with the place of what is wrong and the nearest valid name."""
    from omegaconf import OmegaConf

    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))  # ${...} in overrides is for the run
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the YAML parser has many error types; all of them mean "not YAML"
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level")
    try:
        comparison = build(Comparison, {str(k): v for k, v in tree.items()}, "")
        _check(comparison)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    return comparison


def apply_variant(comparison: Comparison, name: str | None) -> tuple[str, Comparison]:
    """Give the name of the variant meant (None: the first) and the comparison with it applied. Raises `UserError`."""
    known = list(comparison.variants) or [ONLY_VARIANT]
    chosen = known[0] if name is None else name
    if chosen not in known:
        raise UserError(f"no variant {chosen!r}{nearest(chosen, known)}")
    variant = comparison.variants.get(chosen, Variant())
    wanted_arms = comparison.arms if variant.arms is None else _listed(variant.arms, comparison.arms)
    wanted = comparison.settings if variant.settings is None else _listed(variant.settings, comparison.settings)
    settings = {key: comparison.settings[key] for key in wanted}
    replaced = {
        key: getattr(variant, key)
        for key in ("seeds", "metrics", "seed_metrics", "last_rounds")
        if getattr(variant, key) is not None
    }
    if "metrics" in replaced:
        replaced.setdefault("seed_metrics", None)
    found = dataclasses.replace(
        comparison,
        arms={arm: comparison.arms[arm] for arm in wanted_arms},
        settings={key: _with_arms(value, list(wanted_arms)) for key, value in settings.items()},
        overrides=[*comparison.overrides, *variant.overrides],
        levels=_levels(comparison.levels, variant.levels, f"variants.{chosen}.levels"),
        **replaced,
    )
    for key, setting in settings.items():
        if setting.against is not None and setting.against not in settings:
            raise UserError(
                f"variants.{chosen}: setting {key!r} is against {setting.against!r}, which the variant leaves out; select both"
            )
    return chosen, found


def _listed(words: Sequence[str], of: Mapping[str, Any]) -> list[str]:
    """The words of a list in the order in which the file declares them: the baseline stays the first arm."""
    return [name for name in of if name in words]


def _with_arms(setting: SettingSpec, arms: list[str]) -> SettingSpec:
    """A setting with only those of its arms that are among `arms`."""
    own = arms if setting.arms is None else [arm for arm in setting.arms if arm in arms]
    return dataclasses.replace(setting, arms=own)


def _levels(of_file: Levels, of_variant: Any, where: str) -> Levels:
    """The levels of a variant: those of the file, some of them, or others."""
    if of_variant is None:
        return of_file
    if isinstance(of_variant, Mapping):
        return build(Levels, of_variant, where)
    if not isinstance(of_variant, (list, tuple)):
        raise UserError(f"{where}: expected a list of levels, or name and values, got {of_variant!r}")
    words = [str(word) for word in of_variant]
    _known(words, of_file.values, where, "level")
    return Levels(of_file.name, {value: of_file.values[value] for value in words})


# ---------------------------------------------------------------------- checks


def _known(names: Iterable[str], of: Iterable[str], where: str, kind: str) -> None:
    """Raise `UserError` for the first name that is not among `of`."""
    known = list(of)
    for name in names:
        if name not in known:
            raise UserError(f"{where}: no {kind} {name!r}{nearest(name, known)}")


def _check(comparison: Comparison) -> None:
    """Refuse what types cannot. Raises `UserError`."""
    for key in ("base", "metrics", "arms", "settings"):
        if not getattr(comparison, key):
            raise UserError(f"{key} is missing or empty")
    for kind in ("arms", "settings"):
        for name in getattr(comparison, kind):
            if not FOLDER_NAME.fullmatch(name):
                raise UserError(f"{kind}: {name!r} cannot name a folder; use letters, digits, '_', '-', '.' and '+'")
    _at_least_one("last_rounds", comparison.last_rounds)
    _at_least_one("seeds", comparison.seeds)
    _words("overrides", comparison.overrides)
    for arm, words in comparison.arms.items():
        _words(f"arms.{arm}", words)
    for value, words in comparison.levels.values.items():
        _words(f"levels.values.{value}", words)
    for key, setting in comparison.settings.items():
        _check_setting(key, setting, comparison)
    for key, variant in comparison.variants.items():
        _check_variant(f"variants.{key}", variant, comparison)


def _check_setting(key: str, setting: SettingSpec, comparison: Comparison) -> None:
    where, baseline = f"settings.{key}", next(iter(comparison.arms))
    _words(f"{where}.overrides", setting.overrides)
    _at_least_one(f"{where}.seeds", setting.seeds)
    _known(setting.arms or (), comparison.arms, f"{where}.arms", "arm")
    if setting.arms is not None and not setting.arms:
        raise UserError(f"{where}.arms is empty; leave it out for all arms")
    if setting.against is None:
        if setting.arms is not None and baseline not in setting.arms:
            raise UserError(
                f"{where}.arms leaves out the baseline {baseline!r}; add it, or say whose to use with `against`"
            )
        return
    _known(
        [setting.against], (name for name in comparison.settings if name != key), f"{where}.against", "other setting"
    )
    other = comparison.settings[setting.against]
    if other.arms is not None and baseline not in other.arms:
        raise UserError(f"{where}.against: the setting {setting.against!r} does not run the baseline {baseline!r}")


def _check_variant(where: str, variant: Variant, comparison: Comparison) -> None:
    _known(variant.settings or (), comparison.settings, f"{where}.settings", "setting")
    _known(variant.arms or (), comparison.arms, f"{where}.arms", "arm")
    _words(f"{where}.overrides", variant.overrides)
    for key in ("seeds", "last_rounds"):
        _at_least_one(f"{where}.{key}", getattr(variant, key))
    for key in ("settings", "arms", "metrics"):
        if getattr(variant, key) == []:
            raise UserError(f"{where}.{key} is empty; leave it out to keep what the file says")
    baseline = next(iter(comparison.arms))
    if variant.arms is not None and baseline not in variant.arms:
        raise UserError(f"{where}.arms leaves out the baseline {baseline!r}, the first of arms")
    for value, words in _levels(comparison.levels, variant.levels, f"{where}.levels").values.items():
        _words(f"{where}.levels.values.{value}", words)


def _at_least_one(where: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{where}: expected a whole number >= 1, got {value}")


def _words(where: str, words: Sequence[str]) -> None:
    for word in words:
        if not word.partition("=")[1] or not word.partition("=")[0].strip():
            raise UserError(f"{where}: expected key=value, got {word!r}")
