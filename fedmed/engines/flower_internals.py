"""What FedMed knows about Flower beyond its public Python API (flwr 1.41): with `flower_tasks.py`, all there is to look at
when Flower changes.

Two parts: how the command-line programs are driven and quietened, and (below) the private names the in-process grid
needs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Nothing phones home, nothing is installed at run time (the default since flwr 1.41 is to install the app's
# dependencies anew for each run).
QUIET_SWITCHES: dict[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Seconds between two looks of the SuperExec at its task list: Flower's own default of 1 s delays every start by half
# that on average.
POLL_SWITCH: dict[str, str] = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}

CONNECTION = "fedmed"  # name of the SuperLink connection in the private config.toml


class RunState(NamedTuple):
    """Where a run stands: pending, starting, running, finished:completed, finished:failed or finished:stopped."""

    status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.status.startswith("finished")


def quiet_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment with the quiet switches set and without any other `FLWR_*` entry.

    The caller's own entries would leak another home, port or database into the run.
    """
    return {k: v for k, v in base.items() if not k.startswith("FLWR_")} | QUIET_SWITCHES


def free_port() -> int:
    """Give a TCP port on 127.0.0.1 that was free a moment ago; its user must be ready to ask again."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connection_toml(port: int) -> str:
    """Give `$FLWR_HOME/config.toml` as text: one explicit address, so that `flwr run` starts no SuperLink itself."""
    head = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    return f'{head}address = "127.0.0.1:{port}"\ninsecure = true\n'


def superlink_command(port: int) -> list[str]:
    """Give the command of a SuperLink for simulations: reachable from this machine only, state in memory."""
    return [
        "flower-superlink",
        "--insecure",
        "--simulation",
        "--isolation",
        "subprocess",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]


def last_json_object(text: str) -> dict[str, Any]:
    """Give the last JSON object in the output of a `flwr ... --format json` command, which may print plain lines before
    it.

    Raises ValueError when there is none.
    """
    decoder = json.JSONDecoder()
    start, found = text.find("{"), None
    while start >= 0:
        try:
            value, length = decoder.raw_decode(text[start:])
        except ValueError:
            start = text.find("{", start + 1)
            continue
        found = value if isinstance(value, dict) else found
        start = text.find("{", start + length)
    if found is None:
        raise ValueError(f"no JSON object in {text[:200]!r}")
    return found


def parse_run_states(text: str) -> dict[str, RunState]:
    """Read the states of runs by id from the output of `flwr ls --format json`. Raises ValueError when it holds no list."""
    states, answer = {}, last_json_object(text)
    if not isinstance(answer.get("runs"), list):
        raise ValueError(f"no list of runs in {text[:200]!r}")
    for run in answer["runs"]:
        details = str(run.get("status-details") or "")
        states[str(run.get("run-id"))] = RunState(str(run.get("status", "")), "" if details == "N/A" else details)
    return states


def parse_run_state(text: str, run_id: str) -> RunState:
    """Read the state of one run from the output of `flwr ls --format json`.

    Raises ValueError when the run is not listed.
    """
    states = parse_run_states(text)
    if run_id not in states:
        raise ValueError(f"run {run_id} is not listed in {text[:200]!r}")
    return states[run_id]


def inherited_python_path(base: Mapping[str, str]) -> list[str]:
    """Give the entries of PYTHONPATH as absolute paths: a run has another working directory."""
    return [str(Path.cwd() / entry) for entry in base.get("PYTHONPATH", "").split(os.pathsep) if entry]


# ---------------------------------------------------------------------- what the in-process grid needs

LOCAL_RUN_ID = 1


def act_as_server(run_id: int = LOCAL_RUN_ID) -> None:
    """Let this process build messages of a run; Flower's own programs set this when they start an app."""
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1


def stamp(message: Any, message_id: str) -> None:
    """Give a message its id, which Flower does when it stores one; a reply copies it from the request."""
    message.metadata.__dict__["_message_id"] = message_id


def empty_run(run_id: int = LOCAL_RUN_ID) -> Any:
    """A Flower run record with nothing but its id."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)


def quiet_log() -> None:
    """Let Flower's log say warnings only, once each (it has a handler of its own); everything when our own log is on DEBUG."""
    import flwr.supercore  # noqa: F401  (sets up the logger, so later settings stand)

    logger = logging.getLogger("flwr")
    logger.propagate = False
    if not logging.getLogger("fedmed").isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.WARNING)
