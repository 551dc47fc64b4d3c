"""Arguments of registered classes as text: name, default, and what the source says behind each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any

from fedmed.cli.listing import describe
from fedmed.registry import KINDS, resolve

_WIDTH = 110


def listed(kind: str) -> str:
    """Every registered name of a kind (a word of the registry, such as "corruption"), with one line about it and its arguments."""
    blocks = []
    for name, path in KINDS[kind].items():
        cls = resolve(kind, name)
        lines = [f"{name}  {describe(path).removeprefix(f'`{name}`: ')}".rstrip()]
        rows = arguments(getattr(cls, "Params", cls))
        width = max((len(argument) + len(default) for argument, default, _ in rows), default=0) + 1
        for argument, default, meaning in rows:
            head = f"  {argument}={default}".ljust(width + 4)
            lines += (
                textwrap.wrap(f"{head}{meaning}", _WIDTH, subsequent_indent=" " * len(head))
                if meaning
                else [head.rstrip()]
            )
        blocks.append("\n".join(lines if rows else [*lines, "  (no arguments)"]))
    return "\n\n".join(blocks)


def arguments(cls: type[Any]) -> list[tuple[str, str, str]]:
    """(name, default, comment behind the line) of each field of a dataclass; an inherited field has the comment of its own class."""
    said: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            said |= _comments(owner)
    return [(field.name, _default(field), said.get(field.name, "")) for field in dataclasses.fields(cls) if field.init]


def _comments(cls: type[Any]) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # no source at hand
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    nodes = body.body if isinstance(body, ast.ClassDef) else []
    return {
        node.target.id: by_line.get(node.end_lineno or 0, "")
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "(needed)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
