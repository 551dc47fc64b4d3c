"""Apply a corruption to the items of all clients and keep what was clean as a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.corruption import (
    Corruption,
    ImageCorruption,
    ImageStack,
    TrainPool,
    WeakAnnotation,
    WeakSite,
)
from data_prep.items import Items
from data_prep.seeding import Seed
from fedmed.data.site_file import CENTRAL
from fedmed.errors import UserError

CORRUPTED = "corrupted"  # the condition under which all central images are degraded
WEAK = ("scribble", "box")  # annotations that may take the place of masks
BELONGING = ("class_boxes", "class_tags")  # what goes with weak annotation, and goes when it does


def corrupt(
    sites: Sequence[Items],
    task: str,
    classes: Sequence[str],
    corruption: Corruption | WeakAnnotation,
    annotation: str,
    seed: Seed,
) -> list[Items]:
    """Corrupt the training annotations of all sites; the clean ones go to each site's reference. `classes`: their names.

    UserError when the corruption is for another task, or training would read another annotation.
    """
    _check_task(corruption, task)
    if isinstance(corruption, WeakAnnotation):
        return _annotate(sites, classes, corruption, annotation, seed)
    key = {"segmentation": "mask"}.get(task, "label")
    name = type(corruption).__name__
    for site in sites:
        read = str(site.attrs.get("annotation", key)) if annotation == "auto" else annotation
        if read != key or key not in site.arrays:
            raise UserError(
                f"data.corruption: {name} changes {key}, but site {site.name} would train on {read}. "
                f"Set data.annotation={key} or leave the corruption out."
            )
    pooled = _train_pool(sites, key, classes)
    result = corruption.apply(pooled, seed)
    noisy = [
        _with_noise(site, key, result.targets[pooled.client == index], result.facts[index])
        for index, site in enumerate(sites)
    ]
    if result.active is None:
        return noisy
    return [_with_active(site, result.active[pooled.client == index]) for index, site in enumerate(noisy)]


def _train_pool(sites: Sequence[Items], key: str, classes: Sequence[str]) -> TrainPool:
    """The training items of all sites, with the annotation `key` as targets."""
    train = [site.splits["train"] for site in sites]
    return TrainPool(
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


def _annotate(
    sites: Sequence[Items], classes: Sequence[str], corruption: WeakAnnotation, annotation: str, seed: Seed
) -> list[Items]:
    """Sites with weak annotation of their training items; full masks of these lie in the reference only.

    UserError: a site without masks, or training that is told to read one annotation everywhere.
    """
    name = type(corruption).__name__
    if annotation != "auto":
        raise UserError(
            f"data.corruption: {name} decides what each site trains on, but data.annotation={annotation}. "
            "Set data.annotation=auto."
        )
    for site in sites:
        if "mask" not in site.arrays:
            raise UserError(
                f"data.corruption: {name} draws from full masks, but site {site.name} has no dataset mask. "
                "Leave the corruption out."
            )
        masks = site.arrays["mask"][site.splits["train"]]
        if masks.size and (masks >= len(classes)).all():
            raise UserError(
                f"data.corruption: {name} draws from full masks, but those of site {site.name} are withheld. "
                "Set data.path to the file they were derived from."
            )
    pooled = _train_pool(sites, "mask", classes)
    drawn = [_weak_dataset(site) for site in sites]
    if any(drawn):
        parts = [
            np.minimum(site.arrays[key][site.splits["train"]], len(classes)).astype(np.uint8)
            if key
            else np.full(site.arrays["mask"][site.splits["train"]].shape, len(classes), dtype=np.uint8)
            for site, key in zip(sites, drawn, strict=True)
        ]
        pooled = dataclasses.replace(pooled, weak=np.concatenate(parts), weak_in=tuple(drawn))
    results = corruption.annotate(pooled, seed)
    return [_with_weak(site, weak, len(classes)) for site, weak in zip(sites, results, strict=True)]


def _weak_dataset(site: Items) -> str:
    """Name of the weak annotation a site has already: the one it says it is trained on, else the first; "": none."""
    shape = site.arrays["mask"].shape
    there = [key for key in WEAK if key in site.arrays and site.arrays[key].shape == shape]
    named = str(site.attrs.get("annotation", ""))
    return named if named in there else next(iter(there), "")


def _with_weak(site: Items, weak: WeakSite, num_classes: int) -> Items:
    """The site as its annotators left it: no other weak annotation, and masks of validation and test items only.

    Rows of other splits in the new datasets say that nothing is drawn; so do the mask's rows of training items.
    """
    mask, train = site.arrays["mask"], site.splits["train"]
    attrs = {**site.attrs, "annotation": weak.annotation, "label_kind": weak.label_kind}
    if weak.annotation == "mask":
        return dataclasses.replace(site, attrs=attrs, facts=dict(weak.facts))
    kept = {weak.annotation, *BELONGING} if weak.targets is None else set()
    gone = {*WEAK, *BELONGING} - kept
    arrays = {key: values for key, values in site.arrays.items() if key not in gone}
    nothing = max(num_classes, int(mask.max(initial=0)))  # the file's own value for "not annotated" may be larger
    arrays["mask"] = mask.astype(np.promote_types(mask.dtype, np.uint8))  # a copy; a bool mask has no third value
    arrays["mask"][train] = nothing
    attrs["ignore_value_in_mask"] = nothing
    if weak.targets is not None:
        arrays[weak.annotation] = np.full(mask.shape, num_classes, dtype=np.uint8)
        arrays[weak.annotation][train] = weak.targets
        attrs[f"ignore_value_in_{weak.annotation}"] = num_classes
    for key, values in weak.extras.items():
        arrays[key] = np.zeros((site.size, *values.shape[1:]), dtype=values.dtype)
        arrays[key][train] = values
    reference = {"mask": mask, **site.reference}
    return dataclasses.replace(site, arrays=arrays, reference=reference, attrs=attrs, facts=dict(weak.facts))


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


def _check_task(corruption: Corruption | ImageCorruption | WeakAnnotation, task: str) -> None:
    if task not in corruption.tasks:
        name, tasks = type(corruption).__name__, ", ".join(corruption.tasks)
        raise UserError(f"data.corruption: {name} is for {tasks} files, this file is for {task}.")
