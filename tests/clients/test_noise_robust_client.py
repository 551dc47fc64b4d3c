"""FedNoRo at the site: class losses, distillation terms, and which loss a role gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.noise_robust import (
    NoiseRobust,
    NoiseRobustParams,
    adjusted_log_prob,
    class_mean_losses,
    kd_terms,
    soft_labels,
)
from fedmed.data.loader import batches
from fedmed.losses.classification import logit_adjusted_cross_entropy

NAN, INF = float("nan"), float("inf")


def test_class_means_by_hand() -> None:
    losses, labels = torch.tensor([0.2, 0.4, 1.0, INF, 5.0]), torch.tensor([0, 0, 1, 2, 4])
    np.testing.assert_allclose(class_mean_losses(losses, labels, 5), [0.3, 1.0, INF, NAN, 5.0], rtol=1e-6)
    np.testing.assert_allclose(class_mean_losses(losses, labels, 5, min_count=2), [0.3, NAN, NAN, NAN, NAN], rtol=1e-6)


def test_class_mean_that_is_not_a_number_is_present_but_infinite() -> None:
    assert class_mean_losses(torch.tensor([NAN, 1.0]), torch.tensor([0, 1]), 2).tolist() == [INF, 1.0]


def test_class_means_of_nothing() -> None:
    assert np.isnan(class_mean_losses(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3)).all()


def by_hand() -> dict[str, Any]:
    return {
        "student_logits": torch.zeros(1, 2, dtype=torch.float64),
        "teacher_logits": torch.tensor([[0.8, 0.0]], dtype=torch.float64),
        "labels": torch.tensor([0]),
        "class_counts": torch.tensor([1, 1]),
    }


def test_distillation_by_hand() -> None:
    np.testing.assert_allclose(soft_labels(by_hand()["teacher_logits"]).numpy(), [[0.731059, 0.268941]], atol=1e-6)
    terms = kd_terms(**by_hand(), kd_weight=0.8)
    assert float(terms["kd"]) == pytest.approx(0.8 * 0.110944, abs=1e-6)
    assert float(terms["nll"]) == pytest.approx(0.2 * 0.693147, abs=1e-6)
    assert float(terms["kd"] + terms["nll"]) == pytest.approx(0.227385, abs=1e-6)


def test_without_distillation_weight_the_loss_is_the_logit_adjusted_one() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, generator=rng, dtype=torch.float64)
    labels, counts = torch.tensor([0, 1, 2, 3, 3, 3]), torch.tensor([5, 1, 7, 3])
    terms = kd_terms(student, teacher, labels, counts, 0.0)
    assert float(terms["kd"]) == 0.0
    torch.testing.assert_close(terms["nll"], logit_adjusted_cross_entropy(student, labels, counts))


def test_equal_teacher_and_student_give_no_divergence() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = kd_terms(logits, logits, torch.zeros(5, dtype=torch.int64), torch.ones(3), 1.0, temperature=1.0)
    assert float(terms["kd"]) == pytest.approx(0.0, abs=1e-12)


def test_absent_class_has_neither_loss_nor_gradient() -> None:
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    counts, labels = torch.tensor([3, 0, 5]), torch.tensor([0, 2, 2, 0])
    assert (adjusted_log_prob(student, counts)[:, 1] == 0).all()
    terms = kd_terms(student, torch.zeros(4, 3, dtype=torch.float64), labels, counts, 0.5)
    (gradient,) = torch.autograd.grad(terms["kd"] + terms["nll"], student)
    assert gradient.isfinite().all() and (gradient[:, 1] == 0).all()


def test_gradient_agrees_with_differences() -> None:
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts, labels = torch.tensor([3, 1, 5, 2]), torch.tensor([0, 2, 3])
    assert torch.autograd.gradcheck(lambda z: sum(kd_terms(z, teacher, labels, counts, 0.6).values()), (student,))


def test_tau_zero_ignores_the_prior() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        adjusted_log_prob(logits, torch.tensor([1, 0, 4]), tau=0.0), F.log_softmax(logits, dim=1)
    )


def test_role_decides_the_loss(new_client: Any) -> None:
    client = new_client(NoiseRobust)
    batch = next(iter(batches(client.train_set, 4)))
    output = client.model(batch.images)
    client.begin_round({"stage": 1, "role": "noisy", "kd_weight": 0.5}, {})
    assert set(client.loss(output, batch, 0)) == {"ce"}
    client.begin_round({"stage": 2, "role": "clean", "kd_weight": 0.0}, {})
    assert set(client.loss(output, batch, 0)) == {"ce"}
    client.begin_round({"stage": 2, "role": "noisy", "kd_weight": 0.5}, {})
    terms = client.loss(output, batch, 0)
    teacher = client.teacher(batch.images).logits
    expected = kd_terms(output.logits, teacher, batch.targets, torch.as_tensor(client.class_counts), 0.5)
    assert set(terms) == {"kd", "nll"}
    torch.testing.assert_close(terms, expected)


def test_teacher_stays_the_received_model(new_client: Any) -> None:
    client = new_client(NoiseRobust)
    client.begin_round({"stage": 2, "role": "noisy", "kd_weight": 1.0}, {})
    batch = next(iter(batches(client.train_set, 4)))
    before = client.teacher(batch.images).logits
    client.fit()
    torch.testing.assert_close(client.teacher(batch.images).logits, before)


def test_query_gives_plain_losses_by_class(new_client: Any) -> None:
    client = new_client(NoiseRobust, args={"tau": 1.0})
    arrays, metrics = client.query_class_losses({}, {})
    client.model.eval()
    split = client.train_set
    batch = split.batch(torch.arange(len(split)))
    with torch.no_grad():
        losses = F.cross_entropy(client.model(batch.images).logits, batch.targets, reduction="none")
    naive = [
        float(losses[batch.targets == c].mean()) if (batch.targets == c).any() else NAN
        for c in range(split.num_classes)
    ]
    assert arrays == {}
    np.testing.assert_allclose(metrics["class_loss"], naive, rtol=1e-5)
    client.check_leaves(arrays, metrics)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"tau": -1.0}, {"min_count": 0}])
def test_values_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        NoiseRobustParams(**wrong)  # type: ignore[arg-type]
