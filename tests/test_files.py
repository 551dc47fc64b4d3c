"""Atomic files and what is made ready for JSON; the writers are tested with the run folder they serve."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedmed.files import json_ready


def test_json_ready_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, -math.inf], 2: torch.tensor([1.0, math.nan]), "c": np.int64(3), "d": (True, None)}
    assert json_ready(value) == {"a": [1.0, None, None], "2": [1.0, None], "c": 3, "d": [True, None]}
