"""Calls of Flower's command `flwr` about the runs of one SuperLink: hand in, list, stop, follow the log.

Exit codes say nothing (0 for a failed run too), so the JSON that a command prints decides. Every call has a deadline.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from fedmed.engines.flower_internals import CONNECTION, RunState, last_json_object, parse_run_state, parse_run_states
from fedmed.engines.ray_log import clean
from fedmed.errors import FedMedError

COMMAND_LIMIT_S = 120.0  # one call of the flwr command, about 1 s


class FlwrCommands:
    """The command `flwr`, for the SuperLink that `FLWR_HOME` of `env` names.

    `work`: working directory of the calls; `note`: gets every line they print, without colours; `time_left`: seconds
    until the caller gives up; `log`: file that an error refers to.
    """

    def __init__(
        self,
        work: Path,
        env: Mapping[str, str],
        *,
        note: Callable[[str], None] = lambda line: None,
        time_left: Callable[[], float] = lambda: COMMAND_LIMIT_S,
        log: Path | None = None,
    ) -> None:
        self._work, self._env, self._note = work, dict(env), note
        self._time_left, self._log = time_left, log

    def call(self, *arguments: str) -> str:
        """Call the command and give its standard output. Raises `FedMedError` when it takes too long."""
        limit = max(1.0, min(COMMAND_LIMIT_S, self._time_left()))
        try:
            done = subprocess.run(
                ["flwr", *arguments],
                cwd=self._work,
                env=self._env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit,
                start_new_session=True,
                check=False,
            )
        except FileNotFoundError:
            raise FedMedError(
                f"Flower's command flwr is not installed beside {sys.executable}: pip install flwr"
            ) from None
        except subprocess.TimeoutExpired:
            where = f"; see {self._log}" if self._log else ""
            raise FedMedError(f"flwr {arguments[0]} gave no answer within {limit:.0f} s{where}") from None
        output = done.stdout.decode("utf-8", errors="replace")
        for line in (output + done.stderr.decode("utf-8", errors="replace")).splitlines():
            self._note(f"[flwr {arguments[0]}] {clean(line)}")
        return output

    def submit(self, app: Path, run_config: Path, federation: str | None = None) -> str:
        """Hand a run in and give its id. `federation`: settings of a simulation.

        Raises `FedMedError` with Flower's words when it is refused.
        """
        options = ["--format", "json", "-c", str(run_config)]
        output = self.call(
            "run", str(app), CONNECTION, *options, *(["--federation-config", federation] if federation else [])
        )
        try:
            answer = last_json_object(output)
        except ValueError:
            answer = {"error-message": " ".join(clean(output).split())[-500:] or "no answer"}
        if not answer.get("success") or not answer.get("run-id"):
            raise FedMedError(f"flwr run refused the app: {answer.get('error-message', answer)}")
        return str(answer["run-id"])

    def state(self, run_id: str) -> RunState:
        """Ask for the state of a run. Raises `FedMedError` when there is no answer."""
        output = self.call("ls", CONNECTION, "--run-id", run_id, "--format", "json")
        try:
            return parse_run_state(output, run_id)
        except ValueError as error:
            raise FedMedError(f"flwr ls gave no state of the run: {error}") from None

    def states(self) -> dict[str, RunState]:
        """The states of all runs by id. Flower then forgets the messages of those that have ended.

        Raises `FedMedError` when there is no answer.
        """
        output = self.call("ls", CONNECTION, "--format", "json")
        try:
            return parse_run_states(output)
        except ValueError as error:
            raise FedMedError(f"flwr ls gave no states: {error}") from None

    def stop(self, run_id: str) -> bool:
        """Stop a run; False when Flower would not, as with one that has ended."""
        try:
            return bool(last_json_object(self.call("stop", run_id, CONNECTION, "--format", "json")).get("success"))
        except ValueError:
            return False

    def stream(self, run_id: str, lines: queue.Queue[str | None], skip: int) -> None:
        """Follow the log of a run in a thread: lines go to `lines`, None when the stream ends.

        Every stream begins with the first line of the run; `skip` leaves out those already had.
        """
        process = subprocess.Popen(
            ["flwr", "log", run_id, CONNECTION, "--stream"],
            cwd=self._work,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

        def read() -> None:
            with process:
                assert process.stdout is not None
                for number, line in enumerate(process.stdout):
                    if number >= skip:
                        lines.put(line.decode("utf-8", errors="replace"))
            lines.put(None)

        threading.Thread(target=read, name="flwr-log", daemon=True).start()
