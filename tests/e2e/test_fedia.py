"""FedIA as whole runs: when masks are measured and completed, what is kept of it, and stop and resume in the middle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedmed.errors import UserError
from fedmed.federation.checkpoint import CheckpointStore
from fedmed.federation.personal import PersonalStore

SITES = [f"phantom-0{i}" for i in range(3)]
# A margin of −1 flags every site in round 3, so that masks are completed in round 4; the low threshold is for a model
# that has hardly learnt.
FEDIA = {
    "data.phantom": {"num_sites": 3, "images_per_site": 20, "image_size": 16, "lesions": 3},
    "model.activation": "softmax", "strategy.name": "fedia", "client.name": "fedia", "federation.rounds": 6,
    "strategy.args": {"warmup_last_round": 1, "margin": -1.0, "threshold": 0.0}, "evaluation.every": 6,
}  # fmt: skip


def settings(lab: Any, **changes: Any) -> dict[str, Any]:
    return {**lab.segmentation, **FEDIA, **{key.replace("__", "."): value for key, value in changes.items()}}


def reported(lab: Any, out: Path, metric: str) -> dict[str, dict[int, float]]:
    """Values of a metric by site and round."""
    found: dict[str, dict[int, float]] = {site: {} for site in SITES}
    for record in lab.history(out, phase="train", status="ok"):
        if metric in record["metrics"]:
            found[record["site"]][record["round"]] = record["metrics"][metric]
    return found


def added(lab: Any, out: Path) -> dict[str, list[int]]:
    return {
        site: [int(v) for _, v in sorted(row.items())] for site, row in reported(lab, out, "n_corrected_pixels").items()
    }


def test_a_course(lab: Any) -> None:
    out, summary = lab.run(**settings(lab))
    measured = reported(lab, out, "completeness")
    assert all(list(row) == [2] and 0 <= row[2] <= 1 for row in measured.values())
    for row in added(lab, out).values():  # what was added once stays
        assert row[:3] == [0, 0, 0] and row[3] > 0 and row[3:] == [row[3]] * 3
    notes = summary["notes"]
    assert notes["completeness"] == {site: row[2] for site, row in measured.items()}
    assert notes["corrected"] == dict.fromkeys(SITES, 4) and notes["all_flagged"]
    assert sum(notes["weights"].values()) == pytest.approx(1.0) and set(notes["weights"]) == set(SITES)
    kept = CheckpointStore(out / "checkpoint").read()
    assert kept is not None and kept.strategy["due"] == {} and set(kept.strategy["line"]) == set(SITES)
    for site in SITES:
        personal = PersonalStore(out / "sites" / site / "personal").read(6)
        assert personal is not None and set(personal) == {"completion/added_mask", "completion/source"}
        bits = personal["completion/added_mask"]
        assert (
            bits.shape[1] == 16 * 16 // 8
            and sum(int(b).bit_count() for b in bits.flatten()) == added(lab, out)[site][-1]
        )


def test_no_correction_in_a_short_run(lab: Any) -> None:
    out, summary = lab.run(**settings(lab, federation__rounds=3))
    assert summary["notes"]["corrected"] == {} and all(row == [0, 0, 0] for row in added(lab, out).values())


def test_stopped_after_every_round(lab: Any) -> None:
    whole, summary = lab.run(**settings(lab))
    parts = lab.new()
    for number in range(1, 7):
        lab.stopped(parts, number, resume=number > 1, **settings(lab))
    _, resumed = lab.run(parts, options={"resume": True}, **settings(lab))
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)
    assert summary["notes"] == resumed["notes"]


def test_stopped_while_masks_are_completed(lab: Any) -> None:
    """Interrupted in round 4 after the second site has completed its masks: as if the round had not begun."""
    whole, _ = lab.run(**settings(lab))

    def interrupt(call: Any) -> None:
        call()
        raise KeyboardInterrupt

    parts = lab.new()
    with pytest.raises(KeyboardInterrupt):
        lab.run(parts, options={"intercept": lab.fault(interrupt, 4)}, **settings(lab))
    lab.run(parts, options={"resume": True}, **settings(lab))
    assert lab.model(whole) == lab.model(parts) and lab.history(whole) == lab.history(parts)


def test_a_lost_reply_is_asked_for_again(lab: Any) -> None:
    """The second site's masks of round 4 are not accepted: it forgets them and completes them in round 5."""

    def lose(call: Any) -> None:
        call()
        raise RuntimeError("connection lost")

    out, summary = lab.run(options={"intercept": lab.fault(lose, 4)}, **settings(lab))
    assert summary["notes"]["corrected"] == {SITES[0]: 4, SITES[1]: 5, SITES[2]: 4}
    row = reported(lab, out, "n_corrected_pixels")[SITES[1]]
    assert sorted(row) == [1, 2, 3, 5, 6] and row[3] == 0 and row[5] > 0


def test_a_lost_folder_is_noticed_and_masks_are_completed_again(lab: Any) -> None:
    out = lab.new()

    def forget(call: Any) -> Any:
        shutil.rmtree(out / "sites" / SITES[1] / "personal")
        return call()

    _, summary = lab.run(out, options={"intercept": lab.fault(forget, 5)}, **settings(lab))
    row = added(lab, out)[SITES[1]]
    assert row[3] > 0 and row[4] == 0 and row[5] > 0
    assert summary["notes"]["corrected"] == {SITES[0]: 4, SITES[1]: 6, SITES[2]: 4}
    fresh = reported(lab, out, "personal_fresh")
    assert fresh == {SITES[0]: {}, SITES[1]: {5: 1}, SITES[2]: {}}


def test_another_activation_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"set model\.activation=softmax"):
        lab.run(**settings(lab, model__activation="sigmoid"))
