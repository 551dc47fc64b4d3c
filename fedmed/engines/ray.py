"""The ray engine: the same two apps under `flwr run` on Flower's Ray simulation, one machine or an attached Ray
cluster.

A run gets everything for itself: a private folder (mode 0700) that is Flower's home, Ray's temporary folder and the
working directory at once, a SuperLink on a free port of 127.0.0.1 with its state in memory, and an environment without
the caller's `FLWR_*` settings. Whatever way the run ends, all its processes are ended and the folder is removed
(`processes.py`). docs/engines.md tells users about it.

Exit codes of `flwr run` say nothing (0 for a failed run too); the status that `flwr ls` reports decides.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fedmed.config import Config, to_yaml
from fedmed.engines import bundle
from fedmed.engines.flower_internals import POLL_SWITCH, inherited_python_path, quiet_environment
from fedmed.engines.ray_log import failure
from fedmed.engines.ray_session import Session
from fedmed.errors import FedMedError, UserError
from fedmed.report.run_folder import RAY_LOG

log = logging.getLogger("fedmed.ray")
SLACK_S = 600.0  # added to the federation's own deadlines when no limit is given: start of Ray, last evaluation, files


def attached_cluster() -> str | None:
    """Give the address of the Ray cluster to attach to (RAY_ADDRESS), or None when the run starts its own Ray."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address not in ("", "local") else None


def available_cpus() -> int:
    """Count the CPUs this process may use (affinity mask or container limit where the system tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def available_gpus() -> int:
    """Count the GPUs that this process may use and PyTorch can."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(config: Config) -> None:
    """Raise `UserError` for a GPU no client would find; warn when clients will not use the GPU that is there.

    Ray shows a client only the GPUs it is given, numbered from 0: none with `engine.gpus_per_client=0`.
    """
    device, share = config.engine.device, config.engine.gpus_per_client
    gpus = available_gpus() if attached_cluster() is None else None  # a cluster's other machines cannot be asked
    if gpus is not None and share > gpus:
        offer = f"engine.gpus_per_client={share:g}, but this machine offers {gpus}"
        raise UserError(f"{offer}: lower it, or set RAY_ADDRESS to a cluster")
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu") and (kind != "cuda" or (number and not number.isdigit())):
        raise UserError(f"engine.device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and share == 0:
        raise UserError(
            f"engine.device={device} on ray needs a share of a GPU: set engine.gpus_per_client, e.g. 1 or 0.25"
        )
    if kind == "cuda" and int(number or 0) >= math.ceil(share):
        raise UserError(
            f"engine.device={device}: on ray a client sees its own GPUs only, numbered from 0; use cuda or auto"
        )
    if device == "auto" and share == 0 and gpus:
        log.warning("the clients will run on the CPU: give them the GPU with engine.gpus_per_client, e.g. 1 or 0.25")


def federation_config(config: Config, num_sites: int) -> str:
    """Give the value of `flwr run --federation-config`: how many virtual SuperNodes, and what they may use.

    Ray is started with no more CPUs than all sites can use at once, so that no actor is started that never gets work.
    When attached to a cluster, Ray refuses such limits, and none is given. Raises `UserError` when one client asks for
    more CPUs than there are.
    """
    per_client = config.engine.cpus_per_client
    words = [f"num-supernodes={num_sites}", f"client-resources-num-cpus={per_client}"]
    words.append(f"client-resources-num-gpus={float(config.engine.gpus_per_client)}")
    if attached_cluster() is None:
        cpus = available_cpus()
        if per_client > cpus:
            offer = f"engine.cpus_per_client={per_client}, but this machine offers {cpus}"
            raise UserError(f"{offer}: lower it, or set RAY_ADDRESS to a cluster")
        words.append(f"init-args-num-cpus={min(cpus, num_sites * per_client)}")
    return " ".join(words)


def time_limit(config: Config) -> float:
    """Give the seconds after which a run is given up by default: all deadlines of the federation used in full."""
    federation = config.federation
    waits = (32 * federation.query_deadline_s, federation.train_deadline_s, 2 * federation.evaluate_deadline_s)
    return federation.start_deadline_s + federation.rounds * math.fsum(waits) + SLACK_S


def _package_path() -> list[str]:
    """Give the folder the package is imported from, unless it is installed: children must import the same code."""
    root = str(Path(__file__).resolve().parents[2])
    installed = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return [] if root in installed else [root]


def environment(home: Path, threads: int) -> dict[str, str]:
    """Build the environment of every process of a run.

    `home`: the private folder; `threads`: CPU threads of one process. The folder of this interpreter's programs comes
    first on PATH, for Flower finds its own helpers by name.
    """
    env = quiet_environment(os.environ) | POLL_SWITCH
    programs = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    env["PATH"] = os.pathsep.join(dict.fromkeys([*programs, env.get("PATH", os.defpath)]))
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*_package_path(), *inherited_python_path(env)]))
    if not env["PYTHONPATH"]:
        del env["PYTHONPATH"]
    env |= {"FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if attached_cluster() is None:
        # Ray's session goes away with the run, and a Ray that runs on this machine already is not found by chance.
        env["RAY_TMPDIR"] = str(home)
    return env


def private_folder() -> Path:
    """Make the private folder of a run (mode 0700).

    Ray puts sockets some 70 characters below it, and a socket's name may have 103: hence a short place is chosen.
    """
    place = tempfile.gettempdir()
    if len(place) > 20 and os.access("/tmp", os.W_OK | os.X_OK):
        place = "/tmp"  # TMPDIR of macOS and of some clusters is too long
    return Path(os.path.realpath(tempfile.mkdtemp(prefix="fedmed-", dir=place)))


def _check_installation(path: str) -> None:
    """Raise `UserError` when Flower's programs or Ray are not installed beside this interpreter."""
    missing = [
        name for name in ("flwr", "flower-superlink", "flwr-simulation") if shutil.which(name, path=path) is None
    ]
    if missing:
        raise UserError(
            f"engine=ray needs Flower's command {missing[0]!r} beside {sys.executable}: pip install 'flwr[simulation]'"
        )
    if find_spec("ray") is None:
        raise UserError(f"engine=ray needs the package ray beside {sys.executable}: pip install 'flwr[simulation]'")


def simulate(
    app: Path | None,
    run_config: str,
    out: Path,
    *,
    federation: str,
    resume: bool = False,
    threads: int = 1,
    on_line: Callable[[str], None] | None = None,
    timeout_s: float,
) -> None:
    """Run one Flower app as a simulation and wait for its end.

    `app`: folder of the app (None: the stub of this package); `run_config`: text of the run-config key `config`; `out`:
    run folder, where `ray.log` is written; `federation`: see `federation_config`; `on_line`: called with each line of
    the run's output, without colours; `timeout_s`: seconds for everything. Returns when the run has completed; raises
    `FedMedError`, or the kind of it that the server app raised, with the reason otherwise. Nothing of the run is left
    behind in either case.
    """
    out.mkdir(parents=True, exist_ok=True)
    home = private_folder()
    env = environment(home, threads)
    with Session(home, env, out / RAY_LOG, on_line, timeout_s) as session:
        _check_installation(env["PATH"])
        folder = app or bundle.write_stub(home / "app")
        values = bundle.write_run_config(home / "run-config.toml", run_config, out, resume)
        session.start()
        run_id = session.submit(folder, values, federation)
        state = session.follow(run_id)
        if state.status != "finished:completed":
            raise failure(state, session.tail, out / RAY_LOG)


def run(
    config: Config,
    out: Path,
    *,
    resume: bool,
    num_sites: int,
    on_line: Callable[[str], None] | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run a federation of `num_sites` virtual sites on Ray; the server app writes the results to `out`.

    `config`: with absolute paths only, for the apps have another working directory (`prepare.with_absolute_paths`).
    `resume`: go on from the checkpoint in `out`; `on_line`: receives the output line by line; `timeout_s`: seconds for
    the whole run (None: the sum of the federation's own deadlines). Raises `UserError` for settings this machine cannot
    serve, `QuorumLost` and other `FedMedError`s with the reason when the run fails, is stopped or ends without
    `summary.json`. Ctrl-C and SIGTERM end everything first.
    """
    if num_sites < 1:
        raise UserError(f"expected at least one site, got {num_sites}: the site file holds no site group")
    out = out.expanduser().resolve()
    simulate(
        None,
        to_yaml(dataclasses.replace(config, out=str(out))),
        out,
        federation=federation_config(config, num_sites),
        resume=resume,
        threads=config.engine.threads,
        on_line=on_line,
        timeout_s=time_limit(config) if timeout_s is None else timeout_s,
    )
    if not (out / "summary.json").is_file():
        raise FedMedError(
            f"the run completed, but wrote no summary: expected {out / 'summary.json'}; see {out / RAY_LOG}"
        )
