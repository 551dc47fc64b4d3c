"""What a site keeps of its last evaluation: which cases are chosen, the counts by hand, and nothing that names an item."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.config import from_tree
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.federation import case_files
from fedmed.federation.case_files import pick_cases
from fedmed.federation.client import Client, Moment
from fedmed.federation.scoring import score_view, write_case_files
from fedmed.federation.site import Place, Workshop
from fedmed.report.write import read_overlay

NAN = float("nan")


def dice(*values: float) -> list[dict[str, float]]:
    """Cases with these Dice scores."""
    return [{"dice": v} for v in values]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ((), {}),
        ((0.3,), {"median": 0}),
        ((NAN,), {"median": 0}),
        ((NAN, NAN), {"median": 0}),
        ((NAN, 0.5), {"median": 1}),
        ((0.3, 0.7), {"best": 1, "worst": 0}),
        ((0.5, 0.1, 0.9), {"best": 2, "median": 0, "worst": 1}),
        ((0.5, 0.1, 0.9, NAN, 0.2), {"best": 2, "median": 4, "worst": 1}),
        ((0.4, 0.4, 0.4), {"best": 0, "median": 1, "worst": 2}),
    ],
)
def test_best_median_and_worst_by_hand(values: tuple[float, ...], places: dict[str, int]) -> None:
    assert pick_cases("segmentation", dice(*values)) == places


def test_each_task_has_a_score_of_its_own() -> None:
    cases = [{"prob_true": 0.1, "correct": 1.0}, {"prob_true": 0.9, "correct": 0.5}]
    assert pick_cases("classification", cases) == {"best": 1, "worst": 0}
    assert pick_cases("multilabel", cases) == {"best": 0, "worst": 1}


class Told(Client):
    """A client that predicts what the test says: a function of the batch."""

    answer: Callable[[Any, Batch], Tensor]

    def predict(self, batch: Batch, view: str) -> Tensor:
        """The test's answer; the model must be in eval mode and nothing recorded."""
        assert not self.model.training and not torch.is_grad_enabled()
        return self.answer(batch)


def told(path: Path, answer: Callable[[Any, Batch], Tensor], model: str = "small_cnn") -> Client:
    """A client on the first site of `path` that predicts `answer`."""
    args = {"widths": [4, 4]} if model == "small_cnn" else {"base_width": 4}
    tree = {"model": {"name": model, "args": args}, "training": {"batch_size": 1}}
    workshop = Workshop(from_tree({**tree, "engine": {"device": "cpu"}}))
    env = workshop.env(workshop.data(Place(path, partition=0)))
    cls = type("ToldHere", (Told,), {"answer": answer})
    client = cls(env, Moment(1, 1), {})
    client.received = {n: v.clone() for n, v in env.layout.exchanged_state(env.model).items()}
    return client


def test_segmentation_pictures_and_pixel_counts(tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "seg.h5", "segmentation", num_sites=1, images_per_site=20, image_size=16)

    def answer(client: Any, batch: Batch) -> Tensor:
        """Right everywhere, but item k of the split has its first 4·k pixels turned over."""
        wanted = (batch.targets == 1).float().flatten(1)
        place = {int(row): k for k, row in enumerate(client.data.splits["test"])}
        for line, row in zip(wanted, batch.index.tolist(), strict=True):
            line[: 4 * place[row]] = 1 - line[: 4 * place[row]]
        return wanted.view(len(batch), 1, 16, 16)

    client = told(path, answer, "unet")
    _, scored = score_view(client, "global")
    write_case_files(tmp_path / "kept", scored)

    cases = [row["dice"] for row in scored[0].cases]
    stored = read_overlay(tmp_path / "kept" / "overlay.npz")
    assert stored["rank"].tolist() == ["best", "median", "worst"]
    ordered = sorted(cases, reverse=True)
    assert stored["dice"].tolist() == [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    assert stored["image"].shape == (3, 16, 16, 3) and stored["image"].dtype == np.uint8
    flips = (stored["reference"] != stored["prediction"]).sum(axis=(1, 2))
    assert flips.tolist() == [4 * place for place in pick_cases("segmentation", scored[0].cases).values()]

    found = json.loads((tmp_path / "kept" / "confusion.json").read_text())
    with SiteFile.open(path) as file:
        data = file.site(file.sites[0].name)
    masks = data.target[data.splits["test"]]
    wrong = np.zeros((2, 2), dtype=int)
    for k, mask in enumerate(masks):
        line = mask.ravel()
        guess = np.where(np.arange(line.size) < 4 * k, 1 - line, line)
        np.add.at(wrong, (line, guess), 1)
    assert found["counts"] == wrong.tolist() and found["unit"] == "pixels" and found["split"] == "test"
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert not [p for p in (tmp_path / "kept").iterdir() if "tmp" in p.name]


def test_classification_counts_and_examples(site_file: Path, tmp_path: Path) -> None:
    def answer(client: Any, batch: Batch) -> Tensor:
        """Class 0 always, more surely for items that stand later in the site."""
        prob = torch.full((len(batch), len(client.data.classes)), 0.01)
        prob[:, 0] = 0.5 + 0.001 * batch.index
        return prob

    client = told(site_file, answer)
    _, scored = score_view(client, "global")
    write_case_files(tmp_path / "kept", scored)
    labels = [int(row["label"]) for row in scored[0].cases]
    found = json.loads((tmp_path / "kept" / "confusion.json").read_text())
    counts = np.array(found["counts"])
    assert counts[:, 0].tolist() == [labels.count(c) for c in range(len(counts))] and counts[:, 1:].sum() == 0
    with np.load(tmp_path / "kept" / "examples.npz", allow_pickle=False) as stored:
        assert set(stored.files) == {"rank", "score", "image", "classes", "probability", "truth"}
        picked = stored["probability"][np.arange(len(stored["truth"])), stored["truth"]]
        assert np.allclose(picked, stored["score"])
        assert stored["score"][0] == max(row["prob_true"] for row in scored[0].cases)
    assert not (tmp_path / "kept" / "overlay.npz").exists()
    names = client.data.item_id
    for name in ("confusion.json", "examples.npz"):
        content = (tmp_path / "kept" / name).read_bytes()
        assert not any(item.encode() in content for item in names)


def test_unknown_labels_are_not_counted() -> None:
    cases = [
        {"label_0": 1.0, "prob_0": 0.9}, {"label_0": 1.0, "prob_0": 0.5}, {"label_0": 0.0, "prob_0": 0.7},
        {"label_0": NAN, "prob_0": 0.9}, {"label_0": 0.0, "prob_0": NAN},
    ]  # fmt: skip
    assert case_files._two_by_two(cases, 0).tolist() == [[0, 1], [1, 1]]


def test_multilabel_keeps_what_is_unknown(tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "multi.h5", "multilabel", num_sites=1, images_per_site=20, image_size=16)
    client = told(path, lambda client, batch: 0.8 * batch.targets)
    client.data.extras["active_classes"] = np.array([1, 0, *[1] * (len(client.data.classes) - 2)])
    _, scored = score_view(client, "global")
    write_case_files(tmp_path / "kept", scored)
    found = json.loads((tmp_path / "kept" / "confusion.json").read_text())
    counts = np.array(found["counts"])
    assert counts.shape == (len(client.data.classes), 2, 2)
    assert counts[1].sum() == 0  # the class the site does not annotate
    assert (counts[:, 0, 1] == 0).all() and (counts[:, 1, 0] == 0).all()  # never wrong
    with np.load(tmp_path / "kept" / "examples.npz", allow_pickle=False) as stored:
        assert np.isnan(stored["truth"][:, 1]).all() and not np.isnan(stored["truth"][:, 0]).any()


def test_the_test_split_is_kept_where_a_round_is_chosen_on_validation(bench: Any, tmp_path: Path) -> None:
    site = bench(evaluation={"select": "bacc"})
    site.send("evaluate", final=True)
    assert json.loads((tmp_path / "site" / "confusion.json").read_text())["split"] == "test"


def test_nothing_scored_leaves_no_pictures(tmp_path: Path) -> None:
    write_case_files(tmp_path / "kept", [])
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["cases.csv"]
