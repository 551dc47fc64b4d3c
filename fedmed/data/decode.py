"""From the types of a site file to float32: scaling to 0..1, then the site's normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmed.errors import UserError

Decoder = Callable[[Tensor], Tensor]


def make_decoder(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, unsigned16: bool = False
) -> Callable[[Tensor], Tensor]:
    """Build the function that turns stored images (B,C,H,W) into float32.

    uint8 is divided by 255, uint16 (held as int16 bit patterns when `unsigned16`) by 65535, floats are taken as they
    are; then (x - mean) / std with mean, std of length C or 1, on the scale after the division. Raises UserError for a
    wrong length or std <= 0.
    """
    centre = _per_channel("data.mean", mean, channels)
    scale = _per_channel("data.std", std, channels)
    if scale is not None and not bool((scale > 0).all()):
        raise UserError(
            f"data.std must be positive in every channel, got {list(std or [])}. Leave it out to skip the scaling."
        )
    placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    def decode(raw: Tensor) -> Tensor:
        """Stored images to float32."""
        if raw.dtype == torch.uint8:
            images = raw.to(torch.float32).div_(255.0)
        elif unsigned16:
            images = raw.to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32).div_(65535.0)
        else:
            images = raw.to(torch.float32, copy=True)
        if centre is None and scale is None:
            return images
        if raw.device not in placed:
            placed[raw.device] = tuple(None if x is None else x.to(raw.device) for x in (centre, scale))  # type: ignore[assignment]
        shift, divisor = placed[raw.device]
        if shift is not None:
            images.sub_(shift)
        return images if divisor is None else images.div_(divisor)

    return decode


def _per_channel(key: str, values: Sequence[float] | None, channels: int) -> Tensor | None:
    if values is None:
        return None
    if len(values) not in (1, channels):
        raise UserError(
            f"{key} needs one number or one per channel ({channels}), got {len(values)}: {list(values)}. Fix {key}."
        )
    return torch.tensor([float(v) for v in values], dtype=torch.float32).view(-1, 1, 1)
