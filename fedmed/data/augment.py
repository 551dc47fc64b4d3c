"""Augmentation of whole batches: one draw of random numbers per batch, no loop over items; masks move with their
images.

Two stages, so that the cheap one runs on stored bytes: `move` (flips, transposition, quarter turns, shift; any type)
and `finish` (small affine maps, intensity; float32). Everything random is drawn in `draw`, from the caller's CPU
generator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.config import nearest
from fedmed.errors import UserError

NAMES = ("hflip", "vflip", "transpose", "rot90", "shift", "affine", "intensity")
MAX_SHIFT = 4  # pixels, one draw per batch
MAX_ANGLE = math.radians(10.0)
MAX_TRANSLATE = 0.02  # of the image side
MAX_CONTRAST = 0.2  # relative
MAX_BRIGHTNESS = 0.2  # of an image's own standard deviation


@dataclass(frozen=True)
class Moves:
    """What was drawn for one batch. Order of application: transpose, vertical flip, horizontal flip, shift, affine,
    intensity.

    symmetry (B,) int64: 4 x transpose + 2 x vertical + horizontal flip, or None; shift (dy, dx) pixels or None; theta
    (B,2,3) or None; contrast, brightness (B,) or None.
    """

    symmetry: Tensor | None = None
    shift: tuple[int, int] | None = None
    theta: Tensor | None = None
    contrast: Tensor | None = None
    brightness: Tensor | None = None


class Augment:
    """Batched augmentation named by a list: hflip, vflip, transpose, rot90, shift (or shiftN, up to N pixels), affine,
    intensity.

    Flips and transposition: probability 1/2 per item. rot90: 0, 1, 2 or 3 quarter turns per item. shift: one (dy, dx)
    per batch, the border is repeated. affine: rotation within 10 degrees and translation within 2 % per item, bilinear
    (masks: nearest), border repeated. intensity: contrast x 0.8-1.2 about the item's mean, brightness within 0.2 of its
    standard deviation. Borders are repeated in images and masks alike, so no false background appears and an ignore
    value stays where it was.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._max_shift = 0
        chosen = set()
        for name in self.names:
            shift = re.fullmatch(r"shift(\d*)", name)
            if shift:
                self._max_shift = int(shift.group(1) or MAX_SHIFT)
            elif name not in NAMES:
                raise UserError(
                    f"data.augment knows {', '.join(NAMES)} (shiftN: "
                    f"up to N pixels), got {name!r}{nearest(name, NAMES)}"
                )
            chosen.add("shift" if shift else name)
        self._chosen = frozenset(chosen)

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return bool(self._chosen)

    def __call__(self, images: Tensor, targets: Tensor | None, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Augment images (B,C,H,W) float32; targets (B,H,W) or (B,K,H,W) move along, anything else (or None) comes back
        unchanged.
        """
        if not self.active:
            return images, targets
        moves = self.draw(images.shape, rng)
        masks = targets if targets is not None and targets.ndim >= 3 else None
        images, masks = self.move(images, masks, moves)
        images, masks = self.finish(images, masks, moves)
        return images, targets if masks is None else masks

    def draw(self, shape: Sequence[int], rng: torch.Generator) -> Moves:
        """Draw for a batch of `shape` (B,C,H,W): one table of uniform numbers, plus two integers when shifting."""
        batch, (height, width) = shape[0], shape[-2:]
        if height != width and self._chosen & {"transpose", "rot90"}:
            raise UserError(
                f"data.augment: transpose and rot90 need square images, these are {height} x {width}. "
                "Use hflip and vflip."
            )
        uniform = torch.rand(9, batch, generator=rng)
        half = uniform < 0.5
        none = torch.zeros(batch, dtype=torch.bool)
        flags = [half[i] if name in self._chosen else none for i, name in enumerate(("transpose", "vflip", "hflip"))]
        if "rot90" in self._chosen:
            flags = _then_quarter_turns(flags[0], flags[1], flags[2], (uniform[3] * 4).long())
        symmetry = None
        if self._chosen & {"transpose", "vflip", "hflip", "rot90"}:
            symmetry = flags[0] * 4 + flags[1] * 2 + flags[2]
        shift = None
        if self._max_shift:
            down, right = torch.randint(-self._max_shift, self._max_shift + 1, (2,), generator=rng).tolist()
            shift = (down, right)
        theta = _affine(uniform[4:7], height, width) if "affine" in self._chosen else None
        signed = uniform[7:9] * 2 - 1
        intensity = "intensity" in self._chosen
        contrast = 1 + MAX_CONTRAST * signed[0] if intensity else None
        brightness = MAX_BRIGHTNESS * signed[1] if intensity else None
        return Moves(symmetry, shift, theta, contrast, brightness)

    def move(self, images: Tensor, masks: Tensor | None, moves: Moves) -> tuple[Tensor, Tensor | None]:
        """Apply flips, transposition and shift, on any type, as one gather."""
        if moves.symmetry is None and moves.shift is None:
            return images, masks
        height, width = images.shape[-2:]
        source = _source_pixels(moves, height, width).to(images.device)
        return _gather(images, source), None if masks is None else _gather(masks, source)

    def finish(self, images: Tensor, masks: Tensor | None, moves: Moves) -> tuple[Tensor, Tensor | None]:
        """Apply affine maps and intensity changes to float32 images; masks keep their type."""
        if moves.theta is not None:
            images = _resample(images, moves.theta, "bilinear")
            if masks is not None:
                planes = masks if masks.ndim == 4 else masks[:, None]
                moved = _resample(planes.to(torch.float32), moves.theta, "nearest").to(masks.dtype)
                masks = moved if masks.ndim == 4 else moved[:, 0]
        if moves.contrast is not None and moves.brightness is not None:
            std, mean = torch.std_mean(images.flatten(1), dim=1, unbiased=False)
            gain = moves.contrast.to(images.device)
            offset = mean * (1 - gain) + moves.brightness.to(images.device) * std
            images = torch.addcmul(offset.view(-1, 1, 1, 1), images, gain.view(-1, 1, 1, 1))
        return images, masks


def _source_pixels(moves: Moves, height: int, width: int) -> Tensor:
    """For every pixel of the result its source pixel in row-major order, (B, H*W) int64, or (1, H*W) when all items
    move alike.
    """
    down, right = moves.shift or (0, 0)
    row = (torch.arange(height) - down).clamp_(0, height - 1)
    column = (torch.arange(width) - right).clamp_(0, width - 1)
    if moves.symmetry is None:
        return (row[:, None] * width + column).view(1, -1)
    rows = torch.stack([row, height - 1 - row])[:, None, :, None]  # [vertical flip, 1, H, 1]
    columns = torch.stack([column, width - 1 - column])[None, :, None, :]  # [1, horizontal flip, 1, W]
    maps = (rows * width + columns).view(4, -1)
    if height == width:  # transposed: row and column change roles in the source
        maps = torch.cat([maps, (columns * width + rows).view(4, -1)])
    return maps.index_select(0, moves.symmetry)


def _gather(planes: Tensor, source: Tensor) -> Tensor:
    """Pick pixels: planes (B,H,W) or (B,K,H,W), source (B or 1, H*W)."""
    flat = planes.flatten(-2)
    index = source if planes.ndim == 3 else source[:, None]
    return flat.gather(-1, index.expand(flat.shape)).view(planes.shape)


def _then_quarter_turns(transpose: Tensor, vflip: Tensor, hflip: Tensor, turns: Tensor) -> list[Tensor]:
    """Compose (transpose, then flips) with `turns` counter-clockwise quarter turns, again as (transpose, vertical,
    horizontal) flags.

    A quarter turn is a transposition followed by a vertical flip, a half turn is both flips, three quarters a
    transposition followed by a horizontal flip. A transposition after flips equals the flips with their roles exchanged
    after the transposition.
    """
    odd = turns % 2 == 1
    vertical = torch.where(odd, hflip, vflip) ^ ((turns == 1) | (turns == 2))
    horizontal = torch.where(odd, vflip, hflip) ^ ((turns == 3) | (turns == 2))
    return [transpose ^ odd, vertical, horizontal]


def _affine(uniform: Tensor, height: int, width: int) -> Tensor:
    """Rotation and translation (B,2,3) on the -1..1 grid from uniform (3,B); pixels stay square if H != W."""
    angle = (uniform[0] * 2 - 1) * MAX_ANGLE
    offset = (uniform[1:3] * 2 - 1) * 2 * MAX_TRANSLATE
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos, -sin * height / width, offset[0], sin * width / height, cos, offset[1]], dim=1)
    return rows.view(-1, 2, 3)


def _resample(planes: Tensor, theta: Tensor, mode: str) -> Tensor:
    grid = functional.affine_grid(theta.to(planes.device), list(planes.shape), align_corners=False)
    return functional.grid_sample(planes, grid, mode=mode, padding_mode="border", align_corners=False)
