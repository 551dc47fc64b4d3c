"""`fedmed list`: every name a user may write, with one line of description, without importing what the names stand
for.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import fedmed
from fedmed.cli.compare import comparisons
from fedmed.errors import UserError

# Word on the command line -> kind in the registry; experiments are files, not registry entries.
REGISTRY_KINDS = {
    "strategies": "strategy",
    "clients": "client",
    "addons": "add-on",
    "models": "model",
    "losses": "loss",
    "partitions": "partition",
    "corruptions": "corruption",
    "importers": "importer",
}
KINDS = ("experiments", "comparisons", *REGISTRY_KINDS)

_MAX_REEXPORTS = 4  # steps a name is followed through `from x import y`


def first_sentence(text: str | None) -> str:
    """First sentence of a docstring or description on one line, without its full stop; empty for None."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    # A full stop ends the sentence only before a capital or the end, so "e.g. x", "0.5" and "vs. it" do not.
    match = re.search(r"\.(?=\s+[A-Z(`]|$)", paragraph)
    return (paragraph[: match.start()] if match else paragraph).rstrip(".")


def _source_of(module: str) -> Path | None:
    """Find the file of a module by its name alone: importing its parent packages could import torch."""
    relative = Path(*module.split("."))
    roots = [Path(fedmed.__file__).resolve().parent.parent, *(Path(p or ".") for p in sys.path)]
    candidates = (c for root in roots for c in (root / relative.with_suffix(".py"), root / relative / "__init__.py"))
    return next((c for c in candidates if c.is_file()), None)


@cache
def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def describe(import_path: str, steps: int = _MAX_REEXPORTS) -> str:
    """First sentence of the docstring behind `module:attribute`, read from the source; falls back to the module's;
    empty if there is none.
    """
    module, _, attribute = import_path.partition(":")
    path = _source_of(module)
    tree = _parsed(path) if path else None
    if path is None or tree is None:
        return ""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == attribute:
            return first_sentence(ast.get_docstring(node) or ast.get_docstring(tree))
        if isinstance(node, ast.ImportFrom) and steps > 0:
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    base = package[: len(package) - node.level + 1] if node.level else []
                    return describe(f"{'.'.join([*base, *filter(None, [node.module])])}:{alias.name}", steps - 1)
    return first_sentence(ast.get_docstring(tree))


def _experiment_description(path: Path) -> str:
    """The `description:` of an experiment file."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"(cannot be read: {type(error).__name__})"
    return first_sentence(str(tree.get("description") or "")) if isinstance(tree, dict) else ""


def experiments() -> dict[str, str]:
    """Names of all experiments with their descriptions, sorted; files that begin with "_", the data protocols in
    `data/` and the comparisons in `compare/` are no experiments.
    """
    from fedmed.config import experiment_dirs

    found: dict[str, str] = {}
    for folder in experiment_dirs():
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("")
            if name.parts[0] not in ("data", "compare") and not any(part.startswith("_") for part in name.parts):
                found.setdefault(name.as_posix(), _experiment_description(path))
    return dict(sorted(found.items()))


def entries(kind: str) -> dict[str, str]:
    """Names of one kind (a word of `KINDS`) with one-line descriptions. Raises `UserError` for another word."""
    from fedmed.config import nearest
    from fedmed.registry import KINDS as REGISTERED

    if kind == "experiments":
        return experiments()
    if kind == "comparisons":
        return comparisons()
    if kind not in REGISTRY_KINDS:
        raise UserError(f"nothing to list under {kind!r}{nearest(kind, KINDS)}")
    return {
        name: describe(path).removeprefix(f"`{name}`: ")
        for name, path in sorted(REGISTERED[REGISTRY_KINDS[kind]].items())
    }


def render(kinds: list[str], width: int | None = None) -> str:
    """Text of `fedmed list`: one block per kind, descriptions cut to `width` columns (None: not at all)."""
    blocks: list[str] = []
    for kind in kinds:
        found = entries(kind)
        column = max((len(name) for name in found), default=0)
        lines = [kind] if len(kinds) > 1 else []
        for name, text in found.items():
            room = len(text) if width is None else max(width - column - 4, 10)
            shown = text if len(text) <= room else text[: room - 3] + "..."
            lines.append(f"  {name.ljust(column)}  {shown}".rstrip())
        blocks.append("\n".join(lines if found else [*lines, "  (none)"]))
    return "\n\n".join(blocks)
