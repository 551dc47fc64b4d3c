"""Supervised training and scoring where a site annotates some of the classes only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.supervised import Supervised
from fedmed.config import from_tree
from fedmed.data.phantom import make_phantom
from fedmed.errors import UserError
from fedmed.federation.client import Moment
from fedmed.federation.scoring import score
from fedmed.federation.site import Place, Workshop, make_addons
from fedmed.federation.state import clone_state
from fedmed.models.output import Output

CLASSES = 6
Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multilabel") / "sites.h5"
    return make_phantom(path, "multilabel", num_sites=1, images_per_site=40, image_size=16)


@pytest.fixture
def site(source: Path, tmp_path: Path) -> Factory:
    """`site(active, ...)`: a client of a multi-label site with these active_classes, (L,), (N, L) or None."""

    def make(active: np.ndarray | None = None, **client: Any) -> Any:
        path = tmp_path / "site.h5"
        path.write_bytes(source.read_bytes())
        with h5py.File(path, "r+") as file:
            if active is not None and active.ndim == 2:
                file["site_00/active_classes"] = active.astype(np.uint8)
            elif active is not None:
                file["site_00"].attrs["active_classes"] = active.astype(np.uint8)
        tree = {"model": {"args": {"widths": [4, 4]}}, "training": {"batch_size": 5}, "client": client}
        config = from_tree({**tree, "engine": {"device": "cpu"}})
        workshop = Workshop(config)
        env = workshop.env(workshop.data(Place(path, partition=0)))
        made = Supervised(env, Moment(1, 4), make_addons(config))
        made.received = clone_state(env.layout.exchanged_state(env.model))
        made.load_view("global")
        return made

    return make


def first_batch(client: Any) -> Any:
    return client.train_set.batch(torch.arange(5))


def loss_of(client: Any, batch: Any, logits: torch.Tensor) -> torch.Tensor:
    terms = client.loss(Output(logits), batch, 0)
    assert list(terms) == ["bce"]
    return terms["bce"]


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_without_flags_nothing_changes(site: Factory) -> None:
    for args in ({}, {"missing": "negative"}):
        client = site(args=args)
        batch, logits = first_batch(client), random_logits()
        assert torch.equal(loss_of(client, batch, logits), F.binary_cross_entropy_with_logits(logits, batch.targets))


@pytest.mark.parametrize("whole", [True, False])
def test_missing_classes_are_left_out(site: Factory, whole: bool) -> None:
    flags = np.array([1, 0, 0, 1, 0, 0])
    client = site(flags if whole else np.tile(flags, (40, 1)))
    batch, logits = first_batch(client), random_logits()
    batch.targets[:, 1] = 1.0  # what stands there is not read
    value = loss_of(client, batch, logits)
    value.backward()
    kept = [0, 3]
    expected = F.binary_cross_entropy_with_logits(logits[:, kept], batch.targets[:, kept])
    torch.testing.assert_close(value, expected)
    assert logits.grad is not None
    assert not logits.grad[:, [1, 2, 4, 5]].any() and (logits.grad[:, kept] != 0).all()


def test_each_item_has_its_own_classes(site: Factory) -> None:
    flags = np.random.default_rng(0).integers(0, 2, (40, CLASSES))
    client = site(flags)
    batch, logits = first_batch(client), random_logits()
    active = torch.from_numpy(flags[batch.index.numpy()]).bool()
    each = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
    torch.testing.assert_close(loss_of(client, batch, logits), each[active].mean())


def test_nothing_active_is_a_loss_of_zero(site: Factory) -> None:
    client = site(np.zeros((40, CLASSES)))
    batch, logits = first_batch(client), random_logits()
    value = loss_of(client, batch, logits)
    value.backward()
    assert float(value.detach()) == 0.0 and logits.grad is not None and not logits.grad.any()
    before = clone_state(client.model.state_dict())
    assert client.fit()["train_loss"] == 0.0
    trained = dict(client.model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in trained.items())


def test_negative_takes_the_zeros_as_they_are(site: Factory) -> None:
    client = site(np.array([1, 0, 0, 1, 0, 0]), args={"missing": "negative"})
    batch, logits = first_batch(client), random_logits()
    assert torch.equal(loss_of(client, batch, logits), F.binary_cross_entropy_with_logits(logits, batch.targets))


def test_what_missing_may_be(site: Factory) -> None:
    with pytest.raises(UserError, match="mask or negative"):
        site(args={"missing": "ignore"})


# ---------------------------------------------------------------------- what a file says, and scores


def test_classes_of_a_site_are_those_of_its_training_items(site: Factory) -> None:
    everything = site().data
    rows = everything.splits["train"]
    flags = np.ones((40, CLASSES), dtype=np.uint8)
    flags[rows] = 0
    flags[rows[0], 2] = flags[rows[1], 4] = 1
    data = site(flags).data
    assert np.flatnonzero(data.active_classes).tolist() == [2, 4]
    data.splits["train"] = rows[:0]
    assert data.active_classes.all()  # no training item: of any item
    assert everything.active_classes.all()
    assert everything.annotated(everything.split("test").batch(torch.arange(2))) is None


def test_scores_do_not_read_zeros_of_missing_classes(site: Factory) -> None:
    plain = score(site(), "test", "global")
    rows = site().data.splits["test"]
    flags = np.ones((40, CLASSES))
    flags[:, 1] = 0
    flags[rows[0], 0] = 0
    client = site(flags)
    scored = score(client, "test", "global")
    first, second = scored.cases[0], scored.cases[1]
    assert np.isnan(first["label_0"]) and np.isnan(first["label_1"]) and second["label_0"] in (0.0, 1.0)
    assert all(np.isnan(case["label_1"]) for case in scored.cases)
    assert [case["prob_1"] for case in scored.cases] == [case["prob_1"] for case in plain.cases]

    def judged(case: dict[str, Any]) -> float:
        known = [label for label in range(CLASSES) if not np.isnan(case[f"label_{label}"])]
        return float(np.mean([(case[f"prob_{label}"] > 0.5) == (case[f"label_{label}"] > 0.5) for label in known]))

    assert [case["correct"] for case in scored.cases] == pytest.approx([judged(case) for case in scored.cases])
    assert scored.metrics.keys() == plain.metrics.keys()


def test_scores_where_all_is_annotated_are_those_without_flags(site: Factory) -> None:
    plain, flagged = (score(site(active), "test", "global") for active in (None, np.ones((40, CLASSES))))
    assert plain.metrics == pytest.approx(flagged.metrics, nan_ok=True, rel=0, abs=0)


def test_scores_of_a_site_that_never_annotates_a_class(site: Factory) -> None:
    flags = np.array([1, 0, 1, 1, 1, 1])
    scored = score(site(flags), "test", "global")
    assert all(np.isnan(case["label_1"]) for case in scored.cases)
    none = score(site(np.zeros(CLASSES)), "test", "global")
    assert all(np.isnan(case["correct"]) for case in none.cases) and np.isnan(none.metrics["auc"])
