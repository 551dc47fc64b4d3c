"""Intensities of MR, CT and radiographs brought into the types of a site file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmed.data.formats.limits import BadFile

TYPES = ("uint8", "uint16", "float16")
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue
_SAMPLED = 4_000_000  # values that percentiles are taken of


def scaled(values: np.ndarray, low: float, high: float, dtype: str) -> np.ndarray:
    """Values from low..high to the whole range of an integer type, or to 0..1 for float16; what lies outside is clipped.

    In: any shape, real; low >= high (a constant volume) gives zeros. Not-a-numbers count as `low`.
    """
    if not high > low:
        return np.zeros(values.shape, dtype=dtype)
    share = np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    share = np.nan_to_num(share, nan=0.0, copy=False)
    if dtype == "float16":
        return share.astype(np.float16)
    return np.rint(share * np.iinfo(dtype).max).astype(dtype)


def as_they_are(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in another type without any scaling. Raises `BadFile` where the type cannot hold them."""
    if values.size and not np.isfinite(values).all():
        raise BadFile("values that are infinite or no numbers")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if dtype == "float16":
        if max(-low, high) > 65504:
            raise BadFile("values beyond 65504, which float16 does not hold")
        return values.astype(np.float16)
    top = np.iinfo(dtype).max
    if low < 0 or high > top or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        raise BadFile(f"values that are no whole numbers in 0..{top}")
    return values.astype(dtype)


def percentiles(values: np.ndarray, shares: Sequence[float]) -> tuple[float, float]:
    """Two percentiles (0..100) of a volume, of evenly spaced values where it has more than four million; (0, 0) where none is finite."""
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // _SAMPLED)]
    flat = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
    if not flat.size:
        return 0.0, 0.0
    low, high = np.percentile(flat, shares)
    return float(low), float(high)


def equal_channels(image: np.ndarray) -> bool:
    """Whether a picture (H, W) or (H, W, C) is grey, stored as it may be."""
    return image.ndim == 2 or bool((image[..., :1] == image[..., 1:]).all())


def grey_of(image: np.ndarray, mixed: bool) -> np.ndarray | None:
    """A picture (H, W) or (H, W, 3) as (H, W) of the same type; of real colours their luma (ITU-R BT.601) if `mixed`, else None."""
    if image.ndim == 2:
        return image
    if equal_channels(image):
        return np.ascontiguousarray(image[..., 0])
    return np.rint(image @ np.array(LUMA)).astype(image.dtype) if mixed else None


def check_window(window: Sequence[float] | None) -> None:
    """Raise ValueError unless a window is None or (centre, width) with width > 0."""
    if window is not None and (len(window) != 2 or not window[1] > 0):
        raise ValueError(f"window: expected [centre, width] with width > 0, got {list(window)}")
