"""FedMLP at the site: what is read of the labels, what is tagged and kept, what is trained on, what leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.missing_classes import SOURCE, TAGS, MissingClasses, MissingClassesParams
from clients.prototype_tags import NEGATIVE, NONE, POSITIVE, similarity_difference
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.state import clone_state, first_non_finite
from fedmed.losses.multilabel import joint_terms, prior_shift, two_view_terms
from fedmed.models.build import build_model
from fedmed.models.output import Output

C, D, N, TRAIN = 3, 8, 26, 20
STAGE_1, COLLECT, STAGE_2 = {"stage": 1, "collect": 0}, {"stage": 1, "collect": 1}, {"stage": 2, "collect": 1}
ALL = {"negative_fraction": 1.0, "positive_fraction": 1.0}
Factory = Callable[..., Any]


@pytest.fixture
def new_client(tmp_path: Path) -> Factory:
    """`new_client(active, **client.args)`: a site of 20 training items of 3 classes that has received the initial model.

    active: (C,) or (N, C) flags, None: the file says nothing. Validation and test items are fully active.
    """

    def make(
        active: Any = (1, 0, 0), augment: tuple[str, ...] = ("hflip", "shift2"), round: int = 1, **args: Any
    ) -> Any:
        rng = np.random.default_rng(0)
        truth = (rng.random((N, C)) < 0.4).astype(np.uint8)
        given, extras = truth.copy(), {}
        if active is not None:
            flags = np.broadcast_to(np.asarray(active, dtype=np.uint8), (N, C)).copy()
            given[:TRAIN] *= flags[:TRAIN]
            flags[TRAIN:] = 1
            extras["active_classes"] = flags
        site = SiteArrays(
            name="clinic",
            image=rng.integers(0, 256, (N, 16, 16), dtype=np.uint8),
            annotations={"label": given},
            splits={"train": np.arange(TRAIN), "val": np.arange(TRAIN, 23), "test": np.arange(23, N)},
            extras=extras,
            reference={"label": truth},
        )
        meta = {"task": "multilabel", "classes": ["a", "b", "c"], "channels": ["grey"], "image_size": [16, 16]}
        path = write_site_file(tmp_path / "site.h5", meta, [site])
        config = from_tree(
            {"client": {"args": args}, "training": {"batch_size": 6}, "data": {"augment": list(augment)}}
        )
        with SiteFile.open(path) as file:
            data = file.site("clinic")
        model = build_model("small_cnn", {"widths": [4, D]}, 1, C, (16, 16), "multilabel", seed=1)
        layout = Layout.of(model, MissingClasses.is_personal)
        env = Env(config, data, model, layout, torch.device("cpu"), "sigmoid", "clinic")
        client = MissingClasses(env, Moment(round, 9), {})
        client.received = clone_state(layout.exchanged_state(model))
        return client

    return make


def prototypes(valid: tuple[int, ...] = (1,) * (2 * C), tau: tuple[float, ...] = (1.0,) * C) -> dict[str, Tensor]:
    proto = torch.randn(2 * C, D, generator=torch.Generator().manual_seed(3))
    flags = torch.tensor(valid, dtype=torch.uint8)
    return {"proto": proto * flags[:, None], "proto_valid": flags, "tau": torch.tensor(tau)}


def next_round(client: Any, make: Factory, active: Any = (1, 0, 0), **args: Any) -> Any:
    made = make(active, **args)
    made.personal = dict(client.personal)
    return made


def features_of(client: Any) -> np.ndarray:
    client.model.eval()
    with torch.no_grad():
        return client.model(client.given.batch(torch.arange(TRAIN)).images).features.double().numpy()


# ---------------------------------------------------------------------- what is read


def test_flags_of_the_training_items_count(new_client: Factory) -> None:
    client = new_client((1, 0, 1))
    client.begin_round(STAGE_1, {})
    assert client.annotated.tolist() == [[True, False, True]] * TRAIN
    assert client.supervised.shape == (N, C) and not client.supervised[TRAIN:].any()


def test_a_file_without_flags_is_annotated_in_full(new_client: Factory) -> None:
    client = new_client(None)
    client.begin_round(STAGE_2, prototypes())
    assert client.annotated.all() and (client.tags == NONE).all() and not client.asks_teacher
    assert torch.isfinite(torch.tensor(client.fit()["train_loss"]))


def test_labels_of_missing_classes_are_never_read(new_client: Factory) -> None:
    first, second = new_client(), new_client()
    split = second.train_set
    filled = split.targets.clone()
    filled[:, 1:] = 1
    second.train_set = split.with_targets(filled)
    results = []
    for client in (first, second):
        client.begin_round(COLLECT, {})
        results.append((client.fit(), client.end_round(), client.shift))
    assert results[0][0] == results[1][0] and torch.equal(results[0][2], results[1][2])
    for a, b in zip(results[0][1][0].values(), results[1][1][0].values(), strict=True):
        assert torch.equal(a, b)


def test_prior_of_the_observed_labels(new_client: Factory) -> None:
    client = new_client(prior_clip=1e-3)
    client.begin_round(STAGE_1, {})
    rate = client.train_set.targets[:, 0].double().mean()
    assert client.shift[0].item() == pytest.approx((rate / (1 - rate)).log().item(), abs=1e-6)
    without = new_client(prior_adjustment=False)
    without.begin_round(STAGE_1, {})
    assert without.shift is None


# ---------------------------------------------------------------------- stage 1


def test_the_second_view_leaves_the_first_as_it_is(new_client: Factory) -> None:
    client, seen = new_client(), []
    client.begin_round(STAGE_1, {})
    loss = client.loss
    client.loss = lambda output, batch, step: seen.append(batch.images) or loss(output, batch, step)
    client.fit()
    expected = list(batches(client.train_set, 6, client.rng("batches"), client.augment))
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b.images) for a, b in zip(seen, expected, strict=True))


def test_stage_1_loss_is_that_of_both_views(new_client: Factory) -> None:
    client = new_client(stage1_consistency=0.5)
    client.begin_round(STAGE_1, {})
    for value in client.received.values():  # a teacher that differs from the student
        if value.is_floating_point():
            value.add_(0.05)
    batch = next(iter(batches(client.train_set, 6, client.rng("batches"), client.augment)))
    second, _ = client.augment(batch.source, None, client.rng("second view"))
    assert not torch.equal(second, batch.images)
    client.model.eval()  # so that passes do not depend on one another
    outputs = [client.model(view).logits for view in (batch.images, second)]
    teachers = [client.teacher(view).logits for view in (batch.images, second)]
    active = torch.tensor([True, False, False]).expand(6, C)
    expected = two_view_terms(outputs, teachers, batch.targets, active, client.shift, 0.5)
    found = client.loss(Output(*client.model(batch.images)), batch, 0)
    assert set(found) == {"supervised", "consistency"} and found["consistency"].item() > 0
    torch.testing.assert_close(found, expected)


def test_the_figure_of_the_paper_has_no_teacher_in_stage_1(new_client: Factory) -> None:
    client = new_client(stage1_consistency=0.0)
    client.begin_round(STAGE_1, {})
    client.teacher = None
    assert set(client.fit()) == {"train_loss", "loss/supervised"}


# ---------------------------------------------------------------------- stage 2


def test_tags_come_from_the_received_model_and_the_prototypes(new_client: Factory) -> None:
    client, extras = new_client(negative_fraction=0.3, positive_fraction=0.4), prototypes()
    client.begin_round(STAGE_2, extras)
    s = similarity_difference(features_of(client), extras["proto"].double().numpy())
    assert (client.tags[:, 0] == NONE).all()
    for c in (1, 2):
        negative, positive = np.flatnonzero(s[:, c] >= 0), np.flatnonzero(s[:, c] < 0)
        chosen = negative[np.argsort(-s[negative, c], kind="stable")][: int(0.3 * len(negative))]
        assert set(np.flatnonzero(client.tags[:, c] == NEGATIVE)) == set(chosen)
        chosen = positive[np.argsort(s[positive, c], kind="stable")][: int(0.4 * len(positive))]
        assert set(np.flatnonzero(client.tags[:, c] == POSITIVE)) == set(chosen)
    assert client.personal[TAGS].dtype == torch.uint8 and client.personal[TAGS].shape == (TRAIN, C)


def test_pseudo_labels_are_trained_on(new_client: Factory) -> None:
    client = new_client(**ALL, augment=())
    given = client.train_set.targets.clone()
    client.begin_round(STAGE_2, prototypes())
    assert client.supervised[:TRAIN].all()  # everything is tagged
    assert torch.equal(client.train_set.targets[:, 0], given[:, 0])
    assert (client.train_set.targets[:, 1:].numpy() == (client.tags[:, 1:] == POSITIVE)).all()
    share = torch.from_numpy((client.tags == POSITIVE).mean(axis=0))
    torch.testing.assert_close(client.shift[1:], prior_shift(share).float()[1:])
    assert torch.equal(client.data.split("train", client.device).targets, given)


def test_stage_2_loss_is_one_mean_over_all_entries(new_client: Factory) -> None:
    client = new_client(negative_fraction=0.3, positive_fraction=0.3)
    client.begin_round(STAGE_2, prototypes())
    for value in client.received.values():
        if value.is_floating_point():
            value.add_(0.05)
    batch = next(iter(batches(client.train_set, 12, client.rng("batches"), client.augment)))
    output = client.model(batch.images)
    use = torch.from_numpy(client.annotated | (client.tags != NONE))[batch.index]
    assert use[:, 1:].any() and not use.all()
    teacher = client.teacher(batch.images).logits
    found = client.loss(output, batch, 0)
    torch.testing.assert_close(found, joint_terms(output.logits, teacher, batch.targets, use, client.shift))
    assert set(found) == {"supervised", "distilled"}


@pytest.mark.parametrize(("valid", "tagged"), [((1, 1, 1, 0, 1, 1), [2]), ((0,) * 6, []), ((1, 1, 0, 0, 0, 1), [])])
def test_a_class_without_both_prototypes_is_distilled_only(
    new_client: Factory, valid: tuple[int, ...], tagged: list[int]
) -> None:
    client = new_client(**ALL)
    client.begin_round(STAGE_2, prototypes(valid))
    assert np.flatnonzero((client.tags != NONE).any(axis=0)).tolist() == tagged
    assert np.isfinite(client.fit()["train_loss"])


def test_stage_2_before_any_prototype(new_client: Factory) -> None:
    client = new_client(**ALL)
    client.begin_round(STAGE_2, {})
    assert (client.tags == NONE).all() and TAGS in client.personal
    assert np.isfinite(client.fit()["loss/distilled"])


def test_adaptive_fractions_follow_the_degree(new_client: Factory) -> None:
    client = new_client(**ALL, threshold="adaptive")
    client.begin_round(STAGE_2, prototypes(tau=(1.0, 1.0, 0.0)))
    assert (client.tags[:, 1] != NONE).all() and (client.tags[:, 2] == NONE).all()


# ---------------------------------------------------------------------- what is kept


def test_tags_pile_up_from_round_to_round(new_client: Factory) -> None:
    args = {"negative_fraction": 0.3, "positive_fraction": 0.3}
    first = new_client(**args)
    first.begin_round(STAGE_2, prototypes())
    second = next_round(first, new_client, **args)
    second.begin_round(STAGE_2, prototypes())
    kept = first.tags != NONE
    assert (second.tags[kept] == first.tags[kept]).all() and (second.tags != NONE).sum() > kept.sum()
    assert (first.personal[TAGS].numpy() == first.tags).all()  # replaced, not written into


def test_a_reply_that_was_not_accepted_is_tagged_again(new_client: Factory) -> None:
    client = new_client(**ALL)
    client.begin_round(STAGE_1, {})
    assert set(client.personal) == {SOURCE}
    before = next_round(client, new_client, **ALL)
    client.begin_round(STAGE_2, prototypes())
    before.begin_round(STAGE_2, prototypes())
    assert (before.tags == client.tags).all()


def change_labels(split: Any) -> Any:
    targets = split.targets.clone()
    targets[0, 0] ^= 1
    return split.with_targets(targets)


@pytest.mark.parametrize(
    "change",
    [change_labels, lambda s: s.subset(torch.arange(9)), lambda s: s.subset(torch.arange(TRAIN).flip(0)), None],
)
def test_other_labels_start_anew_and_say_so(new_client: Factory, caplog: pytest.LogCaptureFixture, change: Any) -> None:
    first = new_client(**ALL)
    first.begin_round(STAGE_2, prototypes())
    other = next_round(first, new_client, (1, 0, 0) if change else (1, 1, 0), **ALL)
    if change:
        other.train_set = change(other.train_set)
    with caplog.at_level(logging.WARNING):
        other.begin_round(STAGE_2, {})
    assert (other.tags == NONE).all() and "pseudo-labels are dropped" in caplog.text


# ---------------------------------------------------------------------- what leaves


def test_what_is_sent_is_declared_and_of_the_trained_model(new_client: Factory) -> None:
    client = new_client((1, 0, 1))
    client.begin_round(COLLECT, {})
    client.fit()
    arrays, metrics = client.end_round()
    client.check_leaves(arrays, metrics)
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == {
        "proto": ((2 * C, D), torch.float32), "proto_count": ((2 * C,), torch.int64), "tau": ((C,), torch.float32),
        "active": ((C,), torch.uint8),
    }  # fmt: skip
    features, labels = features_of(client), client.given.targets.numpy()
    assert arrays["active"].tolist() == [1, 0, 1] and metrics == {"n_pseudo_pos": 0, "n_pseudo_neg": 0}
    for c in (0, 2):
        for v in (0, 1):
            assert arrays["proto_count"][2 * c + v] == (labels[:, c] == v).sum()
            expected = features[labels[:, c] == v].mean(axis=0)
            np.testing.assert_allclose(arrays["proto"][2 * c + v].numpy(), expected, rtol=1e-4, atol=1e-6)
    assert arrays["proto"][2:4].abs().sum() == 0 and arrays["proto_count"][2:4].tolist() == [0, 0]
    assert arrays["tau"][[0, 2]].tolist() == [0, 0] and 0 <= arrays["tau"][1] <= 1


def test_nothing_but_numbers_of_tags_leaves_before_the_end_of_the_warm_up(new_client: Factory) -> None:
    client = new_client()
    client.begin_round(STAGE_1, {})
    client.fit()
    assert client.end_round() == ({}, {"n_pseudo_pos": 0, "n_pseudo_neg": 0})


def test_few_items_are_not_sent(new_client: Factory) -> None:
    client = new_client(min_count=12)
    client.begin_round(COLLECT, {})
    arrays, _ = client.end_round()
    assert arrays["proto_count"].tolist() == [0] * 6 and arrays["proto"].abs().sum() == 0
    assert arrays["active"].tolist() == [1, 0, 0]


def test_pseudo_labels_do_not_enter_the_prototypes(new_client: Factory) -> None:
    client = new_client(**ALL)
    client.begin_round(STAGE_2, prototypes())
    arrays, metrics = client.end_round()
    assert arrays["proto_count"][2:].tolist() == [0] * 4 and arrays["proto_count"][:2].sum() == TRAIN
    assert metrics["n_pseudo_pos"] + metrics["n_pseudo_neg"] == 2 * TRAIN


def test_noise_is_drawn_by_round_and_only_on_what_is_sent(new_client: Factory) -> None:
    sent = []
    for number, std in ((1, 0.0), (1, 0.1), (1, 0.1), (2, 0.1)):
        client = new_client(noise_std=std, round=number)
        client.begin_round(COLLECT, {})
        sent.append(client.end_round()[0]["proto"])
    plain, first, again, later = sent
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, plain)
    assert (first - plain).abs().max() < 1 and torch.equal(first[2:], torch.zeros(4, D))


def test_clipped_features(new_client: Factory) -> None:
    client = new_client(feature_clip=1e-3)
    client.begin_round(COLLECT, {})
    norms = client.end_round()[0]["proto"].norm(dim=1)
    assert norms.max() <= 1e-3 + 1e-9 and norms[:2].min() > 0


# ---------------------------------------------------------------------- edges

EDGES: dict[str, Any] = {
    "no class annotated": (0, 0, 0),
    "every class annotated": (1, 1, 1),
    "in part": np.eye(C, dtype=np.uint8)[np.arange(N) % C],
}


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("edge", EDGES)
def test_no_nan_reaches_a_weight(new_client: Factory, edge: str, weight: float) -> None:
    for config, extras in ((COLLECT, {}), (STAGE_2, prototypes()), (STAGE_2, prototypes((0,) * 6)), (STAGE_2, {})):
        client = new_client(EDGES[edge], stage1_consistency=weight, **ALL)
        client.begin_round(config, extras)
        losses = client.fit()
        arrays, metrics = client.end_round()
        client.check_leaves(arrays, metrics)
        assert np.isfinite(list(losses.values())).all()
        assert first_non_finite(client.layout.exchanged_state(client.model)) is None
        assert first_non_finite(arrays) is None


def test_a_class_without_positives_or_without_negatives(new_client: Factory) -> None:
    for value in (0, 1):
        client = new_client((1, 1, 1))
        client.train_set = client.train_set.with_targets(torch.full((TRAIN, C), value, dtype=torch.uint8))
        client.begin_round(COLLECT, {})
        losses = client.fit()
        counts = client.end_round()[0]["proto_count"].reshape(C, 2)
        assert np.isfinite(losses["train_loss"]) and (counts[:, value] == TRAIN).all()
        assert (counts[:, 1 - value] == 0).all()


def test_annotation_by_item(new_client: Factory) -> None:
    client = new_client(EDGES["in part"], **ALL)
    client.begin_round(STAGE_2, prototypes())
    assert (client.tags[client.annotated] == NONE).all() and (client.tags[~client.annotated] != NONE).all()
    arrays, _ = client.end_round()
    assert arrays["active"].tolist() == [1, 1, 1] and arrays["tau"].tolist() == [0, 0, 0]


def test_a_model_without_features_is_refused(new_client: Factory) -> None:
    client = new_client()
    client.begin_round(STAGE_1, {})
    batch = next(iter(batches(client.train_set, 6)))
    output = client.model(batch.images)
    for features in (None, torch.zeros(6, D, 4, 4)):
        with pytest.raises(UserError, match="needs a model that gives features"):
            client.loss(Output(output.logits, features), batch, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lower": 0.8}, {"upper": 1.2}, {"negative_fraction": -0.1}, {"positive_fraction": 2}, {"threshold": "soft"},
        {"min_quota": -1}, {"min_count": 0}, {"prior_clip": 0.0}, {"stage1_consistency": float("nan")},
        {"noise_std": -1.0}, {"feature_clip": float("inf")},
    ],
)  # fmt: skip
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected, got"):
        replace(MissingClassesParams(), **wrong)
