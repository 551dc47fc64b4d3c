"""How a coordinator stands: the SuperLink, the certificate, the sites, the newest run. Holds no secrets."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.deployment import keys
from fedmed.deployment.coordinator import RENEW_DAYS, nodes, problem, running_pid
from fedmed.deployment.coordinator_folder import CoordinatorFolder
from fedmed.errors import FedMedError, UserError
from fedmed.files import Record, read_history
from fedmed.report.run_folder import RunFolder


@dataclass(frozen=True)
class SiteStatus:
    """An approved site: name, state in words, key fingerprint."""

    name: str
    state: str
    fingerprint: str


@dataclass(frozen=True)
class RunStatus:
    """The newest run folder: name, how far it is, seconds since its last record, last error in words (None: none)."""

    name: str
    progress: str
    age_s: float
    error: str | None


@dataclass(frozen=True)
class Status:
    """A coordinator at one moment. problem: why the SuperLink gives no answer, None when it does."""

    folder: CoordinatorFolder
    problem: str | None
    pid: str | None
    days_left: float
    authority: str
    sites: tuple[SiteStatus, ...]
    run: RunStatus | None

    def lines(self) -> list[str]:
        """The status for people."""
        state = "up" if self.problem is None else f"down: {self.problem}"
        process = f"process {self.pid}" if self.pid else "no process holds this folder"
        online = sum(site.state.startswith("online") for site in self.sites)
        rows = [
            ("coordinator", f"{state} ({process})"),
            ("sites use", " or ".join(self.folder.public_addresses)),
            ("certificate", _certificate(self.days_left)),
            ("ca.crt", f"SHA-256 {self.authority}"),
            ("sites", f"{len(self.sites)} approved, {online} online"),
            *((f"  {site.name}", f"{site.state}  {site.fingerprint}") for site in self.sites),
        ]
        if self.run is None:
            rows.append(("run", f"none in {self.folder.runs}"))
        else:
            rows.append(("run", f"{self.run.name}: {self.run.progress}, {_duration(self.run.age_s)} ago"))
            rows.append(("last error", self.run.error or "none"))
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]


def status(folder: CoordinatorFolder) -> Status:
    """Look at the SuperLink, its sites and the newest run. The folder may hold an expired certificate."""
    reason, known = problem(folder), None
    if reason is None:
        try:
            known = nodes(folder)
        except FedMedError as error:
            reason = str(error)
    sites = tuple(
        SiteStatus(name, _site_state(site.node_id, known), site.fingerprint) for name, site in folder.sites().items()
    )
    left = min(keys.days_left(folder.certificate()), keys.days_left(folder.authority()))
    return Status(
        folder, reason, running_pid(folder), left, keys.fingerprint(folder.authority()), sites, newest_run(folder.runs)
    )


def _site_state(node_id: int, known: dict[int, dict[str, Any]] | None) -> str:
    if known is None:
        return "unknown"
    node = known.get(node_id)
    if node is None:
        return "lost by Flower: approve its public key again"
    if node.get("status") == "online":
        return f"online since {_moment(node.get('online-at'))}"
    if node.get("status") == "registered":
        return "never seen"
    return f"offline, last seen {_moment(node.get('offline-at'))}"


def newest_run(runs: Path) -> RunStatus | None:
    """The run folder that was written to last; None when there is none."""
    folders = [(_age_s(RunFolder(path)), path) for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    found = [(age, RunFolder(path)) for age, path in folders if age is not None]
    if not found:
        return None
    age_s, folder = min(found, key=lambda pair: (pair[0], pair[1].path))
    records: list[Record] = []
    with contextlib.suppress(UserError):
        records = read_history(folder.history)
    failed = next((record for record in reversed(records) if record.get("status") == "failed"), None)
    error = None
    if failed is not None:
        error = f"round {failed.get('round')}, {failed.get('phase')}, {failed.get('site') or 'server'}: {failed.get('reason')}"
    return RunStatus(folder.path.name, _progress(folder, records), age_s, error)


def _age_s(folder: RunFolder) -> float | None:
    times = [path.stat().st_mtime for path in (folder.history, folder.config, folder.summary) if path.is_file()]
    return max(0.0, time.time() - max(times)) if times else None


def _progress(folder: RunFolder, records: list[Record]) -> str:
    rounds = _rounds(folder.config)
    total = "" if rounds is None else f" of {rounds}"
    if not records:
        return "waiting for its first round"
    where = f"round {records[-1].get('round')}{total}, {records[-1].get('phase')}"
    done = folder.summary.is_file() and folder.summary.stat().st_mtime >= folder.history.stat().st_mtime
    return f"finished ({where})" if done else where


def _rounds(path: Path) -> int | None:
    """Number of rounds of a run, from its config.yaml; None when it cannot be told."""
    from omegaconf import OmegaConf

    try:
        return int(OmegaConf.select(OmegaConf.load(path), "federation.rounds"))
    except Exception:  # the YAML parser has many error types; all of them mean that the file does not say
        return None


def _certificate(days: float) -> str:
    if days <= 0:
        return f"EXPIRED {-days:.0f} days ago: fedmed coordinator renew, then restart"
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    soon = "; renew it: fedmed coordinator renew, then restart" if days < RENEW_DAYS else ""
    return f"{days:.0f} days left, until {end:%Y-%m-%d}{soon}"


def _moment(text: object) -> str:
    """Flower's date in minutes (UTC)."""
    return str(text or "unknown").replace("T", " ")[:16] + " UTC"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
