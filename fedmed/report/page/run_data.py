"""Everything a page about a run needs, read out of its folder; what is missing is empty and never an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.files import Record, read_history, read_json
from fedmed.report.run_folder import RunFolder
from fedmed.report.values import number


@dataclass(frozen=True)
class RunData:
    """A run: its folder, the numbers of summary.json, the records, config.yaml as text and as a tree, model.json."""

    folder: RunFolder
    summary: Mapping[str, Any]
    history: Sequence[Record]
    config_text: str
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    finished: bool

    @cached_property
    def sites(self) -> dict[str, int]:
        """Site -> number of its line in every figure, by name."""
        names = {*self.summary.get("sites", {}), *self.summary.get("truth", {})}
        return {site: place for place, site in enumerate(sorted(names))}

    @property
    def metric(self) -> str:
        """The metric that judges, "" without evaluation."""
        return self.summary.get("main_metric") or ""

    @property
    def key(self) -> str | None:
        """Its full name in the records ("test/global/dice"), None without evaluation."""
        prefix = self.summary.get("judged_by")
        return f"{prefix}/{self.metric}" if prefix and self.metric else None

    @property
    def scores(self) -> dict[str, float]:
        """Site -> last value of the judging metric."""
        return {site: number(found.get(self.metric)) for site, found in self.summary.get("sites", {}).items()}

    @property
    def noisy(self) -> set[str]:
        """Sites whose training data are known to be corrupted."""
        return {site for site, info in self.summary.get("truth", {}).items() if info.get("is_noisy")}

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return default if node is None else node

    def site_folders(self) -> dict[str, Path]:
        """Site -> its own folder, where the folder is there (simulations)."""
        found = {site: self.folder.site(site) for site in self.sites}
        return {site: path for site, path in found.items() if path.is_dir()}

    @property
    def central_folder(self) -> Path:
        """What the coordinator kept of scoring its own file, if it did."""
        return self.folder.path / "central"


def read_run(path: Path) -> RunData:
    """Read a run folder. One that did not finish is summed up from its records. Raises `UserError` for another folder."""
    folder = RunFolder(path)
    if not folder.history.is_file():
        raise UserError(
            f"{path} holds no run: no history.jsonl, no comparison.json; give the folder of a run or of a comparison"
        )
    history = read_history(folder.history)
    text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    finished = folder.summary.is_file()
    summary = read_json(folder.summary) if finished else _sum_up(path, history, text)
    model_file = path / "model.json"
    model = read_json(model_file) if model_file.is_file() else {}
    for file, found in ((folder.summary, summary), (model_file, model)):
        if not isinstance(found, Mapping):
            raise UserError(f"{file} holds no keys and values, so it was not written by a run")
    return RunData(folder, summary, history, text, _tree(text), model, finished)


def _tree(text: str) -> Mapping[str, Any]:
    """config.yaml as a tree, whatever version of FedMed wrote it."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _sum_up(path: Path, history: Sequence[Record], text: str) -> Mapping[str, Any]:
    """The numbers of a run that left no summary: what its records say so far."""
    from fedmed.config import Config, from_yaml
    from fedmed.report.summary import build_summary

    try:
        config = from_yaml(text) if text else dataclasses.replace(Config(), name=path.name)
    except UserError:  # of another version
        config = dataclasses.replace(Config(), name=path.name)
    return build_summary(path, history, config)
