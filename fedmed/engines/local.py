"""The local engine: a Flower `Grid` inside this process. No Ray, no sockets, no serialisation, one model in memory.

A site runs when its reply is pulled, so replies are made one at a time and in site order. What a site is sent goes by reference; sites never
write into what they receive. A deadline counts for each site on its own and cannot interrupt it: an answer that took too long is dropped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmed.engines.flower_internals import LOCAL_RUN_ID, act_as_server, empty_run, stamp
from fedmed.federation.messages import CLIENT_RAISED

Intercept = Callable[[Message, Callable[[], Message]], Message | None]


class LocalGrid(Grid):
    """Runs a Flower ClientApp for `num_nodes` virtual nodes in this process.

    `node_configs`: one mapping per node, added to `partition-id` and `num-partitions`. `intercept(message, call)` stands between request and
    site: tests use it to raise, delay, tamper or swallow (None: no answer ever). `arrival_seed`: run everything at once in a random order and
    let replies turn up at random, with random node ids, as a network does.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, Any],
        *,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        intercept: Intercept | None = None,
        arrival_seed: int | None = None,
    ) -> None:
        act_as_server()
        self._app = client_app
        self._run = empty_run()
        self._intercept = intercept
        self._arrival = None if arrival_seed is None else random.Random(arrival_seed)
        ids = list(range(1000, 1000 + num_nodes))
        if self._arrival is not None:
            ids = self._arrival.sample(range(1, 2**62), num_nodes)
        extra = node_configs or [{} for _ in ids]
        self._contexts = {
            node: Context(
                run_id=LOCAL_RUN_ID, node_id=node, state=RecordDict(), run_config=dict(run_config),
                node_config={"partition-id": i, "num-partitions": num_nodes, **extra[i]},
            )
            for i, node in enumerate(ids)
        }  # fmt: skip
        self._waiting: dict[str, Message] = {}
        self._done: dict[str, Message | None] = {}

    @property
    def sequential(self) -> bool:
        """True: a pull runs the site, so deadlines count per site."""
        return self._arrival is None

    def set_run(self, run: Any) -> None:
        """Take Flower's run record."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's run record."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str = "", ttl: float | None = None
    ) -> Message:
        """Build a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the virtual nodes."""
        nodes = list(self._contexts)
        if self._arrival is not None:
            self._arrival.shuffle(nodes)
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take requests; they run when pulled."""
        ids = []
        for message in messages:
            message_id = str(uuid4())
            stamp(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        if self._arrival is not None:
            order = list(ids)
            self._arrival.shuffle(order)
            for message_id in order:
                self._done[message_id] = self._answer(self._waiting.pop(message_id))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the replies to these requests that are there, running the sites that have not run yet."""
        found = []
        for message_id in list(message_ids):
            if self._arrival is not None and self._arrival.random() < 0.5:
                continue
            if message_id in self._waiting:
                self._done[message_id] = self._answer(self._waiting.pop(message_id))
            reply = self._done.get(message_id)
            if reply is not None:
                found.append(reply)
                del self._done[message_id]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, then collect what arrives before `timeout` (seconds); for Flower's own strategies."""
        missing = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while missing and (deadline is None or time.monotonic() < deadline):
            found = list(self.pull_messages(missing))
            answered = {reply.metadata.reply_to_message_id for reply in found}
            replies += found
            missing = [i for i in missing if i not in answered]
            if missing and all(i in self._done for i in missing) and self._arrival is None:
                break  # swallowed for good
        return replies

    def _answer(self, message: Message) -> Message | None:
        def call() -> Message:
            return self._app(message, self._contexts[message.metadata.dst_node_id])

        try:
            reply = call() if self._intercept is None else self._intercept(message, call)
        except Exception as error:  # what a node would send when its app raises
            reply = Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        if reply is not None:
            stamp(reply, str(uuid4()))
        return reply
