"""The Flower ClientApp of a site: decode, call, encode. Everything else is in `fedmed.federation.site`."""

from __future__ import annotations

import dataclasses
import logging
import re
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
_DATA_READERS = Path(__file__).resolve().parent / "data"  # errors of its modules may quote labels and places of items
_PATH = re.compile(r"(?<![\w.<])~?/[^\s'\",;:)]+")


@lru_cache(maxsize=1)
def _workshop(text: str, experiment: str, overrides: str, out: str, device: str) -> Workshop:
    """The workshop of the run this process serves; the last one only, so a process holds one model. `device`: if not empty, the site's own."""
    config = from_run_config({"config": text, "experiment": experiment, "overrides": overrides, "out": out})
    if device:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, device=device))
    return Workshop(config)


@lru_cache(maxsize=1)
def _simulated_file(workshop: Workshop) -> Path:
    """The site file of the simulation this process serves; asked for once, since the answer is keyed by the whole configuration."""
    from fedmed.engines.prepare import site_file

    return site_file(workshop.config)


def _place(config: Config, context: Context, workshop: Workshop) -> Place:
    """Where this node's data are: `data-path` of its node config (a hospital), else its share of the simulation's site file.

    `site` says which site of the file is meant, `name` what the federation calls it (else as the file does).
    """
    node = context.node_config
    if "data-path" in node:
        state = node.get("state-dir")
        place = Place(
            Path(str(node["data-path"])),
            site=str(node["site"]) if "site" in node else None,
            state=Path(str(state)) if state else None,
        )
        if "name" in node:
            workshop.data(place).name = str(node["name"])
        return place
    place = Place(_simulated_file(workshop), partition=int(node["partition-id"]))
    if not config.out:
        return place
    return Place(
        place.data, partition=place.partition, state=Path(config.out) / "sites" / folder_name(workshop.data(place).name)
    )


def _reason(error: Exception, context: Context) -> str:
    """What of an error leaves the site.

    A simulation shows all of it. A hospital shows the message of FedMed's own errors, without paths and without what was read from its data
    file; of others only type and place.
    """
    node, kind = context.node_config, type(error).__name__
    if "data-path" not in node:
        return f"{kind}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(frame.filename).name
    if not isinstance(error, FedMedError):
        return f"{kind} in {file}:{frame.lineno} (details in the site's log)"
    if Path(frame.filename).resolve().is_relative_to(_DATA_READERS):
        return f"{kind}: the data file of this site does not suit the run (the site's log says why)"
    text = str(error)
    for known in (node["data-path"], node.get("state-dir")):  # these may have spaces
        text = text.replace(str(known), "<path>") if known else text
    return f"{kind}: {_PATH.sub('<path>', text)}"


def _handle(kind: str, message: Message, context: Context) -> Message:
    try:
        run = context.run_config
        words = [str(run.get(key, "")) for key in ("config", "experiment", "overrides", "out")]
        workshop = _workshop(*words, device=str(context.node_config.get("device", "")))
        return Message(
            answer(kind, workshop, _place(workshop.config, context, workshop), message.content), reply_to=message
        )
    except Exception as error:  # the round goes on without this site; the server names it
        simulated = "data-path" not in context.node_config
        # A real site's log is where the details stay; a simulation shows the reason anyway.
        log.log(logging.DEBUG if simulated else logging.ERROR, "%s failed", kind, exc_info=True)
        return Message(Error(CLIENT_RAISED, _reason(error, context)), reply_to=message)


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
