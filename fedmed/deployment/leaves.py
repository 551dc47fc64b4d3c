"""`fedmed site leaves`: what leaves a site in an experiment and what stays, read from the declarations that the code itself checks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmed.config import Config
from fedmed.data.site_file import SiteFile
from fedmed.deployment.limits import check, least_counts
from fedmed.deployment.site_config import SiteConfig
from fedmed.deployment.site_facts import Facts, site_in_file
from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.federation.messages import BASE_LEAVES, Leaf
from fedmed.federation.site import client_class, make_addons, make_model
from fedmed.federation.subsets import modality_subsets, takes_subsets
from fedmed.metrics import evaluate_cases, summarise
from fedmed.models.heads import num_outputs

IDENTITY = {
    "site": "name of the site",
    "task": "segmentation, classification or multilabel",
    "classes": "names of the classes",
    "channels": "names of the image channels",
    "image_size": "height and width in pixels",
    "label_kind": "kind of annotation",
    "num_train": "number of training items",
    "num_val": "number of validation items",
    "num_test": "number of test items",
    "groups_left_out": "parts of the model that it will not send",
    "schema": "layout version of the site file",
    "code_hash": "hash of the installed code",
}  # what `Identity.as_config` sends
_STAYS = (
    "images, annotations, names of items and patients, predictions, losses and scores of single items, class counts",
    "cases.csv: one line per scored item (in the state folder)",
    "confusion.json: counts of true and predicted classes (in the state folder)",
    "config.yaml: what the run asked (in the state folder)",
)
_KINDS = {"parameter": "parameters", "buffer": "buffers (running statistics)", "counter": "counters"}


@dataclass(frozen=True)
class Shape:
    """What of the data decides the shapes of what is sent, and where that comes from."""

    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    image_size: tuple[int, ...]
    source: str


def leaves(config: Config, site: SiteConfig | None = None, *, entries: bool = False) -> Iterator[str]:
    """The lines of `fedmed site leaves`; `entries`: with every entry of the model. Raises `UserError`."""
    shape = shape_of(config, site)
    cls = client_class(config)
    model, activation = make_model(config, shape.task, len(shape.classes), len(shape.channels), shape.image_size)
    layout = Layout.of(model, cls.is_personal)
    yield f"experiment {config.name}: strategy {config.strategy.name}, client {config.client.name}{_addons(config)}"
    yield (
        f"shapes of {shape.source}: {shape.task}, {len(shape.classes)} classes, {len(shape.channels)} channels, "
        f"{shape.image_size[0]} x {shape.image_size[-1]} pixels"
    )
    yield ""
    yield "LEAVES"
    yield "  once, and after a restart: the identity"
    yield from _table(IDENTITY.items())
    yield from _model(layout, entries)
    yield from _declared(config, shape)
    yield from _scores(config, shape, cls.views, model, activation)
    yield "  when something goes wrong: one line of text, without paths and without values of the data"
    yield ""
    yield "STAYS"
    yield from (f"    {line}" for line in _stays(config, layout, shape))
    if site is not None:
        yield ""
        yield from _judgement(config, site)


def shape_of(config: Config, site: SiteConfig | None) -> Shape:
    """The shape of a site's data or, without a site, of the data an experiment names (a small sample of a phantom). Raises `UserError`."""
    if site is not None:
        return _read_shape(site.data, f"the data of site {site.name!r}")
    if not config.data.path:
        raise UserError("the experiment names no data; give --config SITE.yaml, whose data decide the shapes")
    if not config.data.path.startswith("phantom:"):
        found = _read_shape(Path(config.data.path), config.data.path)
    else:
        from fedmed.data.phantom import make_phantom

        with tempfile.TemporaryDirectory(prefix="fedmed-") as folder:
            sample: dict[str, Any] = {**config.data.phantom, "num_sites": 1, "images_per_site": 10}
            path = make_phantom(Path(folder) / "phantom.h5", config.data.path.removeprefix("phantom:"), **sample)
            found = _read_shape(path, "the experiment's synthetic data (--config SITE.yaml: of yours)")
    side = config.data.resize
    return found if side is None else Shape(found.task, found.classes, found.channels, (side, side), found.source)


def _read_shape(path: Path, source: str) -> Shape:
    with SiteFile.open(path) as file:
        return Shape(file.task, tuple(file.classes), tuple(file.channels), tuple(file.image_size), source)


def _addons(config: Config) -> str:
    names = list(make_addons(config))
    return f" with {', '.join(names)}" if names else ""


def _table(rows: Any) -> Iterator[str]:
    found = [(str(name), str(text)) for name, text in rows]
    width = max((len(name) for name, _ in found), default=0)
    yield from (f"    {name.ljust(width)}  {text}" for name, text in found)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _amount(layout: Layout, names: Sequence[str]) -> tuple[int, int]:
    """Numbers and bytes of some entries."""
    sizes = [(torch.Size(layout.entries[name].shape).numel(), layout.entries[name].dtype.itemsize) for name in names]
    return sum(count for count, _ in sizes), sum(count * size for count, size in sizes)


def _model(layout: Layout, entries: bool) -> Iterator[str]:
    numbers, size = _amount(layout, layout.exchanged)
    if not layout.exchanged:
        yield "  nothing of the model"
        return
    yield f"  in every round it trains: the model, {len(layout.exchanged)} entries, {numbers:,} numbers, {_bytes(size)}"
    for kind, words in _KINDS.items():
        names = [name for name in layout.exchanged if layout.entries[name].kind == kind]
        if names:
            yield f"    {words}: {len(names)} entries, {_amount(layout, names)[0]:,} numbers"
    if entries:
        rows = ((name, f"{list(layout.entries[name].shape)} {layout.entries[name].kind}") for name in layout.exchanged)
        yield from _table(rows)


def _declared(config: Config, shape: Shape) -> Iterator[str]:
    """The leaves of client and add-ons; anything else a client would send is refused by the code."""
    yield (
        "  with the model, and as answers to the method's questions: these numbers and arrays and no others "
        f"(C = {len(shape.classes)} classes, M = {len(shape.channels)} channels, D = features)"
    )
    scores = [leaf for leaf in BASE_LEAVES if leaf.name.split("/")[0] in ("n", "train", "val", "test", "test-*")]
    rows = [(leaf, count) for leaf, count in least_counts(config).values() if leaf not in scores]
    yield from _table((leaf.name, _meaning(leaf, count)) for leaf, count in rows)


def _meaning(leaf: Leaf, count: int) -> str:
    array = f"array {leaf.shape}: " if leaf.kind == "array" else f"{leaf.shape} numbers: " if leaf.shape != "1" else ""
    return array + leaf.meaning.replace("client.args.min_count", f"{count} (client.args.min_count)")


def _scores(config: Config, shape: Shape, views: tuple[str, ...], model: nn.Module, activation: str) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.sites and evaluation.mode == "separate":
        yield "  no scores (evaluation.sites=false)"
        return
    often = "after every round" if evaluation.every == 1 else f"after every {evaluation.every} rounds and the last one"
    yield f"  {often}: scores over all items of a split, one number each"
    splits = ("val", "test") if evaluation.select else ("test",)
    for split in splits:
        yield f"    n/{split}, the number of items"
        for view in views:
            yield "    " + ", ".join(f"{split}/{view}/{name}" for name in metric_names(shape, activation, hd95=False))
    if evaluation.hd95 and shape.task == "segmentation":
        yield "    after the last round also " + ", ".join(f"{s}/{v}/hd95" for s in splits for v in views)
    if evaluation.modality_subsets != "none" and "global" in views and takes_subsets(model, len(shape.channels)):
        yield "    after the last round the same of the test items shown some of their modalities only:"
        yield "      " + ", ".join(modality_subsets(shape.channels))


def metric_names(shape: Shape, activation: str, *, hd95: bool) -> list[str]:
    """Names of the scores of a split, from scoring four made-up items."""
    count, num_classes = 4, len(shape.classes)
    pixels = (8, 8) if shape.task == "segmentation" else ()
    probs = torch.full((count, num_outputs(shape.task, num_classes, activation), *pixels), 0.5)
    targets = torch.zeros((count, num_classes) if shape.task == "multilabel" else (count, *pixels), dtype=torch.int64)
    cases = evaluate_cases(shape.task, probs, targets, activation, num_classes, hd95=hd95)
    return list(summarise(shape.task, probs, targets, cases, shape.classes))


def _stays(config: Config, layout: Layout, shape: Shape) -> Iterator[str]:
    yield from _STAYS
    pictures = "overlay.npz" if shape.task == "segmentation" else "examples.npz"
    yield f"{pictures}: three images with reference and prediction (in the state folder)"
    if layout.personal:
        numbers, size = _amount(layout, layout.personal)
        shown = ", ".join(layout.personal[:6]) + (", ..." if len(layout.personal) > 6 else "")
        yield f"personal/: {len(layout.personal)} entries of the model, {numbers:,} numbers, {_bytes(size)} ({shown})"
    if config.optimizer.persist:
        yield "personal/: the optimiser's moments"
    yield "personal/: whatever else the method keeps from round to round"


def _judgement(config: Config, site: SiteConfig) -> Iterator[str]:
    """Whether the site's limits let the run through, and what they hold back."""
    name, num_train = site_in_file(site)
    try:
        check(site.limits, config, Facts(site.name, num_train))
    except UserError as error:
        yield f"REFUSED: {error}"
        return
    yield f"ALLOWED by the limits of site {site.name!r}"
    with SiteFile.open(site.data) as file:
        info = next(s for s in file.sites if s.name == name)
    small = [
        split for split, count in (("val", info.n_val), ("test", info.n_test)) if 0 < count < site.limits.min_count
    ]
    if small:
        yield f"  withheld all the same, for fewer than {site.limits.min_count} items: scores and number of {', '.join(small)}"
