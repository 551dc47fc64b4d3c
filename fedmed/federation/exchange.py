"""Who is there, and asking them: identification by site name, answers pulled in site order, deadlines, validation.

Node ids are random and change on restart, so everything above this module speaks of site names. Replies are pulled one by one in
site order and never in arrival order: sums are the same on every engine, and one reply is in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmed.errors import FedMedError, QuorumLost, UserError
from fedmed.federation import messages as names
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Answer, Identity, Update, code_hash
from fedmed.federation.records import decode_metrics
from fedmed.federation.state import first_non_finite

log = logging.getLogger("fedmed.server")
_POLL_S = (0.02, 0.5)  # first and longest pause between two looks for a reply


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


class Exchange:
    """The sites of a run and the wire to them.

    `known` keeps an index given before (a checkpoint's): site name → index. `expected` is the number of nodes a simulation starts; the run
    waits for that many, a real federation for `min_sites`.
    """

    def __init__(
        self, grid: Grid, *, min_sites: int, plain_clients: bool, start_deadline_s: float, expected: int | None = None
    ) -> None:
        self.grid = grid
        self.roster: dict[str, Identity] = {}
        self.online: dict[str, int] = {}  # site name -> node id
        self.known: dict[str, int] = {}
        self._names: dict[int, str | None] = {}  # node id -> site name; None: refused
        self._min_sites = max(min_sites, expected or 0)
        self._plain_clients = plain_clients
        self._expected = expected
        self._deadline_s = start_deadline_s

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites online, in site order (by index)."""
        return tuple(sorted(self.online, key=lambda name: self.roster[name].index))

    def wait_for_sites(self) -> None:
        """Wait until enough sites have identified themselves. Raises `QuorumLost` at the deadline, `UserError` if sites do not fit together."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            self.refresh(strict=True)
            if len(self.online) >= self._min_sites:
                return
            if time.monotonic() >= deadline:
                raise QuorumLost(
                    f"{len(self.online)} of the {self._min_sites} sites needed were online after {self._deadline_s:g} s "
                    f"({', '.join(self.sites) or 'none'}); start the missing sites, or lower federation.min_sites"
                )
            time.sleep(_POLL_S[1])

    def refresh(self, *, strict: bool = False) -> None:
        """Look who is online and identify new nodes. With `strict`, a node that does not fit ends the run; later it is only refused."""
        nodes = list(self.grid.get_node_ids())
        new = [n for n in nodes if n not in self._names]
        if new:
            self._identify(sorted(new), strict)
        online: dict[str, int] = {}
        for node in nodes:
            name = self._names.get(node)
            if name is None:
                continue
            if name in online:
                if strict:
                    raise UserError(f"two nodes call themselves {name!r}; give every site a name of its own")
                # A site that was restarted has a new node while the old one is still listed: the one that answered last is alive.
                node = max(node, online[name], key=list(self._names).index)
            online[name] = node
        self.online = online

    def _identify(self, nodes: list[int], strict: bool) -> None:
        requests = [(str(n), Message(names.pack(config={}), n, "query.identify")) for n in nodes]
        found: list[Identity] = []
        for node, reply in zip(nodes, self.replies(requests, self._deadline_s), strict=True):
            identity = self._read_identity(node, reply, strict)
            if identity is None:
                self._names[node] = None
            else:
                found.append(dataclasses.replace(identity, node_id=node))
        for identity in sorted(found, key=lambda i: i.site):
            problem = self._misfit(identity)
            if problem and strict:
                raise UserError(problem)
            if problem:
                log.warning("refused: %s", problem)
                self._names[identity.node_id] = None
                continue
            index = self.known.setdefault(identity.site, max(self.known.values(), default=-1) + 1)
            self.roster[identity.site] = dataclasses.replace(identity, index=index)
            self._names[identity.node_id] = identity.site

    def _read_identity(self, node: int, reply: Reply, strict: bool) -> Identity | None:
        found = names.part(reply.message.content, names.IDENTITY, ConfigRecord) if reply.message is not None else None
        if found is not None:
            with contextlib.suppress(TypeError):  # not an identity: goes on as if there were none
                return Identity.from_config(found)
        if self._plain_clients:
            return Identity(
                site=f"node-{node}",
                task="",
                classes=(),
                channels=(),
                image_size=(),
                label_kind="",
                num_train=0,
                plain=True,
            )
        problem = f"node {node} did not identify itself: {reply.reason or 'its answer has no identity'}"
        if strict and self._expected is not None and reply.reason:  # a simulation: nobody will come and mend the node
            if reply.reason.startswith("UserError: "):
                raise UserError(reply.reason.removeprefix("UserError: "))
            raise FedMedError(problem)
        log.warning("%s; left out. Set federation.plain_clients=true to accept plain Flower clients", problem)
        return None

    def _misfit(self, identity: Identity) -> str | None:
        """Why a site cannot work with the others, in one line, or None."""
        first = next((i for i in self.roster.values() if not i.plain), None)
        if identity.plain:
            return None
        if identity.code_hash != code_hash():
            return f"site {identity.site!r} runs other code ({identity.code_hash}) than the server ({code_hash()}); install the same version at both ends"
        if first is None:
            return None
        for field in ("schema", "task", "classes", "channels", "image_size"):
            mine, theirs = getattr(identity, field), getattr(first, field)
            if mine != theirs:
                return f"sites differ in {field}: {first.site!r} has {_brief(theirs)}, {identity.site!r} has {_brief(mine)}; all sites of a run must agree"
        return None

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
    if not arrays:
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


class Quorum:
    """Counts valid answers of one phase and says whether they are enough: at least `share` of those asked, and at least one."""

    def __init__(self, phase: str, round_number: int, asked: int, share: float, resume_hint: Callable[[], str]) -> None:
        self._phase, self._round, self._asked = phase, round_number, asked
        self.needed = max(
            1, -(-round(share * asked * 1e9) // 10**9)
        )  # ceil, safe against 0.1 * 30 = 3.0000000000000004
        self.valid = 0
        self.failures: list[str] = []
        self._resume_hint = resume_hint

    def check(self) -> None:
        """Raise `QuorumLost` if too few answers were valid, `UserError` if all sites refuse for one and the same fault of the user's."""
        if self.valid < self.needed:
            reasons = {failure.partition(": ")[2] for failure in self.failures}
            if (
                len(reasons) == 1
                and len(self.failures) == self._asked
                and (reason := reasons.pop()).startswith("UserError: ")
            ):
                raise UserError(
                    f"{reason.removeprefix('UserError: ')} (all {self._asked} sites answered this in round {self._round}, {self._phase})"
                )
            failures = "; ".join(self.failures[:5]) or "no site was online"
            raise QuorumLost(
                f"round {self._round}, {self._phase}: {self.valid} valid answers of {self._asked} asked, {self.needed} needed ({failures}). "
                f"{self._resume_hint()}"
            )


def _brief(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
