"""The deployment engine: one run over the sites of a coordinator, with this process as its server app.

The coordinator's SuperLink runs already (`fedmed coordinator start DIR`). A run is handed in as the stub bundle with its configuration;
then this process takes the run's server task itself and runs the round loop, as on the local engine. Sites read their own files, so what
the experiment says about data files stays behind, and so does every path of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmed.config import Config, DataConfig, TrackingConfig, params_from, to_yaml
from fedmed.engines import bundle
from fedmed.engines.flower_internals import quiet_log
from fedmed.engines.flower_tasks import GIVE_UP_S, ServerTask, TaskLost, TaskSource, bundle_hash, no_answer
from fedmed.engines.flwr_commands import FlwrCommands
from fedmed.engines.prepare import absolute
from fedmed.engines.signals import handled, leave
from fedmed.errors import FedMedError, UserError

if TYPE_CHECKING:
    from fedmed.deployment.coordinator_folder import CoordinatorFolder
    from fedmed.federation.history import Callback

log = logging.getLogger("fedmed.deployment")

HEALTH_LIMIT_S = 10.0  # for the SuperLink to answer: its supervisor may be starting it again
TAKE_LIMIT_S = 60.0  # from handing a run in to having its task; usually at once
POLL_S = 0.2
# Keys of `data` that say what a simulation's file is and what is done to it.
SIMULATED = ("path", "phantom", "resize", "partition", "corruption", "cache_dir")


# ---------------------------------------------------------------------- configuration


def check_coordinator(config: Config, coordinator: str | Path | None) -> str | Path:
    """Give the coordinator's folder back. Raises `UserError` when the engine needs one and there is none, or the other way round."""
    name = config.engine.name
    if coordinator is None:
        raise UserError(
            "the engine deployment needs --coordinator DIR, the folder that `fedmed coordinator init DIR` made"
        )
    if name != "deployment":
        raise UserError(f"--coordinator is for --engine deployment; this run is to use the engine {name}")
    return coordinator


def ignored_keys(config: Config, overrides: Sequence[str] = ()) -> list[str]:
    """Keys that have no effect because every site reads its own file, as far as somebody may expect one.

    These are those set by `overrides` (KEY=VALUE), and `data.path` when it names more than phantom data.
    """
    words = [word.partition("=")[0].strip() for word in overrides]
    keys = [f"data.{name}" for name in SIMULATED]
    found = [key for key in keys if any(word == key or word.startswith(f"{key}.") for word in words)]
    if config.data.path and not config.data.path.startswith("phantom:") and "data.path" not in found:
        found.insert(0, "data.path")
    return found


def coordinator_config(config: Config) -> Config:
    """The configuration the coordinator works with: no simulated data, its own paths absolute."""

    empty = DataConfig()
    evaluation = config.evaluation
    central = "none" if evaluation.central in ("auto", "none") else absolute(evaluation.central)
    alone = absolute(evaluation.local_only) if evaluation.local_only else None
    return dataclasses.replace(
        config,
        out=absolute(config.out),
        data=dataclasses.replace(config.data, **{name: getattr(empty, name) for name in SIMULATED}),
        evaluation=dataclasses.replace(evaluation, central=central, local_only=alone),
        engine=dataclasses.replace(config.engine, name="deployment"),
    )


def sent_config(config: Config) -> Config:
    """What the sites are sent of the coordinator's configuration: nothing that is its own business, no path."""
    return dataclasses.replace(
        config,
        out="",
        evaluation=dataclasses.replace(config.evaluation, central="none", local_only=None),
        tracking=TrackingConfig(),
    )


def check(config: Config) -> None:
    """Refuse before anything is handed in what can be seen without a site: names, arguments, files. Raises `UserError`."""
    from fedmed.data.augment import Augment
    from fedmed.federation.foreign import flower_strategy
    from fedmed.federation.site import client_class, make_addons
    from fedmed.server_app import make_strategy

    if not config.out:
        raise UserError("the key out is empty; say where results go (`fedmed run` does: --out DIR)")
    params_from(client_class(config).Params, config.client.args, "client.args")
    make_addons(config)
    Augment(config.data.augment)
    if config.strategy.name.startswith("flwr:"):
        flower_strategy(config)
    else:
        make_strategy(config)
    for key in ("central", "local_only"):
        path = getattr(config.evaluation, key)
        if path not in (None, "none") and not Path(path).exists():
            raise UserError(f"evaluation.{key}: there is no {path} on this machine")


# ---------------------------------------------------------------------- one run


def run(
    config: Config, coordinator: str | Path, *, resume: bool = False, callbacks: Iterable[Callback] = ()
) -> dict[str, Any]:
    """Run over the sites of the coordinator's folder `coordinator` and give the summary; `config.out` is the run folder.

    One run at a time. Raises `UserError`, `QuorumLost`, and `FedMedError` when the SuperLink is not up or loses the run; what was reached
    is then in the checkpoint. Ctrl-C and SIGTERM stop the run at the SuperLink too.
    """
    import torch

    from fedmed.deployment.coordinator_folder import CoordinatorFolder

    folder = CoordinatorFolder.open(coordinator)
    check(config := coordinator_config(config))
    quiet_log()
    threads = torch.get_num_threads()
    with only_run(folder), handled(leave, signal.SIGTERM), tempfile.TemporaryDirectory(prefix="fedmed-") as place:
        wait_for_superlink(folder)
        flwr = FlwrCommands(Path(place), folder.environment(), log=folder.log_file)
        stop_left_over(flwr)
        app = bundle.write_stub(Path(place) / "app")
        text = bundle.to_toml({"config": to_yaml(sent_config(config))})
        run_id = flwr.submit(app, bundle.write_private(Path(place) / "run-config.toml", text))
        try:
            torch.set_num_threads(config.engine.threads)
            with _what_now(folder, config):
                task = take(folder, run_id, bundle_hash(app))
                run_id = ""  # no longer waiting
                return _serve(folder, flwr, task, config, resume, callbacks)
        finally:
            torch.set_num_threads(threads)
            if run_id:
                with contextlib.suppress(FedMedError):
                    flwr.stop(run_id)  # nobody else would ever take it


def only_run(folder: CoordinatorFolder) -> AbstractContextManager[None]:
    """Be the one run of a coordinator. Raises `FedMedError` that names the other."""
    from fedmed.deployment.only_one import only_one

    def refusal(pid: str) -> FedMedError:
        return FedMedError(
            f"a run is under way already at the coordinator {folder.path}, as process {pid}; "
            "wait for its end, or stop it with Ctrl-C there"
        )

    return only_one(folder.path / "state" / "run.lock", refusal)


def wait_for_superlink(folder: CoordinatorFolder) -> None:
    """Wait until the SuperLink answers. Raises `FedMedError` when it does not."""
    from fedmed.deployment.coordinator import problem

    deadline = time.monotonic() + HEALTH_LIMIT_S
    while (reason := problem(folder)) is not None:
        if time.monotonic() >= deadline:
            raise FedMedError(
                f"the coordinator is not up ({reason}); start it, and leave it running: fedmed coordinator start {folder.path}"
            )
        time.sleep(POLL_S)


def stop_left_over(flwr: FlwrCommands) -> None:
    """Stop the runs that Flower still counts as going on: nobody works on them, for this process is the only one."""
    for run_id, state in flwr.states().items():
        if state.finished:
            continue
        if not flwr.stop(run_id) and not flwr.state(run_id).finished:
            raise FedMedError(f"run {run_id} of an earlier command is still {state.status} and cannot be stopped")
        log.warning("stopped run %s, which an earlier command left behind as %s", run_id, state.status)


def take(folder: CoordinatorFolder, run_id: str, expected_hash: str) -> ServerTask:
    """Take the server task of the run that was handed in. Tasks of other runs are refused: nobody else makes this process do anything.

    Raises `FedMedError` when it does not come in time, or with another bundle.
    """
    source = TaskSource(folder.address, folder.secret_file.read_bytes(), folder.ca_file.read_bytes(), server=True)
    deadline = time.monotonic() + TAKE_LIMIT_S
    try:
        while time.monotonic() < deadline:
            found = source.take()
            if found is None:
                time.sleep(POLL_S)
                continue
            number, token = found
            if str(number) != run_id:
                _refuse(source, number, token)
                continue
            task = ServerTask(source, token)
            if task.bundle_hash != expected_hash:
                task.finish("refused: another bundle than was handed in")
                raise FedMedError(
                    f"run {run_id} came back with another bundle ({task.bundle_hash[:12]}) than was handed in ({expected_hash[:12]}); "
                    f"somebody tampers with the coordinator's database, see {folder.log_file}"
                )
            return task
    finally:
        source.close()
    raise FedMedError(
        f"Flower had no task for run {run_id} within {TAKE_LIMIT_S:g} s; does another program take its tasks? See {folder.log_file}"
    )


def _refuse(source: TaskSource, number: int, token: str) -> None:
    log.warning("run %d was not handed in by this command and is refused", number)
    with contextlib.suppress(TaskLost), no_answer("it is gone"):
        ServerTask(source, token).finish("refused: this coordinator runs only what `fedmed run` hands in")


def _serve(
    folder: CoordinatorFolder,
    flwr: FlwrCommands,
    task: ServerTask,
    config: Config,
    resume: bool,
    callbacks: Iterable[Callback],
) -> dict[str, Any]:
    """Run the server app, and tell the SuperLink how it ended."""
    from fedmed.federation.exchange import short_reason
    from fedmed.server_app import run_server

    problem, stopped = "it broke off", False
    try:

        def approved() -> dict[int, str]:
            return {site.node_id: name for name, site in folder.sites().items()}

        summary = run_server(task.grid, config, callbacks=callbacks, resume=resume, approved=approved)
        problem = ""
        return summary
    except (KeyboardInterrupt, SystemExit):
        problem, stopped = "stopped at the coordinator", True
        raise
    except FedMedError as error:
        problem = short_reason(str(error))
        raise
    finally:
        if task.finish(problem, stopped=stopped):
            with contextlib.suppress(FedMedError):
                flwr.states()  # Flower then removes the messages of the run, and so the models in them, from its database


@contextlib.contextmanager
def _what_now(folder: CoordinatorFolder, config: Config) -> Iterator[None]:
    """Say of a lost run how to go on with it."""
    try:
        with no_answer(f"no answer for {GIVE_UP_S / 60:g} minutes"):
            yield
    except TaskLost as error:
        kept = (Path(config.out) / "checkpoint").exists()
        words = (
            f"What was reached is kept: --out {config.out} --resume goes on"
            if kept
            else "Nothing was kept yet: start anew"
        )
        raise FedMedError(
            f"the SuperLink lost the run ({error}): it was away for too long, or somebody stopped the run; see {folder.log_file}. {words}"
        ) from error
