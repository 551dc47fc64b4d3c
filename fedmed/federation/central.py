"""Scoring the global model on items the coordinator holds: its own site file, or the group `central` of a derived file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from fedmed.config import Config
from fedmed.data.site_file import SiteFile
from fedmed.federation.client import Client, Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.rounds import Scorer
from fedmed.federation.scoring import score_subsets, score_view, write_case_files
from fedmed.federation.site import choose_device, make_model
from fedmed.federation.state import State


def central_scorer(
    config: Config, data_path: Path | None, model: nn.Module, layout: Layout, activation: str, cls: type[Client]
) -> Scorer | None:
    """A function that scores the global view on items the coordinator holds, or None if there are none.

    Beside the clean items of a derived file come its conditions (groups `central_<condition>`), loaded once like these.
    """
    choice = config.evaluation.central
    if choice == "none" or "global" not in cls.views:
        return None
    path, group = (data_path, "central") if choice == "auto" else (Path(choice), None)
    if path is None:
        return None
    cfg = config.data
    read = partial(
        SiteFile.site, annotation=cfg.annotation, mean=cfg.mean, std=cfg.std, allow_empty_train=True, load=cfg.load
    )
    with SiteFile.open(path) as file:
        if group is not None and not file.central:
            return None
        data = {"": read(file, group or file.sites[0].name)}
        if group is not None:
            data |= {name: read(file, f"{group}_{name}") for name in file.conditions}
    device = choose_device(config.engine.device)
    clean = data[""]
    # One network for all conditions; each score loads the state anew.
    scored_model, _ = make_model(config, clean.task, len(clean.classes), len(clean.channels), clean.image_size)
    scored_model.to(device)
    subsets = config.evaluation.modality_subsets
    places = {name: Env(config, d, scored_model, layout, device, activation, "central") for name, d in data.items()}

    def scorer(state: State, last: bool) -> dict[str, float]:
        """Score one global state, on the clean items first (and on every subset of their modalities)."""
        metrics: dict[str, float] = {}
        for condition, env in places.items():
            client = cls(env, Moment(), {})
            client.received = state
            hd95 = config.evaluation.hd95 and last
            # Scores by class only here: of the few items of a class that a site holds they would say too much.
            scores, details = score_view(client, "global", hd95=hd95, condition=condition, by_class=True)
            metrics |= scores
            if last and not condition:  # beside the sites' own, for the report
                write_case_files(Path(config.out) / "central", details)
            if not condition and (subsets == "every" or (subsets == "last" and last)):
                metrics |= score_subsets(client)
        return metrics

    return scorer
