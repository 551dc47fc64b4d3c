"""Who is there, and asking them: identification by site name, answers pulled in site order, deadlines, validation.

Node ids are random (and change on restart unless sites have keys), so everything above this module speaks of site names. Replies are pulled one by one in
site order and never in arrival order: sums are the same on every engine, and one reply is in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmed.errors import FedMedError, QuorumLost, UserError
from fedmed.federation import messages as names
from fedmed.federation.admission import agreed, misfit, plain_identity
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Answer, Identity, Update
from fedmed.federation.records import decode_metrics
from fedmed.federation.state import first_non_finite

log = logging.getLogger("fedmed.server")
_POLL_S = (0.02, 0.5)  # first and longest pause between two looks for a reply
_ASK_AGAIN_S = 30.0  # before a node that was left out is asked again who it is


@dataclass(frozen=True)
class Reply:
    """What came of one request: a message, or the reason why there is none."""

    site: str
    message: Message | None
    reason: str | None
    seconds: float


def short_reason(text: str) -> str:
    """The telling line of an error text (the last line that is not blank), at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:300]


@dataclass
class _Node:
    """What is known of a node that is online: what it said of itself, why it is left out, and the question that is open."""

    asked: float = -math.inf  # when it was asked last who it is
    question: str = ""  # id of the message that asks, until the answer is there
    order: int = 0  # of its answer among all answers
    identity: Identity | None = None
    problem: str = ""  # why it is left out

    @property
    def awaited(self) -> bool:
        """Asked for the first time, without an answer yet."""
        return bool(self.question) and not self.problem


class Exchange:
    """The sites of a run and the wire to them.

    `known` keeps an index given before (a checkpoint's): site name -> index. `expected` is the number of nodes a simulation starts: the run
    waits for that many, and ends at once when one of them does not fit, for nobody will come and mend it. A real federation waits for
    `min_sites`, leaves out whoever does not fit, says so, and asks again later. `approved` gives, whenever it is called, node id -> the name a
    site was approved under; then nobody else takes part. None: everybody may.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        min_sites: int,
        plain_clients: bool,
        start_deadline_s: float,
        identify_deadline_s: float = 300.0,
        expected: int | None = None,
        approved: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self.grid = grid
        self.roster: dict[str, Identity] = {}
        self.online: dict[str, int] = {}  # site name -> node id
        self.known: dict[str, int] = {}
        self._nodes: dict[int, _Node] = {}  # the nodes online
        self._answers = 0
        self._min_sites = max(min_sites, expected or 0)
        self._plain_clients = plain_clients
        self._simulated = expected is not None
        self._strict = False  # a node that does not fit ends the run
        self._start_s, self._identify_s = start_deadline_s, identify_deadline_s
        self._read_approved, self._approved = approved, dict(approved() if approved else {})

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites online, in site order (by index)."""
        return tuple(sorted(self.online, key=lambda name: self.roster[name].index))

    @property
    def num_sites(self) -> int:
        """How many places there are: every index that was ever given is smaller."""
        return 1 + max(self.known.values(), default=-1)

    def wait_for_sites(self) -> None:
        """Wait until enough sites that fit together have identified themselves, and everyone online has been heard.

        Their indices follow their names, whoever came first. Raises `QuorumLost` at the deadline with the reasons; in a simulation
        `UserError` or `FedMedError` for the first node that does not fit.
        """
        self._strict = self._simulated
        deadline, pause = time.monotonic() + self._start_s, _POLL_S[0]
        while True:
            heard = self._look()
            fitting = self._fitting()
            late = time.monotonic() >= deadline
            if len(fitting) >= self._min_sites and (heard or late):
                break
            if late:
                raise QuorumLost(self._too_few(fitting))
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(pause * 1.5, _POLL_S[1])
        self._strict = False
        self._enrol(fitting)

    def refresh(self) -> None:
        """Look who is online. A new node has `identify_deadline_s` to say who it is; one that was left out is asked again, and not waited for."""
        deadline, pause = time.monotonic() + self._identify_s, _POLL_S[0]
        while not self._look() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_S[1])
        self._enrol(self._fitting())

    # ------------------------------------------------------------------ who is there

    def _look(self) -> bool:
        """Ask the nodes that are due, take the answers that are there; True when nobody is waited for."""
        self._nodes = {number: self._nodes.get(number) or _Node() for number in sorted(self.grid.get_node_ids())}
        if self._read_approved is not None:  # sites may be approved while the run goes on
            self._approved = dict(self._read_approved())
        now = time.monotonic()
        due = [number for number, node in self._nodes.items() if self._is_due(node, now)]
        if due:
            messages = [Message(names.pack(config={}), number, "query.identify") for number in due]
            for number, question in zip(due, self.grid.push_messages(messages), strict=True):
                self._nodes[number].asked, self._nodes[number].question = now, question
                if not question:
                    self._unidentified(number, "it went offline")
        asked = {node.question: number for number, node in self._nodes.items() if node.question}
        for message in self.grid.pull_messages(list(asked)) if asked else ():
            if message.metadata.reply_to_message_id in asked:
                self._heard(asked[message.metadata.reply_to_message_id], message)
        for number, node in self._nodes.items():
            if node.awaited and time.monotonic() - node.asked >= self._identify_s:
                self._unidentified(number, f"no answer within {self._identify_s:g} s")
        return not any(node.awaited for node in self._nodes.values())

    def _is_due(self, node: _Node, now: float) -> bool:
        """Whether to ask a node who it is: at once when it is new, after a pause when it is left out (it may have been mended)."""
        pause = self._identify_s if node.question else _ASK_AGAIN_S
        return node.asked < 0 or (bool(node.problem) and now - node.asked >= pause)

    def _heard(self, number: int, message: Message) -> None:
        node = self._nodes[number]
        node.question, node.identity = "", None
        self._answers += 1
        node.order = self._answers
        found = names.part(message.content, names.IDENTITY, ConfigRecord) if not message.has_error() else None
        if found is not None:
            with contextlib.suppress(TypeError):  # not an identity: goes on as if there were none
                node.identity = dataclasses.replace(Identity.from_config(found), node_id=number)
                return
        reason = short_reason(message.error.reason or "") if message.has_error() else "its answer has no identity"
        self._unidentified(number, reason)

    def _unidentified(self, number: int, reason: str) -> None:
        """Take a node that does not say who it is for a plain Flower client, where these are welcome; else leave it out."""
        if self._plain_clients:
            node = self._nodes[number]
            node.question, node.identity = "", plain_identity(number)
        elif reason.startswith("UserError: "):  # our own site, which refuses
            text = reason.removeprefix("UserError: ")
            self._leave_out(number, text if text.startswith("site ") else f"{self._called(number)}: {text}")
        else:
            hint = (
                ""
                if number in self._approved or self._strict
                else " (plain Flower clients need federation.plain_clients=true)"
            )
            self._leave_out(number, f"{self._called(number)} did not identify itself: {reason}{hint}", FedMedError)

    def _leave_out(self, number: int, problem: str, kind: type[FedMedError] = UserError) -> None:
        if self._strict:
            raise kind(problem)
        if self._nodes[number].problem != problem:
            log.warning("left out: %s", problem)
        self._nodes[number].problem = problem

    def _called(self, number: int) -> str:
        return f"site {self._approved[number]!r}" if number in self._approved else f"node {number}"

    # ------------------------------------------------------------------ who takes part

    def _fitting(self) -> dict[str, int]:
        """Site name -> node of those that fit together; what is wrong with the others is noted."""
        said = sorted((n.order, number, n.identity) for number, n in self._nodes.items() if n.identity is not None)
        placed = [identity for identity in self.roster.values() if not identity.plain]
        first = placed[0] if placed else agreed([identity for _, _, identity in said])
        fitting: dict[str, int] = {}
        for _, number, identity in said:
            problem = self._wrong_name(number, identity) or misfit(identity, first)
            if problem:
                self._leave_out(number, problem)
                continue
            if identity.site in fitting and self._strict:
                raise UserError(f"two nodes call themselves {identity.site!r}; give every site a name of its own")
            # A site that was restarted may have a new node while the old one is still listed: the one that answered last is alive.
            fitting[identity.site] = number
            self._nodes[number].problem = ""
        return fitting

    def _wrong_name(self, number: int, identity: Identity) -> str | None:
        """Why a node may not bear the name it gives itself, or None: a name belongs to the key it was approved with."""
        if self._read_approved is None:
            return None
        if number not in self._approved:
            return f"node {number} ({identity.site!r}) was never approved; run `fedmed coordinator approve` with its public key"
        if self._approved[number] == identity.site:
            return None
        return f"{self._called(number)} calls itself {identity.site!r}; `name` in its site.yaml must be the one it was approved under"

    def _enrol(self, fitting: dict[str, int]) -> None:
        """Give new sites the next indices, by name."""
        for name in sorted(fitting):
            identity = self._nodes[fitting[name]].identity
            assert identity is not None
            self.roster[name] = dataclasses.replace(identity, index=self.known.setdefault(name, self.num_sites))
        self.online = fitting

    def _too_few(self, fitting: Mapping[str, int]) -> str:
        """The error of a run that cannot start: who is there, who was left out and why, who is missing."""
        problems = [node.problem for node in self._nodes.values() if node.problem]
        away = sorted(name for number, name in self._approved.items() if number not in self._nodes)
        reasons = f"; left out: {'; '.join(problems[:5])}" if problems else ""
        missing = f"; not online: {', '.join(away)}" if away else ""
        return (
            f"{len(fitting)} of the {self._min_sites} sites needed were online after {self._start_s:g} s "
            f"({', '.join(sorted(fitting)) or 'none'}){reasons}{missing}; start the missing sites, or lower federation.min_sites"
        )

    # ------------------------------------------------------------------ the wire

    def replies(self, requests: Sequence[tuple[str, Message]], deadline_s: float) -> Iterator[Reply]:
        """Send all requests, then yield one `Reply` per request in the given order.

        The deadline counts from sending; in an engine that runs one site after the other it counts for each site on its own.
        """
        sequential = bool(getattr(self.grid, "sequential", False))
        started = time.monotonic()
        ids = list(self.grid.push_messages([message for _, message in requests]))
        for (site, _), message_id in zip(requests, ids, strict=True):
            begun = time.monotonic() if sequential else started
            message = self._await(message_id, begun + deadline_s)
            seconds = time.monotonic() - begun
            if message is None or (sequential and seconds > deadline_s):
                yield Reply(site, None, f"no answer within {deadline_s:g} s", seconds)
            elif message.has_error():
                yield Reply(site, None, short_reason(message.error.reason or ""), seconds)
            else:
                yield Reply(site, message, None, seconds)
            message = None  # not held while the next site works

    def _await(self, message_id: str, deadline: float) -> Message | None:
        pause = _POLL_S[0]
        while True:
            found = list(self.grid.pull_messages([message_id]))
            if found:
                return found[0]
            if time.monotonic() >= deadline:
                return None
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(pause * 1.5, _POLL_S[1])


def read_update(content: RecordDict, identity: Identity, layout: Layout) -> Update | str:
    """Turn the content of a train reply into an `Update` (with `num_examples` 0 and no arrays: nothing to train on), or say what is wrong with it."""
    metrics, problem = _read_metrics(content)
    if problem:
        return problem
    count = metrics.pop(names.NUM_EXAMPLES, None)
    if not isinstance(count, (int, float)) or not math.isfinite(count) or count < 0 or count != int(count):
        return f"{names.NUM_EXAMPLES}: expected a whole number >= 0, got {count!r}"
    try:
        extras, arrays = names.arrays_of(content, names.EXTRAS), names.arrays_of(content, names.ARRAYS)
    except (TypeError, ValueError, NotImplementedError) as error:  # bytes that are no array, or a type torch lacks
        return f"the arrays cannot be read: {type(error).__name__}: {error}"
    if count == 0:
        return Update(identity.site, identity.index, 0, {}, extras, metrics)
    if not arrays and layout.exchanged:
        return f"the reply has no {names.ARRAYS!r} record"
    misfit = layout.misfit(arrays, identity.groups_left_out)
    if misfit:
        return misfit
    broken = first_non_finite(arrays)
    if broken:
        return f"entry {broken!r} holds NaN or infinite values (the local training diverged)"
    return Update(identity.site, identity.index, int(count), arrays, extras, metrics)


def read_answer(content: RecordDict, identity: Identity) -> Answer | str:
    """Turn the content of a query reply into an `Answer`, or say what is wrong with it."""
    metrics, problem = _read_metrics(content)
    if problem:
        return problem
    count = metrics.pop(names.NUM_EXAMPLES, 0)
    extras = names.arrays_of(content, names.EXTRAS)
    return Answer(identity.site, identity.index, int(count) if isinstance(count, (int, float)) else 0, extras, metrics)


def _read_metrics(content: RecordDict) -> tuple[names.Metrics, str | None]:
    record = names.part(content, names.METRICS, MetricRecord)
    if record is None:
        return {}, f"the reply has no {names.METRICS!r} record"
    return decode_metrics(record), None
