"""What a deployment needs of Flower beyond its public Python API (flwr 1.41), as `flower_internals.py` does for the rest.

Both ends take their tasks from Flower and run the installed package themselves: `ServerTask` at the coordinator, `ClientTask` at a site.
Between the SuperLink and other machines stands the `Wall`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fedmed.errors import FedMedError

log = logging.getLogger("fedmed.flower")

ACQUIRE = (
    "/flwr.proto.Runtime/AcquireTask"  # what the shared secret of a SuperLink or SuperNode and its executor protects
)
ALLOWED_PATHS = ("/v1/fleet/", "/health")  # of a SuperLink, for callers on other machines
GIVE_UP_S = 900.0  # for how long a SuperLink or SuperNode may be away before its executor gives up
BEAT_S = 10.0  # between two signs of life of an executor; Flower gives a task up a minute after the last one


class TaskLost(FedMedError):
    """Nothing more can be done for a task: its run has ended, no sign of life of it came through for a minute, or nobody answers."""


class TaskSource:
    """The queue of tasks of a SuperLink (`server`) or a SuperNode (client), which run in isolation `process`.

    address: host:port of its API; ca: root certificates in PEM, None without TLS; secret: what both ends were given.
    """

    def __init__(self, address: str, secret: bytes, ca: bytes | None = None, *, server: bool = False) -> None:
        from flwr.supercore.constant import TaskType
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        self.address, self.ca, self.server = address, ca, server
        self._kind = TaskType.SERVER_APP if server else TaskType.CLIENT_APP
        guard = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
        self._client = _runtime_client(address, ca, "SuperExec", guard)

    def take(self) -> tuple[int, str] | None:
        """The oldest waiting task as (run id, token), or None. Raises `httpx.HTTPError` when nobody answers in time."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest  # type: ignore[attr-defined]

        found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
        return (int(found.task.run_id), str(found.token)) if found.HasField("task") and found.token else None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class ClientTask:
    """One message a SuperNode has received, for the app of the site: `message`, `context`, and the SHA-256 of the run's bundle.

    Use as a context manager. A task without an answer is not closed: its token runs out, and the SuperNode answers with an error, while it
    would wait for ever for the answer of a task that is reported as failed. The bundle is neither unpacked nor imported.
    """

    def __init__(self, source: TaskSource, token: str) -> None:
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        self._client = _token_client(source, token, "flwr-clientapp")
        self._heartbeat = _Heartbeat(source, token, "flwr-clientapp")
        try:
            self.message, self.context, _, bundle = pull_task_input(self._client)
            self.bundle_hash = hashlib.sha256(bundle.content).hexdigest()
        except BaseException:
            self._close()
            raise
        self._answered = False

    def answer(self, reply: Any) -> None:
        """Send the reply."""
        from flwr.supernode.runtime.run_clientapp import push_message

        push_message(self._client, reply, self.context)
        self._answered = True

    def __enter__(self) -> ClientTask:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        from flwr.common.constant import SubStatus
        from flwr.supernode.runtime.run_clientapp import push_task_output

        try:
            if self._answered:
                push_task_output(client=self._client, context=self.context, sub_status=SubStatus.COMPLETED, details="")
        finally:
            self._close()

    def _close(self) -> None:
        self._heartbeat.stop()
        self._client.close()


class ServerTask:
    """The server app's share of a run, held by this process: `grid` to the sites and the SHA-256 of the bundle.

    `finish` says how it ended; without it the run counts as failed when the process has gone.
    """

    def __init__(self, source: TaskSource, token: str) -> None:
        from flwr.common.serde import context_from_proto, run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest  # type: ignore[attr-defined]
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid.http_grid import HttpGrid

        self.grid = HttpGrid(source.address, source.ca is None, source.ca, token=token)
        self._invoker = self.grid._retry_invoker = _patient_invoker(source.address)
        self._client = self.grid._runtime_client
        self._heartbeat = _Heartbeat(source, token, "flwr-serverapp")
        try:
            given = self._client.PullTaskInput(PullTaskInputRequest())
        except BaseException:
            self._close()
            raise
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        self.grid.set_run(run_from_proto(given.run))
        self._context = context_from_proto(given.context)
        self.bundle_hash = hashlib.sha256(given.fab.content).hexdigest()

    def finish(self, problem: str = "", *, stopped: bool = False) -> bool:
        """Report the end, with a problem as failed or `stopped`, and let go; False when a SuperLink that is away missed it."""
        import httpx
        from flwr.common.constant import SubStatus
        from flwr.common.serde import context_to_proto
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest  # type: ignore[attr-defined]

        status = SubStatus.STOPPED if stopped else SubStatus.FAILED if problem else SubStatus.COMPLETED
        self._invoker.max_tries = 1  # whoever presses Ctrl-C does not wait
        try:
            self._client.PushTaskOutput(
                PushTaskOutputRequest(context=context_to_proto(self._context), sub_status=status, details=problem)
            )
        except (httpx.HTTPError, TaskLost):
            return False
        finally:
            self._close()
        return True

    def _close(self) -> None:
        self._heartbeat.stop()
        self.grid.close()


def mend_supernode() -> None:
    """Let the SuperNode of this process drop a message whose run ends while it is received, as it drops those it fails to receive.

    Flower forgets the message's task then. An executor that has taken it would ask for the content for an hour, and answer nobody.
    """
    from flwr.common.constant import Status, SubStatus

    supernode: Any = importlib.import_module("flwr.supernode.start_client_internal")
    flowers_way = supernode._pull_and_store_message

    def pull(*, state: Any, object_store: Any, receive: Callable[[], Any], **others: Any) -> int | None:
        """Flower's function, and what it leaves behind is dropped."""
        received: list[str] = []

        def watched() -> Any:
            found = receive()
            received.extend([found[0].metadata.message_id] if found else [])
            return found

        def open_tasks() -> set[int]:
            return {
                task.task_id for task in state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])
            }

        before = open_tasks()
        run_id = flowers_way(state=state, object_store=object_store, receive=watched, **others)
        if run_id is None and received:
            for task_id in open_tasks() - before:
                state.finish_task(task_id, SubStatus.FAILED, "the run ended while its message was received")
            state.delete_messages(message_ids=received)
            object_store.delete(received[0])
        return run_id

    supernode._pull_and_store_message = pull


@contextmanager
def no_answer(words: str) -> Iterator[None]:
    """Turn what Flower's clients raise when nobody answers any more into a `TaskLost` that says `words`."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        raise TaskLost(f"{words}, {type(error).__name__}: {error}") from error


class Refusal(NamedTuple):
    """A request that was not served: address of the caller, path, HTTP status, the public key it came with (PEM; b"": none)."""

    host: str
    path: str
    status: int
    key: bytes


def run_superlink_behind_wall(on_refused: Callable[[Refusal], None] | None = None) -> None:
    """Be `flower-superlink` (arguments of this process), which answers other machines only on the paths that sites need.

    Flower's API for handing runs in and for registering sites asks nobody who they are, and is served on the same port.
    `on_refused` is told of what the wall and the sites' own API refuse.
    """
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    extensions.get_middleware = lambda: (Middleware(Wall, on_refused=on_refused),)
    flower_superlink()


class Wall:
    """ASGI middleware: callers that are not on this machine reach `ALLOWED_PATHS` only; anything else is 403."""

    def __init__(self, app: Any, on_refused: Callable[[Refusal], None] | None = None) -> None:
        self._app, self._on_refused = app, on_refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = str(scope.get("path", ""))

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400 and self._on_refused is not None:
                self._on_refused(_refusal(scope, path, int(message["status"])))
            await send(message)

        allowed = path.startswith(ALLOWED_PATHS)
        if allowed or is_own_machine(scope.get("client")):
            await self._app(scope, receive, watched if allowed else send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b"this address serves sites only; the coordinator's own machine alone may control it\n"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await watched({"type": "http.response.start", "status": 403, "headers": headers})
        await watched({"type": "http.response.body", "body": body})


def _refusal(scope: Any, path: str, status: int) -> Refusal:
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

    value = dict(scope.get("headers", ())).get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b"")
    try:
        key = base64.b64decode(value, validate=True)
    except ValueError:
        key = b""
    return Refusal(str((scope.get("client") or ("unknown",))[0]), path, status, key)


def is_own_machine(client: tuple[str, int] | None) -> bool:
    """Whether a caller (host, port) is on the loopback interface; unknown: no."""
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def bundle_hash(app: Path) -> str:
    """SHA-256 of the bundle that `flwr run` makes of an app folder; the same on every machine."""
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(app)).hexdigest()


def _patient_invoker(address: str) -> Any:
    """Flower's retries, with an end, and with an error for a lost task in place of its own answer: to interrupt the process."""
    import httpx
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.run import RunNotRunningException

    invoker: Any = make_simple_http_retry_invoker()
    flowers_choice = invoker.should_giveup
    away = threading.Event()

    def gives_up(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise TaskLost(
                f"Flower at {address} no longer knows the task: its run has ended, or no sign of life of it came through"
            ) from error
        try:
            return bool(flowers_choice(error))
        except RunNotRunningException:
            raise TaskLost(f"Flower at {address} takes nothing more for the task: its run has ended") from error

    def missed(state: Any) -> None:
        if not away.is_set():
            away.set()
            log.warning("no answer from %s; trying again for %g minutes", address, GIVE_UP_S / 60)

    def answered(state: Any) -> None:
        if away.is_set():
            away.clear()
            log.warning("%s answers again", address)

    invoker.max_time, invoker.should_giveup = GIVE_UP_S, gives_up
    invoker.on_backoff, invoker.on_success, invoker.on_giveup = missed, answered, None
    invoker.wait_function = time.sleep  # Flower's own logs every try
    return invoker


def _runtime_client(address: str, ca: bytes | None, component: str, *more: Any, patient: bool = True) -> Any:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.runtime.tracing import RuntimeTracingInterceptor

    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=ca is None, root_certificates=ca,
        interceptors=[RuntimeTracingInterceptor(), RuntimeVersionHttpInterceptor(component_name=component), *more],
        retry_invoker=_patient_invoker(address) if patient else None,
    )  # fmt: skip


def _token_client(source: TaskSource, token: str, component: str, *, patient: bool = True) -> Any:
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

    guard = RuntimeTokenHttpInterceptor(token)
    return _runtime_client(source.address, source.ca, component, guard, patient=patient)


class _Heartbeat(threading.Thread):
    """Says every few seconds that a task is worked on, until stopped. That the task is lost is for the next call that matters to find out.

    Flower's own sender would interrupt the process then, and its end waits for retries.
    """

    def __init__(self, source: TaskSource, token: str, component: str) -> None:
        super().__init__(name="task-heartbeat", daemon=True)
        self._client = _token_client(source, token, component, patient=False)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Send signs of life."""
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest  # type: ignore[attr-defined]

        while not self._over.wait(BEAT_S):
            with suppress(Exception):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        self._client.close()

    def stop(self) -> None:
        """Send no more; does not wait for one on its way."""
        self._over.set()
