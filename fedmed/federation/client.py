"""The base local half: one forward pass, one backward, one optimiser step per batch, and the hooks a method overrides.

A client object lives for one message. Nothing important hides on it: what must survive goes into `self.personal`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.config import Config, params_from
from fedmed.data.augment import Augment
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteData
from fedmed.data.split import Batch, Split
from fedmed.errors import FedMedError
from fedmed.federation.layout import Layout
from fedmed.federation.messages import BASE_LEAVES, Leaf
from fedmed.federation.schedule import learning_rate
from fedmed.federation.seeding import torch_rng
from fedmed.federation.state import State, copy_state
from fedmed.models.heads import probabilities
from fedmed.models.output import Output, extra_inputs
from fedmed.schema import NoParams

MOMENTS = "optimizer/"  # prefix of optimiser moments among the personal arrays


@dataclass
class Env:
    """What a client works in: built once per process and site. `initial` holds the run seed's values of personal entries."""

    config: Config
    data: SiteData
    model: nn.Module
    layout: Layout
    device: torch.device
    activation: str
    site: str
    initial: State = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """Where in the run a message stands. `round` counts from 1.

    `site_index`: place of the site in the federation, -1 for what is none of its sites (central scoring, plain Flower strategies).
    `personal_round`: the last round whose reply the server accepted from this site; `durable_round`: the same as the server's newest
    checkpoint has it, to which a resume would go back. 0: none.
    """

    round: int = 0
    rounds: int = 0
    site_index: int = -1
    num_sites: int = 1
    personal_round: int = 0
    durable_round: int = 0


class AddOn:
    """A loss term that rides on any client; a fresh object per message, switched on by `client.<name>.enabled=true`."""

    Params: ClassVar[type] = NoParams
    leaves: ClassVar[tuple[Leaf, ...]] = ()

    def __init__(self, params: Any) -> None:
        self.params = params

    def begin_round(self, client: Client, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Called after the client's own `begin_round`."""

    def loss(self, client: Client, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Named terms added to the client's."""
        return {}


class Client:
    """Base of all local training. A method overrides `loss`, and the other hooks as far as it needs them."""

    Params: ClassVar[type] = NoParams
    leaves: ClassVar[tuple[Leaf, ...]] = ()
    views: ClassVar[tuple[str, ...]] = ("global",)
    tasks: ClassVar[tuple[str, ...]] = ("classification", "multilabel", "segmentation")

    def __init__(self, env: Env, moment: Moment, addons: Mapping[str, AddOn], params: Any = None) -> None:
        self.config, self.data, self.model, self.layout = env.config, env.data, env.model, env.layout
        self.device, self.activation, self.site = env.device, env.activation, env.site
        self.round, self.rounds = moment.round, moment.rounds
        self.site_index, self.num_sites = moment.site_index, moment.num_sites
        self.params = params_from(self.Params, env.config.client.args, "client.args") if params is None else params
        self.addons = addons
        self.received: State = {}
        self.personal: State = {}
        self.augment = Augment(list(env.config.data.augment))
        self.optimizer: torch.optim.Optimizer | None = None
        self._initial = env.initial
        self._train_set: Split | None = None

    # ------------------------------------------------------------------ what a method may override

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """The received model is loaded: sweep the data, choose what to train on (`self.train_set = ...`)."""

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Named loss terms of one batch (scalar tensors); the base sums them."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(output, batch, step)")

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; gives the detached loss terms. Overridden only where a step is not one backward and one step."""
        assert self.optimizer is not None
        terms = self.loss_terms(batch, step)
        values = list(terms.values())
        total = values[0] if len(values) == 1 else torch.stack(values).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Extra arrays and metrics that go with the update (each declared in `leaves`)."""
        return {}, {}

    def predict(self, batch: Batch, view: str) -> Tensor:
        """Probabilities for a decoded batch; the only thing evaluation calls. The model of the view is loaded."""
        return probabilities(self.forward(batch).logits, self.activation)

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        """True for an entry that never travels; called at both ends with the owner of the entry."""
        return False

    # ------------------------------------------------------------------ what the base gives a method

    @property
    def train_set(self) -> Split:
        """What this round trains on; a method may replace it for the round."""
        if self._train_set is None:
            self._train_set = self.data.split("train", self.device)
        return self._train_set

    @train_set.setter
    def train_set(self, split: Split) -> None:
        self._train_set = split

    @property
    def class_counts(self) -> Any:
        """Class counts of the train split as the site labels it, NumPy int64 (C,); counted once per data set."""
        return self.data.split("train", self.device).class_counts()

    @property
    def lr(self) -> float:
        """Learning rate of this round."""
        return learning_rate(self.config.optimizer, self.round, self.rounds)

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator keyed by (seed, round, site, purpose)."""
        return torch_rng(self.config.seed, self.round, self.site, purpose)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast where `engine.precision` asks for it."""
        if self.config.engine.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def forward(self, batch: Batch) -> Output:
        """One pass of the model over a batch, with the per-item extras it asks for; logits are float32."""
        with self.autocast():
            output = self.model(batch.images, **extra_inputs(self.model, batch.extras))
        return Output(output.logits.float(), *output[1:])

    def loss_terms(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One forward pass and all named terms, the add-ons' included."""
        output = self.forward(batch)
        terms = self.loss(output, batch, step)
        for addon in self.addons.values():
            terms = {**terms, **addon.loss(self, output, batch, step)}
        return terms

    def sweep(self, split: str | Split = "train", *, gradient: bool = False) -> Iterator[tuple[Batch, Output]]:
        """Ordered, unaugmented pass in eval mode; the model's mode is put back at the end.

        `gradient`: outputs can be differentiated, in batches as small as those of training, so that memory is not more than training needs.
        """
        items = self.data.split(split, self.device) if isinstance(split, str) else split
        size = self.config.training.batch_size * (1 if gradient else 4)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in batches(items, size):
                with torch.set_grad_enabled(gradient):
                    output = self.forward(batch)
                yield batch, output
        finally:
            self.model.train(was_training)

    def teacher(self, images: Tensor, extras: Mapping[str, Tensor] | None = None) -> Output:
        """The received model in eval mode on the same images, without gradient and without a second network.

        `extras`: those of the batch, for a model that asks for some.
        """
        state = {name: value.to(self.device) for name, value in self.received.items()}
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                inputs = extra_inputs(self.model, extras or {})
                output: Output = torch.func.functional_call(self.model, state, (images,), inputs)
        finally:
            self.model.train(was_training)
        return Output(output.logits.float(), *output[1:])

    # ------------------------------------------------------------------ called by the site runtime

    def load_view(self, view: str) -> None:
        """Load a view into the model. `global`: received entries; `personal`: the same overlaid with what the site keeps.

        Personal entries the site does not keep yet have the run seed's values in both views.
        """
        own = {n: self.personal[n] for n in self.layout.entries if n in self.personal} if view == "personal" else {}
        own = {**self._initial, **own}
        missing = [name for name in self.layout.exchanged if name not in self.received]
        if missing:  # the resident model would keep what another site trained
            raise FedMedError(
                f"the received model has no entry {missing[0]!r} ({len(missing)} of {len(self.layout.exchanged)} are missing)"
            )
        target = self.model.state_dict()
        copy_state(self.received, target)
        copy_state(own, target)

    def fit(self) -> dict[str, float]:
        """Train for `training.epochs` (or `max_steps`) and give `train_loss` and one mean per named term. No host synchronisation inside."""
        training = self.config.training
        self.optimizer = make_optimizer(self.model, self.config, self.personal, self.lr)
        self.model.train()
        rng = self.rng("batches")
        sums: dict[str, Tensor] = {}
        step = 0
        for batch in self._epochs(rng):
            for name, value in self.train_step(batch, step).items():
                sums[name] = sums[name] + value if name in sums else value
            step += 1
            if training.max_steps is not None and step >= training.max_steps:
                break
        self.optimizer.zero_grad(set_to_none=True)  # the next site finds a model without gradients
        if self.config.optimizer.persist:
            self.personal = {**self.personal, **optimizer_arrays(self.model, self.optimizer)}
        means = {f"loss/{name}": float(total) / step for name, total in sums.items()} if step else {}
        return {"train_loss": sum(means.values()) if means else math.nan, **means}

    def _epochs(self, rng: torch.Generator) -> Iterator[Batch]:
        for _ in range(self.config.training.epochs):
            yield from batches(self.train_set, self.config.training.batch_size, rng, self.augment)

    def check_leaves(self, extras: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
        """Refuse to send what no leaf declares. Raises `FedMedError`."""
        leaves = declared_leaves(type(self), self.addons)
        for kind, sent in (("array", extras), ("metric", metrics)):
            for name in sent:
                if not any(leaf.kind == kind and leaf.covers(name) for leaf in leaves):
                    raise FedMedError(
                        f"{type(self).__name__} wanted to send the {kind} {name!r}, which its `leaves` do not declare; nothing was sent"
                    )


def declared_leaves(client_class: type[Client], addons: Mapping[str, AddOn | type[AddOn]]) -> tuple[Leaf, ...]:
    """Everything a client class with these add-ons may send besides the model."""
    return (*BASE_LEAVES, *client_class.leaves, *(leaf for addon in addons.values() for leaf in addon.leaves))


def make_optimizer(
    model: nn.Module, config: Config, personal: Mapping[str, Tensor], lr: float | None = None
) -> torch.optim.Optimizer:
    """The optimiser of the configuration over all parameters with gradient, with the kept moments if `optimizer.persist`.

    `lr`: the learning rate of the round (`Client.lr`), else `optimizer.lr`.
    """
    settings = config.optimizer if lr is None else dataclasses.replace(config.optimizer, lr=lr)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        optimizer = kind(
            parameters, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), weight_decay=settings.weight_decay
        )
    if settings.persist:
        _restore_moments(model, optimizer, personal)
    return optimizer


def optimizer_arrays(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The moments of an optimiser as arrays named `optimizer/<entry>/<moment>`."""
    out: State = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{MOMENTS}{name}/{key}"] = value.detach().cpu().clone()
    return out


def _restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, personal: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        prefix = f"{MOMENTS}{name}/"
        kept = {key.removeprefix(prefix): value for key, value in personal.items() if key.startswith(prefix)}
        if kept:
            optimizer.state[parameter] = {
                k: v.clone() if k == "step" else v.to(parameter.device).clone() for k, v in kept.items()
            }
