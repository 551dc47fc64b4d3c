"""Configuration: frozen dataclasses, YAML with inheritance, key=value overrides, errors that name the nearest valid key.

OmegaConf reads and merges the YAML (with its interpolation); the dataclasses below say what is allowed, and `build` turns the merged tree
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedmed.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class StepConfig:
    """One named step of a data protocol: a partition or a corruption, with its arguments (None: the step is left out)."""

    name: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Where the site files are and what is done to them before the run."""

    path: str = ""  # a site file, or phantom:<kind>
    phantom: dict[str, Any] = field(default_factory=dict)  # arguments of the phantom generator
    annotation: str = "auto"  # auto, mask, label, scribble or box: what training reads
    resize: int | None = None  # pixels a side after area averaging; None keeps the stored size
    mean: list[float] | None = None  # per channel, on the 0..1 scale
    std: list[float] | None = None
    augment: list[str] = field(default_factory=list)
    partition: StepConfig = field(default_factory=StepConfig)
    corruption: StepConfig = field(default_factory=StepConfig)
    cache_dir: str | None = None  # derived site files; None: ~/.cache/fedmed


@dataclass(frozen=True)
class ModelConfig:
    """The network both ends build from the run seed."""

    name: str = "small_cnn"
    args: dict[str, Any] = field(default_factory=dict)
    activation: str = "auto"  # auto, softmax, sigmoid


@dataclass(frozen=True)
class StrategyConfig:
    """The server rule."""

    name: str = "fedavg"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientConfig:
    """The local half, and the add-ons that ride on it (in YAML: one sub-node per add-on)."""

    name: str = "supervised"
    args: dict[str, Any] = field(default_factory=dict)
    addons: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """The local optimiser."""

    name: str = "adam"  # sgd, adam, adamw
    lr: float = 1e-3
    momentum: float = 0.0  # sgd only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam, adamw
    weight_decay: float = 0.0  # L2 in the gradient for sgd and adam, decoupled for adamw
    persist: bool = False  # keep the moments at the site from round to round


@dataclass(frozen=True)
class TrainingConfig:
    """How much a site trains in a round."""

    epochs: int = 1
    max_steps: int | None = None  # stop after so many steps even if the epochs are not over
    batch_size: int = 16


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part, how long is waited, when a round counts. Seconds for every deadline."""

    rounds: int = 10
    fraction: float = 1.0  # of the sites online, sampled each round
    min_sites: int = 2  # a run does not start with fewer
    quorum: float = 0.5  # of the sites asked; fewer valid answers stop the run
    start_deadline_s: float = 3600.0
    query_deadline_s: float = 3600.0
    train_deadline_s: float = 3600.0
    evaluate_deadline_s: float = 3600.0
    plain_clients: bool = False  # accept nodes that cannot identify themselves
    checkpoint_every: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """When and where models are scored."""

    every: int = 1  # rounds between evaluations; the last round is always scored
    mode: str = (
        "separate"  # separate message; before: received model in the train message; after: the site's trained model
    )
    sites: bool = True  # score at the sites
    central: str = (
        "auto"  # auto: the pooled clean items of a derived file, if any; none; or a site file of the coordinator's
    )
    select: str | None = None  # validation metric by which the best round is chosen, e.g. bacc
    hd95: bool = False  # 95th-percentile surface distance in the last evaluation (slow)


@dataclass(frozen=True)
class EngineConfig:
    """What the run runs on."""

    name: str = "local"
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    precision: str = "fp32"  # fp32, bf16
    threads: int = 1  # torch threads of a process; more than one gives up bit-equality between engines
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, off by default and offline unless asked."""

    enabled: bool = False
    project: str = "fedmed"
    mode: str = "offline"


@dataclass(frozen=True)
class TensorboardConfig:
    """TensorBoard event files in the run folder, off by default."""

    enabled: bool = False


@dataclass(frozen=True)
class TrackingConfig:
    """Experiment trackers."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    name: str = "experiment"
    description: str = ""
    seed: int = 0
    out: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


# (key, allowed values) and (key, lower bound, bound itself allowed): the value checks that types cannot express.
_CHOICES = {
    "data.annotation": ("auto", "mask", "label", "scribble", "box"),
    "model.activation": ("auto", "softmax", "sigmoid"),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "evaluation.mode": ("separate", "before", "after"),
    "engine.name": ("local", "ray"),
    "engine.precision": ("fp32", "bf16"),
    "tracking.wandb.mode": ("offline", "online", "disabled"),
}
_BOUNDS = {
    "seed": (0, True),
    "data.resize": (0, False),
    "optimizer.lr": (0, False),
    "optimizer.momentum": (0, True),
    "optimizer.weight_decay": (0, True),
    "training.epochs": (0, False),
    "training.max_steps": (0, False),
    "training.batch_size": (0, False),
    "federation.rounds": (0, False),
    "federation.fraction": (0, False),
    "federation.min_sites": (0, False),
    "federation.quorum": (0, True),
    "federation.start_deadline_s": (0, False),
    "federation.query_deadline_s": (0, False),
    "federation.train_deadline_s": (0, False),
    "federation.evaluate_deadline_s": (0, False),
    "federation.checkpoint_every": (0, False),
    "evaluation.every": (0, False),
    "engine.threads": (0, False),
    "engine.cpus_per_client": (0, False),
    "engine.gpus_per_client": (0, True),
}
_UPPER = {"federation.fraction": 1.0, "federation.quorum": 1.0}


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
    for key, choices in _CHOICES.items():
        value = get(config, key)
        if value not in choices:
            raise UserError(f"{key}: expected one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")
    for key, (bound, inclusive) in _BOUNDS.items():
        value = get(config, key)
        if value is not None and not (value >= bound if inclusive else value > bound):  # NaN is out of every range
            raise UserError(f"{key}: expected a value {'>=' if inclusive else '>'} {bound}, got {value}")
    for key, upper in _UPPER.items():
        if get(config, key) > upper:
            raise UserError(f"{key}: expected a value <= {upper}, got {get(config, key)}")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UserError(f"optimizer.betas: expected two values >= 0 and < 1, got {betas}")
    return config


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

    Left out: name, description, out, engine, tracking, deadlines, and the number of rounds unless `with_rounds` (a method whose schedule depends on it).
    """
    tree = to_tree(config)
    for key in ("name", "description", "out", "engine", "tracking"):
        tree.pop(key)
    tree["data"].pop("cache_dir")
    for key in list(tree["federation"]):
        if key.endswith("_deadline_s") or key == "checkpoint_every" or (key == "rounds" and not with_rounds):
            tree["federation"].pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def folder_name(site: str) -> str:
    """A folder name for a site: itself if it is one, else its harmless characters and a short hash that keeps two sites apart."""
    harmless = "".join(c if c.isalnum() or c in "-_." else "_" for c in site).strip(".")[:60]
    return harmless if harmless == site and harmless else f"{harmless}-{hashlib.sha256(site.encode()).hexdigest()[:6]}"
