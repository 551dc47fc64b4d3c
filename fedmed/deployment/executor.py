"""Run as a module by `fedmed site start`: takes the messages a SuperNode has received and answers them with the installed client app.

One long-lived process, so data and model stay warm from round to round. The bundle that came with a run is neither unpacked nor imported:
its hash must be on the site's list before anything else of a message is looked at, then the run's configuration must keep to the site's
limits, and only then the app is called. Whatever goes wrong becomes an answer with a reason; without one the SuperNode would wait for ever.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from flwr.app import Context, Error, Message, RecordDict

from fedmed.config import Config, config_hash, folder_name
from fedmed.deployment.limits import check, read_config, withhold
from fedmed.deployment.site_config import SiteConfig, read_site_config
from fedmed.deployment.site_facts import Facts, own_bundle_hash, site_in_file
from fedmed.deployment.site_log import MarkedFormatter
from fedmed.engines import flower_tasks
from fedmed.engines.flower_internals import quiet_log
from fedmed.engines.flower_tasks import ClientTask, TaskLost, TaskSource
from fedmed.errors import FedMedError, UserError
from fedmed.federation.messages import CLIENT_RAISED
from fedmed.files import write_text

log = logging.getLogger("fedmed.site")
POLL_S = 0.2  # pause between two looks for a message
GRACE_S = 8.0  # for the message in work after SIGTERM; the supervisor kills two seconds later
STOPPED = "the site was stopped while it worked on the message; it will be back for the next round"

App = Callable[..., Message]


class _Stopped(BaseException):
    """The process is to end. Not an Exception: nothing on the way may take it for a failed message."""


class Executor:
    """Answers the messages of one SuperNode, one after the other.

    `app`: the client app, called with `message` and `context`; `allowed`: SHA-256 sums of bundles; `facts`: of the site;
    `in_file`: what its data file calls it.
    """

    def __init__(self, config: SiteConfig, app: App, allowed: frozenset[str], facts: Facts, in_file: str) -> None:
        self.config, self.app, self.allowed, self.facts, self.in_file = config, app, allowed, facts, in_file
        self._busy = self._stopping = False
        self._grace: threading.Timer | None = None

    def run(self, source: TaskSource, open_task: Callable[[TaskSource, str], ClientTask] = ClientTask) -> int:
        """Answer messages until SIGTERM or Ctrl-C; gives the exit code. Raises `httpx.HTTPError` when the SuperNode is away for long."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._stopping:
                found = source.take()
                if found is None:
                    time.sleep(POLL_S)
                else:
                    self._work(source, found[1], open_task)
        except _Stopped:
            pass
        finally:
            if self._grace is not None:
                self._grace.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)
        log.info("stopped")
        return 0

    # ------------------------------------------------------------------ signals

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """End now, or after the message in work; a second signal, which comes by itself after the grace, does not wait for it."""
        if not self._busy or self._stopping:
            raise _Stopped
        self._stopping = True
        self._grace = threading.Timer(GRACE_S, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
        self._grace.daemon = True
        self._grace.start()

    # ------------------------------------------------------------------ one message

    def _work(self, source: TaskSource, token: str, open_task: Callable[[TaskSource, str], ClientTask]) -> None:
        """Answer one message. Nothing that happens to it ends the loop."""
        self._busy = True
        try:
            with open_task(source, token) as task:
                self._answer(task)
        except TaskLost as error:
            log.warning("the answer came to nothing: %s", error)
        except Exception as error:  # the SuperNode is gone or has forgotten the message; the next one may fare better
            log.error("the SuperNode did not take the answer (%s: %s)", type(error).__name__, _one_line(str(error)))
        finally:
            self._busy = False

    def _answer(self, task: ClientTask) -> None:
        name, started = describe(task.message), time.monotonic()
        log.info("%s: received", name)
        try:
            reply = self.reply(task)
        except _Stopped:
            log.warning("%s: %s", name, STOPPED)
            task.answer(_error(task.message, STOPPED))
            raise
        try:
            task.answer(reply)
        except (httpx.HTTPError, TaskLost):
            raise
        except (
            Exception
        ) as error:  # it cannot be written as Flower sends it; no answer at all would block the SuperNode
            log.error("%s: the answer cannot be sent", name, exc_info=True)
            reply = _error(
                task.message, f"{type(error).__name__}: the answer cannot be sent (details in the site's log)"
            )
            task.answer(reply)
        seconds = time.monotonic() - started
        if reply.has_error():
            refused = "refuses" in (reply.error.reason or "")
            how = "refused" if refused else f"answered with an error after {seconds:.1f} s"
            log.log(
                logging.WARNING if refused else logging.ERROR, "%s: %s: %s", name, how, _one_line(reply.error.reason)
            )
        else:
            log.info("%s: answered in %.1f s", name, seconds)

    def reply(self, task: ClientTask) -> Message:
        """The answer to a message; an error for whatever the site does not allow or the app raises."""
        message = task.message
        try:
            self._check_bundle(task.bundle_hash)
            text = str(task.context.run_config.get("config", ""))
            config = read_config(text)
            check(self.config.limits, config, self.facts)
            reply = self.app(message=message, context=self._context(task.context, config, text))
        except FedMedError as error:
            return _error(message, f"{type(error).__name__}: {error}")
        except Exception as error:  # for instance a kind of message that the app does not know
            log.error("%s failed", describe(message), exc_info=True)
            return _error(message, f"{type(error).__name__} (details in the site's log)")
        if reply.has_content():
            kind = message.metadata.message_type.partition(".")[0]
            for split in withhold(reply.content, kind, self.config.limits.min_count):
                log.info("scores and number of items of split %s withheld (limits.min_count)", _one_line(split))
        return reply

    def _check_bundle(self, digest: str) -> None:
        if digest not in self.allowed:
            own = ", ".join(sorted(value[:12] for value in self.allowed))
            raise UserError(
                f"site {self.config.name!r} refuses the bundle {digest}: it is not on the site's list ({own}...); install the same "
                "version of FedMed at both ends, or let the site add this sum to `bundles` in its site.yaml"
            )

    def _context(self, context: Context, config: Config, text: str) -> Context:
        """What the app is told: the site's own paths and device, and of the run's values the checked configuration alone."""
        folder = f"{folder_name(config.name)}-{config_hash(config, with_rounds=False)[:8]}"
        state = self.config.state / folder
        if not state.exists():  # the first message of this run
            state.mkdir(mode=0o700, parents=True)
            write_text(state / "config.yaml", text)  # for the site's own records
        node: dict[str, Any] = {
            "data-path": str(self.config.data), "site": self.in_file, "name": self.config.name, "state-dir": str(state),
            "device": self.config.device,
        }  # fmt: skip
        return Context(context.run_id, context.node_id, node, RecordDict(), {"config": text})


def describe(message: Message) -> str:
    """What a message is, for the log: round and kind, in words that are ours, since the sender chooses the text."""
    kind = {"query.identify": "identify", "query.method": "query"}.get(
        message.metadata.message_type, message.metadata.message_type
    )
    kind = kind if re.fullmatch(r"[a-z.]{1,30}", kind) else "message"
    group = message.metadata.group_id
    return f"round {group}, {kind}" if re.fullmatch(r"\d{1,9}", group or "") else kind


def _error(message: Message, reason: str) -> Message:
    return Message(Error(CLIENT_RAISED, reason), reply_to=message)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())[:500]


# ---------------------------------------------------------------------- the process


def main(words: Sequence[str] | None = None) -> int:
    """Read site.yaml and answer messages; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedmed.deployment.executor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("site", help="site.yaml")
    parser.add_argument("--port", type=int, required=True, help="of the SuperNode's API on this machine")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret shared with the SuperNode")
    given = parser.parse_args(words)
    os.umask(0o077)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(MarkedFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("fedmed").setLevel(logging.INFO)
    logging.getLogger(flower_tasks.log.name).setLevel(logging.ERROR)  # of a SuperNode that ended the supervisor tells
    quiet_log()
    try:
        config = read_site_config(given.site)
        in_file, num_train = site_in_file(config)
        allowed = frozenset({own_bundle_hash(), *config.bundles})
        source = TaskSource(f"127.0.0.1:{given.port}", given.secret.read_bytes())
        from fedmed.client_app import app

        log.info("ready: site %r, %d training items, device %s", config.name, num_train, config.device)
        return Executor(config, app, allowed, Facts(config.name, num_train), in_file).run(source)
    except FedMedError as error:
        log.error("%s", error)
        return 2
    except (OSError, httpx.HTTPError) as error:
        log.error("%s: %s", type(error).__name__, error)
        return 3


if __name__ == "__main__":
    sys.exit(main())
