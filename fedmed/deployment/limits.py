"""What a site lets a run do: its configuration is judged before anything it names is imported, and replies are thinned out after.

A coordinator chooses configuration and messages, never code: the names in a configuration stand for classes that are installed at the site.
A name with a colon would import anything, an argument with a path or address would read or fetch it, and an OmegaConf interpolation would
read the site's environment; none of them passes unless the site allows it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedmed.config import Config, build, from_tree, load_config
from fedmed.deployment.site_config import IMPORT_PATH, Limits
from fedmed.deployment.site_facts import Facts
from fedmed.errors import FedMedError, UserError
from fedmed.models.monai_wrapper import FETCHING

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from fedmed.federation.messages import Leaf
    from fedmed.schema import ClientConfig

_BY_CLASS = re.compile(r"\d*[CM]\b")  # an axis over classes or modalities in the shape of a leaf
_LIBRARY = re.compile(r"monai:\w+")  # reaches the networks of monai.networks.nets and nothing else
_FLOWER = re.compile(r"flwr:\w+")  # a strategy, which runs at the coordinator only
_SHOWN = 3  # reasons in one refusal


@lru_cache(maxsize=1)
def read_config(text: str) -> Config:
    """Read the configuration of a run as it comes with a message, and refuse interpolations, unresolved. Raises `UserError`."""
    from omegaconf import OmegaConf

    if not text.strip():
        raise UserError(
            "the run brings no configuration; hand it in with `fedmed run EXPERIMENT --engine deployment`, which sends the whole of it"
        )
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # the YAML parser has many error types; all of them mean "not YAML"
        raise UserError(f"the run's configuration is not valid YAML ({type(error).__name__})") from error
    if not isinstance(tree, dict):
        raise UserError("the run's configuration has no keys at its top level")
    if any("${" in word for _, word in _strings(tree, "")):
        raise UserError(
            "the run's configuration holds an interpolation ${...}, which would read values of the site; send it resolved"
        )
    return from_tree({str(key): value for key, value in tree.items()})


def check(limits: Limits, config: Config, facts: Facts) -> None:
    """Compare what a run asks with what the site allows. Raises `UserError` ("site X refuses: ...") with the reasons."""
    problems = [*_names(limits, config), *_amounts(limits, config, facts), *_methods(limits, config)]
    if not problems:  # only now may the client be looked up, which imports it
        problems = [*_releases(limits, config, facts)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"site {facts.site!r} refuses: {'; '.join(problems[:_SHOWN])}{more}")


# ---------------------------------------------------------------------- names


def _strings(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """All strings of a tree with their places, the keys included."""
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            yield place, str(key)
            yield from _strings(value, place)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _strings(value, f"{where}[{index}]")


def _names(limits: Limits, config: Config) -> Iterator[str]:
    """Import paths that are not allowed, and arguments that would make a network read a file or fetch one."""
    named = {"model.name": config.model.name, "strategy.name": config.strategy.name, "client.name": config.client.name}
    named |= {f"client.{name}": name for name in config.client.addons}
    for place, name in named.items():
        harmless = (place == "model.name" and _LIBRARY.fullmatch(name)) or (
            place == "strategy.name" and _FLOWER.fullmatch(name)
        )
        if ":" in name and not harmless and name not in limits.allow_imports:
            yield _import_refusal(place, name)
    arguments = {
        "model.args": config.model.args,
        "client.args": config.client.args,
        "data.augment": config.data.augment,
    }
    arguments |= {f"client.{name}": values for name, values in config.client.addons.items()}
    for place, tree in arguments.items():
        for where, word in _strings(tree, place):
            if IMPORT_PATH.fullmatch(word) and word not in limits.allow_imports:
                yield _import_refusal(where, word)
    for where, word in _strings(config.model.args, "model.args"):
        if "/" in word or "\\" in word:
            yield f"{where} names a file or an address; a site's model reads and fetches nothing, remove it"
    for key in FETCHING:
        if config.model.args.get(key):
            yield f"model.args.{key}: a site's model reads and fetches nothing, remove it"


def _import_refusal(place: str, name: str) -> str:
    return f"{place}={name} would import code that is not part of FedMed; use a registered name, or ask for it in limits.allow_imports"


# ---------------------------------------------------------------------- amounts and methods


def _amounts(limits: Limits, config: Config, facts: Facts) -> Iterator[str]:
    training = config.training
    if limits.max_epochs is not None and training.epochs > limits.max_epochs:
        yield f"training.epochs={training.epochs}, allowed are {limits.max_epochs} (limits.max_epochs)"
    if limits.max_steps is not None:
        steps = training.epochs * -(-facts.num_train // training.batch_size)
        steps = steps if training.max_steps is None else min(steps, training.max_steps)
        if steps > limits.max_steps:
            yield f"a round of {steps} steps, allowed are {limits.max_steps} (limits.max_steps); set training.max_steps={limits.max_steps}"


def _methods(limits: Limits, config: Config) -> Iterator[str]:
    client = config.client
    used = [client.name, *(name for name, values in client.addons.items() if values.get("enabled"))]
    if limits.methods is not None:
        for name in used:
            if name not in limits.methods:
                yield f"{name!r} is not one of the methods allowed here ({', '.join(limits.methods) or 'none'}; limits.methods)"
    if limits.experiments is None:
        return
    if config.name not in limits.experiments:
        yield (
            f"experiment {config.name!r} is not one of those allowed here "
            f"({', '.join(limits.experiments) or 'none'}; limits.experiments)"
        )
    elif _loosened(client, load_config(config.name).client):
        yield (
            f"the client part differs from that of experiment {config.name!r} as it is installed here; "
            "leave client.* as it is, or give the experiment another name and ask for it"
        )


def _loosened(client: ClientConfig, installed: ClientConfig) -> bool:
    """Whether a client part differs from the installed one, other than by withholding more (`min_count`)."""
    asked, ours = ({**part.args, "min_count": 0} for part in (client, installed))
    more = client.args.get("min_count", 0) or 0, installed.args.get("min_count", 0) or 0
    stricter = all(isinstance(count, int) for count in more) and more[0] >= more[1]
    return (
        not stricter or asked != ours or dataclasses.replace(client, args={}) != dataclasses.replace(installed, args={})
    )


# ---------------------------------------------------------------------- least counts


def least_counts(config: Config) -> dict[str, tuple[Leaf, int]]:
    """What the run's client and add-ons declare: name -> (leaf, least number of items it stands for).

    A client with an argument `min_count` withholds what stands for fewer items. Imports the client. Raises `UserError`.
    """
    from fedmed.federation.messages import BASE_LEAVES
    from fedmed.federation.site import client_class, make_addons

    cls = client_class(config)
    params: Any = build(cls.Params, config.client.args, "client.args")
    found = {leaf.name: (leaf, leaf.min_count) for leaf in BASE_LEAVES}
    for source, leaves in ((params, cls.leaves), *((a.params, a.leaves) for a in make_addons(config).values())):
        found |= {leaf.name: (leaf, max(leaf.min_count, getattr(source, "min_count", 1))) for leaf in leaves}
    return found


def is_by_group(leaf: Leaf) -> bool:
    """Whether a leaf tells classes or other groups of items apart, and so may stand for very few of them."""
    from fedmed.federation.messages import BASE_LEAVES

    return leaf not in BASE_LEAVES and bool(
        _BY_CLASS.search(leaf.shape) or ("*" in leaf.name and leaf.kind == "metric")
    )


def _releases(limits: Limits, config: Config, facts: Facts) -> Iterator[str]:
    if limits.min_count <= 1:
        return
    if facts.num_train < limits.min_count:
        yield f"its training split has fewer than {limits.min_count} items (limits.min_count)"
    try:
        declared = least_counts(config)
    except FedMedError as error:
        yield str(error)
        return
    for leaf, count in declared.values():
        if is_by_group(leaf) and count < limits.min_count:
            yield (
                f"client {config.client.name!r} would send {leaf.name} ({leaf.meaning}), which may stand for {count} "
                f"{'item' if count == 1 else 'items'}, asked are {limits.min_count} (limits.min_count); "
                f"set client.args.min_count={limits.min_count} where the client has it, or choose another"
            )


def withhold(content: RecordDict, kind: str, min_count: int) -> list[str]:
    """Take the scores of splits with fewer than `min_count` items out of a reply, their counts too; gives the splits.

    `kind`: of the message, as in `site.answer`. In an identity the counts of such splits become 0.
    """
    from flwr.app import ConfigRecord, MetricRecord

    from fedmed.federation.messages import IDENTITY, METRICS, NUM_EXAMPLES, part

    identity, metrics = part(content, IDENTITY, ConfigRecord), part(content, METRICS, MetricRecord)
    small = []
    for key in ("num_val", "num_test") if identity is not None else ():
        assert identity is not None
        if 0 < int(identity.get(key, 0)) < min_count:  # type: ignore[arg-type]
            identity[key] = 0
            small.append(key.removeprefix("num_"))
    for name in [n for n in metrics or () if n.startswith("n/")]:
        assert metrics is not None
        if 0 < int(metrics[name]) < min_count:  # type: ignore[arg-type]
            split = name.removeprefix("n/")
            small.append(split)
            for other in [n for n in metrics if n == name or n.startswith(f"{split}/")]:
                del metrics[other]
            if kind == "evaluate" and split == "test":
                metrics[NUM_EXAMPLES] = 0  # an evaluation's number of items is that of its test split
    return small
