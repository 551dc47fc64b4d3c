"""What the output of a Ray simulation says: lines without colours and noise, and the reason of a failure in a few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedmed.engines.flower_internals import RunState
from fedmed.errors import FedMedError, QuorumLost, UserError

REASON_LINES = 8  # of the log, in an error message
LINE_WIDTH = 300

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ACTOR = re.compile(r"^\((?:ClientAppActor|raylet|pid=)[^)]*\)\s?")
# General advice of Flower and Ray, the same in every run.
_NOISE = re.compile(
    r"default simulated SuperNodes changed|flwr federation simulation-config|To change federation size"
    r"|RAY_ACCEL_ENV_VAR_OVERRIDE|override accelerator visible devices|^\s*warnings\.warn\(|^\s*$"
    r"|For more information, visit|Exit Code: \d+$|^INFO *: *$|^Using SuperLink|^Successfully installed"
    r"|Manually terminating ClientAppActor"
)
_TRACE_START = re.compile(r'^(?:ERROR\s*:\s+)?(?:Traceback \(most recent call last\)|ray::)|^\s+File "')
_TRACE_LINK = re.compile(r"^The above exception was the direct cause|^During handling of the above exception")
# What remains of an error once the call stack is gone: `module.SomeError: text`, or a line logged as warning or error.
_EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Lost|Exit|Interrupt|Timeout)(?:: .*)?$")
_LOGGED = re.compile(r"^(?:WARNING|ERROR|CRITICAL)\s*:?\s+(?P<text>.+)$")
_UNTELLING = re.compile(
    r"^Traceback|An exception was raised when processing a message|^ray::|raised an exception$"
    r"|Stopping Simulation Runtime|^RuntimeError: (?:Simulation Runtime crashed|An error was encountered)"
    r"|An exception occur|An error was encountered"
)
_KINDS: dict[str, type[FedMedError]] = {"UserError": UserError, "QuorumLost": QuorumLost, "FedMedError": FedMedError}
_HINTS = (
    (
        "ActorPool is empty",
        "Ray offers too few CPUs or GPUs for one client: lower engine.cpus_per_client or engine.gpus_per_client",
    ),
    (
        "num_gpus must not be provided",
        "Ray found a cluster that the engine did not know of: export RAY_ADDRESS before the start",
    ),
    (
        "OutOfMemoryError",
        "a client ran out of memory: raise engine.cpus_per_client or engine.gpus_per_client, so that fewer run at once",
    ),
    (
        "ActorDiedError",
        "a client process died, often for lack of memory: raise engine.cpus_per_client, so that fewer run at once",
    ),
    (
        "No heartbeat received",
        "the process of the server app was killed, often by the system for lack of memory",
    ),
)


def clean(line: str) -> str:
    """Strip colours and the line end."""
    return _ESCAPES.sub("", line).rstrip()


class ConsoleFilter:
    """Decides, line by line, what of a run's output is worth showing: no general advice, no call stacks."""

    def __init__(self) -> None:
        self._in_trace = False

    def shows(self, line: str) -> bool:
        """Whether to show the next cleaned line."""
        text = _ACTOR.sub("", line)
        if _TRACE_START.search(text):
            self._in_trace = True
            return False
        if self._in_trace and (not text or text[0].isspace()):
            return False
        self._in_trace = False
        return not (_NOISE.search(text) or _TRACE_LINK.search(text))


def telling_lines(lines: Iterable[str]) -> list[str]:
    """Pick the lines of a log that say what went wrong: exceptions without their call stack, warnings, errors.

    Each text once, at its last place; at most `REASON_LINES` lines of at most `LINE_WIDTH` characters.
    """
    picked: dict[str, None] = {}
    for line in lines:
        text = _ACTOR.sub("", clean(line))
        logged = _LOGGED.match(text)
        text = logged["text"].strip() if logged else text
        if (logged or _EXCEPTION.match(text)) and not _UNTELLING.search(text) and not _NOISE.search(text):
            picked.pop(text, None)
            picked[text] = None
    return [text if len(text) <= LINE_WIDTH else f"{text[:LINE_WIDTH]}..." for text in list(picked)[-REASON_LINES:]]


def _kind(details: str, lines: list[str]) -> type[FedMedError]:
    """Find out which of FedMed's errors the server app raised: the last in the log that the run's status repeats."""
    for line in reversed(lines):
        found = re.match(r"^fedmed\.errors\.(\w+): (.*)$", line)
        if found and found[1] in _KINDS and found[2].removesuffix("...") in details:
            return _KINDS[found[1]]
    return FedMedError


def failure(state: RunState, lines: Iterable[str], log: Path) -> FedMedError:
    """Make the error of a run that did not complete.

    `state`: its final state, whose details hold the text of the server app's exception; `lines`: the last lines of the
    log; `log`: the file that has them all. One of FedMed's own errors comes back as itself; anything else as a
    `FedMedError` with the reason, the telling lines of the log and a hint where the cause is known.
    """
    if state.status == "finished:stopped":
        return FedMedError(f"the run was stopped from outside; see {log}")
    all_lines = list(lines)
    telling = telling_lines(all_lines)
    details = state.details.removeprefix("Simulation failed with exception: ").strip()
    kind = _kind(details, telling)
    if kind is not FedMedError:
        return kind(details)  # the server app has said it all
    if not details or _UNTELLING.search(details):
        details = telling.pop() if telling else details or f"no reason given (status {state.status})"
    first = details.splitlines()[0]
    rest = [f"  {line}" for line in telling if first not in line]
    hints = [f"Hint: {hint}." for word, hint in _HINTS if any(word in line for line in (details, *all_lines))]
    return FedMedError("\n".join([f"the ray run failed: {details}", *rest, *hints[:1], f"Full log: {log}"]))
