"""`fedmed report`: one HTML file about a run, a demo or a comparison. Imports nothing heavy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder of a run, of `fedmed demo`, or of `fedmed compare`.")
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out", metavar="FILE.html", help="Where to write it; default: report.html in DIR.", show_default=False
    ),
]
NoImages = Annotated[
    bool, typer.Option("--no-images", help="Aggregates only: no example cases, so no images of patients.")
]


def report_command(folder: Folder, out: Out = None, no_images: NoImages = False) -> None:
    """Write one self-contained HTML page about a run or a comparison: no network, no other files."""
    from fedmed.report.page import write_page

    path = write_page(
        Path(folder), None if out is None else Path(out), not no_images, lambda line: typer.echo(line, err=True)
    )
    size = path.stat().st_size
    typer.echo(f"report: {path} ({size / 1e6:.1f} MB)")
