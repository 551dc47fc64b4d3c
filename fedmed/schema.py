"""The keys of a configuration: frozen dataclasses with their defaults, and the bounds that types cannot express."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    load: str = "auto"  # auto, memory or map: whether images and masks are read at once or batch by batch
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
    schedule: str = (
        "constant"  # constant; multistep: lr · factor per milestone; poly: lr · (1 − (round − 1)/rounds)^power
    )
    milestones: list[int] = field(default_factory=list)  # multistep: rounds (from 1) from which on lr is smaller
    factor: float = 0.1  # multistep
    power: float = 0.9  # poly


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
    identify_deadline_s: float = 300.0
    query_deadline_s: float = 3600.0
    train_deadline_s: float = 3600.0
    evaluate_deadline_s: float = 3600.0
    plain_clients: bool = False  # accept nodes that cannot identify themselves
    local_only: bool = False  # every site trains alone, nothing of the model travels
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
    modality_subsets: str = "last"  # scores on every subset of the modalities: none, last, every
    local_only: str | None = None  # run folder of the same sites, each trained alone


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
CHOICES = {
    "data.annotation": ("auto", "mask", "label", "scribble", "box"),
    "data.load": ("auto", "memory", "map"),
    "model.activation": ("auto", "softmax", "sigmoid"),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "optimizer.schedule": ("constant", "multistep", "poly"),
    "evaluation.mode": ("separate", "before", "after"),
    "evaluation.modality_subsets": ("none", "last", "every"),
    "engine.name": ("local", "ray", "deployment"),
    "engine.precision": ("fp32", "bf16"),
    "tracking.wandb.mode": ("offline", "online", "disabled"),
}
BOUNDS = {
    "seed": (0, True),
    "data.resize": (0, False),
    "optimizer.lr": (0, False),
    "optimizer.momentum": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.factor": (0, False),
    "optimizer.power": (0, True),
    "training.epochs": (0, False),
    "training.max_steps": (0, False),
    "training.batch_size": (0, False),
    "federation.rounds": (0, False),
    "federation.fraction": (0, False),
    "federation.min_sites": (0, False),
    "federation.quorum": (0, True),
    "federation.start_deadline_s": (0, False),
    "federation.identify_deadline_s": (0, False),
    "federation.query_deadline_s": (0, False),
    "federation.train_deadline_s": (0, False),
    "federation.evaluate_deadline_s": (0, False),
    "federation.checkpoint_every": (0, False),
    "evaluation.every": (0, False),
    "engine.threads": (0, False),
    "engine.cpus_per_client": (0, False),
    "engine.gpus_per_client": (0, True),
}
UPPER = {"federation.fraction": 1.0, "federation.quorum": 1.0}

# How the name of a split begins whose items are shown a subset of their modalities: `test-with+FLAIR+T1`.
SUBSET_SPLIT = "test-with+"

# Words in the name of a metric of which small values are good.
SMALLER_IS_BETTER = ("hd95", "missed", "both_empty", "loss", "error")


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good, with or without `split/view/` before its name."""
    return any(word in metric.rsplit("/", 1)[-1] for word in SMALLER_IS_BETTER)


@dataclass(frozen=True)
class NoParams:
    """The arguments of a strategy, client or add-on that takes none."""
