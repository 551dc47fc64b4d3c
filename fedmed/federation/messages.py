"""What travels between server and sites, as plain typed objects. The names of the records are Flower's own, so that its strategies can drive our sites."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmed.federation.records import Metrics, decode_state, encode_config, encode_metrics, encode_state
from fedmed.federation.state import State

CLIENT_RAISED = 2  # Flower's error code for a client app that raised
ARRAYS, CONFIG, METRICS, EXTRAS, IDENTITY = "arrays", "config", "metrics", "extras", "identity"
NUM_EXAMPLES = "num-examples"
SCHEMA_VERSION = "fedmed-data-1"
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


@dataclass(frozen=True)
class Leaf:
    """Something a client may send besides the model: declared once, checked before every reply, printed in the privacy table.

    `name` may hold one `*` (for example `loss/*`); `min_count` is the least number of items a released statistic stands for.
    """

    name: str
    shape: str
    meaning: str
    min_count: int = 1
    kind: str = "metric"  # metric or array

    def covers(self, name: str) -> bool:
        """True if `name` is this leaf."""
        head, star, tail = self.name.partition("*")
        return (
            name == self.name
            if not star
            else name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail)
        )


BASE_LEAVES = (
    Leaf(NUM_EXAMPLES, "1", "number of training items the update stands for"),
    Leaf("train_loss", "1", "mean training loss of the round"),
    Leaf("loss/*", "1", "mean of one named loss term over the round"),
    Leaf("seconds", "1", "time the site worked on the message"),
    Leaf("personal_fresh", "1", "1 if the site had to begin its personal state anew"),
    Leaf("n/*", "1", "number of items of a split that was scored"),
    Leaf("train/*", "1", "aggregate score on the training split"),
    Leaf("val/*", "1", "aggregate score on the validation split"),
    Leaf("test/*", "1", "aggregate score on the test split"),
    Leaf("test-*", "1", "aggregate score on the test split under a condition"),
)


@dataclass(frozen=True)
class Identity:
    """What a site says of itself before anything else. `index` and `node_id` are the server's."""

    site: str
    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    image_size: tuple[int, ...]
    label_kind: str
    num_train: int
    num_val: int = 0
    num_test: int = 0
    groups_left_out: tuple[str, ...] = ()
    schema: str = SCHEMA_VERSION
    code_hash: str = ""
    plain: bool = False
    index: int = -1
    node_id: int = 0

    def as_config(self) -> dict[str, Any]:
        """The part the site sends (scalars, strings and lists only)."""
        values = {n: getattr(self, n) for n in _SENT}
        # A record cannot hold an empty list of unknown type.
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != ()}

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Identity:
        """Read what `as_config` made, by this or another version: what is unknown, or not for a site to say, is ignored.

        Raises `TypeError` if something is missing that every version sends.
        """
        fields = {name: values[name] for name in _SENT if name in values}
        for name in ("classes", "channels", "image_size", "groups_left_out"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


# Of the fields above, those a site sends; `plain`, `index` and `node_id` are never read from a message.
_SENT = (
    "site", "task", "classes", "channels", "image_size", "label_kind",
    "num_train", "num_val", "num_test", "groups_left_out", "schema", "code_hash",
)  # fmt: skip


@dataclass(frozen=True)
class Update:
    """A valid answer to a train message: state of shapes as exchanged, extra arrays by name, metrics."""

    site: str
    index: int
    num_examples: int
    arrays: State
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A valid answer to a method's query."""

    site: str
    index: int
    num_examples: int
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """A question to every site online. It carries the global model; `arrays` are added to it as extras."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


def part(content: RecordDict, name: str, kind: type[R]) -> R | None:
    """The record of that name if it is of that kind, else None.

    Flower's `array_records` and its sisters give objects that refer to themselves and to the whole message: the arrays of a reply would stay in
    memory until the garbage collector comes by.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else None


def arrays_of(content: RecordDict, name: str) -> State:
    """The arrays of the record of that name, by reference where they are of this process; {} if there is no such record."""
    record = part(content, name, ArrayRecord)
    return {} if record is None else decode_state(record)


def pack(
    *,
    arrays: Mapping[str, Tensor] | ArrayRecord | None = None,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> RecordDict:
    """Put the parts of a message into Flower records; parts that are None (and empty extras) are left out."""
    content = RecordDict()
    if arrays is not None:
        content[ARRAYS] = arrays if isinstance(arrays, ArrayRecord) else encode_state(arrays)
    if config is not None:
        content[CONFIG] = encode_config(config)
    if metrics is not None:
        content[METRICS] = encode_metrics(metrics)
    if extras:
        content[EXTRAS] = encode_state(extras)
    return content


@lru_cache(maxsize=1)
def code_hash() -> str:
    """SHA-256 over the sources that decide the result of a run (fedmed, strategies, clients), equal at both ends or the run is refused."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("fedmed", "strategies", "clients"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
