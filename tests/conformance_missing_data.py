"""Conformance adapters of what a site lacks: availability masks of modalities, exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from conformance_methods import error

from data_prep.corruption.missing_modality import availability_patterns, dealt_masks, pattern_quotas, published_masks

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]
STORED = [2, 1, 0, 3]  # flair, t1c, t1, t2 among t1, t1c, flair, t2, the order of the rates
# Patterns of flair, t1c, t1, t2 in the order of their published numbers 0..14.
NUMBERED = "0001 0100 0010 1000 0101 0110 1010 0011 1001 1100 1110 1011 1101 0111 1111"


def missing_mask(arrays: Arrays) -> Compared:
    """Order of the patterns, quotas, masks before and after shuffle and redraws, their numbers and achieved rates."""
    rates = [float(rate) for rate in arrays["missing_rates_t1_t1c_flair_t2"]]
    num_cases = int(arrays["n_samples"])
    patterns, quotas = availability_patterns(len(rates)), pattern_quotas(rates, num_cases)
    masks = published_masks(rates, num_cases, np.random.RandomState(int(arrays["seed"])))[:, STORED]
    outputs = {
        "subset_order_t1_t1c_flair_t2": patterns,
        "subset_quota": quotas,
        "quota_total": quotas.sum(),
        "mask_before_shuffle_t1_t1c_flair_t2": dealt_masks(patterns, quotas, num_cases),
        "final_mask_flair_t1c_t1_t2": masks,
        "final_mask_id": [NUMBERED.split().index("".join(map(str, mask))) for mask in masks],
        "achieved_missing_rates_flair_t1c_t1_t2": 1.0 - masks.mean(axis=0),
    }
    tolerances = {"achieved_missing_rates_flair_t1c_t1_t2": 1e-9}
    return [(key, error(found, arrays[key]), tolerances.get(key, 0.0)) for key, found in outputs.items()]


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {"passion__missing_mask": missing_mask}
