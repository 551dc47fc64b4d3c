"""Any network of `monai.networks.nets` behind the model contract. MONAI is imported on first use: it takes seconds."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.config import nearest
from fedmed.errors import UserError
from fedmed.models.output import Output, channels_last

PREFIX = "monai:"
_INPUTS = ("in_channels", "n_input_channels")
_OUTPUTS = ("out_channels", "num_classes", "n_classes", "classes")
_FROM_DATA = ("spatial_dims", *_INPUTS, *_OUTPUTS)
# Arguments of networks that would read a file or fetch one: weights come from the run, and from nowhere else.
FETCHING = ("pretrained", "pretrained_url", "weights", "path_or_repo_id", "filename", "checkpoint")
_LAST_IS_MAIN = ("BasicUNetPlusPlus",)  # of a list of outputs this one puts the finest last, the others first
# What a network raises for arguments or images it cannot work with.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError, ImportError)
_CLASSIFIERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def monai_networks() -> dict[str, Callable[..., nn.Module]]:
    """Every network class of MONAI under its own name, and the functions that build one (resnet18, ...)."""
    from monai.networks import nets

    found: dict[str, Callable[..., nn.Module]] = {}
    for name, item in vars(nets).items():
        is_network = inspect.isclass(item) and issubclass(item, nn.Module)
        is_builder = inspect.isfunction(item) and item.__annotations__.get("return") == "ResNet"
        if (is_network or is_builder) and item.__name__ == name:
            found[name] = item
    return found


def find_network(name: str) -> Callable[..., nn.Module]:
    """Give the MONAI class or builder called `name`; `UserError` with the nearest name when there is none."""
    networks = monai_networks()
    if name in networks:
        return networks[name]
    lower = {known.lower(): known for known in networks}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {PREFIX + lower[near[0]]!r}?" if near else "use the name of a class of monai.networks.nets"
    raise UserError(f"model.name: MONAI has no network {name!r}; {hint}")


def parameters_of(network: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """Named arguments `network` accepts, those it hands on through **kwargs included (to its base class, or to what it
    builds).
    """
    found: dict[str, inspect.Parameter] = {}
    chain: list[Any] = list(network.__mro__) if inspect.isclass(network) else [network]
    if not inspect.isclass(network):
        chain.append(getattr(sys.modules[network.__module__], network.__annotations__["return"]))
    for step in chain:
        own = inspect.signature(step).parameters
        for name, parameter in own.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            # What a class needs without a default, the builder or subclass in front of it has already set.
            if named and (step is chain[0] or parameter.default is not parameter.empty or name in _FROM_DATA):
                found.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return found


def fill_arguments(
    accepted: Mapping[str, inspect.Parameter],
    args: Mapping[str, Any],
    in_channels: int,
    num_outputs: int,
    image_size: tuple[int, int],
    task: str,
) -> dict[str, Any]:
    """Add to the user's `args` what the data decide: dimensions, channels, outputs, image size; nothing is ever
    downloaded.

    A value the user gave is kept. Raises `UserError` for an argument the network does not know and for those of `FETCHING`.
    """
    for name in args:
        if name not in accepted:
            raise UserError(f"model.args.{name}: unknown argument of this network{nearest(name, accepted)}")
    for name in FETCHING:
        if args.get(name):
            raise UserError(
                f"model.args.{name}: nothing is downloaded, every site builds the same initial model; remove it"
            )
    filled: dict[str, Any] = {"spatial_dims": 2, "pretrained": False, "progress": False}
    filled.update(dict.fromkeys(_INPUTS, in_channels) | dict.fromkeys(_OUTPUTS, num_outputs))
    filled.update(img_size=image_size, in_shape=(in_channels, *image_size), classification=task != "segmentation")
    filled.update(post_activation="")  # a vision transformer puts a tanh behind its logits unless told not to
    return {name: value for name, value in filled.items() if name in accepted} | dict(args)


def build_monai(
    name: str,
    args: Mapping[str, Any],
    in_channels: int,
    num_outputs: int,
    image_size: tuple[int, int],
    task: str,
) -> MonaiNet:
    """Build `name` of `monai.networks.nets` (with or without the `monai:` in front) for 2-D images.

    Raises `UserError` when the network is unknown, refuses its arguments, or does not turn an image of this size into
    logits of the shape the task needs.
    """
    name = name.removeprefix(PREFIX)
    network = find_network(name)
    filled = fill_arguments(parameters_of(network), args, in_channels, num_outputs, image_size, task)
    try:
        net = network(**filled)
    except _REFUSALS as error:
        known = ", ".join(parameters_of(network))
        raise UserError(
            f"model.name {PREFIX}{name}: could not be built: {_short(error)}; model.args may set {known}"
        ) from error
    return MonaiNet(net, name, in_channels, num_outputs, image_size, task)


class MonaiNet(nn.Module):
    """A MONAI network, held as `net`, that returns `Output`.

    In: images (B, in_channels, H, W). Out: logits (B, num_outputs) or (B, num_outputs, H, W); features: the input of
    the classifier, the last linear layer or convolution that ran and has num_outputs outputs; aux: `deep_supervision`,
    the further outputs of the same kind, and `other` (whatever else the network returns). One image of zeros is run
    through at construction (evaluation mode): it finds the classifier and the order of the depth groups, and shows at
    once whether the network suits the task.
    """

    def __init__(
        self, net: nn.Module, name: str, in_channels: int, num_outputs: int, image_size: tuple[int, int], task: str
    ) -> None:
        super().__init__()
        self.net = net
        self.name = PREFIX + name
        self.num_outputs = num_outputs
        self._main = -1 if name in _LAST_IS_MAIN else 0
        self._kept: list[Tensor] | None = None  # a list only during `forward`
        # Measured on a CPU: a tenth to a fifth faster with BatchNorm, no gain with the other normalisations.
        self._channels_last = any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
        order = self._try_out(in_channels, image_size, task)
        classifier = _classifier_name(net, order, num_outputs)
        self.classifier_prefixes: tuple[str, ...] = (f"net.{classifier}",) if classifier else ()
        self.groups: dict[str, tuple[str, ...]] = {"depth": tuple(f"net.{stage}" for stage in _stages(net, order))}
        if classifier:
            net.get_submodule(classifier).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._kept is not None:
            self._kept.append(inputs[0])

    def _try_out(self, in_channels: int, image_size: tuple[int, int], task: str) -> dict[str, int]:
        """Run one image of zeros; give the place of every layer in the order of execution."""
        order: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: order.update({name: len(order)}) if name not in order else None

        layers = [(name, layer) for name, layer in self.net.named_modules() if not any(True for _ in layer.children())]
        hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers]
        was_training = self.training
        try:
            with torch.no_grad():
                got = tuple(self.eval()(torch.zeros(1, in_channels, *image_size)).logits.shape)
        except _REFUSALS as error:
            size = "x".join(map(str, image_size))
            raise UserError(f"model.name {self.name}: cannot process a {size} image: {_short(error)}") from error
        finally:
            self.train(was_training)
            for hook in hooks:
                hook.remove()
        wanted = (1, self.num_outputs, *image_size) if task == "segmentation" else (1, self.num_outputs)
        if got != wanted:
            raise UserError(
                f"model.name {self.name}: {task} needs logits {wanted}, this network gives {got}; use another"
            )
        return order

    def forward(self, images: Tensor) -> Output:
        """Give the `Output` of images (B, in_channels, H, W)."""
        self._kept = []
        try:
            result = self.net(channels_last(images) if self._channels_last else images)
            features = self._kept[-1] if self._kept else None
        finally:
            self._kept = None  # or the graph of this step would outlive it
        if isinstance(result, Tensor):
            if result.ndim == images.ndim + 1:  # DynUNet stacks its side outputs on axis 1 in training mode
                return Output(result[:, 0], features, {"deep_supervision": list(result[:, 1:].unbind(1))})
            return Output(result, features)
        parts = list(result)
        logits = parts.pop(self._main)
        kind = (logits.ndim, logits.shape[:2])
        alike = [part for part in parts if isinstance(part, Tensor) and (part.ndim, part.shape[:2]) == kind]
        other = [part for part in parts if not any(part is side for side in alike)]
        aux = {key: value for key, value in (("deep_supervision", alike), ("other", other)) if value}
        return Output(logits, features, aux or None)


def _short(error: BaseException) -> str:
    """First line of an error message, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _classifier_name(net: nn.Module, order: Mapping[str, int], num_outputs: int) -> str:
    """Name of the last executed linear layer or convolution with `num_outputs` outputs; "" when there is none."""
    best = ""
    for name, layer in net.named_modules():
        if isinstance(layer, _CLASSIFIERS) and name in order:
            size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            if size == num_outputs and order[name] >= order.get(best, -1):
                best = name
    return best


def _stages(net: nn.Module, order: Mapping[str, int]) -> tuple[str, ...]:
    """Parts of the network that hold state, in the order in which they first run; together they cover every state entry
    once.
    """

    def first_run(stage: str) -> int:
        inside = [place for name, place in order.items() if name == stage or name.startswith(stage + ".")]
        return min(inside, default=len(order))

    own = [name for name in net.state_dict() if "." not in name]  # e.g. a class token held by the network itself
    return (*own, *sorted(_parts(net), key=first_run))


def _parts(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the children with state; plain containers are opened."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if not child.state_dict():
            continue
        if type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) or type(child).__name__ == "SkipConnection":
            yield from _parts(child, full + ".")
        else:
            yield full
