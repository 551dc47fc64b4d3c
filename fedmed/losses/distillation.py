"""Self-distillation from the full to a reduced input: by pixel and by class prototype, as PASSION has them.

Source: Shi et al., "PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced Missing
Rates", ACM MM 2024, arXiv 2407.14796, and its official code. Teacher and student are two passes of one network; the
teacher's side never gets a gradient.
Symbols: B batch, K classes, D features, * spatial axes (any number); q^t, q^s → teacher_prob, student_prob, T →
temperature, Z → features, c_k → prototypes, S_k → maps. Everything keeps its dtype; results are per image, (B,).

Kept as published: probabilities are clamped from below, which takes the gradient of clamped student entries and lets the
divergence fall below 0; the mean runs over classes, too (K times less than the usual divergence).
Departure: the classes of an image decide about its prototypes (published: those that every image of the batch has;
`common_classes` gives them), and an image without any counts 0 (published: error).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.weighted_segmentation import PROB_FLOOR, enlarge

EPS = 1e-5  # added to the pixel count of a prototype, and least norm in a cosine (official code)


def tempered(logits: Tensor, temperature: float, size: Sequence[int] | None = None) -> Tensor:
    """softmax(logits / T), enlarged to the spatial `size` if one is given. (B, K, *) → (B, K, *)."""
    prob = (logits / temperature).softmax(dim=1)
    return prob if size is None else enlarge(prob, size)


def pixel_divergence(
    student_prob: Tensor, teacher_prob: Tensor, temperature: float = 4.0, clamp_min: float = PROB_FLOOR
) -> Tensor:
    """T² · mean over pixels and classes of q^t (ln q^t - ln q^s), both clamped to [clamp_min, 1].

    In: tempered probabilities (B, K, *) of one shape. Out: (B,); gradient for the student only. 0 for equal inputs.
    """
    student, teacher = (q.clamp(clamp_min, 1.0).flatten(1) for q in (student_prob, teacher_prob.detach()))
    return temperature**2 * (teacher * (teacher.log() - student.log())).mean(dim=1)


def pixel_distillation(
    student_logits: Sequence[Tensor], teacher_prob: Sequence[Tensor], temperature: float = 4.0
) -> Tensor:
    """Σ_s 2^-s `pixel_divergence` over the output (s = 0) and the side outputs (s = 1, 2, ...).

    In: the student's logits (B, K, *) by scale, and what `tempered` made of the teacher's, at full size. Out: (B,).
    """
    total = teacher_prob[0].new_zeros(teacher_prob[0].shape[0])
    for s, (logits, teacher) in enumerate(zip(student_logits, teacher_prob, strict=True)):
        student = tempered(logits, temperature, teacher.shape[2:])
        total = total + 2.0**-s * pixel_divergence(student, teacher, temperature)
    return total


def own_classes(truth: Tensor) -> Tensor:
    """Which classes an image has. truth (B, K, *) 0/1 → (B, K) bool."""
    return truth.flatten(2).any(dim=2)


def common_classes(truth: Tensor) -> Tensor:
    """The classes that all images of the batch have, alike for each of them. (B, K, *) 0/1 → (B, K) bool."""
    return own_classes(truth).all(dim=0, keepdim=True).expand(truth.shape[0], -1)


def prototypes(features: Tensor, truth: Tensor) -> Tensor:
    """Mean feature of each class, c_k = Σ Z g_k / (Σ g_k + 1e-5). (B, D, *), (B, K, *) 0/1 → (B, K, D); no pixel: 0."""
    masks = truth.to(features.dtype).flatten(2)
    return torch.einsum("bkn,bdn->bkd", masks, features.flatten(2)) / (masks.sum(dim=2, keepdim=True) + EPS)


def similarity_maps(features: Tensor, truth: Tensor) -> Tensor:
    """S_k = cos(Z, c_k) at every pixel, norms at least 1e-5. (B, D, *), (B, K, *) 0/1 → (B, K, N) in [-1, 1]."""
    directions = F.normalize(features.flatten(2), dim=1, eps=EPS)
    return torch.einsum("bkd,bdn->bkn", F.normalize(prototypes(features, truth), dim=2, eps=EPS), directions)


def semantic_loss(student_maps: Tensor, teacher_maps: Tensor, classes: Tensor) -> Tensor:
    """Mean over classes and pixels of (S^s_k - S^t_k)². In: (B, K, N) twice, classes (B, K) bool. Out: (B,), in [0, 4]."""
    return _class_mean((student_maps - teacher_maps.detach()).square(), classes)


def semantic_distance(student_maps: Tensor, teacher_maps: Tensor, classes: Tensor) -> Tensor:
    """Mean over classes and pixels of |S^s_k - S^t_k|, without gradient. In as `semantic_loss`. Out: (B,), in [0, 2]."""
    return _class_mean((student_maps.detach() - teacher_maps.detach()).abs(), classes)


def _class_mean(values: Tensor, classes: Tensor) -> Tensor:
    """Mean of values (B, K, N) over the pixels and the classes (B, K) that count; 0 where none does."""
    weight = classes.to(values.dtype)
    return (values.mean(dim=2) * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)
