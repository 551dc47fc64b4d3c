"""`fedmed coordinator`: set up and run the coordinator's end of a deployment. Imports nothing heavy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed.errors import UserError

app = typer.Typer(
    name="coordinator",
    help="The coordinator's end of a deployment: set up, run, approve sites.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[
    str | None,
    typer.Argument(metavar="[DIR]", help="The coordinator's folder; default: --dir.", show_default=False),
]
Directory = Annotated[
    str | None,
    typer.Option("--dir", "-C", metavar="DIR", help="The coordinator's folder.  [default: .]", show_default=False),
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="What the site is called, as in its site.yaml.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host", metavar="NAME[,IP...]", help="Names and addresses by which sites reach this machine.", show_default=False
    ),
]  # fmt: skip


def _choose(argument: str | None, option: str | None) -> str:
    """The folder meant by `[DIR]` and `--dir`, which may be given in either way."""
    if argument is not None and option is not None and Path(argument).resolve() != Path(option).resolve():
        raise UserError(f"two coordinator's folders given: {argument} and --dir {option}; name one")
    return argument or option or "."


@app.command("init")
def init_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="New folder.")],
    host: Hosts = None,
    port: Annotated[int, typer.Option("--port", help="Port for sites and for this machine.")] = 8000,
) -> None:
    """Make the coordinator's folder: authority, server certificate, secret."""
    from fedmed.deployment import keys
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    folder = CoordinatorFolder.create(directory, host or [], port)
    typer.echo(f"made {folder.path}; keep it to yourself, and back it up")
    typer.echo("give every site (neither is secret):")
    typer.echo(f"  the file    {folder.ca_file}")
    typer.echo(f"              SHA-256 {keys.fingerprint(folder.authority())}")
    typer.echo(f"  the address {' or '.join(folder.public_addresses)}")
    typer.echo("next:")
    typer.echo(f"  fedmed coordinator start {folder.path}")
    typer.echo(f"  fedmed coordinator approve SITE.pub --name NAME --dir {folder.path}    (for each site's public key)")


@app.command("renew")
def renew_command(
    folder: Folder = None,
    directory: Directory = None,
    host: Hosts = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Another port; default: as before.", show_default=False)
    ] = None,
) -> None:
    """Make a new server certificate with the same authority; sites keep their ca.crt."""
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    opened = CoordinatorFolder.open(_choose(folder, directory), expired_ok=True).renew(host or None, port)
    end = opened.certificate().not_valid_after_utc
    typer.echo(f"new certificate for {', '.join(opened.hosts)} until {end:%Y-%m-%d}; restart the coordinator to use it")


@app.command("start")
def start_command(
    folder: Folder = None,
    directory: Directory = None,
    bind: Annotated[
        str, typer.Option("--bind", metavar="ADDRESS", help="0.0.0.0: all addresses; 127.0.0.1: this machine only.")
    ] = "0.0.0.0",
) -> None:
    """Run the coordinator until Ctrl-C; restarts what fails."""
    from fedmed.deployment.coordinator import start

    raise typer.Exit(start(_choose(folder, directory), bind, say=typer.echo))


@app.command("approve")
def approve_command(
    public_key: Annotated[Path, typer.Argument(metavar="SITE.pub", help="Public key that the site has sent.")],
    name: Name,
    directory: Directory = None,
) -> None:
    """Let a site join: register its public key under a name."""
    from fedmed.deployment.coordinator import approve
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    site = approve(CoordinatorFolder.open(_choose(None, directory)), public_key, name)
    typer.echo(f"approved {name}: {site.fingerprint}")
    typer.echo("compare this fingerprint with the one the site reads to you: whoever holds the key is the site")


@app.command("revoke")
def revoke_command(name: Name, directory: Directory = None) -> None:
    """Take a site's right to join away; its key cannot be approved again."""
    from fedmed.deployment.coordinator import revoke
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    site = revoke(CoordinatorFolder.open(_choose(None, directory)), name)
    typer.echo(f"revoked {name}: {site.fingerprint}; to come back it needs a new key pair")


@app.command("status")
def status_command(
    folder: Folder = None,
    directory: Directory = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Exit code only: 0 up, 3 down.")] = False,
) -> None:
    """Show the coordinator, its sites and the newest run. Exit code 0 when it answers, 3 when not."""
    from fedmed.deployment.coordinator import problem
    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    opened = CoordinatorFolder.open(_choose(folder, directory), expired_ok=True)
    if quiet:
        raise typer.Exit(0 if problem(opened) is None else 3)
    from fedmed.deployment.coordinator_status import status

    found = status(opened)
    for line in found.lines():
        typer.echo(line)
    raise typer.Exit(0 if found.problem is None else 3)
