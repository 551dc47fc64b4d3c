"""The merging site: when it merges, from what, what it keeps, and that scoring and resuming change nothing."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from clients import adaptive_merge
from clients.merging import SITE_INDEX, STARTED, STEPS, MergingClient, MergingParams, contiguous_share, poly_lr
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteData
from fedmed.data.split import Batch
from fedmed.engines import run
from fedmed.errors import UserError
from fedmed.federation.checkpoint import read_safetensors
from fedmed.federation.client import Env, Moment, declared_leaves
from fedmed.federation.layout import Layout
from fedmed.federation.scoring import score_view
from fedmed.federation.state import State, clone_state
from fedmed.losses.partial import partial_cross_entropy
from fedmed.models.output import Output
from fedmed.models.side_unet import SideUNet

UPPER = "decoder"
IGNORED = 2


class Plain(MergingClient):
    """Partial cross-entropy on the merged model; the smallest use of the base."""

    merge_prefixes: ClassVar[tuple[str, ...]] = (UPPER,)

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """One term."""
        assert self.optimizer is not None
        self.rates = [*getattr(self, "rates", []), self.optimizer.param_groups[0]["lr"]]
        return {"pce": partial_cross_entropy(output.logits, batch.targets, self.train_set.ignore_value)}


class AskingUNet(SideUNet):
    """Wants to know the site; notes what it is told."""

    inputs = (SITE_INDEX,)
    num_sites = 3

    def forward(self, images: Tensor, site_index: Tensor | None = None) -> Output:
        """As without."""
        self.told = site_index
        return super().forward(images)


def scribbles(num_items: int = 10, labelled: int | None = None) -> SiteData:
    """Bright discs on noise, of which a few pixels carry a label in the first `labelled` images (None: in all)."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 120, (num_items, 16, 16), dtype=np.uint8)
    mask = np.zeros((num_items, 16, 16), dtype=np.uint8)
    mask[:, 4:11, 5:12] = 1
    image[mask == 1] += 100
    target = np.full_like(mask, IGNORED)
    shown = slice(None) if labelled is None else slice(labelled)
    target[shown, 6:9, 3:14] = mask[shown, 6:9, 3:14]
    items = [str(i) for i in range(num_items)]
    return SiteData(
        name="a",
        task="segmentation",
        classes=("background", "disc"),
        channels=("gray",),
        image_size=(16, 16),
        label_kind="scribble",
        image=image,
        target=target,
        item_id=items,
        group_id=items,
        splits={"train": np.arange(num_items, dtype=np.int32), "test": np.arange(2, dtype=np.int32)},
        eval_target=mask,
        ignore_value=IGNORED,
    )


def model_of(seed: int, kind: type[SideUNet] = SideUNet) -> SideUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(1, 2, base_width=2, side_width=4)


def site(
    round_number: int = 6,
    *,
    data: SiteData | None = None,
    cls: type[MergingClient] = Plain,
    model: type[SideUNet] = SideUNet,
    index: int = 1,
    activation: str = "softmax",
    optimizer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """A client that has received the model of seed 1."""
    tree = {"client": {"args": args}, "training": {"batch_size": 4, **(training or {})}}
    config = from_tree({**tree, "optimizer": {"name": "adamw", **(optimizer or {})}})
    network = model_of(1, model)
    layout = Layout.of(network, cls.is_personal)
    env = Env(config, data or scribbles(), network, layout, torch.device("cpu"), activation, "a")
    client = cls(env, Moment(round_number, 9, site_index=index, num_sites=3), {})
    client.received = clone_state(layout.exchanged_state(network))
    return client


def own_state(seed: int = 2) -> State:
    """θ_i of a site: other weights and other norm statistics than those received."""
    state = clone_state(model_of(seed).state_dict())
    state |= {name: value + 0.5 for name, value in state.items() if name.endswith(("mean", "var"))}
    return state


def begin(client: Any, personal: State | None = None) -> Any:
    client.personal = dict(personal or {})
    client.load_view("personal")
    client.begin_round({}, {})
    return client


def round_of(client: Any, personal: State | None = None) -> Any:
    """What the site does with a train message."""
    begin(client, personal)
    client.fit()
    arrays, client.metrics = client.end_round()
    assert arrays == {}
    client.check_leaves(arrays, client.metrics)
    return client


def full(client: Any) -> State:
    return clone_state(client.model.state_dict())


def same(found: State, wanted: State, names: Any = None) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in (found if names is None else names))


def split(client: Any) -> tuple[list[str], list[str]]:
    """Names of the merged entries, and of all others."""
    upper = [n for n, e in client.layout.entries.items() if n.startswith(f"{UPPER}.") and e.trainable]
    return upper, [n for n in client.layout.entries if n not in upper]


# ---------------------------------------------------------------------- arguments and small parts


@pytest.mark.parametrize(
    "wrong",
    [
        {"eta": -1.0}, {"eta": float("nan")}, {"warmup_rounds": -1}, {"merge_data_share": 0.0}, {"merge_data_share": 1.1},
        {"max_passes": 0}, {"ala_init": "half"}, {"bn_buffers": "mean"}, {"total_steps": 0},
    ],
)  # fmt: skip
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MergingParams(**wrong)


def test_learning_rate_by_hand() -> None:
    assert poly_lr(0.01, 15000, 30000) == pytest.approx(0.0053589, abs=1e-7)
    assert poly_lr(0.01, 0, 30000) == 0.01 == poly_lr(0.01, 99, None)
    assert poly_lr(0.01, 30000, 30000) == poly_lr(0.01, 30001, 30000) == 0.0


def test_the_share_is_a_run_of_neighbours() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [contiguous_share(10, 0.8, rng).tolist() for _ in range(100)]
    assert all(items == list(range(items[0], items[0] + 8)) for items in drawn)
    assert {items[0] for items in drawn} == {0, 1, 2}
    assert contiguous_share(1, 0.1, rng).tolist() == [0]
    assert contiguous_share(5, 1.0, rng).tolist() == [0, 1, 2, 3, 4]


def test_merged_are_the_trainable_parameters_under_whole_names() -> None:
    client = site()
    names = client._merged_entries()
    assert names == split(client)[0] and len(names) == 42  # as many tensors as published
    client.merge_prefixes = ("decoder.up", "decoder.out_conv")  # `decoder.up` is no module
    assert client._merged_entries() == ["decoder.out_conv.weight", "decoder.out_conv.bias"]
    frozen = site()
    frozen.model.decoder.out_conv.requires_grad_(False)
    frozen.layout = Layout.of(frozen.model, Plain.is_personal)
    assert len(frozen._merged_entries()) == 40


# ---------------------------------------------------------------------- when it merges


@pytest.mark.parametrize(
    ("number", "personal"), [(1, False), (5, True), (6, False)], ids=["first", "warm-up", "newcomer"]
)
def test_plain_copy(number: int, personal: bool) -> None:
    client = begin(site(number), own_state() if personal else None)
    assert client.learnt is None and same(full(client), client.received)
    client.fit()
    metrics = client.end_round()[1]
    assert metrics == {"merge_weight_mean": 1.0}
    assert same(client.personal, {**full(client), STEPS: torch.tensor([3])}) and STARTED not in client.personal
    assert set(client.personal) == {*client.layout.entries, STEPS}


def test_agreeing_models_are_not_merged() -> None:
    client = site()
    client = begin(client, {**own_state(), **{n: client.received[n] for n in split(client)[0]}})
    assert client.learnt is None and same(full(client), client.received)


def test_the_merge() -> None:
    """Lower part and statistics as received, upper part between both models, on the way that lowers the loss."""
    own = own_state()
    client = begin(site(eta=50.0, max_passes=12), own)
    upper, others = split(client)
    held = full(client)
    assert same(held, client.received, others)
    weights = client.learnt.weights
    assert list(weights) == upper and all(((w >= 0) & (w <= 1)).all() for w in weights.values())
    assert 0.0 < adaptive_merge.mean_weight(weights) < 1.0
    for name in upper:
        mixed = own[name] + (client.received[name] - own[name]) * weights[name]
        torch.testing.assert_close(held[name], mixed)
    assert client.learnt.losses[-1] < client.learnt.losses[0]


def test_learning_starts_from_the_received_model_in_eval_mode_on_a_share_of_the_items() -> None:
    client = begin(site(training={"batch_size": 16}), own_state())
    share = client.train_set.subset(contiguous_share(10, 0.8, client.rng("merge")))
    (batch,) = batches(share, 16)
    client.load_view("global")
    client.model.eval()
    with torch.no_grad():
        loss = partial_cross_entropy(client.forward(batch).logits, batch.targets, IGNORED)
    assert len(batch) == 8 and client.learnt.losses[0] == pytest.approx(float(loss))


def test_the_lower_part_is_what_the_server_sent_to_this_site() -> None:
    client = site()
    mixed = {name: value + 1 for name, value in client.received.items() if name.startswith("sides.")}
    client.received |= mixed
    assert same(mixed, full(begin(client, own_state())))


def test_weights_persist_and_later_rounds_make_one_pass() -> None:
    first = round_of(site(6, eta=50.0), own_state())
    upper, _ = split(first)
    kept = {f"merge/{name}" for name in upper}
    assert set(first.personal) == {*first.layout.entries, *kept, STARTED, STEPS}
    assert len(first.learnt.losses) >= 11
    assert first.metrics["merge_weight_mean"] == pytest.approx(adaptive_merge.mean_weight(first.learnt.weights))
    assert same({n: first.personal[n] for n in first.layout.entries}, full(first))
    second = begin(site(7, eta=0.0), first.personal)
    assert len(second.learnt.losses) == 1
    assert all(torch.equal(w, first.personal[f"merge/{n}"]) for n, w in second.learnt.weights.items())


def test_the_released_variant() -> None:
    """W_0 = 0, so the site starts from its own decoder; W is not kept, the flag is."""
    released: dict[str, Any] = {"ala_init": "zeros", "ala_persist": False}
    own = own_state()
    still = begin(site(eta=0.0, **released), own)
    assert same(full(still), own, split(still)[0])
    client = round_of(site(eta=50.0, **released), own)
    assert 0.0 < client.metrics["merge_weight_mean"] < 0.5
    assert {n for n in client.personal if n.startswith("merge/")} == {STARTED, STEPS}
    again = begin(site(7, eta=0.0, **released), client.personal)
    assert len(again.learnt.losses) == 1 and adaptive_merge.mean_weight(again.learnt.weights) == 0.0
    kept = round_of(site(eta=50.0), own).personal
    assert adaptive_merge.mean_weight(begin(site(7, eta=0.0, **released), kept).learnt.weights) == 0.0


def test_no_step_size_takes_the_received_model_whole() -> None:
    client = begin(site(eta=0.0), own_state())
    assert client.learnt is not None and same(full(client), client.received)


def test_norm_statistics_of_the_site() -> None:
    own = own_state()
    client = begin(site(bn_buffers="local"), own)
    held = full(client)
    inside, outside = "decoder.up1.convs.1.running_mean", "encoder.stages.0.1.running_mean"
    assert torch.equal(held[inside], own[inside]) and torch.equal(held[outside], client.received[outside])
    counter = "decoder.up1.convs.1.num_batches_tracked"
    assert torch.equal(held[counter], client.received[counter])


def test_learning_disturbs_nothing_else() -> None:
    client = site()
    client.personal = own_state()
    client.load_view("personal")
    numbers = torch.get_rng_state()
    client.begin_round({}, {})
    assert torch.equal(torch.get_rng_state(), numbers) and client.model.training
    assert all(p.requires_grad and p.grad is None for p in client.model.parameters())
    assert client.personal.keys() == own_state().keys()


def test_the_same_round_twice() -> None:
    with torch.random.fork_rng(devices=[]):  # dropout of the training draws from the process's generator
        made = []
        for _ in range(2):
            torch.manual_seed(5)
            made.append(round_of(site(eta=50.0), own_state()))
    first, second = made
    assert same(first.personal, second.personal) and first.metrics == second.metrics


# ---------------------------------------------------------------------- few labels, none, divergence


def test_a_site_without_labels_trains_on_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedmed.merge")
    client = begin(site(data=scribbles(labelled=0)), {})
    assert len(client.train_set) == 0 and "no training image has a labelled pixel" in caplog.text
    assert client.end_round() == ({}, {}) and client.personal == {}
    assert len(client.data.split("train")) == 10


def test_batches_without_labels_are_left_out() -> None:
    data = scribbles(labelled=4)  # the second and third batch of four have none
    client = begin(site(data=data, merge_data_share=1.0, eta=50.0, max_passes=1), own_state())
    only = begin(site(data=scribbles(num_items=4), merge_data_share=1.0, eta=50.0, max_passes=1), own_state())
    assert client.learnt.losses == only.learnt.losses
    assert same(client.learnt.weights, only.learnt.weights)


def test_no_label_among_the_items_to_learn_on_keeps_w_and_tries_again() -> None:
    data = scribbles(labelled=1)
    share = next(n for n in range(6, 99) if int(contiguous_share(10, 0.5, site(n).rng("merge"))[0]) > 0)
    client = round_of(site(share, data=data, merge_data_share=0.5), own_state())
    assert client.learnt.losses == [] and client.metrics == {"merge_weight_mean": 1.0}
    assert STARTED not in client.personal and f"merge/{UPPER}.out_conv.bias" in client.personal


def test_full_masks_are_labels_too() -> None:
    data = scribbles()
    data.target, data.ignore_value = data.eval_target, None
    assert round_of(site(data=data), own_state()).learnt.losses


def test_a_model_that_diverged_is_thrown_away(caplog: pytest.LogCaptureFixture) -> None:
    before = {**own_state(), STEPS: torch.tensor([7])}
    client = begin(site(optimizer={"persist": True}), before)
    client.fit()
    assert any(name.startswith("optimizer/") for name in client.personal)
    with torch.no_grad():
        client.model.encoder.stages[0][0].bias.fill_(float("nan"))
    client.end_round()
    assert "diverged in entry 'encoder.stages.0.0.bias'" in caplog.text
    assert client.personal.keys() == before.keys() and same(client.personal, before)


# ---------------------------------------------------------------------- views, site index, refusals


def test_scoring_learns_nothing() -> None:
    client = round_of(site(eta=50.0), own_state())
    kept = dict(client.personal)
    scored = site(7, eta=50.0)
    scored.personal = dict(kept)
    values = {view: score_view(scored, view)[0] for view in scored.views}
    assert same(full(scored), {n: kept[n] for n in scored.layout.entries})  # the view `personal` is θ_i
    assert scored.personal.keys() == kept.keys() and same(scored.personal, kept) and scored.learnt is None
    assert {key.split("/")[1] for one in values.values() for key in one if key.startswith("test/")} == set(scored.views)


def test_the_model_is_told_the_site() -> None:
    client = begin(site(model=AskingUNet, index=2), own_state())
    assert client.model.told.tolist() == [2] * 4 and client.model.told.dtype == torch.int64
    batch = next(iter(batches(client.train_set, 3)))
    client.forward(batch)
    assert client.model.told.tolist() == [2, 2, 2] and batch.extras[SITE_INDEX].tolist() == [2, 2, 2]


def test_central_scoring_and_other_models_are_told_nothing() -> None:
    central = site(model=AskingUNet, index=-1)
    central.forward(next(iter(batches(central.train_set, 3))))
    assert central.model.told is None
    plain, batch = site(), next(iter(batches(scribbles().split("train"), 3)))
    plain.forward(batch)
    assert SITE_INDEX not in batch.extras


def test_a_site_the_model_has_no_room_for() -> None:
    client = site(model=AskingUNet, index=3)
    with pytest.raises(UserError, match=r"a is site number 4 .* room for 3; raise model.args.num_sites"):
        client.forward(next(iter(batches(client.train_set, 3))))


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"needs softmax outputs, got sigmoid; set model.activation=softmax"):
        begin(site(activation="sigmoid"))
    with pytest.raises(UserError, match=r"total_steps and optimizer.schedule=poly both lower"):
        begin(site(total_steps=100, optimizer={"schedule": "poly"}))
    client = site()
    client.merge_prefixes = ("decoder_main",)
    with pytest.raises(
        UserError, match=r"merges the parameters under decoder_main, of which model 'small_cnn' has none"
    ):
        begin(client)


def test_what_leaves_the_site() -> None:
    assert "merge_weight_mean" in {leaf.name for leaf in declared_leaves(Plain, {})}
    assert not any(leaf.kind == "array" for leaf in Plain.leaves)


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("items", "training", "steps"),
    [(10, {}, 3), (9, {}, 2), (9, {"epochs": 2}, 4), (10, {"epochs": 2, "max_steps": 5}, 5), (8, {"max_steps": 9}, 2)],
)
def test_number_of_steps(items: int, training: dict[str, Any], steps: int) -> None:
    client = round_of(site(data=scribbles(items), training=training))
    assert client.num_steps() == len(client.rates) == steps
    assert client.personal[STEPS].tolist() == [steps]


def test_the_learning_rate_goes_on_over_the_rounds() -> None:
    first = round_of(site(1, total_steps=5, optimizer={"lr": 0.1}))
    second = round_of(site(2, total_steps=5, optimizer={"lr": 0.1}), first.personal)
    wanted = [0.1 * max(0.0, 1 - t / 5) ** 0.9 for t in range(6)]
    assert first.rates + second.rates == pytest.approx(wanted) and second.rates[-1] == 0.0
    assert second.personal[STEPS].tolist() == [6]
    assert round_of(site(2, optimizer={"lr": 0.1}), first.personal).rates == [0.1] * 3


# ---------------------------------------------------------------------- a whole run


class StopAfter:
    """Interrupts the run (as Ctrl-C does) after a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_start(self, info: Any) -> None:
        """Nothing."""

    on_record = on_end = on_start

    def on_round(self, round_number: int, records: Any, elapsed: float) -> None:
        """Interrupt."""
        if round_number == self.number:
            raise KeyboardInterrupt


def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the run that was never stopped, also in what the sites keep."""
    monkeypatch.setitem(sys.modules, "merging_under_test", sys.modules[__name__])

    def config(out: Path) -> Any:
        return from_tree(
            {
                "out": str(out),
                "data": {
                    "path": "phantom:segmentation",
                    "phantom": {"num_sites": 2, "images_per_site": 12, "image_size": 32},
                    "corruption": {"name": "weak_labels", "args": {"kind": ["scribble", "block"]}},
                    "cache_dir": str(tmp_path / "cache"),
                },
                "model": {"name": "side_unet", "args": {"base_width": 2, "side_width": 4}, "activation": "softmax"},
                "client": {"name": "merging_under_test:Plain", "args": {"warmup_rounds": 1, "eta": 50.0}},
                "optimizer": {"name": "adamw", "lr": 0.01},
                "training": {"batch_size": 4},
                "federation": {"rounds": 3},
                "evaluation": {"central": "none", "every": 3},
                "engine": {"device": "cpu"},
            }
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config(whole))
    with pytest.raises(KeyboardInterrupt):
        run(config(parts), callbacks=[StopAfter(2)])
    run(config(parts), resume=True)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    for name in ("phantom-00", "phantom-01"):
        one, other = (
            read_safetensors(max((out / "sites" / name / "personal").glob("round-*")) / "personal.safetensors")
            for out in (whole, parts)
        )
        assert one.keys() == other.keys() and same(one, other)
        assert (
            STARTED in one
            and 0.0 < adaptive_merge.mean_weight({n: v for n, v in one.items() if "merge/dec" in n}) < 1.0
        )


def test_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MergingParams().eta = 2.0  # type: ignore[misc]
