"""Apply a corruption to the items of all clients and keep what was clean as a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.corruption import Corruption, ImageCorruption, ImageStack, TrainPool
from data_prep.items import Items
from data_prep.seeding import Seed
from fedmed.data.site_file import CENTRAL
from fedmed.errors import UserError

CORRUPTED = "corrupted"  # the condition under which all central images are degraded


def corrupt(
    sites: Sequence[Items], task: str, classes: Sequence[str], corruption: Corruption, annotation: str, seed: Seed
) -> list[Items]:
    """Corrupt the training annotations of all sites; the clean ones go to each site's reference. `classes`: their names.

    UserError when the corruption is for another task, or training would read another annotation.
    """
    _check_task(corruption, task)
    key = {"segmentation": "mask"}.get(task, "label")
    name = type(corruption).__name__
    for site in sites:
        read = str(site.attrs.get("annotation", key)) if annotation == "auto" else annotation
        if read != key or key not in site.arrays:
            raise UserError(
                f"data.corruption: {name} changes {key}, but site {site.name} would train on {read}. "
                f"Set data.annotation={key} or leave the corruption out."
            )
    train = [site.splits["train"] for site in sites]
    pooled = TrainPool(
        images=np.concatenate([site.arrays["image"][rows] for site, rows in zip(sites, train, strict=True)]),
        targets=np.concatenate([site.arrays[key][rows] for site, rows in zip(sites, train, strict=True)]),
        client=np.repeat(np.arange(len(sites)), [len(rows) for rows in train]),
        groups=np.concatenate([site.arrays["group_id"][rows] for site, rows in zip(sites, train, strict=True)]),
        num_clients=len(sites),
        num_classes=len(classes),
        slices=np.concatenate([site.arrays["slice_no"][rows] for site, rows in zip(sites, train, strict=True)])
        if all("slice_no" in site.arrays for site in sites)
        else None,
        active=_pooled_active(sites, len(classes)),
        classes=tuple(classes),
    )
    result = corruption.apply(pooled, seed)
    noisy = [
        _with_noise(site, key, result.targets[pooled.client == index], result.facts[index])
        for index, site in enumerate(sites)
    ]
    if result.active is None:
        return noisy
    return [_with_active(site, result.active[pooled.client == index]) for index, site in enumerate(noisy)]


def _active(site: Items, num_classes: int) -> np.ndarray:
    return site.arrays.get("active_classes", np.ones((site.size, num_classes), dtype=np.uint8))


def _pooled_active(sites: Sequence[Items], num_classes: int) -> np.ndarray | None:
    """Which classes the training items of all sites are annotated for, (N, C); None where no site says."""
    if not any("active_classes" in site.arrays for site in sites):
        return None
    return np.concatenate([_active(site, num_classes)[site.splits["train"]] for site in sites])


def _with_active(site: Items, active: np.ndarray) -> Items:
    """The site with `active` (n, C) at its training items; its other items keep what they had, or have all classes."""
    flags = _active(site, active.shape[1]).copy()
    flags[site.splits["train"]] = active
    return dataclasses.replace(site, arrays={**site.arrays, "active_classes": flags})


def _with_noise(site: Items, key: str, noisy: np.ndarray, facts: Mapping[str, Any]) -> Items:
    clean = site.arrays[key]
    target = clean.copy()
    target[site.splits["train"]] = noisy
    reference = {key: clean, **site.reference}  # a source that carries a cleaner reference keeps it
    return dataclasses.replace(site, arrays={**site.arrays, key: target}, reference=reference, facts=dict(facts))


def corrupt_images(
    sites: Sequence[Items], central: Items | None, task: str, corruption: ImageCorruption, seed: Seed
) -> tuple[list[Items], Items | None]:
    """Sites with degraded images, whose clean ones go to the site's reference, and the central items degraded.

    Sites whose images stay as they were get facts only. UserError when the corruption is for another task.
    """
    _check_task(corruption, task)
    result = corruption.apply_images(
        [_stack(site) for site in sites], None if central is None else _stack(central), seed
    )
    changed = [
        _with_images(site, images, facts)
        for site, images, facts in zip(sites, result.images, result.facts, strict=True)
    ]
    if result.present is not None:
        changed = [_with_present(site, present) for site, present in zip(changed, result.present, strict=True)]
    if central is None or result.central is None:
        return changed, None
    poor = {**central.arrays, "image": result.central}
    return changed, dataclasses.replace(central, group="", name=f"{CENTRAL}_{CORRUPTED}", arrays=poor)


def _stack(items: Items) -> ImageStack:
    arrays = items.arrays
    return ImageStack(arrays["image"], arrays.get("modality_present"), arrays["group_id"], items.splits["train"])


def _with_images(site: Items, images: np.ndarray | None, facts: Mapping[str, Any]) -> Items:
    if images is None:
        return dataclasses.replace(site, facts=dict(facts))
    reference = {"image": site.arrays["image"], **site.reference}  # as for annotations
    return dataclasses.replace(site, arrays={**site.arrays, "image": images}, reference=reference, facts=dict(facts))


def _with_present(site: Items, present: np.ndarray) -> Items:
    """The site with its new `modality_present`; what it had before goes to the reference."""
    before = {key: site.arrays[key] for key in ("modality_present",) if key in site.arrays}
    reference = {**before, **site.reference} if site.reference else {}
    return dataclasses.replace(site, arrays={**site.arrays, "modality_present": present}, reference=reference)


def _check_task(corruption: Corruption | ImageCorruption, task: str) -> None:
    if task not in corruption.tasks:
        name, tasks = type(corruption).__name__, ", ".join(corruption.tasks)
        raise UserError(f"data.corruption: {name} is for {tasks} files, this file is for {task}.")
