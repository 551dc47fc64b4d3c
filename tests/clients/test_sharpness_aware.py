"""FedISM at the site: measurement, GSAM step, what the second pass must not change, and what a round costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clients.sharpness_aware import (
    SharpnessAware,
    SharpnessAwareParams,
    dot,
    global_norm,
    gsam_gradient,
    gsam_step,
    perturbed,
    sharpness_losses,
    surrogate_gap_gradient_,
    unchanged_buffers,
)
from clients.supervised import Supervised
from fedmed.data.loader import batches
from fedmed.errors import UserError

NAN = float("nan")
RHO, ALPHA = 0.05, 0.1


class Bowl(nn.Module):
    """f(w) = ½(w₁² + 4·w₂²), its two weights in parameters of their own."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([first], dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor([second], dtype=torch.float64))

    def terms(self) -> dict[str, Tensor]:
        """The loss in two terms."""
        return {"a": 0.5 * self.first.square().sum(), "b": 2.0 * self.second.square().sum()}

    def values(self) -> list[float]:
        """The weights."""
        return [self.first.item(), self.second.item()]

    def gradients(self) -> list[float]:
        """Their gradients."""
        assert self.first.grad is not None and self.second.grad is not None
        return [self.first.grad.item(), self.second.grad.item()]


# ---------------------------------------------------------------------- the step


def test_gsam_step_by_hand() -> None:
    model = Bowl(1.0, 1.0)
    terms = gsam_step(model, torch.optim.SGD(model.parameters(), lr=0.1), model.terms, RHO, ALPHA)
    assert model.gradients() == pytest.approx([1.008848, 4.194820], abs=1e-6)
    assert model.values() == pytest.approx([0.899115, 0.580518], abs=1e-6)
    assert {name: float(value) for name, value in terms.items()} == {"a": 0.5, "b": 2.0}
    assert not any(value.requires_grad for value in terms.values())


def test_parallel_gradients_leave_nothing_to_take_away() -> None:
    model = Bowl(1.0, 0.0)
    gsam_gradient(model, model.terms, RHO, ALPHA)
    assert model.gradients() == pytest.approx([1.05, 0.0]) and model.values() == [1.0, 0.0]


def test_alpha_zero_is_plain_sam() -> None:
    model, at_peak = Bowl(1.0, 1.0), Bowl(1 + RHO / math.sqrt(17), 1 + 4 * RHO / math.sqrt(17))
    gsam_gradient(model, model.terms, RHO, 0.0)
    sum(at_peak.terms().values()).backward()  # type: ignore[union-attr]
    assert model.gradients() == pytest.approx(at_peak.gradients(), rel=1e-12)


def test_zero_gradient_moves_nothing() -> None:
    model = Bowl(0.0, 0.0)
    gsam_step(model, torch.optim.SGD(model.parameters(), lr=0.1), model.terms, RHO, ALPHA)
    assert model.values() == [0.0, 0.0] and model.gradients() == [0.0, 0.0]


def test_surrogate_gap_gradient_agrees_with_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(s, generator=rng, dtype=torch.float64) for s in ((3, 4), (5,))] for _ in range(2))
    g, h = (torch.cat([t.flatten() for t in side]) for side in (first, second))
    orthogonal = g - (g @ h) / (h @ h) * h
    expected = h - ALPHA * orthogonal
    surrogate_gap_gradient_(first, second, ALPHA)
    found = torch.cat([t.flatten() for t in second])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(orthogonal @ h, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


def test_second_gradient_zero() -> None:
    second = [torch.zeros(2)]
    surrogate_gap_gradient_([torch.tensor([1.0, -2.0])], second, 0.5)
    assert second[0].tolist() == [-0.5, 1.0]


def test_norm_and_dot_do_not_lose_small_tensors_beside_large_ones() -> None:
    tensors = [torch.full((1,), 1e4), *[torch.full((1,), 1.0) for _ in range(100)]]
    assert float(global_norm(tensors)) == pytest.approx(math.sqrt(1e8 + 100), rel=1e-12)
    assert float(dot(tensors, tensors)) == pytest.approx(1e8 + 100, rel=1e-12)
    half = [torch.full((4,), 1e-6, dtype=torch.float16)]  # its square underflows in float16
    assert float(global_norm(half)) == pytest.approx(2e-6, rel=0.1)
    assert float(global_norm([])) == float(dot([], [])) == 0.0


def test_parameters_without_gradient() -> None:
    """One is frozen, one never used, one used in the first pass only and one in the second only."""
    model, calls = nn.ParameterDict({name: torch.ones(2) for name in ("frozen", "unused", "once", "later", "used")}), []
    model["frozen"].requires_grad_(False)

    def closure() -> dict[str, Tensor]:
        calls.append(0)
        extra = model["once"] if len(calls) == 1 else model["later"]
        return {"loss": (model["frozen"] * model["used"]).sum() + extra.square().sum()}

    gsam_gradient(model, closure, RHO, ALPHA)
    assert model["frozen"].grad is None and model["unused"].grad is None
    assert all((value == 1).all() for value in model.values())
    # g = (used 1, once 2), g' = (used 1, later 2), by entry; both have norm √10 and ⟨g, g'⟩ = 2
    factor = 1 + ALPHA * 2 / 10
    for name, expected in {"used": factor - ALPHA, "once": -2 * ALPHA, "later": 2 * factor}.items():
        torch.testing.assert_close(model[name].grad, torch.full((2,), expected))


def test_perturbation_has_the_radius_and_is_undone_to_the_bit() -> None:
    rng = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(s, generator=rng) * 10**k) for k, s in enumerate(((30, 4), (5,), ()))]
    gradients = [torch.randn(p.shape, generator=rng) for p in parameters]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="in between"), perturbed(list(parameters), gradients, 0.3):
        moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        assert float(global_norm(moved)) == pytest.approx(0.3, rel=1e-4)
        raise RuntimeError("in between")
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    with perturbed([], [], 0.3):
        pass


# ---------------------------------------------------------------------- the measurement


def test_measurement_by_hand() -> None:
    model = nn.Linear(2, 2, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    seen: list[Tensor] = []

    def mean_loss(with_gradient: bool) -> float:
        seen.append(model.weight.detach().clone())
        loss = F.cross_entropy(model(x), y)
        if with_gradient:
            (7 * loss).backward()  # the scale of the gradient cancels
        return loss.item()

    base, higher = sharpness_losses(model, mean_loss, RHO)
    assert base == pytest.approx(0.693147, abs=1e-6) and higher == pytest.approx(0.718460, abs=1e-6)
    torch.testing.assert_close(seen[1], torch.tensor([[-0.025, 0.025], [0.025, -0.025]], dtype=torch.float64))
    assert not model.weight.any() and model.weight.grad is None and model.bias.grad is None


def received(new_client: Any, cls: type = SharpnessAware, rho: float = RHO, **settings: Any) -> Any:
    """A client that has begun its round."""
    client = new_client(cls, **settings)
    client.begin_round({"rho": rho}, {})
    return client


def test_measurement_leaves_the_received_model_as_it_was(new_client: Any) -> None:
    client = new_client(SharpnessAware)
    client.model.train()
    before = {name: value.clone() for name, value in client.model.state_dict().items()}
    client.begin_round({"rho": RHO}, {})
    assert all(torch.equal(value, before[name]) for name, value in client.model.state_dict().items())
    assert all(p.grad is None for p in client.model.parameters()) and client.model.training


def test_measurement_agrees_with_a_plain_one(new_client: Any) -> None:
    """All items at once, in float64, w + e made by hand."""
    client = received(new_client, args={"tau": 2.0})
    model, split = client.model.double().eval(), client.train_set
    batch = split.batch(torch.arange(len(split)))
    images, labels = batch.images.double(), batch.targets
    loss = F.cross_entropy(model(images).logits, labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p += RHO * g / norm
        higher = F.cross_entropy(model(images).logits, labels)
    assert client.loss_base == pytest.approx(loss.item(), rel=1e-5)
    assert client.loss_perturbed == pytest.approx(higher.item(), rel=1e-4)
    assert client.loss_perturbed > client.loss_base


def test_measurement_is_repeatable(new_client: Any) -> None:
    found = [received(new_client).end_round() for _ in range(2)]
    assert found[0] == found[1]


def test_radius_zero_finds_no_sharpness(new_client: Any) -> None:
    client = received(new_client, rho=0.0)
    assert client.loss_perturbed == pytest.approx(client.loss_base, rel=1e-6)


def test_what_leaves(new_client: Any) -> None:
    client = received(new_client)
    arrays, metrics = client.end_round()
    assert arrays == {} and set(metrics) == {"loss_base", "loss_perturbed"}
    client.check_leaves(arrays, metrics)
    rounded = received(new_client, args={"decimals": 2}).end_round()[1]
    assert rounded == {name: round(value, 2) for name, value in metrics.items()}


def test_no_items(new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client(SharpnessAware, args={"decimals": 3})
    monkeypatch.setattr(client, "sweep", lambda split, gradient=False: iter(()))
    client.begin_round({"rho": RHO}, {})
    assert all(math.isnan(value) for value in client.end_round()[1].values())


@pytest.mark.parametrize("config", [{}, {"rho": NAN}, {"rho": -0.1}])
def test_a_message_without_radius_is_refused(new_client: Any, config: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"needs a radius rho .* use strategy\.name=fedism"):
        new_client(SharpnessAware).begin_round(config, {})


# ---------------------------------------------------------------------- a round of training


def trained(client: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Model and losses after a round."""
    losses = client.fit()
    return {name: value.clone() for name, value in client.model.state_dict().items()}, losses


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_alpha_and_radius_zero_are_plain_training_to_the_bit(new_client: Any, optimizer: str) -> None:
    """The second pass is made all the same: equal parameters, the same batch and batch statistics."""
    models, losses = [], []
    for cls, rho, args in ((Supervised, 0.0, {"loss": "logit_adjusted_ce"}), (SharpnessAware, 0.0, {"alpha": 0.0})):
        client = received(new_client, cls, rho, args=args)
        object.__setattr__(client.config.optimizer, "name", optimizer)
        model, loss = trained(client)
        models.append(model)
        losses.append(loss)
    assert losses[0] == losses[1]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_radius_and_alpha_change_training(new_client: Any) -> None:
    found = [
        trained(received(new_client, rho=rho, args={"alpha": alpha}))[0]["head.weight"]
        for rho, alpha in ((0.0, 0.0), (RHO, 0.0), (RHO, 0.5))
    ]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_reported_terms_are_those_at_w_with_the_add_ons(new_client: Any) -> None:
    client = received(new_client, addons={"prox": {"enabled": True, "mu": 3.0}})
    for addon in client.addons.values():
        addon.begin_round(client, {}, {})
    client.model.train()
    client.optimizer = torch.optim.SGD(client.model.parameters(), lr=0.1)
    batch = next(iter(batches(client.train_set, 4)))
    assert float(client.train_step(batch, 0)["prox"]) == 0.0  # at w + e it is not
    with unchanged_buffers(client.model):
        expected = {name: value.item() for name, value in client.loss_terms(batch, 1).items()}
    assert expected["prox"] > 0
    assert {name: value.item() for name, value in client.train_step(batch, 1).items()} == expected


def norms() -> nn.Sequential:
    """Every kind of layer that tracks statistics in its own way, and one in eval mode that reads them."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model.train()
    model[6].eval()
    return model


def test_second_pass_leaves_statistics_and_counters() -> None:
    torch.manual_seed(0)
    once, twice = norms(), norms()
    twice.load_state_dict(once.state_dict())
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        once.get_buffer("6.running_var").mul_(2.0)
        twice.get_buffer("6.running_var").mul_(2.0)
    for _ in range(3):
        once(images)
        gsam_gradient(twice, lambda: {"loss": F.cross_entropy(twice(images), labels)}, RHO, ALPHA)
    assert {name for name, _ in once.named_buffers()} == {name for name, _ in twice.named_buffers()}
    for name, value in once.named_buffers():
        assert torch.equal(value, twice.get_buffer(name)), name
    assert [int(twice.get_buffer(f"{layer}.num_batches_tracked")) for layer in (1, 6)] == [3, 0]
    assert all(torch.equal(value, twice.get_parameter(name)) for name, value in once.named_parameters())


def test_a_last_batch_of_one_is_left_out_as_in_plain_training(new_client: Any) -> None:
    client = received(new_client)
    split = client.train_set
    client.train_set = split.subset(torch.arange(5))
    object.__setattr__(client.config.training, "batch_size", 4)
    assert math.isfinite(client.fit()["train_loss"])


# ---------------------------------------------------------------------- what it costs


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count forward passes of the model, and backward passes by the gradients its last bias receives."""
    count = {"forward": 0, "backward": 0}

    def add(kind: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            count[kind] += 1

        return hook

    bias = model.get_parameter("head.bias")
    handles = [model.register_forward_hook(add("forward")), bias.register_post_accumulate_grad_hook(add("backward"))]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def test_passes_of_a_round(new_client: Any) -> None:
    """One sweep forward and backward, one forward, and twice both per step; nothing else."""
    client = new_client(SharpnessAware)
    items, size = len(client.train_set), client.config.training.batch_size
    steps = len(list(batches(client.train_set, size, torch.Generator())))
    with counted(client.model) as count:
        client.begin_round({"rho": RHO}, {})
        sweep, no_gradient = (
            math.ceil(items / size),
            math.ceil(items / (4 * size)),
        )  # without gradient in larger batches
        assert count == {"forward": sweep + no_gradient, "backward": sweep}
        client.fit()
        assert count == {"forward": sweep + no_gradient + 2 * steps, "backward": sweep + 2 * steps}
        client.end_round()
    assert count["backward"] == sweep + 2 * steps


class LiveStorages(TorchDispatchMode):
    """Largest number of storages of at least `size` bytes that were alive after any operation."""

    def __init__(self, size: int, known: list[Tensor]) -> None:
        super().__init__()
        self.size, self.peak, self.seen = size, 0, dict[int, StorageWeakRef]()
        self.add(known)

    def add(self, tensors: list[Any]) -> None:
        """Take note of new storages, forget dead ones."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.seen[reference.cdata] = reference
        self.seen = {key: reference for key, reference in self.seen.items() if not reference.expired()}
        self.peak = max(self.peak, len(self.seen))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out


def peak_of(step: Callable[[], Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Peak number of parameter-sized storages during a step; the optimiser has its moments already."""
    weight = next(model.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    with LiveStorages(weight.numel() * weight.element_size(), [weight, *moments]) as live:
        step()
    return live.peak


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_two_parameter_sized_buffers_beyond_plain_training(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if kind == "sgd" else torch.optim.Adam(model.parameters())
    images, labels = torch.randn(3, 300), torch.tensor([0, 1, 2])

    def terms() -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(images), labels)}

    def plain() -> None:
        loss = terms()["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    plain()
    base = peak_of(plain, model, optimizer)
    assert base >= 2  # parameters and gradient: the counter sees them
    assert peak_of(lambda: gsam_step(model, optimizer, terms, RHO, ALPHA), model, optimizer) <= base + 2


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": NAN}, {"tau": -1.0}, {"decimals": -1}])
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SharpnessAwareParams(**wrong)
