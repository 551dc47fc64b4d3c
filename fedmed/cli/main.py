"""The command `fedmed`. This module imports nothing heavy, so that `fedmed --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

from fedmed import __version__
from fedmed.cli import compare, coordinator, data, predict, report, site
from fedmed.errors import FedMedError, UserError

app = typer.Typer(
    name="fedmed",
    help="Federated learning for medical imaging on imperfect data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(coordinator.app)
app.add_typer(data.app)
app.add_typer(site.app)
app.command("compare")(compare.compare_command)
app.command("predict")(predict.predict_command)
app.command("report")(report.report_command)

Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="Folder for the results; must be empty or new.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error and detailed logs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. federation.rounds=12.", show_default=False),
]


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _start(debug: bool, quiet: bool) -> None:
    """Set the level of our own log; the logs of others keep theirs."""
    import logging

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedmed").setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fedmed {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("run")
def run_command(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="Name (see `fedmed list`) or path of a YAML file.")
    ],
    overrides: Overrides = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="local|ray|deployment",
            help="What to run on; same as engine.name=...",
            show_default=False,
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="DIR",
            help="With --engine deployment: the coordinator's folder. Its runs/ takes the results.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Run one experiment; results go to runs/<name>-<time> or --out."""
    from fedmed.cli.execute import run_experiment

    _start(debug, quiet)
    run_experiment(
        experiment, overrides or [], engine=engine, coordinator=coordinator, out=out, resume=resume, quiet=quiet,
        say=typer.echo, note=_note,
    )  # fmt: skip


@app.command("list")
def list_command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="experiments, comparisons, strategies, clients, addons, models, losses, partitions, corruptions, importers; default: all.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the names a configuration may use, one line each."""
    import shutil

    from fedmed.cli import listing

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(listing.render([kind] if kind else list(listing.KINDS), width))


@app.command("demo")
def demo_command(
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", metavar="EXPERIMENT", help="Arm to run, repeatable; the first is the baseline.", show_default=False
        ),
    ] = None,
    out: Out = None,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Compare plain averaging with a quality-aware method on synthetic sites with sloppy contours (minutes, CPU)."""
    from fedmed.cli.demo import run_demo

    _start(debug, quiet)
    run_demo(arm or [], overrides or [], out=out, quiet=quiet, say=typer.echo, note=_note)


def _fail(error: BaseException, debug: bool) -> int:
    """Print what went wrong and give the exit code."""
    from fedmed.cli.execute import Interrupted

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if debug and not isinstance(error, (KeyboardInterrupt, Interrupted)):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, Interrupted):
        _note(str(error))
        return 130
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        _note("interrupted")
        return 130
    if isinstance(error, FedMedError):
        _note("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        return 2 if isinstance(error, UserError) else 3
    text = " ".join(str(error).split())
    hint = "" if debug else "; run again with --debug for the traceback"
    _note(f"internal error: {type(error).__name__}{': ' if text else ''}{text}{hint}")
    return 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit code.

    0 done, 1 internal error, 2 wrong input, 3 the run could not go on, 130 interrupted. Errors go to stderr.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = app(args=words, prog_name="fedmed", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C, without a word
            _note("interrupted")
        return code if isinstance(code, int) else 0
    except Exception as error:
        return _fail(error, "--debug" in words)
    except KeyboardInterrupt as error:
        return _fail(error, "--debug" in words)


if __name__ == "__main__":
    sys.exit(main())
