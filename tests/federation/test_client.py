"""The base client and the site runtime: what sweeps leave alone, what may leave the site, what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.errors import FedMedError, UserError
from fedmed.federation.client import AddOn, Client, declared_leaves, make_optimizer
from fedmed.federation.messages import Leaf
from fedmed.federation.personal import PersonalStore
from fedmed.federation.state import clone_state
from fedmed.models.output import Output

BenchFactory = Callable[..., Any]


def use(monkeypatch: pytest.MonkeyPatch, cls: type[Client]) -> None:
    """Let the site runtime use a client class of this module."""
    monkeypatch.setattr("fedmed.federation.site.client_class", lambda config: cls)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------- looking without touching


@pytest.mark.parametrize("training", [True, False])
def test_sweep_and_teacher_leave_mode_and_weights_alone(bench: BenchFactory, training: bool) -> None:
    client = bench().client(Supervised)
    client.model.train(training)
    before = clone_state(client.model.state_dict())
    rows = torch.cat([batch.index for batch, _ in client.sweep("train")])
    assert torch.equal(rows, client.train_set.index.cpu())  # ordered, complete, last single item included
    for batch, output in client.sweep("test"):
        assert not output.logits.requires_grad
        with torch.no_grad():
            client.model.head.weight.add_(1.0)  # the teacher is what was received, not what is trained
        teacher = client.teacher(batch.images)
        torch.testing.assert_close(teacher.logits, output.logits)
        assert not teacher.logits.requires_grad
        with torch.no_grad():
            client.model.head.weight.copy_(before["head.weight"])
    assert client.model.training is training
    assert equal(before, dict(client.model.state_dict()))
    assert equal(before, client.received)


def test_a_sweep_that_is_left_early_puts_the_mode_back(bench: BenchFactory) -> None:
    client = bench().client(Supervised)
    client.model.train()
    sweep = client.sweep("train")
    next(sweep)
    assert not client.model.training
    sweep.close()
    assert client.model.training


def test_generators_are_keyed_by_site_round_and_purpose(bench: BenchFactory) -> None:
    client = bench().client(Supervised)
    a, b, c = (torch.rand(1, generator=client.rng(p)).item() for p in ("x", "x", "y"))
    assert a == b != c


# ---------------------------------------------------------------------- training


def test_training_gives_means_and_own_tensors(bench: BenchFactory) -> None:
    site = bench(training={"batch_size": 5, "epochs": 2})
    reply = site.send("train")
    assert reply.metrics["num-examples"] == 14
    assert reply.metrics["train_loss"] == reply.metrics["loss/ce"] > 0
    assert set(reply.arrays) == set(site.layout.exchanged)
    assert not equal(reply.arrays, site.initial)
    # 14 items in batches of 5: 3 steps an epoch.
    assert reply.arrays["block1.norm.num_batches_tracked"].item() == 6
    model = site.env.model.state_dict()
    assert all(reply.arrays[n].data_ptr() != model[n].data_ptr() for n in reply.arrays)


def test_same_message_same_reply_whatever_was_trained_before(bench: BenchFactory) -> None:
    site = bench(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9})
    first = site.send("train")
    site.send("train", number=2, arrays=first.arrays)
    assert equal(site.send("train").arrays, first.arrays)


def test_max_steps_ends_the_round(bench: BenchFactory) -> None:
    site = bench(training={"batch_size": 5, "epochs": 3, "max_steps": 4})
    assert site.send("train").arrays["block1.norm.num_batches_tracked"].item() == 4


def test_no_step_no_loss(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneItem(Supervised):
        def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
            self.train_set = self.train_set.subset(torch.tensor([0]))

    use(monkeypatch, OneItem)
    site = bench()
    reply = site.send("train")  # batch normalisation cannot train on one item: no step, the received model comes back
    assert reply.metrics["num-examples"] == 1 and math.isnan(reply.metrics["train_loss"])
    assert equal(reply.arrays, site.initial)


def test_nothing_selected_is_an_empty_reply(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(Supervised):
        def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
            self.train_set = self.train_set.subset(torch.zeros(len(self.train_set), dtype=torch.bool))

    use(monkeypatch, Nothing)
    reply = bench().send("train")
    assert reply.metrics["num-examples"] == 0 and reply.arrays is None


def test_a_message_that_lacks_an_entry_is_refused(bench: BenchFactory) -> None:
    site = bench()
    arrays = {n: v for n, v in site.initial.items() if n != "head.bias"}
    with pytest.raises(FedMedError, match=r"the received model has no entry 'head\.bias' \(1 of"):
        site.send("train", arrays=arrays)


def test_what_is_received_is_never_written_into(bench: BenchFactory) -> None:
    site = bench(client={"prox": {"enabled": True, "mu": 0.1}}, optimizer={"persist": True})
    sent = clone_state(site.initial)
    for kind in ("train", "evaluate"):
        site.send(kind, arrays=sent, evaluate="after")
        assert equal(sent, site.initial)


def test_add_ons_ride_along(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pull(AddOn):
        leaves = (Leaf("told", "1", "that the add-on spoke"),)

        def begin_round(self, client: Client, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
            self.strength = float(config["strength"])

        def loss(self, client: Client, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
            return {"pull": self.strength * client.model.head.weight.pow(2).sum()}

    monkeypatch.setattr("fedmed.federation.site.make_addons", lambda config: {"pull": Pull(None)})
    reply = bench().send("train", strength=2.0)
    assert reply.metrics["loss/pull"] > 0
    assert reply.metrics["train_loss"] == pytest.approx(reply.metrics["loss/pull"] + reply.metrics["loss/ce"])
    assert any(leaf.name == "told" for leaf in declared_leaves(Supervised, {"pull": Pull}))


def test_an_add_on_that_is_off_costs_nothing(bench: BenchFactory) -> None:
    plain, off = bench().send("train"), bench(client={"prox": {"mu": 1.0}}).send("train")
    assert equal(plain.arrays, off.arrays) and "loss/prox" not in off.metrics
    held = bench(client={"prox": {"enabled": True, "mu": 1.0}}).send("train")
    assert "loss/prox" in held.metrics and not equal(plain.arrays, held.arrays)


# ---------------------------------------------------------------------- what may leave


@pytest.mark.parametrize("kind", ["metric", "array"])
def test_what_no_leaf_declares_is_refused(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Leaky(Supervised):
        leaves = (Leaf("fine", "1", "declared"), Leaf("grid", "2", "declared", kind="array"))

        def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
            if self.round == 1:
                return {"grid": torch.ones(2)}, {"fine": 1.0}
            return ({"fine": torch.ones(2)}, {}) if kind == "array" else ({}, {"grid": 1.0})

        def query_secret(
            self, config: dict[str, Any], extras: dict[str, Tensor]
        ) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return {}, {"secret": 1.0}

    use(monkeypatch, Leaky)
    site = bench()
    good = site.send("train")
    assert good.metrics["fine"] == 1.0 and good.extras["grid"].tolist() == [1.0, 1.0]
    with pytest.raises(
        FedMedError, match=rf"Leaky wanted to send the {kind} '(fine|grid)', which its `leaves` do not declare"
    ):
        site.send("train", number=2)
    with pytest.raises(FedMedError, match="'secret'"):
        site.send("query", query="secret")


def test_unknown_query_is_a_user_error(bench: BenchFactory) -> None:
    with pytest.raises(UserError, match="no answer to the query 'class_losses'"):
        bench().send("query", query="class_losses")


# ---------------------------------------------------------------------- what the site keeps


class Counting(Supervised):
    """Keeps a number of its own that says how many accepted rounds it has behind it, and its norm layers."""

    views = ("global", "personal")
    leaves = (Leaf("seen", "1", "rounds behind it"),)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        seen = self.personal.get("seen", torch.zeros(())) + 1
        self.personal = {**self.personal, "seen": seen}
        return {}, {"seen": float(seen)}

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.BatchNorm2d)


def test_the_site_goes_on_from_the_round_the_server_accepted(
    bench: BenchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Counting)
    site = bench()
    assert not any("norm" in name for name in site.layout.exchanged)
    first = site.send("train", 1, 0)
    second = site.send("train", 2, 1, arrays=first.arrays)
    third = site.send("train", 3, 2, arrays=second.arrays)
    assert [r.metrics["seen"] for r in (first, second, third)] == [1.0, 2.0, 3.0]
    assert not any("personal_fresh" in r.metrics for r in (first, second, third))
    # The reply of round 3 was lost: round 4 goes on from round 2, and what it gives does not depend on the lost round.
    lost = site.send("train", 4, 2, arrays=second.arrays)
    assert lost.metrics["seen"] == 3.0
    again = site.send("train", 4, 2, arrays=second.arrays)
    assert equal(lost.arrays, again.arrays)


def test_a_site_that_lost_its_folder_says_so(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Counting)
    reply = bench().send("train", 5, 4)
    assert reply.metrics["personal_fresh"] == 1 and reply.metrics["seen"] == 1.0
    assert bench(keeps=False).send("train", 5, 4).metrics["personal_fresh"] == 1


def test_a_client_that_keeps_nothing_is_never_fresh(bench: BenchFactory, tmp_path: Path) -> None:
    reply = bench().send("train", 5, 4)
    assert "personal_fresh" not in reply.metrics
    assert not (tmp_path / "site" / "personal").exists()


def test_views(bench: BenchFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Counting)
    site = bench(training={"batch_size": 5, "epochs": 5}, optimizer={"name": "sgd", "lr": 0.5})
    built = clone_state(site.env.model.state_dict())
    first = site.send("train", 1, 0)
    client = site.client(Counting)
    name = "block1.norm.weight"
    assert torch.equal(client.model.state_dict()[name], built[name])  # view global: the run seed's values
    client.personal = {name: torch.full_like(built[name], 7.0), "seen": torch.ones(())}
    client.load_view("personal")
    assert client.model.state_dict()[name].unique().tolist() == [7.0]
    client.load_view("global")
    assert torch.equal(client.model.state_dict()[name], built[name])
    scores = site.send("evaluate", 1, 1, arrays=first.arrays).metrics
    assert scores["n/test"] == scores["num-examples"] == 4
    assert {k.split("/")[1] for k in scores if k.startswith("test/")} == {"global", "personal"}


def test_the_optimiser_goes_on_where_it_was(bench: BenchFactory) -> None:
    def two_rounds(**optimizer: Any) -> Any:
        site = bench(optimizer={"lr": 0.01, **optimizer})
        first = site.send("train", 1, 0)
        return first, site.send("train", 2, 1, arrays=first.arrays)

    kept_first, kept = two_rounds(persist=True)
    fresh_first, fresh = two_rounds(persist=False)
    assert equal(kept_first.arrays, fresh_first.arrays) and not equal(kept.arrays, fresh.arrays)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_kept_moments_are_those_of_one_long_training(bench: BenchFactory, name: str, tmp_path: Path) -> None:
    """Two rounds of one step with kept moments move the weights as two steps of one optimiser on the same gradients."""
    settings = {"name": name, "lr": 0.01, "momentum": 0.9, "persist": True}
    site = bench(optimizer=settings, training={"max_steps": 1})
    first = site.send("train", 1, 0)
    second = site.send("train", 2, 1, arrays=first.arrays)
    kept = PersonalStore(tmp_path / "site" / "personal").read(1)
    assert kept is not None and all(key.startswith("optimizer/") for key in kept)
    client = site.client(Supervised)
    client.round = 2
    client.received = first.arrays
    client.load_view("global")
    client.optimizer = make_optimizer(client.model, site.config, kept)
    client.model.train()
    batch = next(iter(client._epochs(client.rng("batches"))))
    client.train_step(batch, 0)
    assert equal({n: v for n, v in client.model.state_dict().items() if n in second.arrays}, second.arrays)


# ---------------------------------------------------------------------- scoring in the train message


def test_scores_ride_with_training(bench: BenchFactory) -> None:
    plain = bench().send("train")
    before = bench().send("train", evaluate="before")
    after = bench().send("train", evaluate="after")
    received = bench().send("evaluate").metrics
    trained = bench().send("evaluate", arrays=plain.arrays).metrics
    assert equal(plain.arrays, before.arrays) and equal(plain.arrays, after.arrays)
    for name in ("n/test", "test/global/acc"):
        assert before.metrics[name] == received[name] and after.metrics[name] == trained[name]
    assert "test/global/acc" not in plain.metrics


def test_validation_is_scored_only_where_a_round_is_chosen_by_it(bench: BenchFactory) -> None:
    assert "n/val" not in bench().send("evaluate").metrics
    assert bench(evaluation={"select": "bacc"}).send("evaluate").metrics["n/val"] == 2


def test_cases_stay_at_the_site(bench: BenchFactory, tmp_path: Path) -> None:
    site = bench()
    site.send("evaluate")
    assert not (tmp_path / "site" / "cases.csv").exists()
    reply = site.send("evaluate", final=True)
    lines = (tmp_path / "site" / "cases.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 and lines[0].startswith("site,split,view,item")
    assert not any(isinstance(v, list) for v in reply.metrics.values())
