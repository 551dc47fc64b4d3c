"""The coordinator's folder: what lies where, who may read it, and the list of approved sites.

    coordinator.json   names, addresses and port that sites use
    ca.crt             certificate of the authority: what sites are given
    ca/ca.key          key of the authority; needed for `renew` only, and may be kept elsewhere until then
    tls/               server.crt, server.key
    secret/superexec   what a process must know to take the server's share of a run
    sites.json         approved sites: name, Flower's node id, fingerprint and text of the public key, date
    state/             Flower's database: registered sites, runs, and models on their way, in clear
    flower/            Flower's own settings
    logs/, runs/       output of the SuperLink; run folders

Everything is readable by its owner only (folders 0700, files 0600); `ca.crt` alone may be read by all. Moving the whole folder is safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmed.engines.flower_internals import CONNECTION
from fedmed.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from fedmed.deployment.keys import Pair

SETTINGS = "coordinator.json"
SITES = "sites.json"
DEFAULT_PORT = 8000
SERVER_DAYS = 825  # of the server certificate: the longest that some TLS libraries accept
_FOLDERS = ("ca", "tls", "secret", "state", "flower", "logs", "runs")
_SECRETS = ("ca/ca.key", "tls/server.key", "secret/superexec", SITES, "state/superlink.db", SETTINGS)
# uvicorn's list of proxies that may say whom they speak for: it would let any caller pass for this machine.
_LEFT_OUT = ("RAY_TMPDIR", "FORWARDED_ALLOW_IPS", "SSLKEYLOGFILE")
_THIS_MACHINE = "127.0.0.1,localhost"


@dataclass(frozen=True)
class ApprovedSite:
    """A site that may join: Flower's node id, fingerprint and text (OpenSSH line) of its public key, date of approval."""

    node_id: int
    fingerprint: str
    since: str
    key: str


class CoordinatorFolder:
    """Paths and settings of one coordinator. Made by `create`, read by `open`."""

    def __init__(self, path: Path, hosts: tuple[str, ...], port: int) -> None:
        self.path, self.hosts, self.port = path, hosts, port

    @classmethod
    def create(
        cls, path: str | Path, hosts: Sequence[str], port: int = DEFAULT_PORT, *, days: float = SERVER_DAYS
    ) -> CoordinatorFolder:
        """Make the folder with a new authority and a server certificate of `days` for `hosts` (names, addresses).

        Raises `UserError` for a folder that holds anything, for no or a wrong host, and for a port out of range.
        """
        from fedmed.deployment import keys

        folder = cls(Path(path).expanduser().resolve(), _check_hosts(hosts), _check_port(port))
        folder._make_folders()
        authority = keys.new_authority(folder.hosts[0])
        keys.write_secret(folder.authority_key, authority.private)
        keys.write_secret(folder.ca_file, authority.public).chmod(0o644)
        keys.write_secret(folder.secret_file, secrets.token_hex(32).encode())
        folder._write_sites({})
        folder._write_server(authority, days)
        folder._write_settings()
        folder._write_connection()
        return folder

    @classmethod
    def open(cls, path: str | Path, *, expired_ok: bool = False) -> CoordinatorFolder:
        """Read and check the folder: files, permissions, certificates.

        Raises `UserError` that says what to do, for an expired certificate too unless `expired_ok`.
        """
        place = Path(path).expanduser().resolve()
        try:
            found = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
            folder = cls(place, _check_hosts(found["hosts"]), _check_port(found["port"]))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{place} is no coordinator's folder (it has no {SETTINGS}): name the right one, "
                "or make one with `fedmed coordinator init DIR --host NAME`"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {place / SETTINGS}: {error.strerror}; run as its owner") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{place / SETTINGS} is damaged ({type(error).__name__}: {error}); restore it from a backup, "
                'it should read like {"hosts": ["fl.example.org"], "port": 8000}'
            ) from error
        folder._check(expired_ok)
        folder._write_connection()
        return folder

    # ------------------------------------------------------------------ what lies where

    @property
    def address(self) -> str:
        """Where this machine reaches the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def public_addresses(self) -> tuple[str, ...]:
        """Where sites reach it: every host of the certificate, with the port."""
        return tuple(f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in self.hosts)

    @property
    def ca_file(self) -> Path:
        """Certificate of the authority, for the sites."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Key of the authority."""
        return self.path / "ca" / "ca.key"

    @property
    def server_certificate(self) -> Path:
        """The server certificate."""
        return self.path / "tls" / "server.crt"

    @property
    def server_key(self) -> Path:
        """Its key."""
        return self.path / "tls" / "server.key"

    @property
    def secret_file(self) -> Path:
        """What the SuperLink and the process that runs the server app both know, as raw bytes."""
        return self.path / "secret" / "superexec"

    @property
    def database(self) -> Path:
        """Flower's database."""
        return self.path / "state" / "superlink.db"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME: settings of Flower's commands, with the connection `flower_internals.CONNECTION`."""
        return self.path / "flower"

    @property
    def log_file(self) -> Path:
        """Output of the SuperLink."""
        return self.path / "logs" / "superlink.log"

    @property
    def runs(self) -> Path:
        """Default place of run folders."""
        return self.path / "runs"

    @property
    def sites_file(self) -> Path:
        """The approved sites."""
        return self.path / SITES

    @property
    def lock_file(self) -> Path:
        """Held by the running coordinator; holds its process id."""
        return self.path / "state" / "lock"

    def environment(self) -> dict[str, str]:
        """The environment of Flower's programs and commands: its home here, its telemetry off, no proxy to this machine."""
        from fedmed.engines.ray import environment

        env = {k: v for k, v in environment(self.flower_home, threads=1).items() if k not in _LEFT_OUT}
        for name in ("NO_PROXY", "no_proxy"):
            env[name] = f"{env[name]},{_THIS_MACHINE}" if env.get(name) else _THIS_MACHINE
        return env

    # ------------------------------------------------------------------ certificates

    def certificate(self) -> Certificate:
        """The server certificate, read anew."""
        from fedmed.deployment import keys

        return keys.read_certificate(self.server_certificate, "server certificate")

    def authority(self) -> Certificate:
        """The certificate of the authority."""
        from fedmed.deployment import keys

        return keys.read_certificate(self.ca_file, "certificate of the authority")

    def renew(
        self, hosts: Sequence[str] | None = None, port: int | None = None, *, days: float = SERVER_DAYS
    ) -> CoordinatorFolder:
        """Make a new server certificate with the same authority, for the same or other hosts; give the new folder object.

        Sites keep their `ca.crt`. Raises `UserError` when the key of the authority is not there.
        """
        from fedmed.deployment import keys

        new = CoordinatorFolder(
            self.path,
            self.hosts if hosts is None else _check_hosts(hosts),
            self.port if port is None else _check_port(port),
        )
        try:
            authority = keys.Pair(self.authority_key.read_bytes(), self.ca_file.read_bytes())
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename}: {error.strerror}; a new certificate needs the key of the authority: "
                "put it back, or set up a new coordinator and give its ca.crt to all sites"
            ) from error
        new._write_server(authority, days)
        new._write_settings()
        new._write_connection()
        return new

    # ------------------------------------------------------------------ approved sites

    def sites(self) -> dict[str, ApprovedSite]:
        """The approved sites by name. Raises `UserError` when the list is damaged."""
        return read_sites(self.path)

    @contextlib.contextmanager
    def changed_sites(self) -> Iterator[dict[str, ApprovedSite]]:
        """The approved sites, to be changed by one process at a time; written when the block ends without an error."""
        with (self.path / "state" / "sites.lock").open("a") as lock:
            os.fchmod(lock.fileno(), 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            sites = self.sites()
            yield sites
            self._write_sites(sites)

    # ------------------------------------------------------------------ writing and checking

    def _make_folders(self) -> None:
        path = self.path
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                kind = "a coordinator's folder already" if (path / SETTINGS).exists() else "not an empty folder"
                raise UserError(f"{path} is {kind}; choose a new one (`fedmed coordinator renew` makes a certificate)")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            for name in _FOLDERS:
                (path / name).mkdir(mode=0o700)
        except OSError as error:
            raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another place") from error

    def _check(self, expired_ok: bool) -> None:
        from fedmed.deployment import keys

        for needed in (self.ca_file, self.server_certificate, self.server_key, self.secret_file):
            if not needed.is_file():
                raise UserError(f"{needed} is missing: restore the folder from a backup, or make a new one")
        for name in ("", *_FOLDERS, *_SECRETS):
            if (self.path / name).exists() and (self.path / name).stat().st_mode & keys.GROUP_AND_OTHERS:
                raise UserError(f"{self.path / name} may be read or changed by others: chmod -R go= {self.path}")
        renew = f"make a new certificate with `fedmed coordinator renew {self.path}`"
        certificate = keys.read_server_pair(self.server_key, self.server_certificate)
        if not keys.is_signed_by(certificate, self.authority()):
            raise UserError(f"{self.server_certificate} was not signed by {self.ca_file}; {renew}")
        if keys.days_left(certificate) <= 0 and not expired_ok:
            raise UserError(f"the server certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}; {renew}")

    def _write_server(self, authority: Pair, days: float) -> None:
        from fedmed.deployment import keys

        server = keys.new_server_certificate(authority, self.hosts, days)
        keys.write_secret(self.server_key, server.private)
        keys.write_secret(self.server_certificate, server.public)

    def _write_settings(self) -> None:
        from fedmed.deployment import keys

        keys.write_secret(self.path / SETTINGS, _json({"hosts": list(self.hosts), "port": self.port}))

    def _write_sites(self, sites: dict[str, ApprovedSite]) -> None:
        from fedmed.deployment import keys

        values = {name: dataclasses.asdict(site) for name, site in sorted(sites.items())}
        keys.write_secret(self.sites_file, _json(values))

    def _write_connection(self) -> None:
        """Tell Flower's commands where the SuperLink is; written anew whenever the folder has been moved."""
        from fedmed.deployment import keys
        from fedmed.engines.bundle import toml_value

        lines = (
            "[superlink]",
            f"default = {toml_value(CONNECTION)}",
            f"[superlink.{CONNECTION}]",
            f"address = {toml_value(self.address)}",
            f"root-certificates = {toml_value(str(self.ca_file))}",
        )
        content, path = "".join(f"{line}\n" for line in lines).encode(), self.flower_home / "config.toml"
        if not path.is_file() or path.read_bytes() != content:
            keys.write_secret(path, content)


def read_sites(folder: Path) -> dict[str, ApprovedSite]:
    """Read the approved sites of a coordinator's folder, in the order of their names. Raises `UserError` when the list is damaged."""
    path = folder / SITES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): ApprovedSite(**values) for name, values in sorted(found.items())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path} ({error}); restore it from a backup") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    from fedmed.deployment import keys

    words = [hosts] if isinstance(hosts, str) else list(hosts)
    names = [keys.check_host(word) for text in words for word in str(text).split(",") if word.strip()]
    if not names:
        raise UserError("--host: expected at least one name or address by which sites reach this machine, got none")
    return tuple(dict.fromkeys(names))


def _check_port(port: object) -> int:
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise UserError(f"--port: expected a number from 1 to 65535, got {port!r}")
    return port
