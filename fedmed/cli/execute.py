"""From words on the command line to a finished run: configuration, folder, engine, report. Used by `fedmed run` and
`fedmed demo`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError


class Interrupted(Exception):
    """The user stopped a run; the message says how to go on with it. Exit code 130."""


def resolve_config(experiment: str, overrides: Sequence[str], engine: str | None = None) -> Any:
    """Load the configuration of an experiment; `engine` is the same as the override `engine.name=...`. Raises
    `UserError`.
    """
    from fedmed.config import load_config

    words = [*overrides, *([f"engine.name={engine}"] if engine else [])]
    return load_config(experiment, words)


def resume_command(experiment: str, overrides: Sequence[str], engine: str | None, out: Path) -> str:
    """The command line that goes on with a run, ready for a shell."""
    words = [
        "fedmed",
        "run",
        experiment,
        *overrides,
        *(["--engine", engine] if engine else []),
        "--out",
        str(out),
        "--resume",
    ]
    return shlex.join(words)


def run_config(
    config: Any, out: str | Path, *, resume: bool, quiet: bool, how_to_resume: str
) -> tuple[dict[str, Any], Path]:
    """Run one configuration in folder `out` and give the summary and the folder.

    Raises `UserError` for a folder that may not be used, `Interrupted` on Ctrl-C with the command that goes on.
    """
    from fedmed.files import write_text
    from fedmed.report.run_folder import prepare
    from fedmed.tracking import build_callbacks

    folder = prepare(out, resume)
    config = dataclasses.replace(config, out=str(folder.path))
    callbacks = build_callbacks(config, folder.path, quiet)
    try:
        from fedmed.engines import run

        summary = run(config, resume=resume, callbacks=callbacks)
    except KeyboardInterrupt as stop:
        saved = folder.checkpoint.exists()
        hint = f"go on with:\n  {how_to_resume}" if saved else "nothing was saved yet, so start the run anew"
        raise Interrupted(f"interrupted; {hint}") from stop
    finally:
        for callback in callbacks:
            callback.close()
        with contextlib.suppress(
            OSError
        ):  # a run that never began leaves no empty folder; one that holds anything stays
            folder.path.rmdir()
    if not folder.config.exists():
        from fedmed.config import to_yaml

        write_text(folder.config, to_yaml(config))
    return summary, folder.path


def run_experiment(
    experiment: str,
    overrides: Sequence[str],
    *,
    engine: str | None,
    out: str | None,
    resume: bool,
    quiet: bool,
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Do what `fedmed run` does: run, print the table, write the report.

    `say` takes the result (stdout), `note` remarks (stderr). Raises `UserError`.
    """
    from fedmed.report import tables
    from fedmed.report.run_folder import default_out
    from fedmed.report.write import write_report

    config = resolve_config(experiment, overrides, engine)
    chosen = out or config.out
    if resume and not chosen:
        raise UserError("--resume needs --out DIR: the folder of the run to go on with (see runs/)")
    path = Path(chosen) if chosen else default_out(config.name)
    again = resume_command(experiment, overrides, engine, path)
    summary, folder = run_config(config, path, resume=resume, quiet=quiet, how_to_resume=again)
    report = write_report(folder, summary, note)
    say(tables.render(summary))
    say(f"report: {report}")
