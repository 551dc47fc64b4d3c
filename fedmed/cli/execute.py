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

from fedmed.errors import FedMedError, UserError


class Interrupted(Exception):
    """The user stopped a run; the message says how to go on with it. Exit code 130."""


def resolve_config(experiment: str, overrides: Sequence[str], engine: str | None = None) -> Any:
    """Load the configuration of an experiment; `engine` is the same as the override `engine.name=...`. Raises
    `UserError`.
    """
    from fedmed.config import load_config

    words = [*overrides, *([f"engine.name={engine}"] if engine else [])]
    return load_config(experiment, words)


def resume_command(
    experiment: str, overrides: Sequence[str], engine: str | None, out: Path, coordinator: str | None = None
) -> str:
    """The command line that goes on with a run, ready for a shell."""
    words = [
        "fedmed",
        "run",
        experiment,
        *overrides,
        *(["--engine", engine] if engine else []),
        *(["--coordinator", coordinator] if coordinator else []),
        "--out",
        str(out),
        "--resume",
    ]
    return shlex.join(words)


def run_config(
    config: Any, out: str | Path, *, resume: bool, quiet: bool, how_to_resume: str, coordinator: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Run one configuration in folder `out` and give the summary and the folder.

    Raises `UserError` for a folder that may not be used, `Interrupted` on Ctrl-C with the command that goes on; an error after the first
    checkpoint bears the same command as a note.
    """
    from fedmed.files import write_text
    from fedmed.report.run_folder import prepare
    from fedmed.tracking import build_callbacks

    folder = prepare(out, resume)
    config = dataclasses.replace(config, out=str(folder.path))
    callbacks = build_callbacks(config, folder.path, quiet)
    try:
        from fedmed.engines import run

        where: dict[str, Any] = {} if coordinator is None else {"coordinator": coordinator}
        summary = run(config, resume=resume, callbacks=callbacks, **where)
    except KeyboardInterrupt as stop:
        saved = folder.checkpoint.exists()
        hint = f"go on with:\n  {how_to_resume}" if saved else "nothing was saved yet, so start the run anew"
        raise Interrupted(f"interrupted; {hint}") from stop
    except FedMedError as error:
        if not isinstance(error, UserError) and folder.checkpoint.exists():
            error.add_note(f"go on with:\n  {how_to_resume}")
        raise
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
    coordinator: str | None = None,
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
    root = _runs_folder(config, coordinator)
    if coordinator is not None:
        _note_ignored(config, overrides, note)
    path = Path(chosen) if chosen else default_out(config.name, root)
    again = resume_command(experiment, overrides, engine, path, coordinator)
    summary, folder = run_config(config, path, resume=resume, quiet=quiet, how_to_resume=again, coordinator=coordinator)
    report = write_report(folder, summary, note)
    say(tables.render(summary))
    say(f"report: {report}")


def _runs_folder(config: Any, coordinator: str | None) -> Path:
    """Where run folders go by default. Raises `UserError` when engine and `--coordinator` do not belong together, or it is no such folder."""
    if coordinator is None and config.engine.name != "deployment":
        return Path("runs")
    from fedmed.deployment.coordinator_folder import CoordinatorFolder
    from fedmed.engines.deployment import check_coordinator

    return CoordinatorFolder.open(check_coordinator(config, coordinator)).runs


def _note_ignored(config: Any, overrides: Sequence[str], note: Callable[[str], None]) -> None:
    from fedmed.engines.deployment import ignored_keys

    keys = ignored_keys(config, overrides)
    if keys:
        note(f"note: without effect here: {', '.join(keys)}; every site reads the file that its own site.yaml names")
