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
    sites: Sequence[Items], task: str, num_classes: int, corruption: Corruption, annotation: str, seed: Seed
) -> list[Items]:
    """Corrupt the training annotations of all sites; the clean ones go to each site's reference.

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
        num_classes=num_classes,
        slices=np.concatenate([site.arrays["slice_no"][rows] for site, rows in zip(sites, train, strict=True)])
        if all("slice_no" in site.arrays for site in sites)
        else None,
    )
    result = corruption.apply(pooled, seed)
    return [
        _with_noise(site, key, result.targets[pooled.client == index], result.facts[index])
        for index, site in enumerate(sites)
    ]


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
    if central is None or result.central is None:
        return changed, None
    poor = {**central.arrays, "image": result.central}
    return changed, dataclasses.replace(central, group="", name=f"{CENTRAL}_{CORRUPTED}", arrays=poor)


def _stack(items: Items) -> ImageStack:
    return ImageStack(items.arrays["image"], items.arrays.get("modality_present"))


def _with_images(site: Items, images: np.ndarray | None, facts: Mapping[str, Any]) -> Items:
    if images is None:
        return dataclasses.replace(site, facts=dict(facts))
    reference = {"image": site.arrays["image"], **site.reference}  # as for annotations
    return dataclasses.replace(site, arrays={**site.arrays, "image": images}, reference=reference, facts=dict(facts))


def _check_task(corruption: Corruption | ImageCorruption, task: str) -> None:
    if task not in corruption.tasks:
        name, tasks = type(corruption).__name__, ", ".join(corruption.tasks)
        raise UserError(f"data.corruption: {name} is for {tasks} files, this file is for {task}.")
