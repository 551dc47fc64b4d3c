"""`fedmed data`: make, check, split, corrupt and look at site files. Imports nothing heavy itself; what the commands do lies in the methods layer
and is found by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmed.errors import UserError
from fedmed.registry import CORRUPTIONS, DATA_TOOLS, IMPORTERS, PARTITIONS, import_attribute

PHANTOMS = ("segmentation", "classification", "multilabel", "multimodal")

app = typer.Typer(
    name="data",
    help="Site files: import, check, split, corrupt, look at.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _lister(kind: str) -> Any:
    """An option `--list` that prints names of one kind with their arguments, and ends."""

    def show(value: bool) -> None:
        if value:
            from fedmed.cli.parameters import listed

            typer.echo(listed(kind))
            raise typer.Exit

    return typer.Option("--list", callback=show, is_eager=True, help="Print the names and their arguments.")


File = Annotated[str, typer.Argument(metavar="FILE", help="Site file; it is only read.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Site file to be written.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Arguments.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws; the same words and seed, the same file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables, only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _tool(name: str) -> Any:
    return import_attribute(DATA_TOOLS[name])


@app.command("import", help=f"Make a site file from images. FORMAT is one of: {', '.join(IMPORTERS)}.")
def import_command(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="How the source is laid out; --list says more.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or file with the images; it is only read.")],
    out: Out,
    words: Words = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="N|HxW", help="Pixels of the stored images; default: as they are."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="A/B/C", help="Shares of train/val/test where the source names none.")
    ] = "70/10/20",
    seed: Seed = 0,
    secret: Annotated[
        str | None,
        typer.Option("--secret", metavar="FILE", help="Key that hashes names; default: one of this machine."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="Private CSV: what became of every file. Holds names.")
    ] = None,
    compression: Annotated[int, typer.Option("--compression", help="gzip level 0 to 9; 0 reads fastest.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Files read at the same time; default: one per CPU.")
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="Name of the site where the source has one only.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
    list_: Annotated[bool, _lister("importer")] = False,
) -> None:
    """Make a site file from images."""
    code = _tool("import")(
        format, source, out, words or [], size=size, split=split, seed=seed, secret=secret, trace=trace,
        compression=compression, workers=workers, site=site, force=force, say=typer.echo, note=_note, quiet=quiet,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command("check")
def check_command(
    file: File,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write tables and findings there as JSON, too.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look for faults in a site file: layout, values, duplicates, patients in several splits, names. Exit code 0, or 4 with an error."""
    raise typer.Exit(_tool("check")(file, say=typer.echo, json=json, quiet=quiet))


@app.command("info")
def info_command(file: File, debug: Debug = False) -> None:
    """Say what a site file holds, without reading its images."""
    from fedmed.report.site_info import describe

    for line in describe(Path(file).expanduser()):
        typer.echo(line)


@app.command(
    "split",
    help=f"New splits by patient (--ratio), or clients dealt by a partition (--by): {', '.join(PARTITIONS)}.",
)
def split_command(
    file: File,
    out: Out,
    words: Words = None,
    ratio: Annotated[
        str | None, typer.Option("--ratio", metavar="A/B/C", help="Shares of train/val/test, e.g. 70/10/20.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="K", help="Number of clients in all.", min=1)
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="PARTITION", help="How the images are dealt.")] = None,
    separate: Annotated[
        str | None, typer.Option("--separate", metavar="DIR", help="Also write one file per site or client there.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
    list_: Annotated[bool, _lister("partition")] = False,
) -> None:
    """New splits by patient, or clients."""
    raise typer.Exit(
        _tool("split")(
            file, out, words or [], ratio=ratio, clients=clients, by=by, seed=seed, separate=separate, force=force,
            say=typer.echo, quiet=quiet,
        )
    )  # fmt: skip


@app.command("corrupt", help=f"Corrupt annotations or images as a run would. NAME is one of: {', '.join(CORRUPTIONS)}.")
def corrupt_command(
    file: File,
    out: Out,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What is done; --list says more.")],
    words: Words = None,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
    list_: Annotated[bool, _lister("corruption")] = False,
) -> None:
    """Corrupt annotations or images."""
    raise typer.Exit(
        _tool("corrupt")(file, out, name, words or [], seed=seed, force=force, say=typer.echo, quiet=quiet)
    )


@app.command("phantom", help=f"Make a site file of synthetic images. KIND is one of: {', '.join(PHANTOMS)}.")
def phantom_command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What the images show.")],
    out: Out,
    words: Words = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a site file of synthetic images."""
    raise typer.Exit(_tool("phantom")(kind, out, words or [], force=force, say=typer.echo, quiet=quiet))


@app.command("show")
def show_command(
    file: File,
    out: Annotated[str, typer.Argument(metavar="OUT.png", help="Picture to be written.")],
    sites: Annotated[int, typer.Option("--sites", help="Sites shown, in the order of the file.", min=1)] = 4,
    per_site: Annotated[int, typer.Option("--per-site", help="Images of each, drawn at random.", min=1, max=1000)] = 8,
    tile: Annotated[int, typer.Option("--tile", help="Pixels a side of one image.", min=16, max=1024)] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice.", min=0)] = 0,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Draw some images of every site with outlines, scribbles, boxes and labels."""
    source, target = Path(file).expanduser(), Path(out).expanduser()
    if target.suffix.lower() != ".png":
        raise UserError(f"{target}: expected a name that ends in .png")
    if target.exists() and (not force or target.is_dir() or (source.exists() and target.samefile(source))):
        raise UserError(f"{target} exists already; --force replaces it unless it is the input or a folder")
    from fedmed.report.sheets import contact_sheet

    try:
        written = contact_sheet(source, target, per_site=per_site, max_sites=sites, tile=tile, seed=seed)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or type(error).__name__}") from error
    typer.echo(f"wrote {written}")
