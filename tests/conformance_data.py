"""Conformance adapters of data preparation: each maps one reference file to the project function it checks.

An adapter takes the arrays of the file and gives (key, largest absolute error, tolerance) for every expected output;
infinity where a shape or a whole object does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from data_prep.corruption.contour_noise import Evolution, contour_noise, control_index, offset_curve
from data_prep.corruption.label_noise import label_noise, noise_rates, realised_rates
from data_prep.geometry import mask_dice
from data_prep.partition import fednoro_partition

Arrays = Mapping[str, np.ndarray]
Report = list[tuple[str, float, float]]
EXACT, FLOAT, CURVE, CONTOUR = 0.0, 1e-9, 1e-4, 0.05


def error(found: object, expected: np.ndarray) -> float:
    """Largest absolute difference; NaN equals NaN; infinity for unequal shapes or a NaN on one side only."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if found.shape != expected.shape or not np.array_equal(np.isnan(found), np.isnan(expected)):
        return float("inf")
    return float(np.nanmax(np.abs(found - expected), initial=0.0))


def partition(arrays: Arrays) -> Report:
    """Client of every sample and the counts of each client and class."""
    clients, classes = int(arrays["in__num_clients"]), int(arrays["in__num_classes"])
    rng = np.random.RandomState(int(arrays["in__legacy_seed"]))
    labels, p_class, alpha = arrays["in__labels"], float(arrays["in__p_class"]), float(arrays["in__alpha"])
    client = fednoro_partition(labels, clients, classes, p_class, alpha, rng)
    counts = np.zeros((clients, classes), dtype=np.int64)
    np.add.at(counts, (client, labels), 1)
    return [
        ("out__client_of_sample", error(client, arrays["out__client_of_sample"]), EXACT),
        ("out__counts", error(counts, arrays["out__counts"]), EXACT),
    ]


def noisy_labels(arrays: Arrays) -> Report:
    """Noisy clients, noisy labels and realised rates."""
    rng = np.random.RandomState(int(arrays["in__legacy_seed"]))
    labels, client, soft = arrays["in__labels"], arrays["in__client_of_sample"], arrays["in__soft_labels"]
    clients = max(len(arrays["out__client_is_noisy"]), int(client.max()) + 1)
    fraction, lower, upper = (
        float(arrays[f"in__{key}"]) for key in ("noisy_client_fraction", "level_lower", "level_upper")
    )
    rates = noise_rates(clients, fraction, lower, upper, rng)
    noisy = label_noise(labels, client, rates, str(arrays["in__type"]), soft.shape[1], rng, soft)
    return [
        ("out__noisy_labels", error(noisy, arrays["out__noisy_labels"]), EXACT),
        ("out__client_is_noisy", error(rates > 0, arrays["out__client_is_noisy"]), EXACT),
        (
            "out__realised_noise_rate",
            error(realised_rates(labels, noisy, client, clients), arrays["out__realised_noise_rate"]),
            FLOAT,
        ),
    ]


def noisy_contour(arrays: Arrays) -> Report:
    """Area and overlap of the noisy mask; pixels are not compared (border followers may differ)."""
    settings = Evolution(
        segments=int(arrays["in__segment"]),
        degree=int(arrays["in__degree"]),
        half_window=int(arrays["in__num_neighbours"]),
    )
    mask = (arrays["in__mask"] > 0).astype(np.uint8)
    rng = np.random.RandomState(int(arrays["in__legacy_seed"]))
    noisy = contour_noise(mask, float(arrays["in__mean"]), float(arrays["in__std"]), rng, settings)
    area, ratio = max(float(mask.sum()), 1.0), float(noisy.sum()) / max(float(mask.sum()), 1.0)
    expected = float((arrays["out__noisy_mask"] > 0).sum()) / area
    return [
        ("out__noisy_mask", error(ratio, np.asarray(expected)), CONTOUR),
        ("out__area_ratio", error(ratio, arrays["out__area_ratio"]), CONTOUR),
        ("out__dice_with_clean", error(mask_dice(mask, noisy), arrays["out__dice_with_clean"]), CONTOUR),
    ]


def curve(arrays: Arrays) -> Report:
    """Control indices, offsets and acceptance of one fit."""
    control, length = arrays["in__control_offsets"], int(arrays["in__contour_length"])
    settings = Evolution(segments=len(control))
    offset, accepted = offset_curve(control, length, settings)
    return [
        ("out__control_index", error(control_index(length, settings.segments), arrays["out__control_index"]), EXACT),
        ("out__offset", error(offset, arrays["out__offset"]), CURVE),
        ("out__accepted", error(accepted, arrays["out__accepted"]), EXACT),
    ]


ADAPTERS: dict[str, Callable[[Arrays], Report]] = {
    "fednoro__partition": partition,
    "fednoro__label_noise": noisy_labels,
    "feda3i__contour_noise": noisy_contour,
    "feda3i__offset_curve": curve,
}
