"""A data protocol: resize, partition, corrupt, in this order, once, into a derived site file keyed by its recipe.

Validation and test items are dealt to the clients at random for per-site scores, and lie together in the group
`central`. Annotations are corrupted at training items only. Images are corrupted at all items of a client; then the
central items lie in `central_corrupted` too, degraded. Every engine and client reads the derived file only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corrupt import CORRUPTED, corrupt, corrupt_images
from data_prep.corruption import Corruption, ImageCorruption
from data_prep.held_out import deal_alike, deal_evenly
from data_prep.items import Items, pool, read_items, shrink, site_arrays, take
from data_prep.partition import Natural, NaturalDirichlet, Partition, Pool
from data_prep.seeding import Seed
from fedmed.config import DataConfig, nearest, params_from
from fedmed.data.site_checks import SPLITS
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import refused, write_site_file
from fedmed.errors import UserError
from fedmed.registry import CORRUPTIONS, PARTITIONS, resolve

SCHEMA = "derived-3"  # raise when the same recipe would give other files


@dataclass(frozen=True)
class Recipe:
    """What is done to a source file. partition and corruption are parameter objects; None: left out."""

    resize: int | None
    partition: Partition | None
    corruption: Corruption | ImageCorruption | None
    names: tuple[str | None, str | None]  # registered names of the two
    seed: int

    def as_dict(self, source: Path, content: str) -> dict[str, Any]:
        """The recipe with all defaults spelled out, as JSON-ready values; it decides the name of the derived file."""
        return {
            "schema": SCHEMA,
            "source": {"file": source.name, "sha256": content},
            "resize": self.resize,
            "partition": _step(self.names[0], self.partition),
            "corruption": _step(self.names[1], self.corruption),
            "seed": self.seed,
        }


def derive(config: DataConfig, seed: int, cache_dir: Path) -> Path:
    """Apply the data protocol of `config` and give the path of the file to train on.

    Without resize, partition and corruption: the source itself, untouched. Otherwise a file in `cache_dir` named by the
    sha256 of the recipe (source content, parameters, seed, code schema), written atomically when it is not there yet.
    UserError for unknown names or arguments and for protocols that do not fit the task of the file.
    """
    source = source_path(config, cache_dir)
    recipe = read_recipe(config, seed)
    if recipe.resize is None and recipe.partition is None and recipe.corruption is None:
        return source
    facts = recipe.as_dict(source, _file_digest(source))
    target = cache_dir / f"{source.stem}-{_key(facts)}.h5"
    if not target.is_file():
        _build(source, target, recipe, facts, config.annotation)
    return target


def describe(path: Path | str) -> list[dict[str, Any]]:
    """What a derived file holds, one mapping per site: counts of each split and, where corrupted, the realised noise.

    An original file gives an empty list.
    """
    with SiteFile.open(path) as file:
        recipe = file.recipe
    return [] if recipe is None else list(recipe.get("sites", []))


def read_recipe(config: DataConfig, seed: int) -> Recipe:
    """Turn the `data` section into parameter objects; UserError names the nearest valid name or key."""
    steps: list[Any] = []
    for kind, step, known in (
        ("partition", config.partition, PARTITIONS),
        ("corruption", config.corruption, CORRUPTIONS),
    ):
        if step.name is None:
            if step.args:
                raise UserError(f"data.{kind}.args is set, data.{kind}.name is not; expected one of {', '.join(known)}")
            steps.append(None)
        else:
            steps.append(params_from(resolve(kind, step.name), step.args, f"data.{kind}.args"))
    names = (config.partition.name, config.corruption.name)
    return Recipe(config.resize, steps[0], steps[1], names, seed)


def source_path(config: DataConfig, cache_dir: Path) -> Path:
    """The source file of `config.path`; `phantom:<kind>` is made in `cache_dir` first (once per arguments)."""
    scheme, separator, kind = config.path.partition(":")
    if scheme != "phantom" or not separator:
        return Path(config.path).expanduser()
    from fedmed.data.phantom import PHANTOM_VERSION, make_phantom

    known = [key for key in inspect.signature(make_phantom).parameters if key not in ("path", "kind")]
    for key in config.phantom:
        if key not in known:
            raise UserError(f"unknown key 'data.phantom.{key}'{nearest(key, known)}")
    target = cache_dir / f"phantom-{kind}-{_key([kind, config.phantom, PHANTOM_VERSION])}.h5"
    if not target.is_file():
        with _published(target) as partial:
            make_phantom(partial, kind, **config.phantom)
    return target


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A path in a fresh folder beside `target`; what is written there takes the target's place at the end.

    Two processes (or threads, or machines on one file system) that build the same file do not meet.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            yield partial
            partial.replace(target)
    except OSError as error:
        refusal = refused(target, error)
        refusal.add_note("data.cache_dir names the folder of derived files")
        raise refusal from error


def _key(content: Any) -> str:
    """First 16 hexadecimal digits of the sha256 of JSON-ready content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _build(source: Path, target: Path, recipe: Recipe, facts: dict[str, Any], annotation: str) -> None:
    """Make the derived file `target` from `source`."""
    with SiteFile.open(source) as file:  # checks the file and says what is wrong with it
        task, classes, meta = file.task, file.classes, file.meta
        groups = [site.group for site in file.sites]
    sites = read_items(source, groups)
    if recipe.resize is not None:
        sites = [shrink(site, recipe.resize, _ignore_values(meta, len(classes))) for site in sites]
        meta["image_size"] = [recipe.resize, recipe.resize]
    seed = Seed(recipe.seed)
    if recipe.partition is not None and not _keeps_sites(recipe.partition, len(sites)):
        sites = cut(sites, len(classes), recipe.partition, seed)
    central = _central(sites)  # before anything is corrupted
    poor: Items | None = None
    if isinstance(recipe.corruption, ImageCorruption):
        sites, poor = corrupt_images(sites, central, task, recipe.corruption, seed)
    elif recipe.corruption is not None:
        sites = corrupt(sites, task, classes, recipe.corruption, annotation, seed)
    full = {**facts, "sites": [_summary(site) for site in sites]}
    pooled = None if central is None else site_arrays(central)
    conditions = {} if poor is None else {CORRUPTED: site_arrays(poor)}
    with _published(target) as partial:
        write_site_file(partial, meta, [site_arrays(site) for site in sites], pooled, full, conditions=conditions)


def _keeps_sites(partition: Partition, num_sites: int) -> bool:
    """True for a natural partition that cuts no site: nothing has to be pooled."""
    return isinstance(partition, (Natural, NaturalDirichlet)) and set(partition.counts(num_sites)) == {1}


def _ignore_values(meta: Mapping[str, Any], num_classes: int) -> dict[str, int]:
    """Value that means "not annotated" for each raster annotation that may have one (weak ones: default C)."""
    found = {}
    for key in ("mask", "scribble", "box"):
        value = meta.get(f"ignore_value_in_{key}", meta.get("ignore_value", None if key == "mask" else num_classes))
        if value is not None:
            found[key] = int(value)
    return found


def cut(sites: Sequence[Items], num_classes: int, partition: Partition, seed: Seed) -> list[Items]:
    """Clients client_00, client_01, ... of a partition.

    Training items go where the partition says; validation and test items are dealt at random in nearly equal parts, to
    all clients, or (natural partitions) to those of their own site, or there as the training items of their class are.
    """
    pooled, site_of = pool(sites)
    labels = pooled.arrays.get("label")
    total, owners = partition.total(len(sites)), partition.owners(len(sites))
    base = seed if partition.seed is None else Seed(partition.seed)
    client = np.full(pooled.size, -1, dtype=np.int64)
    train = pooled.splits["train"]
    known = labels[train] if labels is not None and labels.ndim == 1 else None
    view = Pool(known, site_of[train], len(sites), num_classes, pooled.arrays["group_id"][train])
    client[train] = partition.assign(view, seed.rng("partition", partition.seed))
    for split in SPLITS[1:]:
        members, rng = pooled.splits[split], base.rng(f"deal/{split}")
        if known is not None and labels is not None and owners is not None and partition.test_like_train:
            counts = np.zeros((total, num_classes), dtype=np.int64)
            np.add.at(counts, (client[train], known), 1)
            client[members] = deal_alike(labels[members], site_of[members], counts, owners, rng)
        else:
            client[members] = deal_evenly(site_of[members], total, owners, rng)
    digits = max(2, len(str(total - 1)))
    return [
        take(
            pooled,
            {split: rows[client[rows] == index] for split, rows in pooled.splits.items()},
            f"site_{index:0{digits}d}",
            f"client_{index:0{digits}d}",
        )
        for index in range(total)
    ]


def _central(sites: Sequence[Items]) -> Items | None:
    """Validation and test items of all sites together; None when there are none or the sites are too unlike to pool."""
    try:
        pooled, _ = pool(sites)
    except UserError:
        return None
    empty = np.empty(0, dtype=np.int64)
    chosen = {"train": empty, "val": pooled.splits["val"], "test": pooled.splits["test"]}
    if not len(chosen["val"]) + len(chosen["test"]):
        return None
    return dataclasses.replace(take(pooled, chosen, "central", "central"), reference={})


def _summary(site: Items) -> dict[str, Any]:
    counts = {f"n_{split}": len(site.splits[split]) for split in SPLITS}
    facts = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in site.facts.items()}  # NumPy
    return {"site": site.name, **counts, **facts}


def _step(name: str | None, parameters: Any) -> dict[str, Any] | None:
    return None if parameters is None else {"name": name, "args": dataclasses.asdict(parameters)}


def _file_digest(path: Path) -> str:
    """sha256 of a file's content; UserError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the site file {path}: {error.strerror}. Set data.path.") from error
