"""Self-distillation by pixel and by prototype, and the supervision of PASSION: hand cases, gradients, edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedmed.losses.distillation import (
    common_classes,
    own_classes,
    pixel_distillation,
    pixel_divergence,
    prototypes,
    semantic_distance,
    semantic_loss,
    similarity_maps,
    tempered,
)
from fedmed.losses.weighted_segmentation import (
    class_masks,
    deep_ce_dice,
    dice_by_image,
    enlarge,
    weighted_ce_dice,
    weighted_cross_entropy,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def test_divergence_by_hand() -> None:
    teacher, student = (torch.tensor([[p, 1 - p]], dtype=torch.float64)[..., None] for p in (0.7, 0.5))
    assert float(pixel_divergence(student, teacher, 1.0)) == pytest.approx(0.0411414, abs=1e-7)
    assert float(pixel_divergence(student, teacher, 4.0)) == pytest.approx(16 * 0.0411414, abs=1e-6)


def test_divergence_of_equal_inputs_is_zero() -> None:
    prob = tempered(random(2, 3, 4, 4), 4.0)
    assert pixel_divergence(prob, prob).tolist() == [0.0, 0.0]


def test_a_clamped_student_entry_has_no_gradient_and_zeros_stay_finite() -> None:
    student = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    loss = pixel_divergence(student, torch.tensor([[[0.5], [0.5]]], dtype=torch.float64), 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert bool(loss.isfinite().all()) and gradient[0, 0, 0] == 0 and gradient[0, 1, 0] != 0


def test_side_outputs_count_half_of_the_scale_before() -> None:
    scales = [random(2, 3, 8, 8), random(2, 3, 4, 4, seed=1), random(2, 3, 2, 2, seed=2)]
    teacher = [tempered(z, 4.0, (8, 8)) for z in (random(2, 3, 8, 8, seed=3), *scales[1:])]
    found = pixel_distillation(scales, teacher, 4.0)  # the side outputs agree: only the first scale counts
    torch.testing.assert_close(found, pixel_divergence(tempered(scales[0], 4.0), teacher[0], 4.0))
    teacher[0] = tempered(scales[0], 4.0)
    teacher[2] = tempered(random(2, 3, 2, 2, seed=5), 4.0, (8, 8))
    alone = pixel_divergence(tempered(scales[2], 4.0, (8, 8)), teacher[2], 4.0)
    torch.testing.assert_close(pixel_distillation(scales, teacher, 4.0), alone / 4)


@pytest.mark.parametrize("size", [(6,), (6, 5), (6, 5, 4)])
def test_enlarging_works_on_one_to_three_axes(size: tuple[int, ...]) -> None:
    maps = random(1, 2, *(2,) * len(size))
    found = enlarge(maps, size)
    assert tuple(found.shape[2:]) == size and found.flatten(2)[0, 0, 0] == maps.flatten(2)[0, 0, 0]
    assert enlarge(maps, maps.shape[2:]) is maps


def test_prototypes_by_hand() -> None:
    features = torch.tensor([[[1.0, 3.0, 10.0]]], dtype=torch.float64)
    truth = class_masks(torch.tensor([[0, 0, 2]]), 4, torch.float64)
    expected = torch.tensor([[4 / 2.00001, 0.0, 10 / 1.00001, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(prototypes(features, truth)[..., 0], expected, rtol=1e-12, atol=0)


def test_semantic_terms_by_hand() -> None:
    """Two pixels, one class: the teacher's are orthogonal (cos = 1/√2 to their mean), the student's alike (cos = 1)."""
    truth = class_masks(torch.tensor([[0, 0]]), 2, torch.float64)
    teacher = similarity_maps(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64), truth)
    student = similarity_maps(torch.ones(1, 2, 2, dtype=torch.float64), truth)
    gap = 1 - math.sqrt(0.5)
    assert float(semantic_distance(student, teacher, own_classes(truth))) == pytest.approx(gap)
    assert float(semantic_loss(student, teacher, own_classes(truth))) == pytest.approx(gap**2)


def naive_semantic(student: Tensor, teacher: Tensor, ids: Tensor, classes: int) -> tuple[float, float]:
    """One image, one class and one pixel after the other."""
    squares, sizes = [], []
    for k in range(classes):
        if not (ids == k).any():
            continue
        maps = []
        for z in (student, teacher):
            centre = z[:, ids == k].sum(dim=1) / ((ids == k).sum() + 1e-5)
            maps.append(torch.nn.functional.cosine_similarity(z.flatten(1), centre[:, None], dim=0, eps=1e-5))
        squares.append((maps[0] - maps[1]).square().mean())
        sizes.append((maps[0] - maps[1]).abs().mean())
    return float(torch.stack(squares).mean()), float(torch.stack(sizes).mean())


def test_semantic_terms_agree_with_a_naive_version_and_images_do_not_mix() -> None:
    student, teacher, ids = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1), labels(3, 5, 6)
    ids[1][ids[1] == 2] = 0  # one image lacks a class
    truth = class_masks(ids, 3, torch.float64)
    maps, classes = [similarity_maps(z, truth) for z in (student, teacher)], own_classes(truth)
    found = zip(semantic_loss(*maps, classes).tolist(), semantic_distance(*maps, classes).tolist(), strict=True)
    for b, pair in enumerate(found):
        assert pair == pytest.approx(naive_semantic(student[b], teacher[b], ids[b], 3), rel=1e-9)
    assert common_classes(truth).tolist() == [[True, True, False]] * 3


def test_nothing_drawn_and_no_features_give_zero_without_nan() -> None:
    """No class in the image (all pixels left open), and features that are zero everywhere."""
    student = torch.zeros(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    truth = class_masks(torch.tensor([-1, 0])[:, None, None].expand(2, 3, 3), 2, torch.float64)
    maps = similarity_maps(student, truth), similarity_maps(random(2, 4, 3, 3), truth)
    loss = semantic_loss(*maps, own_classes(truth))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss[0] == 0 and bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert semantic_distance(*maps, own_classes(truth))[0] == 0


def test_only_the_student_gets_a_gradient() -> None:
    teacher = random(1, 3, 4, 4).requires_grad_()
    truth = class_masks(labels(1, 4, 4), 3, torch.float64)
    student = random(1, 3, 4, 4, seed=2).requires_grad_()
    maps = similarity_maps(student, truth), similarity_maps(teacher, truth)
    loss = semantic_loss(*maps, own_classes(truth)) + pixel_divergence(tempered(student, 4.0), tempered(teacher, 4.0))
    loss.sum().backward()
    assert teacher.grad is None and student.grad is not None and float(student.grad.abs().sum()) > 0
    assert not semantic_distance(*maps, own_classes(truth)).requires_grad


def test_gradients_in_double_precision() -> None:
    truth = class_masks(labels(2, 3, 3), 3, torch.float64)
    teacher_prob = tempered(random(2, 3, 3, 3), 4.0)
    teacher_maps = similarity_maps(random(2, 3, 3, 3), truth)
    student = random(2, 3, 3, 3, seed=4).requires_grad_()
    for loss in (
        lambda z: pixel_divergence(tempered(z, 4.0), teacher_prob),
        lambda z: semantic_loss(similarity_maps(z, truth), teacher_maps, own_classes(truth)),
        lambda z: weighted_ce_dice(z.softmax(dim=1), truth),
        lambda z: deep_ce_dice([z[..., :2, :2], z[..., :1, :1]], truth),
    ):
        assert torch.autograd.gradcheck(loss, (student,))


def test_weighted_cross_entropy_by_hand() -> None:
    """Three pixels of class 0, one of class 1: weights 1/4 and 3/4."""
    prob = torch.tensor([[[0.5, 0.5, 0.5, 0.8], [0.5, 0.5, 0.5, 0.2]]], dtype=torch.float64)
    truth = class_masks(torch.tensor([[0, 0, 0, 1]]), 2, torch.float64)
    expected = (3 * 0.25 * math.log(2) + 0.75 * math.log(5)) / 4
    assert float(weighted_cross_entropy(prob, truth)) == pytest.approx(expected)


def test_an_image_of_background_alone_has_no_cross_entropy_and_the_dice_of_absent_classes() -> None:
    prob = random(1, 4, 4, 4).softmax(dim=1).requires_grad_()
    truth = class_masks(torch.zeros(1, 4, 4, dtype=torch.int64), 4, torch.float64)
    cross_entropy = weighted_cross_entropy(prob, truth)
    (gradient,) = torch.autograd.grad(cross_entropy.sum(), prob)
    assert cross_entropy.tolist() == [0.0] and not gradient.any()
    perfect = class_masks(torch.zeros(1, 4, 4, dtype=torch.int64), 4, torch.float64)
    assert float(dice_by_image(perfect, truth)) == pytest.approx(0.75, abs=1e-6)


def test_deep_supervision_halves_with_every_scale() -> None:
    truth = class_masks(labels(2, 8, 8), 3, torch.float64)
    fine, coarse = random(2, 3, 4, 4), random(2, 3, 2, 2)
    parts = [weighted_ce_dice(enlarge(z.softmax(dim=1), (8, 8)), truth) for z in (fine, coarse)]
    torch.testing.assert_close(deep_ce_dice([fine, coarse], truth), parts[0] / 2 + parts[1] / 4)
    assert deep_ce_dice([], truth).tolist() == [0.0, 0.0]
