"""FedICRA at the site: the contrast, the two phases of a round and what each may touch, and sites that are alone or too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.site_contrast import SiteContrast, SiteContrastParams, head_steps, site_contrast, split_head
from clients.weak_annotation import weak_terms
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment, make_optimizer
from fedmed.federation.layout import Layout
from fedmed.federation.state import State, clone_state
from fedmed.models.build import build_model
from fedmed.models.site_unet import HEATMAP, ChannelSelection, site_heatmaps

F64 = torch.float64
OUT = ("decoder.out_conv.weight", "decoder.out_conv.bias")
Make = Callable[..., SiteContrast]


@pytest.fixture(scope="session")
def drawn_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One site of 12 images of 32 x 32 pixels, 8 of them for training, with every fifth row of pixels labelled."""
    path = tmp_path_factory.mktemp("drawn") / "sites.h5"
    make_phantom(path, "segmentation", num_sites=1, images_per_site=12, image_size=32, channels=1)
    with h5py.File(path, "r+") as file:
        site = file["site_00"]
        lines = np.full(site["mask"].shape, 2, dtype=np.uint8)
        lines[:, ::5] = site["mask"][:, ::5]
        site["scribble"] = lines
        site.attrs["ignore_value"] = 2
    return path


@pytest.fixture
def contrasting(drawn_site: Path) -> Make:
    """`contrasting(args, site=1, num_sites=3, model={...}, round=1, **config)`: a client that has received the initial model."""

    def make(args: dict[str, Any] | None = None, **given: Any) -> SiteContrast:
        site, num_sites = given.pop("site", 1), given.pop("num_sites", 3)
        args_of_model, name = given.pop("model", {}), given.pop("name", "site_unet")
        moment = Moment(given.pop("round", 1), 4, site, num_sites)
        tree = {
            "model": {"name": name},
            "client": {"args": {"crf_weight": 0.0, "tree_weight": 0.0, **(args or {})}},
            "training": {"batch_size": 2}, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5},
        }  # fmt: skip
        with SiteFile.open(drawn_site) as file:
            data = file.site(file.sites[0].name, "scribble")
        sizes = {"base_width": 2, **({"side_width": 4, "num_sites": 3} if name == "site_unet" else {})}
        model = build_model(name, {**sizes, **args_of_model}, 1, 2, data.image_size, data.task, seed=1)
        layout = Layout.of(model, SiteContrast.is_personal)
        env = Env(from_tree({**tree, **given}), data, model, layout, torch.device("cpu"), "softmax", data.name)
        made = SiteContrast(env, moment, {})
        made.received = clone_state(layout.exchanged_state(model))
        made.load_view("personal")
        torch.manual_seed(0)
        return made

    return make


def first_batch(client: SiteContrast) -> Batch:
    return next(iter(batches(client.train_set, 4)))


def changed(client: SiteContrast) -> set[str]:
    """Trainable entries that are no longer what was received."""
    now = client.model.state_dict()
    return {name for name in client.layout.trainable if not torch.equal(now[name], client.received[name])}


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------------- equations


def test_contrast_by_hand() -> None:
    """Mean squares 1/2 and 1/4 from two others: -(1/2 + 1/4) / 2."""
    own = torch.tensor([[1.0, 0.5]], dtype=F64)
    others = torch.tensor([[[0.0, 0.5]], [[0.5, 1.0]]], dtype=F64)
    assert site_contrast(own, others).item() == -0.375
    assert site_contrast(own, others[:1]).item() == -0.5 and site_contrast(own, others.flip(0)).item() == -0.375
    assert site_contrast(own, own.expand(3, -1, -1)).item() == 0.0


def test_contrast_is_at_least_minus_one() -> None:
    assert site_contrast(torch.ones(2, 3), torch.zeros(4, 2, 3)).item() == -1.0
    assert -1 < site_contrast(maps(2, 3), maps(4, 2, 3, seed=1)).item() < 0


def test_one_site_has_no_contrast() -> None:
    own = maps(2, 3).requires_grad_()
    assert site_contrast(own, torch.zeros(0, 2, 3, dtype=F64)).item() == 0.0


def test_gradient_of_the_contrast_reaches_the_own_heatmap_only() -> None:
    own, others = maps(2, 3).requires_grad_(), maps(2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: site_contrast(h, others.detach()), (own,))
    site_contrast(own, others).backward()
    assert others.grad is None
    torch.testing.assert_close(own.grad, -2 * (own - others.mean(dim=0)).detach() / own.numel())


def test_contrast_of_a_selection() -> None:
    """The gradient of the layers through the own heatmap alone; the others are those of a copy that nobody trains."""
    torch.manual_seed(5)
    block, copy, x = (
        ChannelSelection(3, 2).double(),
        ChannelSelection(3, 2).double(),
        torch.randn(2, 3, 2, 2, dtype=F64),
    )
    copy.load_state_dict(block.state_dict())
    site, other = torch.tensor([0, 0]), torch.tensor([1])
    names, values = zip(*block.named_parameters(), strict=True)

    def loss(*weights: Tensor) -> Tensor:
        own = torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x, site))
        return site_contrast(own, site_heatmaps(copy, x, other))

    assert torch.autograd.gradcheck(loss, values)
    wanted = torch.autograd.grad(loss(*values), values)
    found = torch.autograd.grad(site_contrast(block(x, site), site_heatmaps(block, x, other)), values)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and found[0].abs().sum() > 0
    with torch.no_grad():
        block.mix_out.weight.zero_()  # h = 1/2 for every site
    assert site_contrast(block(x, site), site_heatmaps(block, x, other)).item() == 0.0


@pytest.mark.parametrize(
    ("steps", "body", "head"), [(10, 3, 7), (4, 3, 1), (3, 3, 1), (2, 3, 1), (1, 3, 1), (0, 3, 0), (5, 0, 5), (1, 0, 1)]
)
def test_steps_of_the_first_phase(steps: int, body: int, head: int) -> None:
    assert head_steps(steps, body) == head


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": -0.1}, "finite alpha >= 0 expected, got -0.1"),
        ({"alpha": math.inf}, "alpha"),
        ({"body_steps": -1}, "body_steps >= 0 expected, got -1"),
        ({"eta": -1.0}, "eta"),
        ({"crf_weight": -1.0}, "crf_weight"),
    ],
)
def test_params_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SiteContrastParams(**values)


def test_published_constants() -> None:
    params = SiteContrastParams()
    assert (params.crf_weight, params.tree_weight, params.alpha, params.body_steps) == (0.1, 0.1, 0.5, 3)
    assert params.tree_form == "cascade" and params.warmup_rounds == 5


# ---------------------------------------------------------------------- what is merged and what is trained when


def test_the_merged_part_has_the_published_size() -> None:
    model = build_model("site_unet", {"num_sites": 5}, 1, 2, (32, 32), "segmentation")
    upper = [
        p for name, p in model.named_parameters() if name.rsplit(".", 1)[0].startswith(SiteContrast.merge_prefixes)
    ]
    assert len(upper) == 42 and sum(p.numel() for p in upper) == 633_010


def test_the_parts_are_disjoint_and_complete(contrasting: Make) -> None:
    model = contrasting().model
    head, body = split_head(model)
    assert [p.shape for p in head] == [(2, 2, 3, 3), (2,)]
    assert {id(p) for p in (*head, *body)} == {id(p) for p in model.parameters()}
    assert len(head) + len(body) == len(list(model.parameters()))


@pytest.mark.parametrize("tree_weight", [0.0, 0.1])
def test_each_phase_touches_its_own_entries(contrasting: Make, tree_weight: float) -> None:
    """Weight decay of 0.5 would move a parameter at rest, were it in the optimiser's reach."""
    client = contrasting({"body_steps": 1, "tree_weight": tree_weight}, training={"batch_size": 2, "max_steps": 3})
    client.begin_round({}, {})
    client.optimizer, batch = make_optimizer(client.model, client.config, {}), first_batch(client)
    client.train_step(batch, 0)
    client.train_step(batch, 1)
    assert changed(client) == set(OUT)
    before = clone_state({name: client.model.state_dict()[name] for name in OUT})
    client.train_step(batch, 2)
    assert all(torch.equal(client.model.state_dict()[name], before[name]) for name in OUT)
    unused = {n for n in client.layout.trainable if n.startswith("sides.")} if tree_weight == 0 else set()
    assert (
        changed(client) == set(client.layout.trainable) - unused
    )  # without the tree term nothing reads the side outputs


def test_as_with_two_optimisers(contrasting: Make) -> None:
    """The round again, with an AdamW for each part that knows nothing of the other."""
    client, twin = (contrasting({"body_steps": 2}) for _ in range(2))
    for one in (client, twin):
        one.begin_round({}, {})
    torch.manual_seed(5)
    client.fit()
    torch.manual_seed(5)
    parts = split_head(twin.model)
    optimizers = [make_optimizer(nn.ParameterList(part), twin.config, {}, twin.lr) for part in parts]
    twin.model.train()
    for step, batch in enumerate(twin._epochs(twin.rng("batches"))):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack(list(twin.loss_terms(batch, step).values())).sum().backward()
        optimizers[step >= 2].step()  # 4 steps: two and two
    first, second = client.model.state_dict(), twin.model.state_dict()
    assert client.num_steps() == 4 and all(torch.equal(value, second[name]) for name, value in first.items())


def test_no_body_steps_train_the_head_only(contrasting: Make) -> None:
    client = contrasting({"body_steps": 0})
    client.begin_round({}, {})
    client.fit()
    assert changed(client) == set(OUT)


def test_more_body_steps_than_steps_leave_the_head_one(contrasting: Make) -> None:
    client = contrasting({"body_steps": 100})
    client.begin_round({}, {})
    assert client.num_steps() == 4 and client.head_steps == 1


def test_rounds_of_one_step_are_named(contrasting: Make, caplog: pytest.LogCaptureFixture) -> None:
    short = {"batch_size": 2, "max_steps": 1}
    with caplog.at_level(logging.WARNING, logger="fedmed.fedicra"):
        client = contrasting(training=short)
        client.begin_round({}, {})
        assert "one step long and train the last convolution only" in caplog.text
        client.fit()
        contrasting(training=short, round=2).begin_round({}, {})
        contrasting().begin_round({}, {})
    assert changed(client) == set(OUT) and len(caplog.records) == 1


def test_a_frozen_selection_stays(contrasting: Make) -> None:
    client = contrasting(model={"train_selection": False})
    before = clone_state(client.model.selection.state_dict())
    client.begin_round({}, {})
    losses = client.fit()
    assert losses["loss/contrast"] < 0
    assert all(torch.equal(value, before[name]) for name, value in client.model.selection.state_dict().items())
    assert not any(name.startswith("selection.") for name in client.layout.exchanged)


# ---------------------------------------------------------------------- the terms


def test_terms_of_a_batch(contrasting: Make) -> None:
    args = {"crf_weight": 0.1, "tree_weight": 0.1}
    client = contrasting({**args, "alpha": 2.0})
    client.begin_round({}, {})
    batch = first_batch(client)
    output = client.forward(batch)
    terms = client.loss(output, batch, 0)
    assert list(terms) == ["pce", "crf", "tree", "contrast"] and terms["contrast"].item() < 0
    shared = weak_terms(output, batch, 2, client.params)
    assert all(torch.equal(terms[name], value) for name, value in shared.items())
    plain = contrasting({**args, "alpha": 0.0})
    plain.begin_round({}, {})
    assert list(plain.loss(output, batch, 0)) == ["pce", "crf", "tree"]


@pytest.mark.parametrize(("site", "num_sites", "capacity"), [(0, 3, 3), (2, 3, 3), (1, 2, 5), (1, 5, 3)])
def test_contrast_by_running_the_network_again(contrasting: Make, site: int, num_sites: int, capacity: int) -> None:
    """As published, once more for every other site of the run that the model has room for; equal where nothing is dropped."""
    client = contrasting({"alpha": 1.0}, site=site, num_sites=num_sites, model={"num_sites": capacity})
    client.begin_round({}, {})
    client.model.eval()
    batch = first_batch(client)
    found = client.loss(client.forward(batch), batch, 0)["contrast"]
    with torch.no_grad():
        rows = [client.model(batch.images, site_index=torch.full((4,), k)).aux[HEATMAP] for k in range(capacity)]
    others = [row for k, row in enumerate(rows) if k != site and k < num_sites]
    wanted = -sum(float((rows[site] - row).square().mean()) for row in others) / len(others)
    assert found.item() == pytest.approx(wanted, rel=1e-3) and wanted < 0


def test_one_site_alone(contrasting: Make) -> None:
    client = contrasting(site=0, num_sites=1)
    client.begin_round({}, {})
    losses = client.fit()
    assert losses["loss/contrast"] == 0.0 and math.isfinite(losses["train_loss"])
    assert changed(client) >= set(OUT)


def test_a_message_that_names_no_site(contrasting: Make) -> None:
    client = contrasting(site=-1)
    client.begin_round({}, {})
    assert client.fit()["loss/contrast"] == 0.0


def test_more_sites_than_the_model_has_room_for(contrasting: Make) -> None:
    client = contrasting(site=3, num_sites=4)
    with pytest.raises(UserError, match=r"site number 4 .* room for 3; raise model\.args\.num_sites"):
        client.begin_round({}, {})
        client.fit()


def test_another_model_is_refused(contrasting: Make) -> None:
    with pytest.raises(UserError, match=r"model 'unet' is not; set model\.name=site_unet"):
        contrasting(name="unet").begin_round({}, {})


# ---------------------------------------------------------------------- rounds


def test_what_a_site_keeps_and_a_merge(contrasting: Make) -> None:
    client = contrasting({"warmup_rounds": 1}, round=2)
    kept: State = {name: value + 0.1 for name, value in client.received.items() if value.is_floating_point()}
    client.personal = clone_state(kept)
    client.begin_round({}, {})
    now = client.model.state_dict()
    assert torch.equal(now["encoder.stages.0.0.weight"], client.received["encoder.stages.0.0.weight"])
    assert torch.equal(now["sides.0.0.weight"], client.received["sides.0.0.weight"])
    client.fit()
    arrays, metrics = client.end_round()
    assert arrays == {} and list(metrics) == ["merge_weight_mean"] and 0 <= metrics["merge_weight_mean"] <= 1
    assert set(client.layout.exchanged) <= set(client.personal)
    assert all(torch.equal(client.personal[n], v) for n, v in client.layout.exchanged_state(client.model).items())


def test_training_lowers_the_loss(contrasting: Make) -> None:
    client = contrasting({"body_steps": 16}, training={"batch_size": 4, "epochs": 10})
    losses = []
    for _ in range(2):
        client.begin_round({}, {})
        losses.append(client.fit()["loss/pce"])
        client.end_round()
        client.received = {name: client.personal[name] for name in client.layout.exchanged}
    assert losses[1] < 0.9 * losses[0]
