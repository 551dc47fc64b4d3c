"""Site files: HDF5, one site at the root (a hospital) or several in groups `site_*` (a simulation), opened lazily.

Layout `fedmed-data-1`. Root attributes: task, classes (JSON), channels (JSON), image_size (JSON), layout_version,
optionally name, recipe (JSON), ignore_value, ignore_value_in_<annotation>. Datasets of a site: image (N,H,W[,C]), at
least one of mask, label, scribble, box; optional item_id, group_id, modality_present (N,C), active_classes (L,) or
(N,L) of 0/1, anything else per item. Attributes of a site: site_name, train_idx, val_idx, test_idx, optionally
annotation (what "auto" reads), label_kind (how that was made) and ignore values of its own. Clean references lie under
`reference/` in the group and are read by `read_truth` only. A group `central` may pool clean validation and test images
of all sites; groups `central_<name>` hold them again under other conditions (degraded, ...).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from fedmed.config import nearest
from fedmed.data.label_checks import check_labels, check_not_withheld
from fedmed.data.mapped import FileRows, open_rows, stays_in_file
from fedmed.data.site_checks import (
    LAYOUT,
    TASKS,
    check_header,
    choose_annotation,
    open_hdf5,
    read_json,
    read_splits,
    site_groups,
)
from fedmed.data.site_data import SiteData
from fedmed.data.split import Batch, Split, make_decoder
from fedmed.errors import UserError

__all__ = ["Batch", "SiteData", "SiteFile", "SiteInfo", "Split", "make_decoder", "read_truth"]
CENTRAL = "central"
_NOT_EXTRAS = {"image", "item_id", "group_id", "train_idx", "val_idx", "test_idx"}


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a site without reading pixels: HDF5 group ("" for the root), name, number of images, sizes of
    the splits.
    """

    group: str
    name: str
    n: int
    n_train: int
    n_val: int
    n_test: int


class SiteFile:
    """A site file opened read-only; headers are checked on opening, pixels are read by `site`. Use as a context
    manager.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        attrs = file.attrs
        groups = site_groups(file, path)
        self.layout_version = str(attrs.get("layout_version", ""))
        if self.layout_version != LAYOUT:
            came = repr(self.layout_version) if self.layout_version else "no layout_version"
            raise UserError(
                f"{path}: layout_version must be {LAYOUT!r}, got {came}. "
                "Write the file again with this version of FedMed."
            )
        self.task = str(attrs.get("task", ""))
        if self.task not in TASKS:
            raise UserError(
                f"{path}: root attribute task must be one of {', '.join(TASKS)}, got "
                f"{self.task!r}{nearest(self.task, TASKS)}"
            )
        self.classes: tuple[str, ...] = tuple(str(c) for c in read_json(attrs, "classes", path))
        self.channels: tuple[str, ...] = tuple(str(c) for c in read_json(attrs, "channels", path))
        size = read_json(attrs, "image_size", path)
        if not isinstance(size, list) or len(size) != 2:
            raise UserError(f"{path}: root attribute image_size must be a JSON list [height, width], got {size!r}.")
        self.image_size: tuple[int, int] = (int(size[0]), int(size[1]))
        self.recipe: dict[str, Any] | None = json.loads(attrs["recipe"]) if "recipe" in attrs else None
        self.central = CENTRAL in file
        self.conditions = tuple(sorted(k.removeprefix(f"{CENTRAL}_") for k in file if k.startswith(f"{CENTRAL}_")))
        self.sites = tuple(self._info(group) for group in groups)
        names = [site.name for site in self.sites]
        for said in (*self.classes, *self.channels, *names):
            if not said.isprintable():  # it would be printed as it stands, and could write anywhere on a terminal
                raise UserError(
                    f"{path}: a name of a class, channel or site holds control characters: {said!r}. Rename it."
                )
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UserError(f"{path}: two groups have the site_name {sorted(twice)[0]!r}. Site names must differ.")

    @classmethod
    def open(cls, path: str | Path) -> SiteFile:
        """Open a site file and check its headers. Raises UserError for anything but a consistent site file."""
        path = Path(path).expanduser()
        file = open_hdf5(path)
        try:
            return cls(file, path)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> SiteFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; sites read from it stay usable."""
        self._file.close()

    def site(
        self,
        name: str,
        annotation: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        allow_empty_train: bool = False,
        load: str = "auto",
    ) -> SiteData:
        """Read a site by name or group ("central" for the pooled one), in compact types, and check its labels.

        `annotation` says which dataset training reads (see `choose_annotation`); `mean`, `std` normalise batches on the
        0..1 scale, one number or one per channel. A site without training images is refused unless `allow_empty_train`
        (the central group never has any). `load`: "memory" reads images and masks whole, "map" leaves them in the file
        until a batch asks for them, "auto" does so when they take more than a quarter of the available memory; what is
        read is the same.
        """
        info = self._find(name)
        where = self._where(info.name)
        node = self._node(info.group)
        if info.n_train == 0 and not allow_empty_train and not info.group.startswith(CENTRAL):
            raise UserError(
                f"{where}: the train split is empty ({info.n} images). Put images into train_idx or leave the site out."
            )
        chosen = choose_annotation(node, annotation, where, self.task)
        truth = "mask" if self.task == "segmentation" else "label"
        mapped = stays_in_file(load, sum(_bytes(node[key]) for key in {"image", chosen, truth} if key in node))
        target, ignore = self._load(node, chosen, where, mapped)
        splits = read_splits(node, where, info.n)
        if chosen == "mask" and ignore is not None:
            check_not_withheld(target, splits["train"], ignore, where)
        eval_target = None if truth == chosen or truth not in node else self._load(node, truth, where, mapped)[0]
        kind = node.attrs.get("label_kind") if annotation in ("auto", node.attrs.get("annotation")) else None
        extras = self._small_extras(node, chosen, info.n)
        self._check_flags(extras, info, where)
        item_id = _strings(node, "item_id") or [f"{info.name}:{i}" for i in range(info.n)]
        return SiteData(
            name=info.name,
            task=self.task,
            classes=self.classes,
            channels=self.channels,
            image_size=self.image_size,
            label_kind=str(kind or chosen),
            image=open_rows(node["image"], self.path) if mapped else _planar(node["image"][...]),
            target=target,
            item_id=item_id,
            group_id=_strings(node, "group_id") or list(item_id),
            splits=splits,
            extras=extras,
            mean=mean,
            std=std,
            eval_target=eval_target,
            ignore_value=ignore,
            origin=(self.path, info.group),
            mapped=mapped,
        )

    @property
    def meta(self) -> dict[str, Any]:
        """Root attributes as `write_site_file` takes them (lists decoded; without layout_version, n_sites and recipe),
        for derived files.
        """
        rest = {
            key: _plain(value)
            for key, value in self._file.attrs.items()
            if key not in ("layout_version", "n_sites", "recipe")
        }
        return {
            **rest,
            "classes": list(self.classes),
            "channels": list(self.channels),
            "image_size": list(self.image_size),
        }

    def _node(self, group: str) -> h5py.Group:
        return self._file[group] if group else self._file

    def _where(self, name: str) -> str:
        return f"{self.path}, site {name!r}"

    def _info(self, group: str) -> SiteInfo:
        node = self._node(group)
        name = str(node.attrs.get("site_name") or group or self._file.attrs.get("name") or self.path.stem)
        where = self._where(name)
        check_header(node, where, self.task, len(self.classes), self.image_size, len(self.channels))
        count = int(node["image"].shape[0])
        sizes = [len(rows) for rows in read_splits(node, where, count).values()]
        return SiteInfo(group, name, count, *sizes)

    def _find(self, name: str) -> SiteInfo:
        if (name == CENTRAL and self.central) or name in [f"{CENTRAL}_{key}" for key in self.conditions]:
            return self._info(name)
        for info in self.sites:
            if name in (info.name, info.group):
                return info
        known = [info.group if name.startswith("site_") and info.group else info.name for info in self.sites]
        raise UserError(f"{self.path} has no site {name!r}{nearest(name, known)}")

    def _load(self, node: h5py.Group, name: str, where: str, mapped: bool) -> tuple[np.ndarray | FileRows, int | None]:
        keys = ((holder, f"ignore_value{part}") for part in (f"_in_{name}", "") for holder in (node, self._file))
        declared = next((holder.attrs[key] for holder, key in keys if key in holder.attrs), None)
        # weak annotations may leave pixels undrawn even when the file does not say so: their value is then L
        weak = self.task == "segmentation" and name != "mask"
        ignore = int(declared) if declared is not None else (len(self.classes) if weak else None)
        rows = node[name]
        values = open_rows(rows, self.path) if mapped and rows.ndim >= 3 else rows[...]
        check_labels(values, name, where, self.task, len(self.classes), ignore)
        return values, ignore

    def _small_extras(self, node: h5py.Group, chosen: str, count: int) -> dict[str, np.ndarray]:
        """Per-item numbers (not further images) and active_classes; the rest waits for `SiteData.read`."""
        extras = {}
        for key, item in node.items():
            if (
                key in _NOT_EXTRAS
                or key == chosen
                or not isinstance(item, h5py.Dataset)
                or item.dtype.kind not in "biuf"
            ):
                continue
            if key == "active_classes" or (item.ndim in (1, 2) and item.shape[0] == count):
                extras[key] = item[...]
        if "active_classes" in node.attrs:
            extras["active_classes"] = np.asarray(node.attrs["active_classes"])
        return extras

    def _check_flags(self, extras: dict[str, np.ndarray], info: SiteInfo, where: str) -> None:
        for key, width in (("active_classes", len(self.classes)), ("modality_present", len(self.channels))):
            flags = extras.get(key)
            allowed = [(info.n, width)] + ([(width,)] if key == "active_classes" else [])
            if flags is not None and (flags.shape not in allowed or not np.isin(flags, (0, 1)).all()):
                need = " or ".join(str(shape) for shape in allowed)
                raise UserError(
                    f"{where}: {key} has shape {flags.shape}, expected 0/1 flags of shape {need}. Rewrite it."
                )


def read_truth(path: str | Path) -> dict[str, dict[str, Any]]:
    """What a derived file says about its own corruption: site name -> attributes of `reference/` (is_noisy, noise_rate,
    ...); for reports only.
    """
    truth: dict[str, dict[str, Any]] = {}
    with SiteFile.open(path) as sites:
        for info in sites.sites:
            node = sites._node(info.group)
            if "reference" in node:
                truth[info.name] = {key: _plain(value) for key, value in node["reference"].attrs.items()}
    return truth


def _bytes(dataset: h5py.Dataset) -> int:
    return int(dataset.size) * dataset.dtype.itemsize


def _planar(image: np.ndarray) -> np.ndarray:
    """Images (N,H,W,C) kept plane by plane, shown as they were: splits then need no second copy."""
    if image.ndim == 3:
        return image
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value.decode() if isinstance(value, bytes) else value


def _strings(node: h5py.Group, name: str) -> list[str]:
    if name not in node:
        return []
    return [v.decode() if isinstance(v, bytes) else str(v) for v in node[name][...].tolist()]
