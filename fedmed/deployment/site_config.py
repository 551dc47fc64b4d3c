"""`site.yaml`: where a hospital's data, keys and state lie, and what it lets a coordinator ask of it.

Light: read before torch is needed. Paths are relative to the folder of the file; a key that does not exist is refused, so that no limit is
lost to a slip of the pen.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.config import build, experiment_dirs, nearest
from fedmed.errors import UserError

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
LONGEST_NAME = 100
_PATHS = ("data", "ca", "key", "state", "log")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Limits:
    """What a run may ask of the site at most; None: no limit of this kind."""

    max_epochs: int | None = None  # passes over the training data in a round
    max_steps: int | None = None  # optimiser steps in a round, as the schedule counts them
    methods: tuple[str, ...] | None = None  # names of clients and add-ons; None: all registered ones
    experiments: tuple[str, ...] | None = None  # names, each with the client part this installation has for it
    min_count: int = 1  # least number of items that a released statistic stands for
    allow_imports: tuple[str, ...] = ()  # 'module:attribute' that a run may name besides the registered names

    def __post_init__(self) -> None:
        from fedmed.registry import ADDONS, CLIENTS

        for name in ("max_epochs", "max_steps", "min_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value}")
        for path in self.allow_imports:
            if not IMPORT_PATH.fullmatch(path):
                raise ValueError(f"allow_imports: expected 'module:attribute', got {path!r}")
        for name in self.methods or ():
            if name not in CLIENTS and name not in ADDONS and name not in self.allow_imports:
                raise ValueError(f"methods: no client or add-on is called {name!r}{nearest(name, [*CLIENTS, *ADDONS])}")


@dataclass(frozen=True)
class SiteConfig:
    """One hospital's end of a deployment."""

    name: str  # what the federation calls the site
    data: Path  # site file; one site of any name, or several of which one has this name
    coordinator: str  # host:port
    ca: Path  # the coordinator's ca.crt
    key: Path  # the site's private key
    state: Path  # folder (0700) for everything the site keeps
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    log: Path | None = None  # None: logs/site.log in the state folder
    reconnect_hours: float = 24.0  # how long a lost connection is tried again
    bundles: tuple[str, ...] = ()  # SHA-256 of run bundles allowed besides that of this installation
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.name.isprintable() or self.name != self.name.strip() or not 0 < len(self.name) <= LONGEST_NAME:
            raise ValueError(f"name: expected one line of 1 to {LONGEST_NAME} characters, got {self.name!r}")
        split_address(self.coordinator)
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        if not (math.isfinite(self.reconnect_hours) and self.reconnect_hours > 0):
            raise ValueError(f"reconnect_hours: expected a number > 0, got {self.reconnect_hours}")
        for digest in self.bundles:
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"bundles: expected SHA-256 sums (64 digits 0-9a-f), got {digest!r}")

    @property
    def host(self) -> str:
        """Name or address of the coordinator's machine."""
        return split_address(self.coordinator)[0]

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return split_address(self.coordinator)[1]

    @property
    def log_file(self) -> Path:
        """Where everything the site's processes say is written."""
        return self.log or self.state / "logs" / "site.log"


def split_address(text: str) -> tuple[str, int]:
    """Take host:port apart; an IPv6 address stands in brackets. Raises ValueError."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        is_v6 = ipaddress.ip_address(bare).version == 6
    except ValueError:
        is_v6 = False
    fits = bare and port.isdecimal() and 0 < int(port) < 65536 and (is_v6 if host != bare else ":" not in bare)
    if not fits or "/" in host or not host.isprintable() or " " in host:
        raise ValueError(f"coordinator: expected host:port (for example fl.example.org:8000), got {text!r}")
    return bare, int(port)


def read_site_config(path: str | Path) -> SiteConfig:
    """Read and check `site.yaml`; whether the files it names exist is for `fedmed site check`. Raises `UserError`."""
    path = Path(path).expanduser().resolve()
    tree = _read_tree(path)
    missing = [f.name for f in dataclasses.fields(SiteConfig) if _is_needed(f) and not tree.get(f.name)]
    if missing and not set(tree) - {f.name for f in dataclasses.fields(SiteConfig)}:
        raise UserError(f"{path}: {', '.join(missing)} missing; `fedmed site keygen` writes a file to fill in")
    for key in _PATHS:
        if isinstance(tree.get(key), str):
            tree[key] = path.parent / Path(tree[key]).expanduser()
    for key in ("methods", "experiments", "allow_imports"):
        if isinstance(tree.get("limits"), Mapping) and isinstance(tree["limits"].get(key), str):
            raise UserError(f"{path}: limits.{key}: expected a list, for example [{tree['limits'][key]}]")
    try:
        config = build(SiteConfig, tree, "")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(': ')}") from error
    _check_experiments(config.limits, path)
    return config


def _is_needed(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _read_tree(path: Path) -> dict[str, Any]:
    """The file as plain data; a key that stands there twice is an error."""
    from omegaconf import OmegaConf

    try:
        node = OmegaConf.load(path)
        tree = OmegaConf.to_container(node, resolve=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; `fedmed site keygen DIR` writes a site.yaml to fill in") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the YAML parser has many error types; all of them mean "not YAML"
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level")
    return {str(key): value for key, value in tree.items()}


def _check_experiments(limits: Limits, path: Path) -> None:
    """Refuse a name this installation has no experiment for: such a limit could never be met."""
    known = {p.stem for folder in experiment_dirs() for p in folder.glob("[!_]*.yaml")}
    for name in limits.experiments or ():
        if name not in known:
            raise UserError(f"{path}: limits.experiments: no experiment is called {name!r}{nearest(name, known)}")
