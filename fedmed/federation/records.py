"""The one codec between model states and Flower's records.

Inside one process a state goes by reference: `TensorArray` is a Flower `Array` that holds the tensor and serialises it only when somebody
asks for the bytes (another process, or a Flower strategy). Whoever receives such a state must not write into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fedmed.federation.state import State, clone_state

Metrics = dict[str, float | int | list[float] | list[int]]


class TensorArray(Array):
    """A Flower array that serialises lazily. Looks like any other array to Flower: same fields, same bytes."""

    def __init__(self, tensor: Tensor) -> None:
        fields = self.__dict__
        fields["dtype"] = str(tensor.dtype).removeprefix("torch.")
        fields["shape"] = tuple(tensor.shape)
        fields["stype"] = "numpy.ndarray"
        fields["tensor"] = tensor

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array as Flower stores it: the bytes of `numpy.save`."""
        encoded: bytes | None = self.__dict__.get("_encoded")
        if encoded is None:
            buffer = BytesIO()
            np.save(buffer, self.__dict__["tensor"].detach().cpu().numpy(), allow_pickle=False)
            encoded = self.__dict__["_encoded"] = buffer.getvalue()
        return encoded

    @data.setter
    def data(self, value: bytes) -> None:
        raise AttributeError("a TensorArray is read-only")

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy as a NumPy array, as Flower's own arrays give."""
        array: np.ndarray[Any, Any] = self.__dict__["tensor"].detach().cpu().numpy().copy()
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled (between Ray processes) as a plain Flower array."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


# Flower writes the class name into what it sends and looks it up there.
TensorArray.__qualname__ = Array.__qualname__


def encode_state(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Wrap a state into a record, by reference. bfloat16 is not part of Flower's array format: `TypeError` when it is serialised."""
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = TensorArray(tensor)
    return record


def decode_state(record: ArrayRecord) -> State:
    """Read a state from a record: by reference where the sender is in this process, else a copy of our own. Read-only for the receiver.

    The copy lies in memory as a reply of this process does, so that sums over either are the same operations.
    """
    arrays = dict(record.items())
    if all(isinstance(array, TensorArray) for array in arrays.values()):
        return {name: array.__dict__["tensor"] for name, array in arrays.items()}
    return clone_state(
        {
            n: a.__dict__["tensor"] if isinstance(a, TensorArray) else torch.from_numpy(a.numpy())
            for n, a in arrays.items()
        }
    )


def encode_metrics(metrics: Mapping[str, Any]) -> MetricRecord:
    """Turn metrics into a record: ints, floats, and flat lists of one of the two (a mixed list becomes floats); NumPy and tensor scalars are unwrapped.

    Raises `TypeError` for anything else: metrics hold no strings.
    """
    return MetricRecord({name: _number(name, value) for name, value in metrics.items()})


def _number(name: str, value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return [int(v) for v in value] if all(isinstance(v, int) for v in value) else [float(v) for v in value]
    raise TypeError(f"metric {name!r}: expected a number or a flat list of numbers, got {type(value).__name__}")


def decode_metrics(record: MetricRecord) -> Metrics:
    """A plain dict of the record."""
    return dict(record.items())


def encode_config(values: Mapping[str, Any]) -> ConfigRecord:
    """Turn a plain dict of scalars, strings and flat lists into a record."""
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
