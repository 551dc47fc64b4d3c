"""What a layout reads from a model, and which states it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import UserError
from fedmed.federation.layout import Layout


class Net(nn.Module):
    """Two blocks, a tied weight and two kinds of groups; `stem.deep` is nested in `stem`."""

    groups = {"depth": ("stem", "stem.deep", "head"), "task": ()}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.norm = nn.BatchNorm1d(2)
        self.stem.deep = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.stem.deep.weight


def nobody(name: str, module: nn.Module) -> bool:
    return False


def norms(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d)


def test_kinds_in_state_dict_order() -> None:
    model = Net()
    layout = Layout.of(model, nobody)
    assert list(layout.entries) == list(model.state_dict())
    kinds = {name: entry.kind for name, entry in layout.entries.items()}
    assert kinds["stem.norm.weight"] == "parameter"
    assert kinds["stem.norm.running_mean"] == "buffer"
    assert kinds["stem.norm.num_batches_tracked"] == "counter"
    assert layout.exchanged == tuple(layout.entries)
    assert "stem.norm.running_mean" not in layout.trainable


def test_a_tied_weight_is_a_parameter_under_both_names() -> None:
    layout = Layout.of(Net(), nobody)
    assert layout.entries["head.weight"].kind == layout.entries["stem.deep.weight"].kind == "parameter"
    assert {"head.weight", "stem.deep.weight"} <= set(layout.trainable)


def test_personal_entries_do_not_travel_and_are_told_apart_by_their_owner() -> None:
    layout = Layout.of(Net(), norms)
    assert all(name.startswith("stem.norm.") for name in layout.personal) and len(layout.personal) == 5
    assert not set(layout.personal) & set(layout.exchanged)
    assert set(layout.personal) | set(layout.exchanged) == set(layout.entries)


def test_frozen_parameters_stay_buffers_travel() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    layout = Layout.of(model, nobody)
    assert "stem.norm.weight" not in layout.exchanged and "stem.norm.weight" not in layout.trainable
    assert "stem.norm.running_var" in layout.exchanged


def test_exchanged_state_is_by_reference() -> None:
    model = Net()
    state = Layout.of(model, norms).exchanged_state(model)
    assert state["stem.deep.bias"].data_ptr() == model.stem.deep.bias.data_ptr()


def test_groups_match_whole_components_and_the_longest_prefix() -> None:
    groups = Layout.of(Net(), nobody).group_of("depth")
    assert groups["stem.norm.weight"] == 0 and groups["stem.deep.weight"] == 1 and groups["head.weight"] == 2
    assert Layout.of(Net(), nobody).num_groups("depth") == 3


def test_group_errors_say_what_the_model_has() -> None:
    layout = Layout.of(Net(), nobody)
    for kind in ("modality", "task"):
        with pytest.raises(UserError, match="depth"):
            layout.group_of(kind)
    model = Net()
    model.head2 = nn.Linear(2, 2)  # "head" must not swallow it
    with pytest.raises(UserError, match=r"head2\.weight"):
        Layout.of(model, nobody).group_of("depth")


def test_misfits_are_named() -> None:
    model = Net()
    layout = Layout.of(model, norms)
    good = layout.exchanged_state(model)
    assert layout.misfit(good) is None
    name = "stem.deep.bias"
    cases = {
        "is missing": {n: v for n, v in good.items() if n != name},
        r"expected shape \(2,\), got \(3,\)": {**good, name: torch.zeros(3)},
        "expected torch.float32, got torch.float64": {**good, name: torch.zeros(2, dtype=torch.float64)},
        "unexpected entry 'more'": {**good, "more": torch.zeros(1)},
        "unexpected entry 'stem.norm.bias'": {**good, "stem.norm.bias": torch.zeros(2)},
    }
    for problem, arrays in cases.items():
        found = layout.misfit(arrays)
        assert found is not None
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(found)


def test_an_announced_group_may_be_left_out_and_nothing_smuggled_in_its_place() -> None:
    model = Net()
    layout = Layout.of(model, norms)
    state = layout.exchanged_state(model)
    rest = {n: v for n, v in state.items() if n != "head.weight"}
    assert layout.misfit(rest, optional=("head",)) is None
    assert layout.misfit(rest, optional=("hea",)) == "entry 'head.weight' is missing"
    assert layout.misfit({**rest, "stem.norm.bias": torch.zeros(2)}, optional=("head",)) is not None
