"""`fedmed predict`: masks or labels by a trained model, for images, volumes and site files. Imports nothing heavy itself."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from fedmed.errors import UserError

_SIZES = 1, 65_500  # pixels along an edge


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from "128" or "128x160". Raises UserError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(_SIZES[0] <= side <= _SIZES[1] for side in size):
        raise UserError(f"--size: expected HEIGHT or HEIGHTxWIDTH in pixels, got {text!r}")
    return size


def parse_window(text: str | None) -> tuple[float, float] | None:
    """(centre, width) from "40,400". Raises UserError."""
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        centre, width = 0.0, 0.0
    if not (abs(centre) < 1e9 and 1 <= width < 1e9):
        raise UserError(f"--window: expected centre,width with a width of at least 1, such as 40,400, got {text!r}")
    return centre, width


def _progress(done: int, count: int) -> None:
    """Count sources in one line of a terminal."""
    if sys.stderr.isatty():
        typer.echo(f"\r{done}/{count}" + ("\n" if done == count else ""), err=True, nl=False)


def predict_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Pictures, NIfTI volumes, DICOM series, site files, or folders of them."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the outputs; default: predictions/RUN.", show_default=False
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            "--site",
            metavar="NAME",
            help="Use this site's own model, and only its rows of a site file.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            "--state", metavar="DIR", help="State folder of the run at the site, with --site.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="train|val|test|all", help="Which images of a site file.")
    ] = "test",
    which: Annotated[
        str, typer.Option("--which", metavar="last|selected", help="Model of the last round, or of the chosen one.")
    ] = "last",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probabilities beside masks.")] = False,
    with_patient: Annotated[
        bool, typer.Option("--with-patient", help="Copy name, birth date and the like into DICOM masks.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Images at a time.", min=1)] = 16,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="N|HxW", help="Bring images to this size; default: as the import did.", show_default=False
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="stretch|pad|crop", help="In this way; default: as the import did.", show_default=False
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="C,W",
            help="Intensities of volumes: centre and width; default: as the import did.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables, only the result.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Apply a trained run to images: masks in their own format and geometry, or a table of labels. Not a medical device."""
    wanted, limits = parse_size(size), parse_window(window)
    from fedmed.predict.command import Request, predict

    request = Request(
        run,
        tuple(inputs),
        out,
        site,
        state,
        split,
        which,
        probabilities,
        with_patient,
        batch_size,
        wanted,
        fit,
        limits,
        force,
    )
    note = lambda text: typer.echo(text, err=True)  # noqa: E731
    predict(request, typer.echo, note, (lambda done, count: None) if quiet else _progress, quiet)
