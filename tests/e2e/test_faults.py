"""Sites that misbehave: named in the history, left out, and the others summed exactly as if they had never been asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedmed.errors import QuorumLost
from fedmed.federation.checkpoint import CheckpointStore

KEPT = {"client.name": "local_norm", "optimizer.persist": True}  # a site that keeps things must go back in time, too
SECOND = "phantom-01"


def with_arrays(content: RecordDict, **changes: torch.Tensor | None) -> None:
    """New arrays record: entries replaced, added, or (None) left out; `__` stands for a dot."""
    record = ArrayRecord(dict(content.array_records["arrays"].items()))
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del record[name]
        else:
            record[name] = Array(value.numpy())
    content["arrays"] = record


def with_metrics(content: RecordDict, **changes: float) -> None:
    values = {**content.metric_records["metrics"], **{k.replace("_", "-"): v for k, v in changes.items()}}
    content["metrics"] = MetricRecord(values)


def raises(call: Callable[[], Any]) -> None:
    call()
    raise RuntimeError("out of memory")


def absent(call: Callable[[], Any]) -> None:
    raise RuntimeError("unreachable")


def late(call: Callable[[], Any]) -> Any:
    reply = call()
    time.sleep(2.3)
    return reply


BIAS = torch.zeros(6)  # head.bias: six classes
TAMPERED: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "nan": (lambda c: with_arrays(c, head__bias=BIAS + math.nan), "entry 'head.bias' holds NaN or infinite values"),
    "infinite": (lambda c: with_arrays(c, head__bias=BIAS / 0 + math.inf), "entry 'head.bias' holds NaN"),
    "shape": (lambda c: with_arrays(c, head__bias=torch.zeros(7)), "expected shape (6,), got (7,)"),
    "dtype": (lambda c: with_arrays(c, head__bias=BIAS.double()), "expected torch.float32, got torch.float64"),
    "missing": (lambda c: with_arrays(c, head__bias=None), "entry 'head.bias' is missing"),
    "extra": (lambda c: with_arrays(c, tail=BIAS), "unexpected entry 'tail'"),
    "personal": (lambda c: with_arrays(c, block1__norm__bias=torch.zeros(4)), "unexpected entry 'block1.norm.bias'"),
    "no metrics": (lambda c: c.pop("metrics"), "the reply has no 'metrics' record"),
    "no arrays": (lambda c: c.pop("arrays"), "the reply has no 'arrays' record"),
    "negative": (lambda c: with_metrics(c, num_examples=-3), "num-examples: expected a whole number >= 0, got -3"),
    "half": (lambda c: with_metrics(c, num_examples=2.5), "num-examples: expected a whole number >= 0, got 2.5"),
    "nan count": (lambda c: with_metrics(c, num_examples=math.nan), "num-examples: expected a whole number >= 0"),
}


@pytest.fixture(scope="module")
def without_second(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled once: what a run leaves in which the second site never answers in round 2."""
    return {}


def reference(lab: Any, store: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """Model and history (but for the failed record) of such a run, by a site that is not even reached."""
    if not store:
        out, _ = lab.run(options={"intercept": lab.fault(absent, 2)}, **KEPT)
        store["value"] = lab.model(out), [r for r in lab.history(out) if r["status"] == "ok"]
        plain, _ = lab.run(**KEPT)
        assert lab.model(plain) != lab.model(out)
    found: tuple[bytes, list[Any]] = store["value"]
    return found


def check_left_out(lab: Any, out: Path, store: dict[str, Any], reason: str) -> None:
    """The second site failed in round 2 for this reason, and everything else is as if it had been absent."""
    model, rest = reference(lab, store)
    failed = lab.history(out, status="failed")
    assert [(r["round"], r["phase"], r["site"]) for r in failed] == [(2, "train", SECOND)]
    assert reason in failed[0]["reason"]
    assert lab.summary(out)["failures"] == [
        {"round": 2, "phase": "train", "site": SECOND, "reason": failed[0]["reason"]}
    ]
    assert [r for r in lab.history(out) if r["status"] == "ok"] == rest
    assert lab.model(out) == model


@pytest.mark.parametrize("fault", TAMPERED)
def test_broken_reply(lab: Any, without_second: dict[str, Any], fault: str) -> None:
    change, reason = TAMPERED[fault]
    out, _ = lab.run(options={"intercept": lab.fault(lab.tampered(change), 2)}, **KEPT)
    check_left_out(lab, out, without_second, reason)


def test_a_site_that_raises(lab: Any, without_second: dict[str, Any]) -> None:
    out, _ = lab.run(options={"intercept": lab.fault(raises, 2)}, **KEPT)
    check_left_out(lab, out, without_second, "RuntimeError: out of memory")


def test_a_site_that_answers_too_late(lab: Any, without_second: dict[str, Any]) -> None:
    # The others take hundredths of a second; the deadline leaves them room on a busy machine.
    reference(lab, without_second)
    out, _ = lab.run(options={"intercept": lab.fault(late, 2)}, **KEPT, **{"federation.train_deadline_s": 2.0})
    check_left_out(lab, out, without_second, "no answer within 2 s")


def test_a_site_that_never_answers(lab: Any, without_second: dict[str, Any]) -> None:
    reference(lab, without_second)
    swallow = lab.fault(lambda call: (call(), None)[1], 2)
    out, _ = lab.run(options={"intercept": swallow}, **KEPT, **{"federation.train_deadline_s": 2.0})
    check_left_out(lab, out, without_second, "no answer within 2 s")


def test_a_site_that_is_never_there(lab: Any) -> None:
    """Its personal state is never made, its numbers never count; the run still names it every round."""
    out, summary = lab.run(options={"intercept": lab.fault(raises)})
    assert [r["round"] for r in lab.history(out, phase="train", status="failed")] == [1, 2, 3]
    assert len(summary["failures"]) == 3
    # The central quantity: a weighted mean over the two others.
    assert {r["site"] for r in lab.history(out, phase="train", status="ok")} == {"phantom-00", "phantom-02"}


def test_a_site_that_cannot_be_scored_is_left_out_of_the_scores_only(lab: Any) -> None:
    plain, _ = lab.run()
    out, summary = lab.run(options={"intercept": lab.fault(raises, kind="evaluate")})
    assert lab.model(plain) == lab.model(out)
    assert {r["site"] for r in lab.history(out, phase="evaluate", status="failed")} == {SECOND}
    assert math.isfinite(summary["mean"])


def test_an_unanswered_query_means_clean(lab: Any) -> None:
    settings = {
        "strategy.name": "fednoro",
        "client.name": "fednoro",
        "strategy.args": {"warmup_rounds": 1, "num_votes": 3},
    }
    out, summary = lab.run(options={"intercept": lab.fault(raises, kind="query.method")}, **settings)
    failed = lab.history(out, phase="query", status="failed")
    assert [(r["round"], r["site"]) for r in failed] == [(2, SECOND)]
    assert SECOND not in summary["notes"]["believed_noisy"]
    assert len(lab.history(out, phase="train", round=3, status="ok")) == 3


# ---------------------------------------------------------------------- quorum


@pytest.mark.parametrize("kind", ["train", "query.method"])
def test_quorum_lost_and_resumed(lab: Any, kind: str) -> None:
    settings = {
        "strategy.name": "fednoro",
        "client.name": "fednoro",
        "strategy.args": {"warmup_rounds": 1, "num_votes": 3},
    }
    whole, _ = lab.run(**settings)
    out = lab.new()
    nobody = lab.fault(raises, 2, partition=None, kind=kind)
    with pytest.raises(QuorumLost) as caught:
        lab.run(out, options={"intercept": nobody}, **settings)
    text = str(caught.value)
    assert "round 2" in text and "0 valid answers of 3 asked, 2 needed" in text
    assert f"{SECOND}: RuntimeError: out of memory" in text
    assert "checkpoint after round 1 is kept" in text and "--resume" in text
    assert CheckpointStore(out / "checkpoint").rounds() == [1]
    phase = "train" if kind == "train" else "query"
    assert (
        len(lab.history(out, phase=phase, round=2, status="failed")) == 3
    )  # on disk, although the round does not count
    lab.run(out, options={"resume": True}, **settings)
    assert lab.model(whole) == lab.model(out) and lab.history(whole) == lab.history(out)


def test_quorum_lost_in_the_first_round(lab: Any) -> None:
    with pytest.raises(QuorumLost, match=r"No checkpoint exists yet: start the run again"):
        lab.run(options={"intercept": lab.fault(raises, 1, partition=None)})


def test_a_result_below_the_quorum_is_thrown_away(lab: Any) -> None:
    out = lab.new()
    some = {"federation.quorum": 1.0, "strategy.name": "fedadam", "strategy.args": {"lr": 0.01}}
    with pytest.raises(QuorumLost, match="2 valid answers of 3 asked, 3 needed"):
        lab.run(out, options={"intercept": lab.fault(raises, 2)}, **some)
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and kept.round == 1 and kept.accepted == {f"phantom-0{i}": 1 for i in range(3)}
    whole, _ = lab.run(**some)
    lab.run(out, options={"resume": True}, **some)
    assert lab.model(whole) == lab.model(out)


# ---------------------------------------------------------------------- nothing to train on


def make_empty(path: Path, site: str) -> None:
    """Take the training items of a site away."""
    with h5py.File(path, "r+") as file:
        file[site].attrs["train_idx"] = np.zeros(0, dtype=np.int32)


def test_a_derived_site_without_training_items_is_heard_and_not_summed(lab: Any, tmp_path: Path) -> None:
    """A partition may leave a client nothing to train on; it is still scored."""
    from fedmed.engines import prepare

    derived = {
        "data.partition.name": "iid",
        "data.partition.args": {"num_clients": 3},
        "data.cache_dir": str(tmp_path / "own"),
    }
    path = prepare.site_file(prepare.with_absolute_paths(lab.config(**derived)))
    make_empty(path, "site_01")
    out, _ = lab.run(**derived, **KEPT, **{"evaluation.mode": "before"})
    empty = lab.history(out, phase="train", site="client_01")
    assert [(r["status"], r["num_examples"], r["metrics"]) for r in empty] == [("empty", 0, {})] * 3
    assert lab.history(out, status="failed") == []
    scored = lab.history(out, phase="evaluate", site="client_01")
    assert [r["round"] for r in scored] == [0, 1, 2, 3] and all(r["metrics"]["n/test"] > 0 for r in scored)
    without, _ = lab.run(**derived, **KEPT, options={"intercept": lab.fault(raises)})
    assert lab.model(out) == lab.model(without)


def test_all_sites_empty_leaves_the_model_as_it_is(lab: Any) -> None:
    """A round in which nobody has anything to train on is a round without change, not an error."""

    def nothing(call: Any) -> Any:
        reply = call()
        reply.content.pop("arrays")
        with_metrics(reply.content, num_examples=0)
        return reply

    out, _ = lab.run(options={"intercept": lab.fault(nothing, 1, 2, 3, partition=None)})
    from fedmed.federation.site import make_model

    fresh, _ = make_model(lab.config(), "classification", 6, 3, (16, 16))
    assert all(torch.equal(v, lab.state(out)[n]) for n, v in fresh.state_dict().items())
