"""Fill the tables of the documentation from the code, so that they cannot drift from it.

    python docs/build_tables.py            write the tables into README.md and docs/
    python docs/build_tables.py --check    name the files that are out of date; exit status 1 if there are any

A table stands between the lines `<!-- table: NAME ARGUMENT -->` and `<!-- end -->`; the names are the keys of `TABLES`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import tokenize
import typing
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- table: (?P<name>\S+)(?: (?P<argument>\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

# Meaning of every configuration key; `_config_rows` fails when one is missing or left over.
MEANING = {
    "name": "name of the run; the file name of the experiment unless it says otherwise",
    "description": "one sentence for `fedmed list`",
    "seed": "every random number of the run is derived from it",
    "out": "run folder; empty: `runs/<name>-<time>`. `--out` on the command line wins",
    "data.path": "a site file, or `phantom:<kind>`",
    "data.phantom": "arguments of the phantom generator ([site-files.md](site-files.md))",
    "data.annotation": "which dataset training reads; `auto`: the site's attribute `annotation`, else the first usable",
    "data.load": "`memory`: images and masks are read at once; `map`: batch by batch, from the file; `auto`: `map` when they take more than a "
    "quarter of the available memory ([site-files.md](site-files.md#files-larger-than-memory))",
    "data.resize": "side in pixels after area averaging (square, aspect ratio not kept); `null`: the stored size",
    "data.mean": "per channel, subtracted after images are scaled to 0..1",
    "data.std": "per channel, divided by afterwards",
    "data.augment": "any of `hflip`, `vflip`, `transpose`, `rot90`, `shift` (or `shiftN`, N pixels), `affine`, "
    "`intensity`",
    "data.partition.name": "how training items are dealt to clients ([site-files.md](site-files.md)); `null`: as stored",
    "data.partition.args": "its arguments",
    "data.corruption.name": "what is done to training annotations, or to the images of some clients; `null`: nothing",
    "data.corruption.args": "its arguments",
    "data.cache_dir": "where phantoms and derived site files are kept; `null`: `$XDG_CACHE_HOME/fedmed`, else "
    "`~/.cache/fedmed`",
    "model.name": "a name of `fedmed list models`, `monai:<class of monai.networks.nets>`, or `module:class`",
    "model.args": "its arguments; channels, classes and image size come from the data",
    "model.activation": "`auto`: softmax for classification, sigmoid for multi-label and for one foreground class, "
    "else softmax",
    "strategy.name": "server rule: a name of `fedmed list strategies`, `module:class`, or `flwr:<class>`",
    "strategy.args": "its arguments, see the page of the method",
    "client.name": "local half: a name of `fedmed list clients`, or `module:class`",
    "client.args": "its arguments, see the page of the method",
    "client.<add-on>": "one node per add-on, with `enabled` and its arguments, e.g. `client.prox.enabled=true`",
    "optimizer.name": "the local optimiser; made anew every round unless `persist`",
    "optimizer.lr": "learning rate",
    "optimizer.momentum": "`sgd` only",
    "optimizer.betas": "`adam` and `adamw` only; two values, each in [0, 1)",
    "optimizer.weight_decay": "L2 term in the gradient (`sgd`, `adam`), decoupled (`adamw`)",
    "optimizer.persist": "keep the moments at the site from round to round",
    "optimizer.schedule": "`constant`; `multistep`: lr times `factor` from each milestone on; `poly`: lr · (1 − (round − 1)/rounds)^`power`",
    "optimizer.milestones": "rounds (counted from 1) of `multistep`; rounds count, also those a site was away in",
    "optimizer.factor": "of `multistep`",
    "optimizer.power": "of `poly`",
    "training.epochs": "passes over the training split in a round",
    "training.max_steps": "end a round's training after so many steps at the latest",
    "training.batch_size": "images of a step; a last batch of one image is left out",
    "federation.rounds": "number of rounds",
    "federation.fraction": "share of the sites online that train in a round, drawn anew each round, never fewer than "
    "`min_sites`",
    "federation.min_sites": "a run does not start with fewer sites; a simulation waits for all sites of its file",
    "federation.quorum": "share of the sites asked whose answers must be valid, in each phase; at least one",
    "federation.start_deadline_s": "seconds to wait for enough sites at the start",
    "federation.identify_deadline_s": "seconds for which a run waits for a new site to say who it is; one that was silent is asked again in "
    "later rounds, and not waited for",
    "federation.query_deadline_s": "seconds for the answers to a method's question",
    "federation.train_deadline_s": "seconds for the trained models",
    "federation.evaluate_deadline_s": "seconds for the scores",
    "federation.plain_clients": "accept Flower clients that cannot identify themselves",
    "federation.local_only": "every site trains alone, from the run's seed and with its client and schedule; nothing of the model "
    "travels, the only view is `personal`. Needs `strategy.name=fedavg` ([guide](guide.md#personalised-results))",
    "federation.checkpoint_every": "rounds between checkpoints; the last round always has one",
    "evaluation.every": "rounds between evaluations; the last round is always scored",
    "evaluation.mode": "`separate`: own message; `before`: the received model is scored with the training message; "
    "`after`: the model just trained",
    "evaluation.sites": "score at the sites at all",
    "evaluation.central": "`auto`: the group `central` of a derived file, if there is one, and its groups `central_<name>`; `none`; or the "
    "path of a site file",
    "evaluation.select": "validation metric that chooses `model-selected.safetensors`; `null`: no choice",
    "evaluation.hd95": "95 % surface distance in the last evaluation (segmentation)",
    "evaluation.modality_subsets": "for a model that can be told which modalities are missing: the global view is also scored on every "
    "subset of them, centrally after the last round (`last`) or in every evaluation (`every`), at the sites after the last round",
    "evaluation.local_only": "folder of a finished local-only run of the same sites, whose scores the report shows beside the views of "
    "this run; `null`: none",
    "engine.name": "see [engines.md](engines.md)",
    "engine.device": "`auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes the first CUDA device, if any",
    "engine.precision": "`bf16`: forward passes under autocast",
    "engine.threads": "torch threads of a process; with more than one, engines no longer agree to the bit",
    "engine.cpus_per_client": "ray engine: CPUs of a client process",
    "engine.gpus_per_client": "ray engine: share of a GPU of a client process",
    "tracking.wandb.enabled": "log to Weights & Biases",
    "tracking.wandb.project": "its project",
    "tracking.wandb.mode": "`offline` writes into the run folder and sends nothing; the variable `WANDB_MODE` wins",
    "tracking.tensorboard.enabled": "write TensorBoard events into the run folder",
}

# Arguments whose source line says nothing.
ARGUMENT_MEANING = {
    "clients.supervised:Params.loss": "`auto` (`ce`; `bce` for multi-label and one-class masks; `ce_dice` for masks of "
    "several classes), or a loss that fits",
    "clients.prox:ProximalParams.enabled": "switches the add-on on",
}

# Arguments of `phantom:<kind>`, given under `data.phantom`.
PHANTOM_MEANING = {
    "num_sites": "sites",
    "images_per_site": "one number, or one per site; at least 10",
    "image_size": "pixels a side, at least 16",
    "seed": "of the images; independent of the run's seed",
    "channels": "segmentation: 3 (skin) or 1 (ultrasound)",
    "lesions": "segmentation: at most so many lesions per image",
    "site_shift": "strength of the differences in appearance between sites; 0: none",
    "case_mix": "strength of the differences in case mix; 0: none",
    "difficulty": "classification: overlap of the classes",
    "tail": "classification: share of class c + 1 relative to class c, in (0, 1]",
    "missing_contrasts": "multimodal: whether some sites lack a contrast",
}

# What a run rests on when nobody sets anything: (what holds, key).
DEFAULTS = (
    ("a run does not start with fewer sites than", "federation.min_sites"),
    ("valid answers a phase needs, as a share of the sites asked", "federation.quorum"),
    ("seconds to wait for the sites at the start", "federation.start_deadline_s"),
    ("seconds for a new site to say who it is", "federation.identify_deadline_s"),
    ("seconds for answers to a method's question", "federation.query_deadline_s"),
    ("seconds for training", "federation.train_deadline_s"),
    ("seconds for evaluation", "federation.evaluate_deadline_s"),
    ("rounds between checkpoints", "federation.checkpoint_every"),
    ("rounds between evaluations", "evaluation.every"),
    ("share of the sites that train in a round", "federation.fraction"),
    ("plain Flower clients are accepted", "federation.plain_clients"),
    ("optimiser moments survive the round", "optimizer.persist"),
    ("torch threads of a process", "engine.threads"),
    ("Weights & Biases", "tracking.wandb.enabled"),
    ("its mode, once it is on", "tracking.wandb.mode"),
)


def show(value: Any) -> str:
    """A default as one would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown table; bars inside cells are escaped."""
    lines = [header, tuple("--" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def config_fields(cls: type, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """Dotted key, type and default of every leaf of a configuration dataclass, in the order of the source."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = where + field.name, hints[field.name]
        if key == "client.addons":
            yield "client.<add-on>", "node", None
        elif dataclasses.is_dataclass(kind):
            yield from config_fields(typing.cast(type, kind), f"{key}.")
        else:
            made = field.default_factory is not dataclasses.MISSING
            yield key, str(field.type), field.default_factory() if made else field.default  # type: ignore[misc]


def _config_rows() -> dict[str, tuple[str, ...]]:
    from fedmed import schema

    rows = {}
    for key, kind, default in config_fields(schema.Config):
        allowed = ", ".join(schema.CHOICES.get(key, ()))
        if key in schema.BOUNDS:
            bound, inclusive = schema.BOUNDS[key]
            allowed = f"{'≥' if inclusive else '>'} {bound}"
        if key in schema.UPPER:
            allowed += f", ≤ {schema.UPPER[key]:g}"
        name = kind.replace(" | None", " or null").replace("dict[str, Any]", "mapping")
        rows[key] = (f"`{key}`", name, "" if kind == "node" else f"`{show(default)}`", allowed, MEANING.get(key, ""))
    unexplained, left_over = [k for k in rows if k not in MEANING], [k for k in MEANING if k not in rows]
    if unexplained or left_over:
        raise SystemExit(f"docs/build_tables.py, MEANING: missing {unexplained}, left over {left_over}")
    return rows


def config_table(section: str) -> str:
    """The keys of one section of the configuration; `top`: those outside all sections."""
    chosen = [r for k, r in _config_rows().items() if (k.split(".")[0] if "." in k else "top") == section]
    return table(("key", "type", "default", "allowed", "meaning"), chosen)


def defaults_table(_: str) -> str:
    """The defaults a user relies on without knowing them."""
    rows = _config_rows()
    return table(("what", "default", "key"), [(what, rows[key][2], f"`{key}`") for what, key in DEFAULTS])


def line_comments(source: str) -> dict[int, str]:
    """Comment at the end of each source line, by line number (from 1)."""
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def field_comments(cls: type) -> dict[str, str]:
    """What is said of the fields that a class itself defines: in `ARGUMENT_MEANING`, else behind the line."""
    source = inspect.getsource(cls)
    comments = line_comments(source)
    names = {
        node.target.id: comments.get(node.end_lineno or 0, "")
        for node in ast.parse(source).body[0].body  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    path = f"{cls.__module__}:{cls.__name__}"
    return {name: ARGUMENT_MEANING.get(f"{path}.{name}") or text for name, text in names.items()}


def params_table(path: str) -> str:
    """Arguments of a method: fields of a `module:dataclass`, their defaults, and what the source says behind each.

    An inherited field has the explanation of the class it comes from.
    """
    module_name, _, class_name = path.partition(":")
    cls = getattr(importlib.import_module(module_name), class_name)
    said: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            said |= field_comments(owner)
    rows = []
    for field in dataclasses.fields(cls):
        meaning = ARGUMENT_MEANING.get(f"{path}.{field.name}") or said[field.name]
        if not meaning:
            raise SystemExit(f"docs/build_tables.py: nothing explains {path}.{field.name}")
        rows.append((f"`{field.name}`", f"`{show(field.default)}`", meaning))
    return table(("argument", "default", "meaning"), rows)


def phantom_table(_: str) -> str:
    """Arguments of the phantom generator."""
    from fedmed.data.phantom import make_phantom

    given = {n: p.default for n, p in inspect.signature(make_phantom).parameters.items() if n not in ("path", "kind")}
    if set(given) != set(PHANTOM_MEANING):
        raise SystemExit(f"docs/build_tables.py, PHANTOM_MEANING: differs in {set(given) ^ set(PHANTOM_MEANING)}")
    rows = [(f"`{name}`", f"`{show(default)}`", PHANTOM_MEANING[name]) for name, default in given.items()]
    return table(("argument", "default", "meaning"), rows)


def leaves_table(_: str) -> str:
    """Everything a site may send besides the model, by the class that declares it."""
    from fedmed.federation.messages import BASE_LEAVES
    from fedmed.registry import ADDONS, CLIENTS, resolve

    owners = [("every client", BASE_LEAVES)]
    for kind, names in (("client", CLIENTS), ("add-on", ADDONS)):
        owners += [(f"{kind} `{name}`", resolve(kind, name).leaves) for name in names]
    rows = [
        (owner, f"`{leaf.name}`", leaf.kind, leaf.shape, str(leaf.min_count), leaf.meaning)
        for owner, leaves in owners
        for leaf in leaves
    ]
    rows += [(owner, "nothing more", "", "", "", "") for owner, leaves in owners if not leaves]
    return table(("sent by", "name", "kind", "shape", "least count", "what it is"), rows)


def registry_table(kind: str) -> str:
    """Registered names of one kind with the file that holds each."""
    from fedmed.registry import KINDS

    def place(path: str) -> str:
        module, _, attribute = path.partition(":")
        return f"`{attribute}` in `{module.replace('.', '/')}.py`"

    return table(("name", "where"), [(f"`{name}`", place(path)) for name, path in KINDS[kind].items()])


TABLES: dict[str, Callable[[str], str]] = {
    "config": config_table,
    "defaults": defaults_table,
    "params": params_table,
    "phantom": phantom_table,
    "leaves": leaves_table,
    "registry": registry_table,
}


def filled(text: str) -> str:
    """The text with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match['name']](match['argument'] or '')}\n{match[4]}"

    return _TABLE.sub(fill, text)


def pages() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: list[str]) -> int:
    """Write the tables, or with `--check` only say which files need it."""
    stale = [path for path in pages() if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)}: tables are out of date; run python docs/build_tables.py")
        else:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
