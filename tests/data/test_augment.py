"""Augmentation: each move against a naive version, joint moves of masks, borders, composition of quarter turns."""

from __future__ import annotations

import pytest
import torch

from fedmed.data.augment import Augment, Moves, _then_quarter_turns
from fedmed.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(batch: int = 6, channels: int = 2, side: int = 5) -> torch.Tensor:
    return torch.arange(batch * channels * side * side, dtype=torch.float32).view(batch, channels, side, side)


def naive(image: torch.Tensor, code: int, shift: tuple[int, int] | None) -> torch.Tensor:
    """One image (C,H,W) moved pixel by pixel."""
    if code & 4:
        image = image.transpose(-1, -2)
    if code & 2:
        image = image.flip(-2)
    if code & 1:
        image = image.flip(-1)
    if shift is None:
        return image
    out, (_, height, width) = torch.empty_like(image), image.shape
    for i in range(height):
        for j in range(width):
            row, column = min(max(i - shift[0], 0), height - 1), min(max(j - shift[1], 0), width - 1)
            out[:, i, j] = image[:, row, column]
    return out


@pytest.mark.parametrize("shift", [None, (0, 0), (2, -1), (-3, 4), (9, -9)])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8, torch.float16])
def test_moves_equal_the_naive_version(shift: tuple[int, int] | None, kind: torch.dtype) -> None:
    images = (numbered(8) % 251).to(kind)
    moves = Moves(symmetry=torch.arange(8), shift=shift)
    moved, masks = Augment().move(images, images[:, 0], moves)
    expected = torch.stack([naive(image, code, shift) for code, image in enumerate(images)])
    assert torch.equal(moved, expected) and masks is not None and torch.equal(masks, expected[:, 0])


def test_shift_alone_moves_all_items_alike() -> None:
    images = numbered(3)
    moved, _ = Augment().move(images, None, Moves(shift=(1, 2)))
    assert torch.equal(moved, torch.stack([naive(image, 0, (1, 2)) for image in images]))


def test_wide_images_flip_but_do_not_turn() -> None:
    images = torch.arange(12.0).view(1, 1, 3, 4)
    moved, _ = Augment().move(images, None, Moves(symmetry=torch.tensor([3])))
    assert torch.equal(moved, images.flip(-1, -2))
    for name in ("transpose", "rot90"):
        with pytest.raises(UserError, match="square images, these are 3 x 4"):
            Augment([name])(images, None, rng())


@pytest.mark.parametrize("code", range(8))
@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_compose(code: int, turns: int) -> None:
    image = numbered(1)[0]
    flags = [torch.tensor([bool(code & bit)]) for bit in (4, 2, 1)]
    first, second, third = _then_quarter_turns(flags[0], flags[1], flags[2], torch.tensor([turns]))
    together = int(first) * 4 + int(second) * 2 + int(third)
    assert torch.equal(naive(image, together, None), naive(image, code, None).rot90(turns, (-2, -1)))


@pytest.mark.parametrize("name", ["hflip", "vflip", "transpose", "rot90"])
def test_each_name_gives_only_its_own_images(name: str) -> None:
    images = numbered(64)
    moved, masks = Augment([name])(images, images[:, 0].long(), rng())
    options = {
        "hflip": [images, images.flip(-1)],
        "vflip": [images, images.flip(-2)],
        "transpose": [images, images.transpose(-1, -2)],
        "rot90": [images.rot90(k, (-2, -1)) for k in range(4)],
    }[name]
    chosen = torch.stack([(moved == option).flatten(1).all(1) for option in options])
    assert chosen.any(0).all() and chosen.any(1).all()  # every item is one of them, and each occurs
    assert masks is not None and torch.equal(masks, moved[:, 0].long())


def test_shift_stays_within_its_limit_and_changes_from_batch_to_batch() -> None:
    augment, generator = Augment(["shift4"]), rng()
    drawn = [augment.draw((2, 1, 32, 32), generator).shift for _ in range(200)]
    assert {d for pair in drawn if pair for d in pair} == set(range(-4, 5))
    assert Augment(["shift"]).draw((2, 1, 8, 8), rng()).shift == Augment(["shift4"]).draw((2, 1, 8, 8), rng()).shift
    assert Augment(["shift0"]).draw((2, 1, 8, 8), rng()).shift is None


def test_class_targets_and_nothing_stay_untouched() -> None:
    images, labels, flags = numbered(4), torch.arange(4), torch.ones(4, 3)
    for target in (labels, flags, None):
        _, out = Augment(["hflip", "affine"])(images, target, rng())
        assert out is target
    same, _ = Augment()(images, None, rng())
    assert same is images and not Augment().active


def test_affine_moves_masks_with_images_and_adds_no_value() -> None:
    masks = torch.zeros(8, 32, 32, dtype=torch.uint8)
    masks[:, 8:24, 10:20] = 1
    masks[:, :3] = 4  # an ignore value at the border
    images = (masks == 1).float()[:, None]
    moved, moved_masks = Augment(["affine"])(images, masks, rng(2))
    assert moved_masks is not None and moved_masks.dtype == torch.uint8
    assert set(moved_masks.unique().tolist()) == {0, 1, 4}
    assert ((moved[:, 0] > 0.5) == (moved_masks == 1)).float().mean() > 0.99
    assert not torch.equal(moved_masks, masks)


def test_affine_keeps_pixels_square() -> None:
    wide = torch.zeros(1, 1, 40, 80)
    wide[..., 10:30, 30:50] = 1.0  # a square far from the borders keeps its area under rotation
    moved, _ = Augment(["affine"])(wide, None, rng(1))
    assert abs(float(moved.sum()) - 400) < 8
    rows, columns = moved[0, 0].sum(1) > 0.5, moved[0, 0].sum(0) > 0.5
    assert abs(int(rows.sum()) - int(columns.sum())) <= 1


def test_intensity_keeps_means_within_its_limits() -> None:
    images = torch.randn(64, 3, 16, 16, generator=rng(4)) * 2 + 5
    moved, _ = Augment(["intensity"])(images, None, rng(5))
    std, mean = torch.std_mean(images.flatten(1), 1, unbiased=False)
    new_std, new_mean = torch.std_mean(moved.flatten(1), 1, unbiased=False)
    assert ((new_mean - mean).abs() <= 0.2 * std + 1e-4).all() and (new_mean - mean).abs().max() > 0.1
    assert ((new_std / std - 1).abs() <= 0.2 + 1e-4).all()
    flat, _ = Augment(["intensity"])(torch.ones(2, 1, 4, 4), None, rng())
    torch.testing.assert_close(flat, torch.ones(2, 1, 4, 4))  # a constant image stays what it is


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="got 'hflp'; did you mean 'hflip'"):
        Augment(["hflp"])
