"""FedLPPA at the server: affinities by hand, mixes, rows of prompts, sites that are away, and what is kept."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmed.errors import UserError
from fedmed.federation.checkpoint import Checkpoint, CheckpointStore
from fedmed.federation.messages import Update
from strategies.prompt_affinity import FedLPPA, FedLPPAState, affinities, mixed, prompt_vectors

NAN, INF = float("nan"), float("inf")
SITES = [("a", 10), ("b", 30), ("c", 5)]
ROWS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]]  # room for one site more than there is


def global_state(rows: list[list[float]] = ROWS, universal: tuple[float, float] = (1.0, 1.0)) -> dict[str, Tensor]:
    return {
        "distribution_prompts": torch.tensor(rows).reshape(-1, 1, 2),
        "universal_prompt": torch.tensor(universal).reshape(1, 1, 2),
        "encoder.w": torch.tensor([10.0]),
        "aux_decoder.w": torch.tensor([20.0]),
        "aux_decoder.running_mean": torch.tensor([20.0]),
        "aux_decoder.steps": torch.tensor(5),
        "aux_decoder_like.w": torch.tensor([1.0]),  # a name that only begins alike
    }


def reply(site: str, value: float, *, n: int | None = None, steps: int = 6, rows: Any = None) -> Update:
    """A reply whose floats are all `value`, its prompts excepted."""
    start = global_state()
    arrays = {k: torch.full_like(v, value) if v.is_floating_point() else torch.tensor(steps) for k, v in start.items()}
    arrays["universal_prompt"] = start["universal_prompt"]
    arrays["distribution_prompts"] = start["distribution_prompts"] if rows is None else torch.tensor(rows)[:, None]
    return Update(site, ord(site) - ord("a"), dict(SITES)[site] if n is None else n, arrays)


def lppa(bench: SimpleNamespace) -> FedLPPA:
    rule: FedLPPA = bench.bound(FedLPPA(), global_state(), SITES)
    return rule


def vectors(rows: list[list[float]], universal: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    return prompt_vectors(torch.tensor(rows).reshape(-1, 1, 2), torch.tensor(universal).reshape(1, 1, 2))


# ---------------------------------------------------------------- equations


def test_affinity_by_hand() -> None:
    q = vectors([[1.0, 0.0], [0.0, 1.0]])
    assert q.tolist() == [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]] and q.dtype == torch.float64
    assert affinities(q, 0) == pytest.approx([1.0, 2 / 3]) and affinities(q, 1) == pytest.approx([2 / 3, 1.0])
    aux = {0: {"w": torch.tensor([1.0])}, 1: {"w": torch.tensor([2.0])}}
    assert float(mixed(affinities(q, 0), aux)["w"]) == pytest.approx(0.6 * 1 + 0.4 * 2)


def test_affinity_is_clipped_and_does_not_see_length() -> None:
    q = vectors([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.1]], (0.0, 0.0))
    assert affinities(q, 0)[1] == 0.0 and affinities(q, 1) == [0.0, 1.0, 0.0]
    scaled = q * torch.tensor([[2.0], [7.0], [0.1]], dtype=torch.float64)
    assert affinities(q, 0) == pytest.approx(affinities(scaled, 0))
    assert affinities(q.flip(0), 2) == pytest.approx(affinities(q, 0)[::-1])


@pytest.mark.parametrize("broken", [[0.0, 0.0], [NAN, 1.0], [INF, 1.0], [-INF, INF]])
def test_a_prompt_that_says_nothing(broken: list[float]) -> None:
    q = vectors([[1.0, 0.0], broken, [1.0, 0.0]], (0.0, 0.0))
    assert affinities(q, 0) == pytest.approx([1.0, 0.0, 1.0])
    assert affinities(q, 1) == [0.0, 1.0, 0.0]


def test_one_site() -> None:
    assert affinities(vectors([[0.3, 0.2]]), 0) == [1.0]
    aux = {0: {"w": torch.tensor([0.1, 0.7])}}
    assert torch.equal(mixed([1.0], aux)["w"], aux[0]["w"])


def test_mix_leaves_out_who_was_never_heard() -> None:
    aux = {2: {"w": torch.tensor([4.0])}, 0: {"w": torch.tensor([1.0])}}
    assert float(mixed([1.0, 0.9, 0.5, 0.3], aux)["w"]) == pytest.approx((1 * 1 + 0.5 * 4) / 1.5)
    assert float(mixed([0.0, 1.0, 0.5], aux)["w"]) == pytest.approx(4.0)  # not heard itself
    assert mixed([0.0, 1.0, 0.0], aux) == {} and mixed([1.0], {}) == {}
    assert torch.equal(mixed([1.0, 0.0, 0.5], aux)["w"], mixed([1.0, 0.0, 0.5], dict(sorted(aux.items())))["w"])
    same = {k: {"w": torch.tensor([2.5])} for k in range(3)}
    assert float(mixed([1.0, 0.2, 0.7], same)["w"]) == pytest.approx(2.5)


# ---------------------------------------------------------------- rounds


def test_round_one_adds_nothing(bench: SimpleNamespace) -> None:
    assert lppa(bench).payload(1, "a") == ({}, {})


def test_aggregate_by_hand(bench: SimpleNamespace) -> None:
    rule = lppa(bench)
    before = rule.state
    new = rule.aggregate(1, global_state(), iter([reply("a", 1.0, steps=6), reply("b", 2.0, steps=9)]))
    assert float(new["encoder.w"]) == pytest.approx((10 * 1 + 30 * 2) / 40)
    assert float(new["aux_decoder.w"]) == pytest.approx(1.75) and int(new["aux_decoder.steps"]) == 9
    assert before.aux == {} and set(rule.state.aux) == {0, 1}  # replaced, not written into
    assert set(rule.state.aux[0]) == {"aux_decoder.w", "aux_decoder.running_mean"}
    assert rule.notes["weights"] == {"a": 0.25, "b": 0.75}
    assert rule.notes["affinity"]["a"] == pytest.approx({"a": 1.0, "b": 2 / 3}) and "c" in rule.notes["affinity"]


def test_everybody_gets_a_mix_of_its_own(bench: SimpleNamespace) -> None:
    rule = lppa(bench)
    rule.aggregate(1, global_state(), iter([reply("a", 1.0), reply("b", 2.0)]))
    arrays, config = rule.payload(2, "a")
    assert set(arrays) == {"aux_decoder.w", "aux_decoder.running_mean"} and config == {}
    assert float(arrays["aux_decoder.w"]) == pytest.approx(1.4)
    assert float(arrays["aux_decoder.running_mean"]) == pytest.approx(1.4)
    assert float(rule.payload(2, "b")[0]["aux_decoder.w"]) == pytest.approx(1.6)
    # c was never heard: q_c = (1, 1, 1, 1) has the same affinity with both
    assert float(rule.payload(2, "c")[0]["aux_decoder.w"]) == pytest.approx(1.5)


def test_rows_belong_to_their_sites(bench: SimpleNamespace) -> None:
    """A small site's row moves as far as the site moved it; what others sent in its place is not read."""
    moved = [[9.0, 9.0], [0.7, 0.7], [9.0, 9.0], [9.0, 9.0]]
    start = global_state([[0.5, 0.5]] * 4)
    new = lppa(bench).aggregate(1, start, iter([reply("b", 1.0, n=1, rows=moved), reply("c", 1.0, n=9)]))
    expected = [[0.5, 0.5], [0.7, 0.7], ROWS[2], [0.5, 0.5]]
    assert torch.equal(new["distribution_prompts"], torch.tensor(expected)[:, None])
    assert torch.equal(start["distribution_prompts"], torch.full((4, 1, 2), 0.5))
    spoilt = [[9.0, 9.0], [9.0, 9.0], [NAN, NAN], [9.0, 9.0]]
    new = lppa(bench).aggregate(1, start, iter([reply("b", 1.0, rows=spoilt)]))
    assert bool(new["distribution_prompts"].isfinite().all())


def test_a_site_that_is_away_is_mixed_with_what_it_sent_last(bench: SimpleNamespace) -> None:
    rule = lppa(bench)
    new = rule.aggregate(1, global_state(), iter([reply("a", 1.0), reply("b", 2.0)]))
    new = rule.aggregate(2, new, iter([reply("a", 5.0)]))
    assert float(new["aux_decoder.w"]) == 5.0
    assert float(rule.payload(3, "a")[0]["aux_decoder.w"]) == pytest.approx(0.6 * 5 + 0.4 * 2)
    kept = rule.state
    assert rule.aggregate(3, new, iter([])) is new and rule.state is kept
    assert rule.aggregate(4, new, iter([reply("b", 7.0, n=0)])) is new and rule.state is kept


def test_affinities_follow_the_prompts(bench: SimpleNamespace) -> None:
    rule = lppa(bench)
    opposite = [[1.0, 0.0], [-4.0, -3.0], [0.0, 0.0], [0.0, 0.0]]
    rule.aggregate(1, global_state(), iter([reply("a", 1.0), reply("b", 2.0, rows=opposite)]))
    assert float(rule.payload(2, "a")[0]["aux_decoder.w"]) == 1.0 and rule.notes["affinity"]["a"]["b"] == 0.0


def test_the_state_goes_through_a_checkpoint(bench: SimpleNamespace, tmp_path: Path) -> None:
    rule = lppa(bench)
    new = rule.aggregate(1, global_state(), iter([reply("a", 1.0), reply("b", 2.0)]))
    store, fields = CheckpointStore(tmp_path), {"aux": rule.state.aux, "prompts": rule.state.prompts}
    store.write(Checkpoint(1, new, fields, "hash"))
    kept, fresh = store.read(), lppa(bench)
    assert kept is not None
    fresh.restore(kept.strategy, {})
    assert isinstance(fresh.state, FedLPPAState)
    for site in "abc":
        found, expected = fresh.payload(2, site)[0], rule.payload(2, site)[0]
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_one_reply_at_a_time(bench: SimpleNamespace) -> None:
    """What is put aside is a copy: the rest of a reply is let go."""
    seen: list[weakref.ref[Tensor]] = []

    def replies() -> Iterator[Update]:
        for site in "abc":
            gc.collect()
            assert sum(ref() is not None for ref in seen) <= 1
            one = reply(site, 1.0)
            seen.extend(weakref.ref(one.arrays[name]) for name in ("encoder.w",))
            yield one
            del one

    lppa(bench).aggregate(1, global_state(), replies())


def test_refusals(bench: SimpleNamespace) -> None:
    plain = bench.bound(FedLPPA(), {"w": torch.ones(1)}, SITES)
    with pytest.raises(UserError, match=r"set model\.name=prompt_unet"):
        plain.payload(1, "a")
    small = global_state(ROWS[:2])
    rule = bench.bound(FedLPPA(), small, SITES)
    with pytest.raises(
        UserError, match=r"c is site number 3, the model has prompts for 2; raise model\.args\.num_sites"
    ):
        rule.aggregate(1, small, iter([reply("c", 1.0)]))
    rule.aggregate(1, small, iter([reply("a", 1.0)]))
    assert rule.payload(2, "c") == ({}, {})  # it answers with an error of its own
    assert list(rule.notes["affinity"]) == ["a", "b"] and not math.isnan(rule.notes["affinity"]["b"]["a"])
