"""`fedmed compare`: several methods on several settings and seeds, as one table. Imports nothing heavy itself."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedmed.errors import UserError


def _words(text: list[str] | None) -> tuple[str, ...]:
    """Words of an option that may be repeated and may hold several with commas between them."""
    return tuple(word.strip() for part in text or [] for word in part.split(",") if word.strip())


def compare_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="Name (see `fedmed list comparisons`) or path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to change in all runs, e.g. federation.rounds=12.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Site file; default: the data the comparison names.", show_default=False
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant", metavar="small|full", help="Size; default: the first of the file.", show_default=False
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", help="Number of seeds; default: as the variant says.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="Runs at a time; default: one on a GPU, else one for each CPU core.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="local|ray|deployment", help="What to run on.", show_default=False)
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="DIR",
            help="With --engine deployment: the coordinator's folder.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the results; default: runs/compare/NAME-VARIANT.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="SETTING", help="Run only this setting; repeatable.", show_default=False),
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arms", metavar="A,B", help="Run only these arms.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and what they cost, and stop.")] = False,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not measure what the runs will cost.")] = False,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Run nothing; make tables and page from the runs that are there.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
) -> None:
    """Run a comparison of methods over settings and seeds, and tabulate it. The same command goes on with what was begun.

    Exit code 3 when a run has failed: the others go on, and the tables show what there is.
    """
    from fedmed.compare.expand import Options, make_plan

    if dry_run and tables_only:
        raise UserError("--dry-run and --tables-only exclude each other")
    words = [name, *(overrides or [])]
    for option, value in (
        ("--data", data), ("--variant", variant), ("--seeds", seeds), ("--engine", engine), ("--coordinator", coordinator), ("--out", out)
    ):  # fmt: skip
        words += [option, str(value)] if value is not None else []
    options = Options(variant, tuple(overrides or ()), data, seeds, engine, coordinator, out)
    plan = make_plan(name, options, shlex.join(["fedmed", "compare", *words]))
    from fedmed.compare.command import Request, compare

    request = Request(_words(only), _words(arms), jobs, dry_run, not no_probe, tables_only, quiet)
    for option, values in (("--only", only), ("--arms", arms), ("--jobs", [str(jobs)] if jobs else None)):
        words += [word for value in values or [] for word in (option, value)]
    try:
        compare(plan, request, typer.echo, lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt as stop:
        from fedmed.cli.execute import Interrupted
        from fedmed.compare.run import GO_ON

        raise Interrupted(f"interrupted; {GO_ON}:\n  {shlex.join(['fedmed', 'compare', *words])}") from stop


def comparisons() -> dict[str, str]:
    """Names of all comparisons, each with the first sentence of its description and the data it runs on by default."""
    import yaml

    from fedmed.cli.listing import first_sentence
    from fedmed.compare.spec import comparison_files

    found: dict[str, str] = {}
    for name, path in comparison_files().items():
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            text, data = first_sentence(str(tree.get("description") or "")), tree.get("data") or "--data FILE"
            found[name] = f"{text} ({data})"
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            found[name] = f"(cannot be read: {type(error).__name__})"
    return found
