"""Prototype maths: hand cases, bounds, invariances, a naive twin of the assignment, gradients, and every empty or degenerate input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.prototypes import (
    class_scores,
    group_means,
    hard_assignment,
    normalised_logits,
    npr_loss,
    refresh_prototypes,
    similarities,
    sinkhorn_plan,
    smallest_loss,
    update_prototypes,
    usable,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_scores(*scores: float) -> tuple[Tensor, Tensor]:
    """A feature (1, D) and one prototype for each class (C, 1, D) with these similarities; each class has an axis of its own."""
    count = len(scores)
    feature = torch.zeros(1, count + 1, dtype=torch.float64)
    feature[0, 0] = 1.0
    prototypes = torch.zeros(count, 1, count + 1, dtype=torch.float64)
    for c, s in enumerate(scores):
        prototypes[c, 0, 0], prototypes[c, 0, c + 1] = s, math.sqrt(1 - s * s)
    return feature, prototypes


# ---------------------------------------------------------------------- loss


def test_loss_by_hand() -> None:
    feature, prototypes = with_scores(0.8, 0.2, 0.5)
    scores = class_scores(similarities(feature, prototypes))
    torch.testing.assert_close(scores, torch.tensor([[0.8, 0.2, 0.5]], dtype=torch.float64))
    logits = normalised_logits(scores)[0]
    assert logits.tolist() == pytest.approx([1.22464, -1.22464, 0.0], abs=1e-5)
    assert float(npr_loss(feature, prototypes, torch.tensor([0]))) == pytest.approx(0.322241, abs=1e-6)


def test_the_nearest_prototype_of_a_class_counts() -> None:
    prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    features = torch.tensor([[0.0, 2.0], [-0.5, 0.0]])
    similarity = similarities(features, prototypes)
    assert similarity.shape == (2, 2, 2) and similarity[0, :, 0].tolist() == [0.0, 1.0]
    assert class_scores(similarity).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_gradient_by_hand() -> None:
    """∂L/∂s = (r − mean r − l·mean(r l))/σ and ∂L/∂f = (I − u uᵀ)/‖f‖ · Σ_c ∂L/∂s_c P_c,k*."""
    features, prototypes, labels = normal(5, 6).requires_grad_(), normal(4, 3, 6, seed=1), torch.tensor([0, 3, 1, 1, 2])
    (gradient,) = torch.autograd.grad(npr_loss(features, prototypes, labels), features)
    f, p = features.detach(), F.normalize(prototypes, dim=-1)
    u = F.normalize(f, dim=-1)
    similarity = similarities(f, prototypes)
    scores, nearest = similarity.max(dim=1)
    sigma = (scores.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = (scores - scores.mean(dim=1, keepdim=True)) / sigma
    r = (logits.softmax(dim=1) - F.one_hot(labels, 4)) / len(f)
    by_score = (r - r.mean(dim=1, keepdim=True) - logits * (r * logits).mean(dim=1, keepdim=True)) / sigma
    pulled = torch.stack([sum(by_score[n, c] * p[c, nearest[n, c]] for c in range(4)) for n in range(5)])  # type: ignore[misc]
    expected = (pulled - u * (u * pulled).sum(dim=1, keepdim=True)) / f.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [None, torch.tensor([0, 2, 3])])
def test_gradient_in_float64(classes: Tensor | None) -> None:
    prototypes, labels = normal(4, 3, 6, seed=1), torch.tensor([0, 3, 1, 2])
    assert torch.autograd.gradcheck(
        lambda f: npr_loss(f, prototypes, labels, classes), (normal(4, 6).requires_grad_(),)
    )


def test_prototypes_get_no_gradient() -> None:
    features, prototypes = normal(3, 4).requires_grad_(), normal(2, 2, 4, seed=1).requires_grad_()
    npr_loss(features, prototypes, torch.tensor([0, 1, 0])).backward()
    assert prototypes.grad is None and features.grad is not None and bool((features.grad != 0).any())


@pytest.mark.parametrize(("num_classes", "bound"), [(8, 0.2929), (5, 0.2839)])
def test_the_bound(num_classes: int, bound: float) -> None:
    """Own score 1 and all others −1 is the best there is: the loss comes to the bound from above, and never to 0."""
    assert smallest_loss(num_classes) == pytest.approx(bound, abs=1e-4)
    axis = torch.zeros(num_classes, 1, 3, dtype=torch.float64)
    axis[:, 0, 0] = -1.0
    axis[2] = -axis[2]
    best = float(npr_loss(torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64), axis, torch.tensor([2])))
    assert smallest_loss(num_classes) <= best < smallest_loss(num_classes) + 1e-3
    for seed in range(20):
        features, prototypes = normal(16, 3, seed=seed), normal(num_classes, 2, 3, seed=100 + seed)
        nearest = class_scores(similarities(features, prototypes)).argmax(dim=1)
        assert float(npr_loss(features, prototypes, nearest)) >= smallest_loss(num_classes)
    assert smallest_loss(1) == smallest_loss(0) == 0.0


def test_lengths_do_not_matter_and_order_does_not() -> None:
    features, prototypes, labels = normal(6, 5), normal(3, 2, 5, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = npr_loss(features, prototypes, labels)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(npr_loss(features * torch.arange(1, 7).unsqueeze(1), prototypes * 9, labels), loss)
    torch.testing.assert_close(npr_loss(features[order], prototypes[:, [1, 0]], labels[order]), loss)
    relabelled = torch.tensor([2, 0, 1])
    torch.testing.assert_close(npr_loss(features, prototypes[torch.tensor([1, 2, 0])], relabelled[labels]), loss)


def test_equal_scores_cost_ln_c() -> None:
    features = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    prototypes = torch.ones(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        features[:, 0] = 1.0
    loss = npr_loss(features, prototypes, torch.tensor([0, 3]))
    assert float(loss.detach()) == pytest.approx(math.log(4))
    loss.backward()
    assert features.grad is not None and bool(features.grad.isfinite().all())


def test_a_class_of_zero_prototypes_has_similarity_zero() -> None:
    prototypes = normal(3, 2, 4)
    prototypes[1] = 0.0
    features = normal(1, 4, seed=2).requires_grad_()
    assert class_scores(similarities(features.detach(), prototypes))[0, 1] == 0
    loss = npr_loss(features, prototypes, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_one_class_costs_nothing() -> None:
    features = normal(3, 4).requires_grad_()
    loss = npr_loss(features, normal(1, 2, 4), torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0 and features.grad is not None and bool((features.grad == 0).all())


@pytest.mark.parametrize("bad", [0.0, 1e-9, math.nan, math.inf])
def test_features_without_direction_are_left_out(bad: float) -> None:
    features, prototypes, labels = normal(4, 5), normal(3, 2, 5, seed=1), torch.tensor([0, 1, 2, 0])
    features[2] = 0.0
    features[2, 0] = bad
    features.requires_grad_()
    assert usable(features).tolist() == [True, True, False, True]
    loss = npr_loss(features, prototypes, labels)
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(loss, npr_loss(features[others], prototypes, labels[others]))
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(gradient.isfinite().all()) and bool((gradient[2] == 0).all()) and bool((gradient[0] != 0).any())


def test_no_item_with_a_direction_is_no_loss() -> None:
    for features in (torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 4), math.nan)):
        features.requires_grad_()
        loss = npr_loss(features, normal(3, 2, 4).float(), torch.zeros(len(features), dtype=torch.int64))
        loss.backward()
        assert float(loss.detach()) == 0.0 and features.grad is not None and bool((features.grad == 0).all())


def test_only_some_classes_compete() -> None:
    features, prototypes, labels = normal(5, 4), normal(4, 2, 4, seed=1), torch.tensor([0, 1, 2, 3, 2])
    chosen = torch.tensor([0, 2])
    own = torch.tensor([0, 2, 4])
    expected = npr_loss(features[own], prototypes[chosen], torch.tensor([0, 1, 1]))
    torch.testing.assert_close(npr_loss(features, prototypes, labels, chosen), expected)
    everyone = torch.arange(4)
    torch.testing.assert_close(npr_loss(features, prototypes, labels, everyone), npr_loss(features, prototypes, labels))


@pytest.mark.parametrize("classes", [[], [2], [1, 3]])
def test_too_few_classes_or_none_of_theirs_is_no_loss(classes: list[int]) -> None:
    features = normal(3, 4).requires_grad_()
    loss = npr_loss(features, normal(4, 2, 4), torch.tensor([0, 2, 2]), torch.tensor(classes, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0 and features.grad is not None and bool((features.grad == 0).all())


def test_the_type_of_the_features_stays() -> None:
    features = normal(3, 4, dtype=torch.float32)
    assert npr_loss(features, normal(2, 2, 4), torch.tensor([0, 1, 0])).dtype == torch.float32


# ---------------------------------------------------------------------- assignment


def naive_plan(similarity: Any, epsilon: float, iterations: int) -> Any:
    """The same in plain sums."""
    q = np.exp((similarity - similarity.max()) / epsilon).T
    q /= q.sum()
    k, n = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * n
    return (n * q).T


@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 4), (9, 4), (40, 3), (5, 1)])
def test_plan_against_plain_sums(n: int, k: int) -> None:
    similarity = normal(n, k).tanh()
    plan = sinkhorn_plan(similarity, 0.05, 3)
    np.testing.assert_allclose(plan.numpy(), naive_plan(similarity.numpy(), 0.05, 3), atol=1e-12)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(n, dtype=torch.float64))


def test_many_iterations_balance_the_plan() -> None:
    similarity = normal(40, 4).tanh()
    many = sinkhorn_plan(similarity, 0.5, 200)
    torch.testing.assert_close(many.sum(dim=0), torch.full((4,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn_plan(similarity + 0.3, 0.5, 200), many)  # a common shift changes nothing


def test_plan_by_hand() -> None:
    """Two items, each near its own sub-cluster: with e = exp(−1/ε) the plan is (1, e; e, 1)/(1 + e)."""
    plan = sinkhorn_plan(torch.eye(2), 1.0, 3)
    e = math.exp(-1.0)
    torch.testing.assert_close(plan, torch.tensor([[1.0, e], [e, 1.0]], dtype=torch.float64) / (1 + e))
    assert hard_assignment(plan).tolist() == [0, 1]


def test_the_most_similar_is_taken_even_when_all_prefer_one() -> None:
    """Four items all nearest to sub-cluster 0: balance sends those that lose least to the other."""
    similarity = torch.tensor([[0.9, 0.0], [0.9, 0.1], [0.9, 0.7], [0.9, 0.8]])
    assert hard_assignment(sinkhorn_plan(similarity, 0.05, 50)).tolist() == [0, 0, 1, 1]


def test_a_tiny_epsilon_leaves_no_empty_row() -> None:
    similarity = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    plan = sinkhorn_plan(similarity, 1e-4, 3)
    assert bool(plan.isfinite().all())
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_equal_similarities_go_to_the_first() -> None:
    plan = sinkhorn_plan(torch.zeros(5, 3), 0.05, 3)
    torch.testing.assert_close(plan, torch.full((5, 3), 1 / 3, dtype=torch.float64))
    assert hard_assignment(plan).tolist() == [0] * 5
    assert hard_assignment(sinkhorn_plan(torch.zeros(0, 3))).tolist() == []


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.0, 3), (-1.0, 3), (math.nan, 3), (0.05, 0)])
def test_a_plan_needs_entropy_and_an_iteration(epsilon: float, iterations: int) -> None:
    with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
        sinkhorn_plan(torch.eye(2), epsilon, iterations)


# ---------------------------------------------------------------------- prototypes


def test_group_means_by_hand() -> None:
    means, counts = group_means(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]), 4)
    assert means.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]] and counts.tolist() == [1, 0, 2, 0]
    none, counts = group_means(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 2)
    assert none.tolist() == [[0.0, 0.0]] * 2 and counts.tolist() == [0, 0]


def test_update_by_hand() -> None:
    previous = torch.tensor([[0.3, 0.4], [5.0, 6.0]])
    updated, new = update_prototypes(torch.tensor([[1.0, 0.0], [0.0, 7.0]]), torch.tensor([0, 0]), previous)
    assert updated[0].tolist() == pytest.approx([0.7071, 0.7071], abs=1e-4)
    assert updated[1].tolist() == [5.0, 6.0] and new.tolist() == [True, False]  # nothing assigned: as it was


def test_opposite_features_count_as_nothing() -> None:
    previous = torch.tensor([[0.6, 0.8]])
    updated, new = update_prototypes(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]), previous)
    assert torch.equal(updated, previous) and new.tolist() == [False]


def test_without_items_everything_stays() -> None:
    previous = normal(3, 4)
    updated, new = update_prototypes(torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.int64), previous)
    assert torch.equal(updated, previous) and not new.any()


def sinkhorn(similarity: Tensor) -> Tensor:
    return hard_assignment(sinkhorn_plan(similarity))


def test_two_clusters_of_a_class_are_found() -> None:
    """Features around two axes, prototypes near them: each prototype becomes one axis's mean direction."""
    spread = 0.1 * normal(20, 3)
    features = torch.cat([spread[:10] + torch.tensor([1.0, 0, 0]), spread[10:] + torch.tensor([0, 1.0, 0])])
    start = torch.tensor([[[0.9, 0.3, 0.0], [0.3, 0.9, 0.1]]], dtype=torch.float64)
    found, new = refresh_prototypes(features, torch.zeros(20, dtype=torch.int64), start, sinkhorn)
    units = F.normalize(features, dim=-1)
    expected = F.normalize(torch.stack([units[:10].mean(dim=0), units[10:].mean(dim=0)]), dim=-1)
    torch.testing.assert_close(found[0], expected)
    assert new.tolist() == [True]


def test_classes_with_fewer_than_two_items_keep_theirs() -> None:
    features, labels, start = normal(5, 4), torch.tensor([0, 1, 1, 2, 2]), normal(4, 2, 4, seed=1)
    features[4] = 0.0  # so that class 2 has one with a direction
    found, new = refresh_prototypes(features, labels, start, sinkhorn)
    assert new.tolist() == [False, True, False, False]
    assert torch.equal(found[[0, 2, 3]], start[[0, 2, 3]]) and not torch.equal(found[1], start[1])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_feature_without_direction_moves_no_prototype(bad: float) -> None:
    features, labels, start = normal(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]), normal(2, 2, 4, seed=1)
    expected, _ = refresh_prototypes(features[1:], labels[1:], start, sinkhorn)
    features[0] = bad
    found, _ = refresh_prototypes(features, labels, start, sinkhorn)
    assert torch.equal(found, expected)


def test_the_start_is_not_written_to_and_its_type_stays() -> None:
    start = normal(2, 2, 4, dtype=torch.float32)
    before = start.clone()
    found, _ = refresh_prototypes(normal(6, 4), torch.tensor([0, 1] * 3), start, sinkhorn)
    assert found.dtype == torch.float32 and torch.equal(start, before) and not torch.equal(found, start)


def test_the_order_of_the_items_does_not_matter() -> None:
    features, labels, start = normal(12, 4), torch.tensor([0, 1, 2] * 4), normal(3, 2, 4, seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    found, _ = refresh_prototypes(features, labels, start, sinkhorn)
    again, _ = refresh_prototypes(features[order] * 5, labels[order], start, sinkhorn)
    torch.testing.assert_close(found, again)


def test_no_item_at_all() -> None:
    start = normal(3, 2, 4)
    found, new = refresh_prototypes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), start, sinkhorn)
    assert torch.equal(found, start) and new.tolist() == [False] * 3
