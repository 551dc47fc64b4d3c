"""Reads command lines with the real parsers of `fedmed`, and executes nothing. Loaded by path: test folders are no packages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import click
import typer

from fedmed.cli.main import app


class Parsed(NamedTuple):
    """A command line as its parser sees it: subcommand, as in `site start`, and the values of its arguments and options."""

    command: str
    values: dict[str, Any]


def parse(words: Sequence[str]) -> Parsed:
    """Parse a command line, program name included. Raises `click.UsageError` for what the program would refuse."""
    program, *rest = words
    if program != "fedmed":
        raise click.UsageError(f"expected the command fedmed, got {program!r}")
    command: click.Command = typer.main.get_command(app)
    context, path = command.make_context(program, rest), []
    while isinstance(command, click.Group):
        left = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, left)
        assert name is not None and found is not None
        command, context = found, found.make_context(name, list(rest), parent=context)
        path.append(name)
    return Parsed(" ".join(path), context.params)


def in_shell(block: str, program: str = "fedmed") -> list[list[str]]:
    """Words of every command line of a program in a shell block: continued lines joined, comments and variables before it left out."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[: len(program.split())] == program.split():
            found.append(words)
    return found
