"""Folders a page can be made of: a run with everything a page shows, and a comparison, both written by hand."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.config import folder_name, from_tree, to_yaml
from fedmed.files import json_ready, write_json
from fedmed.report.summary import build_summary

ITEM = "PATIENT-0007/slice"  # how every item id of these folders begins
CLASSES = ["even", "ragged", "ringed"]
SITES = ("north", "south", "west")
MODEL_BYTES = 4000
VOID = {"meta", "img", "br", "hr", "link", "input", "line", "path", "use"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; collects ids, references, headings, text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # (tag, name, value)
        self.headings: list[tuple[int, str]] = []
        self.words: list[str] = []
        self.texts: dict[str, str] = {}  # of style and script
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element and what it says of itself."""
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that closes itself (in SVG)."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        """The element that is open must be the one that closes."""
        if tag in VOID:  # an SVG element with a child, such as a tooltip
            return
        assert self.stack and self.stack[-1] == tag, f"</{tag}> inside {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if self.stack and self.stack[-1] in ("style", "script"):
            self.texts[self.stack[-1]] = self.texts.get(self.stack[-1], "") + data
            return
        self.words.append(data)
        if self.stack and self.stack[-1] in ("h1", "h2", "h3", "h4"):
            level, found = self.headings[-1]
            self.headings[-1] = (level, found + data)

    def values(self, *names: str) -> list[str]:
        """Values of all attributes of these names."""
        return [value for _, name, value in self.attributes if name in names]


def config_of(folder: Path, **sections: Any) -> Any:
    """A configuration whose data were partitioned and corrupted."""
    data = {
        "path": "phantom:classification",
        "cache_dir": str(folder.parent / "cache"),
        "partition": {"name": "dirichlet", "args": {"alpha": 2.0}},
        "corruption": {"name": "label_noise", "args": {"kind": "random"}},
    }
    tree = {"name": "by_hand", "description": "A run written by hand.", "seed": 3, "data": data}
    return from_tree({**tree, "federation": {"rounds": 4}, **sections})


def truth_of(sites: tuple[str, ...]) -> dict[str, Any]:
    """The second site is noisy."""
    return {site: {"is_noisy": i == 1, "noise_rate": 0.4 * (i == 1)} for i, site in enumerate(sites)}


def records(sites: tuple[str, ...], rounds: int = 4, level: float = 0.8) -> list[dict[str, Any]]:
    """Training, notes, both views at the sites, conditions and subsets at the centre; one answer fails in round 2."""
    found: list[dict[str, Any]] = []

    def add(round_number: int, phase: str, site: str | None, metrics: dict[str, Any], **more: Any) -> None:
        base = {"status": "ok", "reason": None, "num_examples": 10, "seconds": 0.5}
        found.append({"round": round_number, "phase": phase, "site": site, **base, "metrics": metrics, **more})

    for t in range(1, rounds + 1):
        for i, site in enumerate(sites):
            if (t, i) == (2, 1):
                add(t, "train", site, {}, status="failed", reason="no answer within 5 s")
            else:
                add(t, "train", site, {"train_loss": 1.0 / t + 0.1 * i}, num_examples=10 + 10 * i)
        add(t, "server", None, {"weights": {s: (1 + i) / 6 for i, s in enumerate(sites)}})
        add(t, "server", None, {"believed_noisy": [sites[1], sites[2]]})
        add(t, "server", None, {"sharpness": {s: 0.1 * i for i, s in enumerate(sites)}})
        for i, site in enumerate(sites):
            value = level * t / rounds - 0.1 * i
            add(t, "evaluate", site, {"n/test": 10, "test/global/bacc": value, "test/personal/bacc": value + 0.05})
        central = {"n/test": 30, "test/global/bacc": level * t / rounds, "test-corrupted/global/bacc": 0.5 * t / rounds}
        central |= {
            "n/test-with+T1": 30,
            "test-with+T1/global/bacc": 0.4,
            "n/test-with+T2": 30,
            "test-with+T2/global/bacc": 0.6,
        }
        add(t, "central", None, central)
    return found


def examples(path: Path) -> None:
    """Three classified cases of 8 x 8 pixels: scores 0.7, 0.4 and 0.1."""
    rng = np.random.default_rng(0)
    probability = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    np.savez(
        path / "examples.npz", rank=np.array(["best", "median", "worst"]), score=np.array([0.7, 0.4, 0.1]),
        image=rng.integers(0, 255, (3, 8, 8, 3)).astype(np.uint8), classes=np.array(CLASSES), probability=probability,
        truth=np.array([0, 1, 2]), item_id=np.array([f"{ITEM}{i}" for i in range(3)]),
    )  # fmt: skip


def counts() -> list[list[int]]:
    """A confusion table that is not symmetric."""
    return [[5, 1, 0], [2, 3, 1], [0, 0, 0]]


def make_run(folder: Path, sites: tuple[str, ...] = SITES, level: float = 0.8, **sections: Any) -> Path:
    """Write a finished run folder with everything a page shows."""
    config, history = config_of(folder, **sections), records(sites, level=level)
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    (folder / "config.yaml").write_text(to_yaml(config))
    write_json(
        folder / "summary.json",
        build_summary(folder, history, config, truth_of(sites), main_metric="bacc", seconds=12.0),
    )
    write_json(folder / "model.json", {"task": "classification", "classes": CLASSES, "channels": ["R", "G", "B"]})
    header = b"{}" + b" " * 6
    for path in (folder / "checkpoint" / "round-00004" / "model.safetensors", folder / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(MODEL_BYTES))
    for site in sites:
        own = folder / "sites" / folder_name(site)
        own.mkdir(parents=True)
        with (own / "cases.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["item", "correct"], [f"{ITEM}1", 1]])
        write_json(
            own / "confusion.json",
            {
                "task": "classification",
                "split": "test",
                "view": "global",
                "unit": "cases",
                "classes": CLASSES,
                "counts": counts(),
            },
        )
        examples(own)
    return folder


def make_recipe(cache: Path, sites: tuple[str, ...] = SITES, seed: int = 3, alpha: float = 2.0) -> Path:
    """Write a derived file that holds nothing but its recipe."""
    import h5py

    cache.mkdir(exist_ok=True)
    facts = [{"site": site, "n_train": 10, **info} for site, info in truth_of(sites).items()]
    recipe = {
        "source": {"file": "phantom-classification-0.h5", "sha256": "ab" * 32}, "resize": None, "seed": seed, "sites": facts,
        "partition": {"name": "dirichlet", "args": {"alpha": alpha, "num_clients": 3}},
        "corruption": {"name": "label_noise", "args": {"kind": "random", "noisy_fraction": 0.42}},
    }  # fmt: skip
    path = cache / f"phantom-classification-0-{seed}{alpha}.h5"
    with h5py.File(path, "w") as file:
        file.attrs["recipe"] = json.dumps(recipe)
    return path


def difference(mean: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    """A difference as comparison.json has it."""
    counted = {
        "sd": 0.01,
        "p": 0.04,
        "p_holm": 0.08,
        "pairs": 6,
        "per": "seed x site",
        "wins": 4,
        "ties": 1,
        "losses": 1,
    }
    return {"mean": mean, "low": low, "high": high, "seeds": 2, "missing": 0, **counted, **more}


def make_comparison(folder: Path, runs: bool = True) -> dict[str, Any]:
    """Write a comparison of three arms, two seeds and two settings; one run has failed, one waits. Gives its content."""
    results, cells = [], []
    gaps = {"mine": difference(0.05, 0.02, 0.08), "other": difference(-0.01, -0.04, 0.02)}
    for setting, shift in (("easy", 0.0), ("hard", -0.2)):
        for arm, gain in (("base", 0.0), ("mine", 0.05), ("other", -0.01)):
            for metric in ("bacc", "gap:bacc"):
                values = {str(seed): 0.7 + shift + gain + 0.01 * seed for seed in (0, 1)}
                by_site = {seed: {"north": v, "south": v - 0.1} for seed, v in values.items()}
                results.append(
                    {
                        "setting": setting, "arm": arm, "metric": metric, "values": values, "sites": by_site if metric == "bacc" else {},
                        "mean": sum(values.values()) / 2, "sd": 0.007, "best": arm == "mine", "tied": arm == "other",
                        "difference": None if arm == "base" else gaps[arm],
                    }
                )  # fmt: skip
            for seed in (0, 1):
                state = (
                    "failed"
                    if (setting, arm, seed) == ("hard", "mine", 1)
                    else "waiting"
                    if (setting, arm, seed) == ("hard", "other", 1)
                    else "done"
                )
                where = f"{setting}/{arm}-{seed}"
                cells.append(
                    {
                        "setting": setting, "arm": arm, "seed": seed, "folder": where, "command": f"fedmed run fednoro seed={seed} --out out/{where}",
                        "config_hash": f"{len(cells):016x}", "state": state, "seconds": 61.2 if state == "done" else None,
                        "error": "QuorumLost: 1 of 3 sites <b>answered</b>" if state == "failed" else None,
                    }
                )  # fmt: skip
                if runs and state == "done":
                    make_run(folder / where, level=0.7 + shift + (0.05 if arm == "mine" else 0.0))
    content = {
        "kind": "comparison", "name": "by_hand", "variant": "small", "description": "Three arms by hand.", "base": "fednoro",
        "data": "some.h5", "engine": "local", "command": "fedmed compare by_hand", "metrics": ["bacc", "gap:bacc"], "last_rounds": 5,
        "baseline": "base", "seeds": [0, 1], "versions": {"python": "3.11"},
        "settings": [
            {"name": "easy", "title": "Easy & clean", "arms": ["base", "mine", "other"], "against": None},
            {"name": "hard", "title": "Hard", "arms": ["base", "mine", "other"], "against": None},
        ],
        "cells": cells, "results": results,
        "win_tie_loss": [{"arm": "mine", "metric": "bacc", "wins": 2, "ties": 0, "losses": 0}],
        "findings": [{"setting": "easy", "arm": "mine", "seed": 0, "columns": ["precision"], "cells": ["0.62"]}],
        "cost": [
            {"setting": "easy", "arm": "mine", "seconds": 60.0, "steps": 1200, "forward": 5000, "backward": 4000, "down": 2.5e6,
             "up": 2.5e6, "memory": 1e9},
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(json_ready(content)))
    return content
