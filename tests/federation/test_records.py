"""The codec: same bytes as Flower's own arrays, by reference inside a process, clear refusals."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedmed.federation.records import (
    TensorArray,
    decode_metrics,
    decode_state,
    encode_config,
    encode_metrics,
    encode_state,
)

STATE = {
    "float": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.float16),
    "double": torch.tensor([math.nan, math.inf], dtype=torch.float64),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 2),
    "flag": torch.tensor([True, False]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


@pytest.mark.parametrize("name", list(STATE))
def test_same_bytes_and_ids_as_flower(name: str) -> None:
    ours, theirs = encode_state({name: STATE[name]}), ArrayRecord({name: STATE[name]})
    mine, its = ours[name], theirs[name]
    assert (mine.dtype, mine.shape, mine.stype, mine.data) == (its.dtype, its.shape, its.stype, its.data)
    assert mine.object_id == its.object_id and ours.object_id == theirs.object_id


def test_a_parameter_can_be_sent() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert encode_state({"w": weight})["w"].data == ArrayRecord({"w": torch.ones(2)})["w"].data


def test_by_reference_in_one_process() -> None:
    record = encode_state(STATE)
    back = decode_state(record)
    assert list(back) == list(STATE)
    assert all(back[name] is STATE[name] for name in STATE)


def test_flower_sees_a_copy() -> None:
    array = TensorArray(torch.ones(2))
    array.numpy()[0] = 5.0
    assert array.numpy().tolist() == [1.0, 1.0]
    with pytest.raises(AttributeError, match="read-only"):
        array.data = b""


@pytest.mark.parametrize("name", list(STATE))
def test_another_process_gets_a_plain_array_with_the_same_content(name: str) -> None:
    again = pickle.loads(pickle.dumps(encode_state({name: STATE[name]})))
    assert type(again[name]) is Array
    back = decode_state(again)[name]
    assert back.dtype == STATE[name].dtype and back.shape == STATE[name].shape
    assert torch.equal(torch.nan_to_num(back.double()), torch.nan_to_num(STATE[name].double()))


def test_decoded_foreign_arrays_are_own_copies() -> None:
    record = ArrayRecord({"w": torch.ones(2)})
    decode_state(record)["w"].zero_()
    assert decode_state(record)["w"].tolist() == [1.0, 1.0]


def test_bfloat16_travels_in_the_process_and_is_refused_as_bytes() -> None:
    record = encode_state({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert decode_state(record)["w"].dtype == torch.bfloat16
    with pytest.raises(TypeError):
        _ = record["w"].data


def test_metrics_unwrap_scalars_and_flat_lists() -> None:
    sent = {
        "int": 3, "float": 0.5, "nan": math.nan, "flag": True, "np": np.float32(0.5), "npi": np.int64(2),
        "tensor": torch.tensor(1.5), "array": np.array([1, 2]), "mixed": [1, 2.5], "tuple": (1, 2), "none": [],
    }  # fmt: skip
    got = decode_metrics(encode_metrics(sent))
    assert math.isnan(got.pop("nan"))  # type: ignore[arg-type]
    assert got == {
        "int": 3, "float": 0.5, "flag": 1, "np": 0.5, "npi": 2, "tensor": 1.5, "array": [1, 2], "mixed": [1.0, 2.5],
        "tuple": [1, 2], "none": [],
    }  # fmt: skip
    assert type(got["flag"]) is int and type(got["npi"]) is int


@pytest.mark.parametrize("value", ["text", None, {"a": 1}, ["a"], [[1.0]], np.zeros((2, 2)), torch.zeros(1, 1)])
def test_other_metrics_are_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="metric 'x': expected a number or a flat list"):
        encode_metrics({"x": value})


def test_config_takes_tuples_as_lists() -> None:
    assert dict(encode_config({"a": (1, 2), "b": "c", "d": True})) == {"a": [1, 2], "b": "c", "d": True}
