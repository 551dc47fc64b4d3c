"""Configuration: YAML with inheritance, key=value overrides, errors that name the nearest valid key.

OmegaConf reads and merges the YAML (with its interpolation); the dataclasses of `fedmed.schema` say what is allowed, and `build` turns the merged tree
into them and rejects whatever does not fit. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedmed.errors import UserError
from fedmed.schema import (
    BOUNDS,
    CHOICES,
    UPPER,
    ClientConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    StrategyConfig,
    TensorboardConfig,
    TrackingConfig,
    TrainingConfig,
    WandbConfig,
)

T = TypeVar("T")

__all__ = [
    "ClientConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StepConfig",
    "StrategyConfig",
    "TensorboardConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WandbConfig",
    "build",
    "config_hash",
    "experiment_dirs",
    "find_experiment",
    "folder_name",
    "from_run_config",
    "from_tree",
    "from_yaml",
    "get",
    "load_config",
    "nearest",
    "params_from",
    "parse_overrides",
    "to_tree",
    "to_yaml",
]


def nearest(name: str, options: Iterable[str]) -> str:
    """Give '; did you mean ...?' with the option most like `name`, else the list of options (empty string when there are none)."""
    names = sorted(options)
    if not names:
        return ""
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(names)}"


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Check `value` against a type annotation; ints are taken as floats, lists as tuples. Raises `UserError`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, where)
        for option in inner:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
    elif dataclasses.is_dataclass(kind) and (value is None or isinstance(value, Mapping)):
        return build(typing.cast(type, kind), value or {}, where)  # `data.corruption=null` clears what was inherited
    elif origin is dict or kind is dict:
        if value is None:
            return {}  # `args=null` clears what was inherited
        if isinstance(value, Mapping):
            inner_kind = arguments[1] if arguments else Any
            return {str(k): _convert(inner_kind, v, f"{where}.{k}") for k, v in value.items()}
    elif origin in (list, tuple) or kind in (list, tuple):
        if isinstance(value, (list, tuple)):
            inner_kind = arguments[0] if arguments else Any
            items = [_convert(inner_kind, v, f"{where}[{i}]") for i, v in enumerate(value)]
            return tuple(items) if (origin or kind) is tuple else items
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)  # a name that looks like a number
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {_type_name(kind)}, got {value!r} ({type(value).__name__})")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Turn a mapping into the dataclass `cls`.

    Unknown keys and wrong types raise `UserError` with the place (`where`) and the nearest valid name; missing keys take the default.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key in names:
            found[key] = _convert(hints[key], value, place)
        else:
            raise UserError(f"unknown key {place!r}{nearest(str(key), names)}")
    try:
        return cls(**found)
    except ValueError as error:  # a Params dataclass may check its ranges in __post_init__
        raise UserError(f"{where}: {error}") from error


def params_from(cls: type[T], args: Mapping[str, Any], where: str) -> T:
    """Check the `args` of a registered class against its `Params` dataclass; `where` is the key shown in errors."""
    return build(cls, args, where)


def _split_addons(tree: dict[str, Any]) -> dict[str, Any]:
    """Move `client.<add-on>` nodes into `client.addons`; other unknown keys are left for `build` to reject."""
    from fedmed.registry import ADDONS

    client = dict(tree.get("client") or {})
    addons = {
        **(client.pop("addons", None) or {}),
        **{name: client.pop(name) for name in list(client) if name in ADDONS},
    }
    unknown = [key for key in client if key not in ("name", "args")]
    if unknown:
        raise UserError(f"unknown key 'client.{unknown[0]}'{nearest(unknown[0], ['name', 'args', *ADDONS])}")
    return {**tree, "client": {**client, "addons": addons}}


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Build and check a `Config` from a plain nested dict. Raises `UserError`."""
    config = build(Config, _split_addons(dict(tree)), "")
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value not in choices:
            raise UserError(f"{key}: expected one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")
    for key, (bound, inclusive) in BOUNDS.items():
        value = get(config, key)
        if value is not None and not (value >= bound if inclusive else value > bound):  # NaN is out of every range
            raise UserError(f"{key}: expected a value {'>=' if inclusive else '>'} {bound}, got {value}")
    for key, upper in UPPER.items():
        if get(config, key) > upper:
            raise UserError(f"{key}: expected a value <= {upper}, got {get(config, key)}")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UserError(f"optimizer.betas: expected two values >= 0 and < 1, got {betas}")
    _check_local_only(config)
    return config


def _check_local_only(config: Config) -> None:
    """Refuse what `federation.local_only` cannot go with. Raises `UserError`."""
    if not config.federation.local_only:
        return
    if config.strategy.name != "fedavg":
        raise UserError(
            f"federation.local_only: no site sends a model, strategy {config.strategy.name!r} would have nothing to work with; "
            "set strategy.name=fedavg strategy.args=null"
        )
    if config.federation.plain_clients:
        raise UserError(
            "federation.local_only: a plain Flower client sends what it trains; set federation.plain_clients=false"
        )


def get(config: Config, key: str) -> Any:
    """Read a dotted key of a config."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def to_tree(config: Config) -> dict[str, Any]:
    """Give the config as nested plain dicts, in the shape a YAML file has (add-ons as sub-nodes of `client`)."""
    tree = dataclasses.asdict(config)
    tree["client"].update(tree["client"].pop("addons"))
    return tree


def to_yaml(config: Config) -> str:
    """Give the resolved config as YAML text; `from_yaml` gives it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def from_yaml(text: str) -> Config:
    """Read a config that `to_yaml` wrote (or any YAML without inheritance)."""
    from omegaconf import OmegaConf

    return from_tree(typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text), resolve=True)))


def experiment_dirs() -> list[Path]:
    """Folders that hold the experiments known by name: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    return [d for d in (package.parent / "experiments", package / "experiments") if (d / "_base.yaml").is_file()]


def find_experiment(name: str | Path, near: Path | None = None) -> Path:
    """Find an experiment by path or by name (`fednoro`, `data/contour_bounded`).

    `near` is a folder looked into first (for `inherit`). Raises `UserError` with the nearest name.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    folders = ([near] if near else []) + experiment_dirs()
    for folder in folders:
        for candidate in (folder / path, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = {p.stem for folder in folders for p in folder.glob("*.yaml") if not p.stem.startswith("_")}
    raise UserError(f"no experiment {str(name)!r}: neither a YAML file nor a known name{nearest(str(name), known)}")


def _load_tree(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """Read one YAML file with everything it inherits; later files win."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: inherits from itself through {' -> '.join(p.name for p in seen)}")
    try:
        tree: Any = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the YAML parser has many error types; all of them mean "not YAML"
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(tree):
        raise UserError(f"{path}: expected keys and values at the top level")
    parents = tree.pop("inherit", [])
    parents = [parents] if isinstance(parents, str) else list(parents or [])
    trees = [_load_tree(find_experiment(p, near=path.parent), (*seen, path)) for p in parents]
    try:
        return OmegaConf.merge(*trees, tree)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` strings into a nested dict; values are read as YAML. Raises `UserError` for a word without '='."""
    from omegaconf import OmegaConf

    words = list(overrides)
    for word in words:
        key, separator, _ = word.partition("=")
        if not separator or not key.strip():
            raise UserError(f"expected key=value (for example federation.rounds=12), got {word!r}")
    try:
        tree = OmegaConf.from_dotlist(words)
        return typing.cast(dict[str, Any], OmegaConf.to_container(tree))
    except Exception as error:
        raise UserError(f"cannot read the overrides {words}: {' '.join(str(error).split())}") from error


def load_config(experiment: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load an experiment by name or path, apply `key=value` overrides, check everything.

    Raises `UserError` for an unknown experiment, key or value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_experiment(experiment)
    try:
        tree = OmegaConf.merge({"name": path.stem}, _load_tree(path))
        for word in overrides:  # one after the other: `strategy.args=null` clears what came before it, not what follows
            tree = OmegaConf.merge(tree, parse_overrides([word]))
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path.name}: {' '.join(str(error).split())}") from error
    return from_tree(typing.cast(dict[str, Any], plain))


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Build the config from Flower's flat run config: `config` (YAML text) wins, else `experiment` and `overrides` (shell-like words)."""
    text = str(run_config.get("config", ""))
    config = (
        from_yaml(text)
        if text
        else load_config(str(run_config.get("experiment", "fedavg")), shlex.split(str(run_config.get("overrides", ""))))
    )
    out = str(run_config.get("out", ""))
    return dataclasses.replace(config, out=out) if out else config


def config_hash(config: Config, *, with_rounds: bool) -> str:
    """SHA-256 of what determines the result of a run.

    Left out: name, description, out, engine, tracking, deadlines, the run `evaluation.local_only` to compare with, and the number of rounds
    unless `with_rounds` (a method whose schedule depends on it).
    """
    tree = to_tree(config)
    for key in ("name", "description", "out", "engine", "tracking"):
        tree.pop(key)
    tree["data"].pop("cache_dir")
    tree["evaluation"].pop("local_only")
    for key in list(tree["federation"]):
        if key.endswith("_deadline_s") or key == "checkpoint_every" or (key == "rounds" and not with_rounds):
            tree["federation"].pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def folder_name(site: str) -> str:
    """A folder name for a site: itself if it is one, else its harmless characters and a short hash that keeps two sites apart."""
    harmless = "".join(c if c.isalnum() or c in "-_." else "_" for c in site).strip(".")[:60]
    return harmless if harmless == site and harmless else f"{harmless}-{hashlib.sha256(site.encode()).hexdigest()[:6]}"
