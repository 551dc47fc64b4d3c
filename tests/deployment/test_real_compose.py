"""The command lines of docker-compose.yml as plain processes: from empty folders to a finished run.

Containers' paths are replaced by the folders that would be mounted there; everything else is what a container would run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import ROOT, Loopback, Process

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

SITES = {"site-a": "alpha", "site-b": "beta", "site-c": "gamma"}
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def services(**settings: str) -> dict[str, dict[str, Any]]:
    """The services of the file, variables filled in as Compose does."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    filled = _VARIABLE.sub(lambda match: settings.get(match[1], match[2] or ""), text)
    return dict(yaml.safe_load(filled)["services"])


def command(service: dict[str, Any], *more: str) -> list[str]:
    """What a container of a service runs after the word `fedmed`; `more` stands in the place of its command."""
    words = [*service.get("entrypoint", ["fedmed"]), *(more or service.get("command", []))]
    assert words[0] == "fedmed"
    return on_host(service, words[1:])


def on_host(service: dict[str, Any], words: list[str]) -> list[str]:
    """Words with the paths of a container replaced by the folders mounted there, the longest first."""
    mounts = sorted(((m["target"], m["source"]) for m in service["volumes"]), key=lambda pair: -len(pair[0]))
    out = []
    for word in words:
        target, source = next(((t, s) for t, s in mounts if word == t or word.startswith(f"{t}/")), ("", ""))
        out.append(source + word[len(target) :] if target else word)
    return out


def healthy(federation: Loopback, service: dict[str, Any], code: int = 0) -> str:
    """Run the health check of a service."""
    test = service["healthcheck"]["test"]
    assert test[:2] == ["CMD", "fedmed"]
    return federation.do(*on_host(service, test[2:]), code=code)


def test_from_empty_folders_to_a_finished_run(federation: Loopback) -> None:
    folders = {name: federation.root / name for name in ("coordinator", *SITES)}
    settings = {
        "FEDMED_PORT": str(federation.port),
        "COORDINATOR_HOSTS": "localhost",
        "COORDINATOR_DIR": str(folders["coordinator"]),
    }
    for service, name in SITES.items():
        letter = service[-1].upper()
        settings |= {f"SITE_{letter}_DIR": str(folders[service]), f"SITE_{letter}_NAME": name}
        settings[f"SITE_{letter}_DATA"] = str(federation.files[name].parent)
    made = services(**settings)

    federation.do(*command(made["coordinator-setup"]))
    healthy(federation, made["coordinator"], code=3)
    coordinator = federation.begin("coordinator", *command(made["coordinator"]))
    coordinator.until(r"\bup;")
    healthy(federation, made["coordinator"])

    started: dict[str, Process] = {}
    for service, name in SITES.items():
        federation.do(*command(made[f"{service}-setup"]))
        public = folders[service] / "site.pub"
        federation.do("coordinator", "approve", str(public), "--name", name, "--dir", str(folders["coordinator"]))
        fill_in(folders[service], federation, name)
        healthy(federation, made[service], code=3)
        started[service] = federation.begin(service, *command(made[service]))
    for service, process in started.items():
        process.until("connected to the coordinator")
        assert "connected" in healthy(federation, made[service])

    words = ("fedavg", "data.path=''", "training.epochs=1", "federation.rounds=2", "federation.min_sites=3")
    out = folders["coordinator"] / "runs" / "first"
    federation.do(*command(made["run"], *words, "--out", str(out)), timeout_s=400)
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
    for process in (*started.values(), coordinator):
        assert process.stop() == 0


def fill_in(folder: Path, federation: Loopback, name: str) -> None:
    """What a hospital does by hand: the coordinator's ca.crt, its address, and where the data are."""
    (folder / "ca.crt").write_bytes((federation.root / "coordinator" / "ca.crt").read_bytes())
    path = folder / "site.yaml"
    text = re.sub(r"(?m)^coordinator: \S+", f"coordinator: localhost:{federation.port}", path.read_text())
    path.write_text(re.sub(r"(?m)^data: \S+", f"data: {federation.files[name]}", text))
