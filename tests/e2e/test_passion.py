"""PASSION as whole runs: the course of β, one site alone, the plain arm, lost and broken replies, stop and resume."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore
from fedmed.federation.messages import EXTRAS
from fedmed.federation.personal import PersonalStore
from fedmed.federation.records import decode_state, encode_state

SITES = [f"phantom-0{i}" for i in range(3)]
# Site 1 has only the first and third contrast, site 2 lacks another one: see the arguments of the phantom.
PASSION = {
    "data.path": "phantom:multimodal", "data.phantom": {"num_sites": 3, "images_per_site": 12, "image_size": 16},
    "model.name": "multi_encoder_unet", "model.args": {"base_width": 2, "depth": 2}, "model.activation": "softmax",
    "strategy.name": "passion", "client.name": "passion", "optimizer.name": "adamw", "training.batch_size": 4,
    "federation.rounds": 3, "evaluation.every": 3, "evaluation.central": "none",
}  # fmt: skip
PLAIN = {"strategy.name": "fedavg", "client.args": {"mode": "plain"}}


def settings(**changes: Any) -> dict[str, Any]:
    return {**PASSION, **{key.replace("__", "."): value for key, value in changes.items()}}


def finite(lab: Any, out: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in lab.state(out).values())


def kept_state(out: Path) -> dict[str, Any]:
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None
    return dict(kept.strategy)


def test_a_course(lab: Any) -> None:
    out, summary = lab.run(**settings())
    state, notes = kept_state(out), summary["notes"]
    assert state["updates"] == 3 and state["eta"] == pytest.approx(0.015) and notes["beta"] == state["beta"]
    assert math.hypot(*state["beta"]) == pytest.approx(math.sqrt(3)) and min(state["beta"]) > 0.1
    assert all(d > 0 for d in notes["distance"]) and len(set(state["beta"])) == 3
    for shares in (notes["weights"], *notes["modality_weights"]):
        assert sum(shares.values()) == pytest.approx(1.0) and set(shares) == set(SITES)
    assert any(0.0 in shares.values() for shares in notes["modality_weights"])  # a site that never has a contrast
    for record in lab.history(out, phase="train", status="ok"):
        terms = {k for k in record["metrics"] if k.startswith("loss/")}
        assert terms == {f"loss/{name}" for name in ("fuse", "deep", "single", "pixel", "semantic")}
    assert finite(lab, out) and not (out / "sites" / SITES[0] / "personal").exists()


def test_stop_and_resume(lab: Any) -> None:
    whole, summary = lab.run(**settings())
    parts = lab.new()
    lab.stopped(parts, 1, **settings())
    lab.stopped(parts, 2, resume=True, **settings())
    _, resumed = lab.run(parts, options={"resume": True}, **settings())
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert summary["notes"] == resumed["notes"] and kept_state(whole) == kept_state(parts)


def test_a_beta_of_its_own_goes_with_the_rounds(lab: Any) -> None:
    local = settings(client__args={"beta": "local", "drop": "random"})
    whole, summary = lab.run(**local)
    parts = lab.new()
    lab.stopped(parts, 2, **local)
    lab.run(parts, options={"resume": True}, **local)
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert kept_state(whole) == {"beta": [], "eta": 0.0, "updates": 0} and summary["notes"]["beta"] == []
    betas = []
    for site in SITES:
        kept, same = (PersonalStore(out / "sites" / site / "personal").read(3) for out in (whole, parts))
        assert kept is not None and same is not None and int(kept["balance/updates"]) == 3
        torch.testing.assert_close(dict(kept), dict(same), rtol=0, atol=0)
        betas.append(tuple(kept["balance/beta"].tolist()))
    assert len(set(betas)) == 3


def test_a_lost_folder_begins_with_ones(lab: Any) -> None:
    out = lab.new()

    def forget(call: Any) -> Any:
        shutil.rmtree(out / "sites" / SITES[1] / "personal")
        return call()

    lab.run(out, options={"intercept": lab.fault(forget, 3)}, **settings(client__args={"beta": "local"}))
    found = [PersonalStore(out / "sites" / site / "personal").read(3) for site in SITES]
    assert [int(kept["balance/updates"]) for kept in found if kept is not None] == [3, 1, 3]
    fresh = [r["site"] for r in lab.history(out, phase="train", round=3) if "personal_fresh" in r["metrics"]]
    assert fresh == [SITES[1]]


def test_one_site_alone_is_the_central_method(lab: Any) -> None:
    one = {"num_sites": 1, "images_per_site": 12, "image_size": 16}
    out, summary = lab.run(**settings(data__phantom=one, federation__min_sites=1))
    assert summary["notes"]["weights"] == {SITES[0]: 1.0} and kept_state(out)["updates"] == 3
    assert finite(lab, out) and all(record["status"] == "ok" for record in lab.history(out))


def test_the_plain_arm(lab: Any) -> None:
    """FedAvg over the same network and base losses; nothing but the model and the losses is sent."""
    seen: list[RecordDict] = []

    def spy(call: Any) -> Any:
        reply = call()
        seen.append(reply.content)
        return reply

    out, _ = lab.run(options={"intercept": lab.fault(spy, partition=None)}, **settings(**PLAIN))
    assert len(seen) == 9 and all(EXTRAS not in content for content in seen)
    for record in lab.history(out, phase="train", status="ok"):
        assert {k for k in record["metrics"] if k.startswith("loss/")} == {"loss/fuse", "loss/deep"}
    initial, trained = (lab.state(lab.run(**settings(**PLAIN, federation__rounds=rounds))[0]) for rounds in (1, 2))
    single = [name for name in trained if name.startswith("shared.single")]
    assert single and all(torch.equal(initial[name], trained[name]) for name in single)


def test_broken_distances_of_a_site_have_no_part(lab: Any) -> None:
    def spoil(content: RecordDict) -> None:
        extras = decode_state(content[EXTRAS])  # type: ignore[arg-type]
        content[EXTRAS] = encode_state({**extras, "distance_sum": torch.full((3,), math.nan)})

    fault = lab.fault(lab.tampered(spoil), partition=0)
    out, summary = lab.run(options={"intercept": fault}, **settings())
    clean, reference = lab.run(**settings())
    assert finite(lab, out) and summary["notes"]["weights"] == reference["notes"]["weights"]
    assert summary["notes"]["distance"] != reference["notes"]["distance"]
    assert all(math.isfinite(b) for b in kept_state(out)["beta"]) and kept_state(out)["updates"] == 3
    assert lab.model(out) != lab.model(clean)  # through β, from round 2 on


def test_counts_that_do_not_arrive_keep_the_encoders(lab: Any) -> None:
    def forget(content: RecordDict) -> None:
        content[EXTRAS] = ArrayRecord()

    fault = lab.fault(lab.tampered(forget), partition=None)
    first, second = (
        lab.state(lab.run(options={"intercept": fault}, **settings(federation__rounds=n))[0]) for n in (1, 2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first if n.startswith("encoders."))
    assert any(not torch.equal(first[n], second[n]) for n in first if n.startswith("shared."))


def test_a_model_without_encoders_per_modality_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match="'modality' groups"):
        lab.run(**settings(model__name="unet", model__args={"base_width": 2}))
    with pytest.raises(UserError, match=r"set model\.name=multi_encoder_unet"):
        lab.run(**settings(model__name="unet", model__args={"base_width": 2}, **PLAIN))
