"""The Flower ServerApp: build the rule of the configuration, run the rounds, write the run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedmed.config import Config, config_hash, from_run_config, nearest, params_from, to_yaml
from fedmed.data.augment import Augment
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.errors import UserError
from fedmed.federation.central import central_scorer
from fedmed.federation.checkpoint import Checkpoint, CheckpointStore, write_safetensors
from fedmed.federation.client import Client, declared_leaves
from fedmed.federation.exchange import Exchange
from fedmed.federation.foreign import flower_strategy, run_flower_strategy
from fedmed.federation.history import Callback, Journal, start_info
from fedmed.federation.layout import Layout
from fedmed.federation.messages import Identity
from fedmed.federation.rounds import RoundLoop
from fedmed.federation.site import checked, client_class, make_addons, make_model
from fedmed.federation.state import State
from fedmed.federation.strategy import Strategy
from fedmed.files import json_ready, write_json, write_text
from fedmed.metrics import main_metric, round_metrics
from fedmed.report.personal import LocalScores, read_local
from fedmed.report.run_folder import RunFolder
from fedmed.report.summary import build_summary

log = logging.getLogger("fedmed.server")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; the report is written here unless an engine of FedMed does it."""
    from fedmed.engines.prepare import with_absolute_paths
    from fedmed.report.run_folder import default_out, prepare
    from fedmed.report.write import write_report
    from fedmed.tracking import build_callbacks

    config = from_run_config(context.run_config)
    resume = bool(context.run_config.get("resume", False))
    if not config.out and config.data.path:
        # A simulation: its sites keep personal state and scores there, so they must know it too.
        raise UserError("the key out is empty; say where results go: flwr run ... -c 'out=\"/absolute/path\" ...'")
    if not config.out:
        config = dataclasses.replace(config, out=str(default_out(config.name)))
    config = with_absolute_paths(config)
    # Under `fedmed run` the command line made the folder and follows the history itself. Otherwise this is a plain `flwr run`.
    inside_engine = config.engine.name == "ray" and bool(context.run_config.get("config"))
    _show_log(logging.WARNING if inside_engine else logging.INFO)
    if not inside_engine:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="ray"))
        prepare(config.out, resume)
    callbacks = [] if inside_engine else build_callbacks(config, config.out)
    try:
        summary = run_server(grid, config, callbacks=callbacks, resume=resume)
    finally:
        for callback in callbacks:
            callback.close()
    if not inside_engine:
        log.info("report: %s", write_report(config.out, summary))


def _show_log(level: int) -> None:
    """Let FedMed's own log lines bear their level and name in Flower's output, where they would lose both."""
    logger = logging.getLogger("fedmed")
    if not logger.hasHandlers():
        logger.setLevel(level)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def run_server(
    grid: Grid,
    config: Config,
    *,
    callbacks: Iterable[Callback] = (),
    resume: bool = False,
    approved: Callable[[], Mapping[int, str]] | None = None,
) -> dict[str, Any]:
    """Run a federation over any Flower grid and give its summary; `config.out` is the run folder.

    `approved`: in a deployment, gives node id -> the name a site was approved under. Raises `UserError` for what does not fit together,
    `QuorumLost` when too few sites answer (a checkpoint is kept).
    """
    from fedmed.engines.prepare import site_file

    started = time.monotonic()
    folder = RunFolder(Path(config.out))
    data_path = site_file(config) if config.data.path else None
    store = CheckpointStore(folder.checkpoint)
    checkpoint = _checkpoint(store, config, resume)
    exchange = _sites(grid, config, data_path, checkpoint, approved)
    facts = _facts(exchange, data_path)
    cls = client_class(config)
    model, activation = make_model(config, facts.task, len(facts.classes), len(facts.channels), facts.image_size)
    layout = Layout.of(model, cls.is_personal)
    journal = Journal(folder.history, callbacks)
    central = central_scorer(config, data_path, model, layout, activation, cls)
    check_selection(config, facts.task, central is not None)
    local = local_scores(config, facts.task, cls, exchange.known)
    initial = layout.exchanged_state(model)
    loop: RoundLoop | None = None
    rule: Any = None  # a strategy of Flower's, in the place of the loop
    if config.strategy.name.startswith("flwr:"):
        rule = flower_strategy(config)
        check_client(cls, facts, config)
    else:
        strategy = make_strategy(config)
        check_pair(strategy, cls, facts, config)
        keep = lambda state: write_safetensors(folder.path / "model-selected.safetensors", _whole(model, state))  # noqa: E731
        loop = RoundLoop(
            strategy, exchange, config, layout, initial, journal=journal, store=store, central=central, on_best=keep,
            config_hash=_config_hash(config, strategy),
        )  # fmt: skip
    if loop is not None and checkpoint is not None:
        loop.resume(checkpoint)
    else:
        journal.restore(0)  # what an earlier attempt left before its first checkpoint
    # Everything fits; only from here on is anything written.
    write_text(folder.config, to_yaml(config))
    write_json(folder.path / "model.json", _model_facts(config, facts, activation, exchange, data_path))
    start_round = checkpoint.round + 1 if checkpoint else 1
    journal.tell("on_start", start_info(config, start_round, exchange.sites, main_metric(facts.task)))
    if loop is not None:
        final = loop.run()
    else:
        final = run_flower_strategy(rule, grid, config, initial, journal, exchange, central)
    write_safetensors(folder.model, _whole(model, final))
    elapsed = time.monotonic() - started if loop is None else loop.elapsed
    summary = _summary(folder, config, facts, data_path, layout, journal, elapsed, local)
    return _close(folder, journal, summary, None if loop is None else loop.progress.best)


def _config_hash(config: Config, strategy: Strategy) -> str:
    """What a resume must agree with; the number of rounds is part of it where something counts back from the last one."""
    return config_hash(config, with_rounds=strategy.depends_on_rounds or config.optimizer.schedule == "poly")


def _summary(
    folder: RunFolder,
    config: Config,
    facts: Identity,
    data_path: Path | None,
    layout: Layout,
    journal: Journal,
    elapsed: float,
    local: LocalScores | None,
) -> dict[str, Any]:
    """The numbers of the run; what was done to the sites' labels is compared with what the rule believes, where it is known."""
    truth = read_truth(data_path) if data_path is not None else {}
    metric = main_metric(facts.task)
    summary = build_summary(
        folder.path, journal.records, config, truth, main_metric=metric, seconds=elapsed, local=local
    )
    if layout.personal:
        summary["notes"]["personal_entries"] = (
            f"{len(layout.personal)} entries stay at the sites; model.safetensors holds the run seed's values for them"
        )
    return summary


def _sites(
    grid: Grid,
    config: Config,
    data_path: Path | None,
    checkpoint: Checkpoint | None,
    approved: Callable[[], Mapping[int, str]] | None,
) -> Exchange:
    """The sites of the run, once enough of them are there. Raises `UserError`, `QuorumLost`."""
    from fedmed.engines.prepare import count_sites

    expected = count_sites(data_path) if data_path else None
    if expected is not None and expected < config.federation.min_sites:  # nobody else will come
        raise UserError(
            f"federation.min_sites is {config.federation.min_sites}, but {data_path} holds {expected} sites; lower it, or give data with more sites"
        )
    exchange = Exchange(
        grid, min_sites=config.federation.min_sites, plain_clients=config.federation.plain_clients,
        start_deadline_s=config.federation.start_deadline_s, identify_deadline_s=config.federation.identify_deadline_s,
        expected=expected, approved=approved,
    )  # fmt: skip
    if checkpoint is not None:
        exchange.known = dict(checkpoint.sites)
    exchange.wait_for_sites()
    return exchange


def _close(folder: RunFolder, journal: Journal, summary: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """Write the summary, with the chosen round if there is one, and tell everybody; gives it back."""
    if best:
        _add_selected(summary, best, journal)
    write_json(folder.summary, summary)
    journal.tell("on_end", summary)
    return summary


def _add_selected(summary: dict[str, Any], best: dict[str, Any], journal: Journal) -> None:
    """Say which round was chosen, and what its model scored centrally: the round of model-selected.safetensors."""
    scored = [r["metrics"] for r in journal.records if r["phase"] == "central" and r["round"] == best["round"]]
    summary["selected"] = json_ready(best)
    summary["central"]["selected"] = {"round": best["round"], **scored[-1]} if scored else {}


def _checkpoint(store: CheckpointStore, config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, if any. Raises `UserError` rather than run over the one of an earlier run."""
    if resume and config.strategy.name.startswith("flwr:"):
        raise UserError(
            "a Flower strategy (strategy.name=flwr:...) cannot be resumed; start the run anew in another folder"
        )
    if resume:
        return store.read()
    if store.rounds():
        raise UserError(
            f"{store.folder.parent} holds a run that reached round {store.rounds()[-1]}; resume it (resume=True, --resume) or choose another folder"
        )
    return None


def make_strategy(config: Config) -> Strategy:
    """The rule of a configuration with its arguments. Raises `UserError`."""
    cls: type[Strategy] = checked("strategy", config.strategy.name, Strategy)
    return cls(params_from(cls.Params, config.strategy.args, "strategy.args"))


def _check_task(role: str, tasks: tuple[str, ...], name: str, facts: Identity) -> None:
    if facts.task not in tasks:
        raise UserError(
            f"{role} {name!r} is for {', '.join(tasks)}, the sites have a {facts.task} task; choose another {role} or data set"
        )


def check_client(cls: type[Client], facts: Identity, config: Config) -> None:
    """Refuse a client that is not for the task of the sites, and arguments no site would accept. Raises `UserError`."""
    if config.federation.plain_clients:
        return
    _check_task("client", cls.tasks, config.client.name, facts)
    params_from(cls.Params, config.client.args, "client.args")
    make_addons(config)
    Augment(config.data.augment)


def check_selection(config: Config, task: str, has_central: bool) -> None:
    """Refuse a choice of the best round that could never be made. Raises `UserError`."""
    metric = config.evaluation.select
    if metric is None:
        return
    if metric not in round_metrics(task):
        raise UserError(
            f"evaluation.select: {task} is not scored by {metric!r} every round{nearest(metric, round_metrics(task))}"
        )
    if not has_central and not (config.evaluation.sites and config.evaluation.mode == "separate"):
        raise UserError(
            "evaluation.select needs scores of the global model on validation items: evaluation.sites=true with evaluation.mode=separate, "
            "or items the coordinator holds (evaluation.central)"
        )


def local_scores(config: Config, task: str, cls: type[Client], sites: Iterable[str]) -> LocalScores | None:
    """Scores of the local-only run to be set beside this one, if one is named; read before anything begins. Raises `UserError`."""
    folder = config.evaluation.local_only
    if folder is None:
        return None
    if "personal" not in cls.views:
        raise UserError(
            f"evaluation.local_only: client {config.client.name!r} has no personal view to set it beside; leave the key out, "
            "or use a method with personal models"
        )
    return read_local(Path(folder), main_metric(task), sites)


def check_pair(strategy: Strategy, cls: type[Client], facts: Identity, config: Config) -> None:
    """Refuse a rule, a client and a task that do not belong together. Raises `UserError`."""
    _check_task("strategy", strategy.tasks, config.strategy.name, facts)
    check_client(cls, facts, config)
    leaves = {leaf.name for leaf in declared_leaves(cls, make_addons(config))}
    missing = [name for name in strategy.requires if name not in leaves]
    if missing and not config.federation.plain_clients:
        raise UserError(
            f"strategy {config.strategy.name!r} needs {', '.join(missing)} from the sites, which client {config.client.name!r} does not send; "
            "use the client of the same method"
        )


def check_config(config: Config, facts: Identity) -> None:
    """Refuse before anything is started what the run would refuse later: names, arguments, method and task. Raises `UserError`."""
    from fedmed.engines.prepare import site_file

    cls = client_class(config)
    make_model(config, facts.task, len(facts.classes), len(facts.channels), facts.image_size)
    check_selection(config, facts.task, has_central=True)  # whether there is one is seen later
    with SiteFile.open(site_file(config)) as file:
        local_scores(config, facts.task, cls, [site.name for site in file.sites])
    if config.strategy.name.startswith("flwr:"):
        flower_strategy(config)
        check_client(cls, facts, config)
    else:
        check_pair(make_strategy(config), cls, facts, config)


def _facts(exchange: Exchange, data_path: Path | None) -> Identity:
    """What the model is built for: the first site's identity, or the simulation's site file where all nodes are plain Flower clients."""
    known = [identity for identity in exchange.roster.values() if not identity.plain]
    if known:
        return min(known, key=lambda i: i.index)
    if data_path is None:
        raise UserError(
            "only plain Flower clients are online and data.path is empty; set data.path to a site file that says task, classes and image size"
        )
    return file_facts(data_path)


def file_facts(path: Path) -> Identity:
    """What the sites of a site file have in common, as a nameless identity. Raises `UserError`."""
    with SiteFile.open(path) as file:
        return Identity(
            "", file.task, tuple(file.classes), tuple(file.channels), tuple(file.image_size), "", 0, plain=True
        )


def _model_facts(
    config: Config, facts: Identity, activation: str, exchange: Exchange, data_path: Path | None
) -> dict[str, Any]:
    """What `fedmed.load` needs to build the model again, and how its images were prepared, as far as a simulation's site file says."""
    return {
        "task": facts.task, "classes": list(facts.classes), "channels": list(facts.channels), "image_size": list(facts.image_size),
        "activation": activation, "mean": config.data.mean, "std": config.data.std,
        "annotation_kinds": {name: identity.label_kind for name, identity in exchange.roster.items()},
        **_prepared(config, data_path),
    }  # fmt: skip


def _prepared(config: Config, data_path: Path | None) -> dict[str, Any]:
    """`preprocessing`: what the import wrote into the site file, None where it wrote nothing; `stored_size`: image size before data.resize."""
    if data_path is None:
        return {"preprocessing": None, "stored_size": None}
    with SiteFile.open(data_path) as file:
        text, size = file.meta.get("preprocessing"), file.image_size
    source = Path(config.data.path).expanduser()
    known = config.data.resize is None or source.is_file()  # else a resized phantom
    stored = file_facts(source).image_size if config.data.resize is not None and known else size
    try:
        made = json.loads(text) if isinstance(text, str) else None
    except ValueError:  # free text
        made = None
    return {"preprocessing": made if isinstance(made, dict) else None, "stored_size": list(stored) if known else None}


def _whole(model: nn.Module, exchanged: State) -> State:
    """The complete state of the model: exchanged entries, and the run seed's values of the others."""
    return {**model.state_dict(), **exchanged}
