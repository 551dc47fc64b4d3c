"""Memory that is given out again: only when nobody holds it, and with the results of ordinary memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn

from fedmed.config import from_tree
from fedmed.engines import run
from fedmed.federation import buffers
from fedmed.federation.buffers import Plan, plan_of
from fedmed.federation.layout import Layout, hand_over
from fedmed.federation.messages import arrays_of
from fedmed.federation.state import State, clone_state, copy_state, first_non_finite, weighted_mean

LARGE = 300_001  # float32 entries: a state of more than a megabyte, of a length no vector unit divides


def large(value: float = 1.0, counter: int = 3) -> State:
    """A state that lies in one block when it is copied."""
    rng = torch.Generator().manual_seed(int(value * 8))
    return {
        "conv": torch.randn(3, 100_000, generator=rng) + value,
        "bias": torch.full((LARGE - 300_000,), value),
        "double": torch.full((5, 2), value, dtype=torch.float64),
        "n": torch.tensor(counter),
        "empty_row": torch.full((1, 1), value),
    }


@pytest.fixture(autouse=True)
def no_blocks_kept() -> None:
    """Start with nothing to give out again."""
    gc.collect()
    buffers._free.clear()


def address(state: State) -> int:
    return state["conv"].untyped_storage().data_ptr()


def kept() -> int:
    return sum(len(blocks) for blocks in buffers._free.values())


def test_a_copy_has_the_same_entries_aligned_and_contiguous() -> None:
    original = {**large(), "across": torch.arange(12.0).reshape(3, 4).t()}
    copy = clone_state(original)
    assert list(copy) == list(original)
    for name, value in original.items():
        assert torch.equal(copy[name], value) and copy[name].dtype == value.dtype
        assert copy[name].is_contiguous() and copy[name].data_ptr() % 64 == 0
    assert clone_state({}) == {} and clone_state({"w": torch.zeros(0)})["w"].shape == (0,)


def test_memory_is_given_out_again_when_its_last_holder_goes() -> None:
    copy = clone_state(large())
    place, view = address(copy), copy["bias"][:1]
    del copy
    assert kept() == 0  # a view of one entry holds the block
    other = clone_state(large(2.0))
    assert address(other) != place and view.item() == 1.0
    array = view.numpy()
    del view
    assert kept() == 0  # and so does a NumPy array
    del array
    assert kept() == 1
    assert address(clone_state(large())) == place


def test_few_blocks_are_kept() -> None:
    copies = [clone_state(large()) for _ in range(9)]
    copies.clear()
    assert kept() == 4
    for extra in range(3):  # states of other sizes push the oldest size out
        clone_state({"w": torch.zeros(LARGE + 64 * extra)})
    assert len(buffers._free) == 2


def test_flat_views_of_a_block() -> None:
    copy = clone_state(large())
    flats = plan_of(copy).flats(copy)
    assert flats is not None and [f.dtype for f in flats] == [torch.float32, torch.float64, torch.int64]
    flats[0].mul_(2.0)
    assert torch.equal(copy["conv"], large()["conv"] * 2) and copy["n"].item() == 3


@pytest.mark.parametrize("change", ["replaced", "transposed", "reordered", "missing", "other type"])
def test_no_flat_view_of_anything_else(change: str) -> None:
    plan, copy = Plan(large()), clone_state(large())
    square = clone_state({"conv": torch.zeros(600, 600)})
    if change == "replaced":
        copy["bias"] = copy["bias"].clone()
    elif change == "transposed":
        plan, copy = Plan(square), {"conv": square["conv"].t()}
    elif change == "reordered":
        copy = dict(reversed(copy.items()))
    elif change == "missing":
        del copy["n"]
    else:
        copy["bias"] = copy["bias"].view(torch.int32)
    assert plan.flats(copy) is None
    assert Plan(large()).flats(large()) is None  # tensors of their own


@pytest.mark.parametrize("packed", [(0, 1, 2), (1, 2), (0, 2), (2,), ()])
def test_a_mean_over_blocks_is_the_mean_over_loose_entries(packed: tuple[int, ...]) -> None:
    states = [large(0.5 * k, counter=k) for k in range(1, 4)]
    pairs = [(10.0 + k, clone_state(s) if k in packed else s) for k, s in enumerate(states)]
    mean = weighted_mean(pairs)
    total = sum(w for w, _ in pairs)
    assert mean is not None and mean["n"].item() == 3
    for name in ("conv", "bias", "double", "empty_row"):
        wanted = sum(w * s[name].double() for w, s in pairs) / total
        assert isinstance(wanted, Tensor) and torch.allclose(mean[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert mean[name].dtype == states[0][name].dtype
    assert all(
        torch.equal(a[n], b[n]) for (_, a), b in zip(pairs, states, strict=True) for n in a
    )  # nothing was written into


def test_weights_for_entries_after_weights_for_states() -> None:
    from fedmed.federation.state import RunningMean

    first, second = clone_state({"w": torch.full((LARGE,), 1.0)}), clone_state({"w": torch.full((LARGE,), 4.0)})
    mean = RunningMean()
    mean.add(first, 1.0)
    mean.add(second, {"w": 2.0})
    mean.add({"other": torch.ones(2)}, 5.0)
    assert (mean.total("w"), mean.total("other"), mean.total("none")) == (3.0, 5.0, 0.0)
    result = mean.result()
    assert result is not None and torch.equal(result["w"], torch.full((LARGE,), 3.0)) and mean.empty
    assert torch.equal(result["other"], torch.ones(2))


def test_non_finite_values_are_found_in_a_block() -> None:
    copy = clone_state(large())
    assert first_non_finite(copy) is None
    copy["double"][2, 1] = float("inf")
    assert first_non_finite(copy) == "double"


def test_copying_into_a_model_in_one_block_and_entry_by_entry() -> None:
    source, block, loose = clone_state(large(2.0)), clone_state(large()), large()
    half = {n: v.half() if v.is_floating_point() else v for n, v in large(2.0).items()}
    for target in (block, loose):
        copy_state(source, target)
        assert all(torch.equal(target[n], source[n]) for n in source)
        copy_state(half, target)
        assert all(torch.equal(target[n], half[n].to(target[n].dtype)) for n in half)
    copy_state({}, block)
    with pytest.raises(KeyError):
        copy_state(source, {})


class Net(nn.Module):
    """Exchanged, frozen, tied and personal entries."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(600, 600)
        self.norm = nn.BatchNorm1d(600)
        self.own = nn.Linear(2, 2)
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.twin = nn.Linear(600, 600)
        self.twin.bias = self.body.bias


def test_a_model_hands_its_entries_over_and_goes_on_in_other_memory() -> None:
    model = Net()
    layout = Layout.of(model, lambda name, module: name.startswith("own."))
    before = clone_state(model.state_dict())
    hand_over(model, layout, keep=True)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    parameters = list(model.parameters())
    given = hand_over(model, layout)
    assert set(given) == set(layout.exchanged) and all(torch.equal(given[n], before[n]) for n in given)
    assert not any(value.requires_grad for value in given.values())
    now = model.state_dict()
    for name in ("own.weight", "own.bias", "fixed"):
        assert torch.equal(now[name], before[name])  # what is not exchanged stays where it is
    copy_state(given, now)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(given[n], before[n]) for n in given)  # training on does not reach what was given away
    assert model.twin.bias is model.body.bias and all(
        a is b for a, b in zip(parameters, model.parameters(), strict=True)
    )


def test_no_reply_is_held_while_the_next_site_works(site_file: Path, tmp_path: Path) -> None:
    alive: list[int] = []
    replies: list[Any] = []

    def watch(message: Message, call: Callable[[], Message]) -> Message:
        if message.metadata.message_type == "train":
            alive.append(sum(reference() is not None for reference in replies))
        reply = call()
        if message.metadata.message_type == "train":
            replies.extend(weakref.ref(value) for value in arrays_of(reply.content, "arrays").values())
        return reply

    tree = {
        "model": {"args": {"widths": [4, 4]}},
        "engine": {"device": "cpu"},
        "federation": {"rounds": 2},
        "out": str(tmp_path / "run"),
    }
    run(from_tree({**tree, "data": {"path": str(site_file), "cache_dir": str(tmp_path)}}), intercept=watch)
    assert len(replies) > 8 and alive == [0, 0, 0, 0]
