"""`fedmed site`: set up, check and run a hospital's end of a deployment. Imports nothing heavy itself."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="site",
    help="A hospital's end of a deployment: key, check, run, and what leaves.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[
    str, typer.Argument(metavar="SITE.yaml", help="The site's settings (`fedmed site keygen` writes one).")
]


@app.command("keygen")
def keygen_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder for the key; made if it is not there.")],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What the federation calls the site.")
    ] = "my-hospital",
) -> None:
    """Make the site's key pair and a site.yaml to fill in."""
    from fedmed.deployment.site_keygen import PRIVATE, PUBLIC, SETTINGS, keygen

    folder, public = keygen(directory, name)
    typer.echo(f"made {folder / PRIVATE} (stays here, never send it), {PUBLIC} and {SETTINGS}")
    typer.echo("send to the coordinator (it is not secret):")
    typer.echo(f"  the file         {folder / PUBLIC}")
    typer.echo(f"  its fingerprint  {public.fingerprint}    (read it out by telephone)")
    typer.echo("get from the coordinator: ca.crt and its fingerprint, the address and port")
    typer.echo("next:")
    typer.echo(f"  fill in {folder / SETTINGS}")
    typer.echo(f"  fedmed site check {folder / SETTINGS}")


@app.command("check")
def check_command(file: File) -> None:
    """Check data, key, certificate, folders, device and connection, one line each. Exit code 0, or 2 with a problem."""
    from fedmed.deployment.site_config import read_site_config

    config = read_site_config(file)
    typer.echo(f"ok       site.yaml: site {config.name!r}, coordinator {config.coordinator}")
    from fedmed.deployment.site_check import check_site

    fine = True
    for point in check_site(config):
        typer.echo(str(point))
        fine = fine and point.ok
    raise typer.Exit(0 if fine else 2)


@app.command("start")
def start_command(file: File) -> None:
    """Run the site until Ctrl-C; restarts what fails, and says why."""
    from fedmed.deployment.site_start import start

    raise typer.Exit(start(file, typer.echo))


@app.command("status")
def status_command(file: File) -> None:
    """Say in one line how the site is. Exit code 0 when it runs and is connected, else 3."""
    from fedmed.deployment.site_config import read_site_config
    from fedmed.deployment.site_start import NOT_RUNNING, status

    fine, text = status(read_site_config(file))
    typer.echo(text)
    raise typer.Exit(0 if fine else NOT_RUNNING)


@app.command("leaves")
def leaves_command(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="Name (see `fedmed list`) or path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as for `fedmed run`.", show_default=False),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="SITE.yaml", help="Use the shapes of this site's data, and its limits."),
    ] = None,
    entries: Annotated[bool, typer.Option("--entries", help="List every entry of the model.")] = False,
) -> None:
    """Print which numbers and arrays leave a site in an experiment, and what stays."""
    from fedmed.config import load_config
    from fedmed.deployment.site_config import read_site_config

    run, site = load_config(experiment, overrides or []), read_site_config(config) if config else None
    from fedmed.deployment.leaves import leaves

    for line in leaves(run, site, entries=entries):
        typer.echo(line)
