"""FedLPPA as whole runs: both views, stop and resume, sites that are away or without annotation, what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore
from fedmed.federation.messages import ARRAYS, EXTRAS, METRICS, arrays_of, part
from fedmed.federation.personal import PersonalStore
from fedmed.federation.records import decode_metrics, encode_state
from strategies.prompt_affinity import affinities, mixed, prompt_vectors

SITES = [f"phantom-0{i}" for i in range(3)]
TERMS = {"loss/pce", "loss/uni", "loss/pls"}
SCORES = ("test/global/dice", "test/personal/dice")
LPPA = {
    "data.path": "phantom:segmentation", "data.phantom": {"num_sites": 3, "images_per_site": 10, "image_size": 32},
    "data.corruption.name": "weak_labels", "data.corruption.args": {"kind": ["scribble", "point", "box"]},
    "model.name": "prompt_unet", "model.args": {"base_width": 2, "num_sites": 3}, "model.activation": "softmax",
    "strategy.name": "fedlppa", "client.name": "fedlppa", "client.args": {"warmup_rounds": 1, "max_passes": 2},
    "optimizer.name": "adamw", "optimizer.weight_decay": 0.01, "training.batch_size": 4, "federation.rounds": 3,
    "evaluation.every": 3, "evaluation.central": "none",
}  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {**LPPA, **{key.replace("__", "."): value for key, value in changes.items()}}


def phantom(num_sites: int) -> dict[str, int]:
    return {"num_sites": num_sites, "images_per_site": 10, "image_size": 32}


def kinds(*names: str) -> dict[str, Any]:
    return {"data__corruption__args": {"kind": list(names)}}


def finite(lab: Any, out: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in lab.state(out).values())


def kept_state(out: Path) -> dict[str, Any]:
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None
    return dict(kept.strategy)


class Tap:
    """Lets every message through and keeps what went down and came up in training, by round and site."""

    def __init__(self) -> None:
        self.down: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.up: dict[tuple[int, int], tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def __call__(self, message: Message, call: Any) -> Message:
        """Answer as the site does."""
        key = int(message.metadata.group_id or 0), message.metadata.dst_node_id - 1000
        if not message.metadata.message_type.startswith("train"):
            return call()
        assert EXTRAS not in message.content
        self.down[key] = {name: value.clone() for name, value in arrays_of(message.content, ARRAYS).items()}
        reply = call()
        record = part(reply.content, METRICS, MetricRecord)
        assert record is not None and EXTRAS not in reply.content
        self.up[key] = arrays_of(reply.content, ARRAYS), dict(decode_metrics(record))
        return reply


def test_a_course(lab: Any) -> None:
    out, summary = lab.run(**settings())
    notes = summary["notes"]
    assert sum(notes["weights"].values()) == pytest.approx(1.0) and set(notes["weights"]) == set(SITES)
    for site, row in notes["affinity"].items():
        assert set(row) == set(SITES) and row[site] == 1.0 and all(0 <= c <= 1 + 1e-9 for c in row.values())
    for record in lab.history(out, phase="train", status="ok"):
        assert {k for k in record["metrics"] if k.startswith("loss/")} == TERMS
        assert record["metrics"]["merge_weight_mean"] <= 1.0
    scores = lab.history(out, phase="evaluate", round=3)
    assert len(scores) == 3 and all(key in record["metrics"] for record in scores for key in SCORES)
    own = PersonalStore(out / "sites" / SITES[0] / "personal").read(3)
    assert own is not None and any(not torch.equal(own[name], value) for name, value in lab.state(out).items())
    state = kept_state(out)
    assert sorted(state["aux"]) == [0, 1, 2] and state["prompts"]["distribution_prompts"].shape == (3, 2, 2)
    assert finite(lab, out)


def test_stop_and_resume(lab: Any) -> None:
    whole, summary = lab.run(**settings())
    parts = lab.new()
    lab.stopped(parts, 1, **settings())
    lab.stopped(parts, 2, resume=True, **settings())
    _, resumed = lab.run(parts, options={"resume": True}, **settings())
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert summary["notes"] == resumed["notes"]
    for site in SITES:
        kept, same = (PersonalStore(out / "sites" / site / "personal").read(3) for out in (whole, parts))
        assert kept is not None and same is not None
        torch.testing.assert_close(dict(kept), dict(same), rtol=0, atol=0)


def test_replies_in_any_order(lab: Any) -> None:
    ordered, _ = lab.run(**settings(federation__rounds=2))
    scrambled, _ = lab.run(**settings(federation__rounds=2), options={"arrival_seed": 7})
    assert lab.model(ordered) == lab.model(scrambled)


def test_what_travels(lab: Any) -> None:
    """Down: one model, in it the mix made for the site. Up: one model and numbers. Rows of prompts belong to their sites."""
    tap = Tap()
    out, _ = lab.run(options={"intercept": tap}, **settings())
    first, second = tap.down[1, 0], tap.down[2, 0]
    aux = [name for name in first if name.startswith("aux_decoder.") and first[name].is_floating_point()]
    assert all(torch.equal(first[n], tap.down[1, k][n]) for n in first for k in (1, 2))  # everybody begins alike
    prompts = second["distribution_prompts"]
    for k in range(3):
        assert torch.equal(prompts[k], tap.up[1, k][0]["distribution_prompts"][k])
        assert not torch.equal(prompts[k], first["distribution_prompts"][k])
        row = affinities(prompt_vectors(prompts, second["universal_prompt"]), k)
        expected = mixed(row, {j: {n: tap.up[1, j][0][n] for n in aux} for j in range(3)})
        found = tap.down[2, k]
        assert all(torch.equal(found[n], expected[n]) for n in aux)
        assert all(torch.equal(found[n], second[n]) for n in second if n not in aux)
    assert any(not torch.equal(tap.down[2, 1][n], second[n]) for n in aux)
    declared = {"num-examples", "train_loss", "seconds", "merge_weight_mean", *TERMS}
    assert all(set(metrics) == declared for _, metrics in tap.up.values()) and finite(lab, out)


def test_an_absent_site_is_still_mixed_in(lab: Any) -> None:
    """Site 1 is silent in round 2: its row and its auxiliary decoder of round 1 go on serving."""
    tap = Tap()

    def lost(message: Message, call: Any) -> Message:
        key = message.metadata.group_id, message.metadata.dst_node_id
        if key == ("2", 1001) and message.metadata.message_type.startswith("train"):
            raise ConnectionError("the line is down")
        return tap(message, call)

    out, _ = lab.run(options={"intercept": lost}, **settings(federation__quorum=0.5))
    third = tap.down[3, 0]
    assert torch.equal(third["distribution_prompts"][1], tap.up[1, 1][0]["distribution_prompts"][1])
    assert not torch.equal(third["distribution_prompts"][0], tap.up[1, 0][0]["distribution_prompts"][0])
    heard = {0: tap.up[2, 0][0], 1: tap.up[1, 1][0], 2: tap.up[2, 2][0]}
    aux = [name for name in third if name.startswith("aux_decoder.") and third[name].is_floating_point()]
    row = affinities(prompt_vectors(third["distribution_prompts"], third["universal_prompt"]), 0)
    expected = mixed(row, {k: {n: arrays[n] for n in aux} for k, arrays in heard.items()})
    assert all(torch.equal(third[name], expected[name]) for name in aux)
    assert finite(lab, out)


def test_a_site_that_was_never_heard(lab: Any) -> None:
    def down(call: Any) -> Any:
        raise ConnectionError("the line is down")

    fault = lab.fault(down, 1, 2)
    out, summary = lab.run(options={"intercept": fault}, **settings(federation__quorum=0.5))
    assert sorted(kept_state(out)["aux"]) == [0, 1, 2] and set(summary["notes"]["affinity"][SITES[1]]) == set(SITES)
    assert finite(lab, out) and len(lab.history(out, phase="train", status="failed")) == 2


def test_a_site_without_annotation_is_heard_and_does_not_count(lab: Any) -> None:
    out, summary = lab.run(**settings(**kinds("scribble", "none", "block")))
    assert summary["notes"]["weights"] == {SITES[0]: 0.5, SITES[2]: 0.5}
    empty = lab.history(out, phase="train", status="empty")
    assert [record["site"] for record in empty] == [SITES[1]] * 3 and all(r["num_examples"] == 0 for r in empty)
    assert sorted(kept_state(out)["aux"]) == [0, 2] and set(summary["notes"]["affinity"][SITES[1]]) == {
        SITES[0],
        SITES[2],
    }
    initial = lab.state(lab.run(**settings(federation__rounds=1, **kinds("scribble", "none", "block")))[0])
    assert torch.equal(initial["distribution_prompts"][1], lab.state(out)["distribution_prompts"][1])
    assert finite(lab, out)


def test_full_masks_and_broken_replies(lab: Any) -> None:
    def spoil(content: RecordDict) -> None:
        arrays = arrays_of(content, ARRAYS)
        content[ARRAYS] = encode_state(
            {n: v * float("nan") if n == "universal_prompt" else v for n, v in arrays.items()}
        )

    fault = lab.fault(lab.tampered(spoil), 2)
    out, _ = lab.run(
        options={"intercept": fault}, **settings(federation__quorum=0.5, **kinds("mask", "noisy_scribble", "point"))
    )
    failed = lab.history(out, phase="train", status="failed")
    assert [record["site"] for record in failed] == [SITES[1]] and finite(lab, out)


def test_one_site_alone(lab: Any) -> None:
    out, summary = lab.run(**settings(data__phantom=phantom(1), federation__min_sites=1))
    assert summary["notes"]["affinity"] == {SITES[0]: {SITES[0]: 1.0}} and finite(lab, out)
    records = lab.history(out, phase="train", status="ok")
    assert all(record["metrics"]["loss/uni"] == 0.0 for record in records)


def test_central_scoring_needs_no_site(lab: Any) -> None:
    _, summary = lab.run(**settings(evaluation__central="auto", federation__rounds=1, evaluation__every=1))
    assert 0 <= summary["central"]["last"]["test/global/dice"] <= 1


def test_refusals(lab: Any) -> None:
    with pytest.raises(UserError, match=r"set model\.name=prompt_unet"):
        lab.run(**settings(model__name="unet", model__args={"base_width": 2}))


def test_a_site_too_many_is_left_out_with_the_reason(lab: Any) -> None:
    out, summary = lab.run(**settings(model__args={"base_width": 2, "num_sites": 2}))
    failed = lab.history(out, phase="train", status="failed")
    assert [record["site"] for record in failed] == [SITES[2]] * 3
    assert all("raise model.args.num_sites" in record["reason"] for record in failed)
    assert set(summary["notes"]["affinity"]) == set(SITES[:2]) and finite(lab, out)
