"""Whole runs of SCAFFOLD, FedNova and Ditto: books that must balance, lost replies, resume, and what FedAvg would do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor, nn

from clients.control_variates import correct_gradients, new_own
from fedmed.data.phantom import make_phantom
from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore, read_safetensors
from strategies.control_variates import next_control

SCAFFOLD: dict[str, Any] = {
    "strategy.name": "scaffold", "client.name": "scaffold", "optimizer.name": "sgd", "optimizer.lr": 0.05,
}  # fmt: skip
NOVA: dict[str, Any] = {
    "strategy.name": "fednova", "client.name": "fednova", "optimizer.name": "sgd", "optimizer.momentum": 0.9,
}  # fmt: skip
DITTO: dict[str, Any] = {"client.name": "ditto", "client.args": {"lam": 0.5}}
UNEQUAL = {"num_sites": 3, "images_per_site": [20, 40, 60], "image_size": 16}
SITES = ("phantom-00", "phantom-01", "phantom-02")


def kept(out: Path, site: str) -> dict[str, Tensor]:
    """What a site keeps, of the newest round."""
    newest = max((out / "sites" / site / "personal").glob("round-*"))
    return read_safetensors(newest / "personal.safetensors")


def server(out: Path) -> dict[str, Any]:
    found = CheckpointStore(out / "checkpoint").read()
    assert found is not None
    return found.strategy


def imbalance(out: Path) -> float:
    """Largest entry of c − Σ_i c_i / N, relative to the largest of c."""
    control: dict[str, Tensor] = server(out)["control"]
    own = [kept(out, site) for site in SITES]
    gaps = [(value - sum(k[f"control/{name}"] for k in own) / 3).abs().max() for name, value in control.items()]
    return float(max(gaps)) / float(max(v.abs().max() for v in control.values()))


# ---------------------------------------------------------------------- SCAFFOLD


def quadratic_round(x: float, c: float, own: list[float], steps: int, lr: float) -> tuple[float, float, list[float]]:
    """One round of two sites with F_1 = (x − 1)²/2 and F_2 = 3(x + 1)²/2, by the functions of the method."""
    ends, after = [], []
    for centre, curvature, before in zip((1.0, -1.0), (1.0, 3.0), own, strict=True):
        w = nn.Parameter(torch.tensor([x], dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=lr)
        control = {"w": torch.tensor([c], dtype=torch.float64)}
        mine = {"w": torch.tensor([before], dtype=torch.float64)}
        for _ in range(steps):
            w.grad = curvature * (w.detach() - centre)
            correct_gradients({"w": w}, control, mine)
            optimizer.step()
        received = {"w": torch.tensor([x], dtype=torch.float64)}
        ends.append(float(w.detach()))
        after.append(float(new_own(received, {"w": w.detach()}, control, mine, steps, lr)["w"]))
    mean = torch.tensor([sum(a - b for a, b in zip(after, own, strict=True)) / 2], dtype=torch.float64)
    new = next_control({"w": torch.tensor([c], dtype=torch.float64)}, {"w": mean}, 2, 2, 2)
    return sum(ends) / 2, float(new["w"]), after


def test_two_quadratics_by_hand() -> None:
    # Round 1, two steps of 0.1 from 0. Site 1: 0 → 0.1 → 0.19. Site 2: 0 → −0.3 → −0.51.
    x, c, own = quadratic_round(0.0, 0.0, [0.0, 0.0], 2, 0.1)
    assert (x, c) == (pytest.approx(-0.16), pytest.approx(0.8)) and own == pytest.approx([-0.95, 2.55])
    # Round 2: site 1 adds 0.8 + 0.95, site 2 adds 0.8 − 2.55: −0.16 → −0.219 → −0.2721 and −0.16 → −0.237 → −0.2909.
    x, c, own = quadratic_round(x, c, own, 2, 0.1)
    assert x == pytest.approx((-0.2721 - 0.2909) / 2)
    assert own == pytest.approx([-1.1895, 2.4045]) and c == pytest.approx(0.6075)


def test_two_quadratics_end_at_the_common_minimum() -> None:
    """Minimum of the sum at −1/2; without control variates ten local steps end elsewhere."""
    x, c, own = 0.0, 0.0, [0.0, 0.0]
    plain = 0.0
    for _ in range(60):
        x, c, own = quadratic_round(x, c, own, 10, 0.1)
        plain, _, _ = quadratic_round(plain, 0.0, [0.0, 0.0], 10, 0.1)
    assert x == pytest.approx(-0.5, abs=1e-6) and c == pytest.approx(0.0, abs=1e-6)
    assert own == pytest.approx([-1.5, 1.5], abs=1e-6)
    assert abs(plain + 0.5) > 0.1


def test_first_round_is_the_uniform_mean(lab: Any) -> None:
    plain, _ = lab.run(**{**SCAFFOLD, "strategy.name": "fedavg", "client.name": "supervised", "federation.rounds": 1})
    out, _ = lab.run(**SCAFFOLD, **{"federation.rounds": 1})  # sites of one size: uniform is by examples
    torch.testing.assert_close(lab.state(out), lab.state(plain), rtol=1e-6, atol=1e-7)
    longer, _ = lab.run(**SCAFFOLD)
    fedavg, _ = lab.run(**{**SCAFFOLD, "strategy.name": "fedavg", "client.name": "supervised"})
    assert not torch.allclose(lab.state(longer)["head.weight"], lab.state(fedavg)["head.weight"], atol=1e-4)


@pytest.mark.parametrize("extra", [{}, {"federation.fraction": 0.6}], ids=["everybody", "sampled"])
def test_control_variates_balance(lab: Any, extra: dict[str, Any]) -> None:
    out, summary = lab.run(**SCAFFOLD, **extra, **{"federation.rounds": 4, "data.phantom": UNEQUAL})
    assert imbalance(out) < 1e-4
    shares = list(summary["notes"]["weights"].values())
    assert shares == pytest.approx([1 / len(shares)] * len(shares)) and server(out)["num_sites"] == 3


def raises(call: Callable[[], Any]) -> None:
    call()
    raise RuntimeError("the line broke")


def absent(call: Callable[[], Any]) -> None:
    raise RuntimeError("not there")


def test_a_lost_reply_rolls_the_site_back(lab: Any) -> None:
    """The site has trained and kept its new c_i, the server never heard: as if it had not been asked."""
    lost, _ = lab.run(options={"intercept": lab.fault(raises, 2)}, **SCAFFOLD)
    away, _ = lab.run(options={"intercept": lab.fault(absent, 2)}, **SCAFFOLD)
    assert lab.model(lost) == lab.model(away)
    assert imbalance(lost) < 1e-4
    everybody, _ = lab.run(**SCAFFOLD)
    assert lab.model(everybody) != lab.model(lost)


def test_a_broken_change_counts_nowhere(lab: Any) -> None:
    def break_it(content: RecordDict) -> None:
        record = ArrayRecord(dict(content.array_records["extras"].items()))
        record["dc/head.bias"] = Array(torch.full((6,), math.nan).numpy())
        content["extras"] = record

    settings = {**SCAFFOLD, "federation.rounds": 1}
    out, summary = lab.run(options={"intercept": lab.fault(lab.tampered(break_it))}, **settings)
    away, _ = lab.run(options={"intercept": lab.fault(absent)}, **settings)
    assert lab.model(out) == lab.model(away) and summary["notes"]["left_out"] == ["phantom-01"]
    for name, value in server(away)["control"].items():
        assert torch.equal(value, server(out)["control"][name])


def test_a_site_that_lost_its_folder_says_so(lab: Any) -> None:
    out = lab.new()
    lab.stopped(out, 2, **SCAFFOLD)
    for path in sorted((out / "sites" / SITES[1] / "personal").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    lab.run(out, options={"resume": True}, **SCAFFOLD)
    fresh = {r["site"]: r["metrics"].get("personal_fresh") for r in lab.history(out, phase="train", round=3)}
    assert fresh == {SITES[0]: None, SITES[1]: 1, SITES[2]: None}


def test_a_site_of_one_image_takes_no_step(lab: Any, tmp_path: Path) -> None:
    path = make_phantom(tmp_path / "sites.h5", "classification", num_sites=3, images_per_site=20, image_size=16)
    only_one_training_item(path, "phantom-01")
    out, summary = lab.run(**{**SCAFFOLD, "data.path": str(path), "data.phantom": {}})
    assert not any(bool(v.any()) for v in kept(out, SITES[1]).values())
    assert imbalance(out) < 1e-4 and summary["notes"]["left_out"] == []
    _, summary = lab.run(**{**NOVA, "data.path": str(path), "data.phantom": {}})
    assert summary["notes"]["left_out"] == ["phantom-01"] and set(summary["notes"]["weights"]) == {SITES[0], SITES[2]}


def only_one_training_item(path: Path, site: str) -> None:
    """Leave a site one of its training items."""
    with h5py.File(path, "r+") as file:
        groups: list[Any] = []
        file.visititems(lambda _, item: groups.append(item) if item.attrs.get("site_name") == site else None)
        (group,) = groups
        group.attrs["train_idx"] = group.attrs["train_idx"][:1]


def test_another_optimiser_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"SCAFFOLD needs plain SGD, got adam .*set optimizer\.name=sgd"):
        lab.run(**{**SCAFFOLD, "optimizer.name": "adam"})
    with pytest.raises(UserError, match=r"FedNova needs a value < 1"):
        lab.run(**{**NOVA, "optimizer.momentum": 1.0})


# ---------------------------------------------------------------------- FedNova


def test_equal_steps_are_fedavg(lab: Any) -> None:
    """With a limit on the steps the sites work alike, however many images they have."""
    settings = {**NOVA, "data.phantom": UNEQUAL, "training.max_steps": 2}
    out, summary = lab.run(**settings)
    plain, _ = lab.run(**{**settings, "strategy.name": "fedavg", "client.name": "supervised"})
    torch.testing.assert_close(lab.state(out), lab.state(plain), rtol=1e-5, atol=1e-6)
    assert {r["metrics"]["num_steps"] for r in lab.history(out, phase="train")} == {2}
    assert summary["notes"]["weights"][SITES[2]] == pytest.approx(0.5, abs=0.02)


def test_unequal_steps_are_not(lab: Any) -> None:
    settings = {**NOVA, "data.phantom": UNEQUAL, "federation.rounds": 1}
    out, summary = lab.run(**settings)
    plain, _ = lab.run(**{**settings, "strategy.name": "fedavg", "client.name": "supervised"})
    steps = [r["metrics"]["num_steps"] for r in lab.history(out, phase="train")]
    assert steps == [2, 4, 6] and not torch.allclose(lab.state(out)["head.weight"], lab.state(plain)["head.weight"])
    assert max(summary["notes"]["weights"].values()) < 0.5  # the largest site has half of the images
    for name in ("block1.norm.running_mean", "block1.norm.num_batches_tracked"):
        torch.testing.assert_close(lab.state(out)[name], lab.state(plain)[name])


# ---------------------------------------------------------------------- Ditto


@pytest.mark.parametrize("persist", [False, True])
def test_the_global_half_is_fedavg(lab: Any, persist: bool) -> None:
    extra = {"optimizer.persist": persist, "data.augment": ["hflip", "shift2"]}
    ditto, _ = lab.run(**DITTO, **extra)
    plain, _ = lab.run(**extra)
    assert lab.model(ditto) == lab.model(plain)
    assert lab.history(ditto, phase="train") == lab.history(plain, phase="train")


def test_both_views_are_scored(lab: Any) -> None:
    out, summary = lab.run(**DITTO, **{"federation.rounds": 2})
    for record in lab.history(out, phase="evaluate"):
        assert {"test/global/bacc", "test/personal/bacc"} <= set(record["metrics"])
    assert set(summary["sites"]) == set(SITES)
    assert all({"bacc", "test/personal/bacc"} <= set(scores) for scores in summary["sites"].values())


def test_an_absent_site_keeps_its_model(lab: Any) -> None:
    short, _ = lab.run(**DITTO, **{"federation.rounds": 1})
    out, _ = lab.run(options={"intercept": lab.fault(absent, 2)}, **DITTO, **{"federation.rounds": 2})
    torch.testing.assert_close(kept(out, SITES[1]), kept(short, SITES[1]), rtol=0, atol=0)
    assert not torch.equal(kept(out, SITES[0])["head.bias"], kept(short, SITES[0])["head.bias"])


@pytest.mark.parametrize(
    "settings",
    [
        {**SCAFFOLD, "federation.fraction": 0.6},
        {**NOVA, "data.phantom": UNEQUAL},
        {**DITTO, "evaluation.mode": "before", "federation.checkpoint_every": 2},
    ],
    ids=["scaffold", "fednova", "ditto"],
)
def test_stopped_after_every_round(lab: Any, settings: dict[str, Any]) -> None:
    whole, summary = lab.run(**settings)
    parts = lab.new()
    for number in (1, 2):
        lab.stopped(parts, number, resume=number > 1, **settings)
    _, again = lab.run(parts, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert repr(summary["sites"]) == repr(again["sites"]) and summary["notes"] == again["notes"]
    if (whole / "sites" / SITES[0] / "personal").exists():
        for site in SITES:
            torch.testing.assert_close(kept(whole, site), kept(parts, site), rtol=0, atol=0)
