"""`fedmed site check`: everything a site needs, one line per point, `ok` or `problem` with what to do. Sends nothing but a TLS handshake."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from fedmed.deployment.probe import probe
from fedmed.deployment.site_config import SiteConfig
from fedmed.deployment.site_facts import own_bundle_hash, site_in_file
from fedmed.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fedmed.data.site_file import SiteData

FREE_BYTES = 2_000_000_000  # the state folder holds a few copies of the model
SOON_DAYS = 30.0
FEW_ITEMS = 5  # of a class; below, numbers by class say much about single patients
FLOWER = "1.41."  # what this version of FedMed works with


@dataclass(frozen=True)
class Point:
    """The answer to one question: what was looked at, whether it is as it should be, and one line of text."""

    ok: bool
    what: str
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'problem':8} {self.what}: {self.text}"


def needed(config: SiteConfig) -> Iterator[Point]:
    """The points without which starting makes no sense: data, device, key, authority, state folder."""
    yield from check_data(config)
    yield _point("device", config, _device)
    yield _point("key", config, _key)
    yield _point("certificate", config, _authority)
    yield _point("state", config, _state)


def check_site(config: SiteConfig) -> Iterator[Point]:
    """All points, one after the other as they are found out."""
    yield from needed(config)
    yield _point("disk", config, _disk)
    yield _point("versions", config, _versions)
    found = probe(config.host, config.port, config.ca)
    yield Point(found.ok, "coordinator", found.text)


def _point(what: str, config: SiteConfig, look: Callable[[SiteConfig], str]) -> Point:
    try:
        return Point(True, what, look(config))
    except UserError as error:
        return Point(False, what, " ".join(str(error).split()))


# ---------------------------------------------------------------------- data


def check_data(config: SiteConfig) -> list[Point]:
    """Read the data file as a run does: shapes, labels, splits; then the training items of every class."""
    from fedmed.data.site_file import SiteFile

    try:
        name, _ = site_in_file(config)
        with SiteFile.open(config.data) as file:
            data = file.site(name)
    except UserError as error:
        return [Point(False, "data", " ".join(str(error).split()))]
    sizes = ", ".join(f"{split} {data.num_examples(split)}" for split in ("train", "val", "test"))
    shape = f"{len(data.classes)} classes, {len(data.channels)} channels, {data.image_size[0]} x {data.image_size[1]} pixels"
    text = f"{config.data}: {data.task}, {shape}; {sizes}; annotation: {data.label_kind}"
    if data.num_examples("train") < config.limits.min_count:
        return [Point(False, "data", f"{text}; fewer training items than limits.min_count={config.limits.min_count}")]
    return [Point(True, "data", text), Point(True, "classes", _classes(data, config.limits.min_count))]


def class_counts(data: SiteData) -> np.ndarray:
    """Training items that show a class, (C,) int64; of masks: items with a pixel of it."""
    import numpy as np

    train = data.splits["train"]
    if data.task == "classification":
        return np.bincount(data.target[train].astype(np.int64), minlength=data.num_classes)[: data.num_classes]
    if data.task == "multilabel":
        return np.asarray((data.target[train] > 0).sum(axis=0), dtype=np.int64)
    counts = np.zeros(data.num_classes, dtype=np.int64)
    for start in range(0, len(train), 64):  # masks may be larger than memory
        flat = data.target[train[start : start + 64]].reshape(min(64, len(train) - start), -1)
        counts += [(flat == place).any(axis=1).sum() for place in range(data.num_classes)]
    return counts


def _classes(data: SiteData, min_count: int) -> str:
    counts = dict(zip(data.classes, class_counts(data).tolist(), strict=True))
    few = [f"{name} ({count})" for name, count in counts.items() if count < max(min_count, FEW_ITEMS)]
    text = "training items by class: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    return text + (f"; few of {', '.join(few)}: see limits.min_count" if few else "")


# ---------------------------------------------------------------------- key, certificate, folders


def _key(config: SiteConfig) -> str:
    from fedmed.deployment import keys

    return f"{config.key}, fingerprint {keys.read_site_key(config.key).fingerprint}"


def _authority(config: SiteConfig) -> str:
    from cryptography import x509

    from fedmed.deployment import keys

    found = keys.read_certificate(config.ca, "certificate of the coordinator's authority")
    try:
        signs = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        signs = False
    if not signs:
        raise UserError(f"{config.ca} is a certificate, but not that of an authority; ask the coordinator for ca.crt")
    left = keys.days_left(found)
    until = f"{found.not_valid_after_utc:%Y-%m-%d}"
    if left <= 0:
        raise UserError(f"{config.ca} expired on {until}; ask the coordinator for the new ca.crt")
    soon = f" (in {left:.0f} days: ask for a new one)" if left < SOON_DAYS else ""
    return f"{config.ca}, valid until {until}{soon}, SHA-256 {keys.fingerprint(found)}"


def _state(config: SiteConfig) -> str:
    from fedmed.deployment import keys

    folder = config.state
    if not folder.exists():
        return f"{folder} does not exist yet and will be made with mode 0700"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; choose another `state`")
    keys.check_private(folder, "the state folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written; change its owner, or choose another `state`")
    return f"{folder}, mode 0700"


def _disk(config: SiteConfig) -> str:
    place = next(p for p in (config.state, *config.state.parents) if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free where the state folder lies"
    if free < FREE_BYTES:
        raise UserError(f"{text}, {FREE_BYTES / 1e9:.0f} GB are asked for; make room, or choose another `state`")
    return text


def _device(config: SiteConfig) -> str:
    import torch

    from fedmed.federation.site import choose_device

    try:
        device = choose_device(config.device)
    except UserError:
        raise UserError(f"{config.device!r} is not available here; use `device: auto` or `device: cpu`") from None
    if device.type != "cuda":
        return f"CPU, {os.cpu_count()} cores" + ("" if config.device == "cpu" else " (no GPU that PyTorch can use)")
    facts = torch.cuda.get_device_properties(device)
    return f"{device}: {facts.name}, {facts.total_memory / 1e9:.0f} GB"


def _versions(config: SiteConfig) -> str:
    from fedmed import __version__
    from fedmed.federation.messages import code_hash

    flower, more = version("flwr"), [digest[:16] for digest in config.bundles]
    text = f"fedmed {__version__}, flwr {flower}, code {code_hash()}, bundle {own_bundle_hash()}"
    text += f" and {', '.join(more)}" if more else ""
    if not flower.startswith(FLOWER):
        raise UserError(f"{text}; this version of FedMed needs flwr {FLOWER}*: pip install 'flwr~={FLOWER}0'")
    return f"{text} (the coordinator's must be the same)"


def main(words: Sequence[str] | None = None) -> int:
    """Print the points that a start needs; `fedmed site start` runs this in a process of its own. Gives the exit code."""
    from fedmed.deployment.site_config import read_site_config

    points = list(needed(read_site_config((sys.argv[1:] if words is None else words)[0])))
    for point in points:
        print(point)
    return 0 if all(point.ok for point in points) else 2


if __name__ == "__main__":
    sys.exit(main())
