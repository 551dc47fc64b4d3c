"""The Flower ClientApp of a site: decode, call, encode. Everything else is in `fedmed.federation.site`."""

from __future__ import annotations

import logging
import traceback
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedmed.config import Config, folder_name, from_run_config
from fedmed.errors import FedMedError
from fedmed.federation.messages import CLIENT_RAISED
from fedmed.federation.site import Place, Workshop, answer

log = logging.getLogger("fedmed.site")
app = ClientApp()


@lru_cache(maxsize=1)
def _workshop(text: str, experiment: str, overrides: str, out: str) -> Workshop:
    """The workshop of the run this process serves; the last one only, so a process holds one model."""
    return Workshop(from_run_config({"config": text, "experiment": experiment, "overrides": overrides, "out": out}))


@lru_cache(maxsize=1)
def _simulated_file(workshop: Workshop) -> Path:
    """The site file of the simulation this process serves; asked for once, since the answer is keyed by the whole configuration."""
    from fedmed.engines.prepare import site_file

    return site_file(workshop.config)


def _place(config: Config, context: Context, workshop: Workshop) -> Place:
    """Where this node's data are: `data-path` of its node config (a hospital), else its share of the simulation's site file."""
    node = context.node_config
    if "data-path" in node:
        state = node.get("state-dir")
        return Place(
            Path(str(node["data-path"])),
            site=str(node["site"]) if "site" in node else None,
            state=Path(str(state)) if state else None,
        )
    place = Place(_simulated_file(workshop), partition=int(node["partition-id"]))
    if not config.out:
        return place
    return Place(
        place.data, partition=place.partition, state=Path(config.out) / "sites" / folder_name(workshop.data(place).name)
    )


def _reason(error: Exception, simulated: bool) -> str:
    """What of an error leaves the site: the message of FedMed's own errors; of others, outside a simulation, only type and place."""
    if simulated or isinstance(error, FedMedError):
        return f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} (details in the site's log)"


def _handle(kind: str, message: Message, context: Context) -> Message:
    try:
        run = context.run_config
        workshop = _workshop(*(str(run.get(key, "")) for key in ("config", "experiment", "overrides", "out")))
        return Message(
            answer(kind, workshop, _place(workshop.config, context, workshop), message.content), reply_to=message
        )
    except Exception as error:  # the round goes on without this site; the server names it
        simulated = "data-path" not in context.node_config
        # A real site's log is where the details stay; a simulation shows the reason anyway.
        log.log(logging.DEBUG if simulated else logging.ERROR, "%s failed", kind, exc_info=True)
        return Message(Error(CLIENT_RAISED, _reason(error, simulated)), reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say who this site is and what it has."""
    return _handle("identify", message, context)


@app.query("method")
def query(message: Message, context: Context) -> Message:
    """Answer a method's question."""
    return _handle("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _handle("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model."""
    return _handle("evaluate", message, context)
