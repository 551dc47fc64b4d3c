"""What each entry of a model state is, decided once and alike at both ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmed.errors import UserError
from fedmed.federation.buffers import plan_of
from fedmed.federation.state import State, clone_state, copy_state

IsPersonal = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Entry:
    """One entry: kind is parameter, buffer (floating) or counter (integer); a personal entry never travels."""

    kind: str
    trainable: bool
    personal: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


class Layout:
    """The entries of a model in state-dict order, which of them travel, and the model's ordered groups.

    Exchanged are all entries that are neither personal nor frozen (a parameter without gradient when the layout is made);
    buffers of the model travel unless personal.
    """

    def __init__(self, entries: dict[str, Entry], groups: dict[str, tuple[str, ...]]) -> None:
        self.entries = entries
        self.exchanged = tuple(
            n for n, e in entries.items() if not e.personal and (e.trainable or e.kind != "parameter")
        )
        self.trainable = tuple(n for n, e in entries.items() if e.trainable and not e.personal)
        self.personal = tuple(n for n, e in entries.items() if e.personal)
        self._groups = groups

    @classmethod
    def of(cls, model: nn.Module, is_personal: IsPersonal) -> Layout:
        """Read a model. `is_personal(name, module)` gets the entry's full name and the module that owns it."""
        owners = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in model.named_modules(remove_duplicate=False)
            for part in (module.named_parameters, module.named_buffers)
            for name, _ in part(recurse=False, remove_duplicate=False)
        }
        parameters = dict(
            model.named_parameters(remove_duplicate=False)
        )  # a tied weight is a parameter under each of its names
        entries: dict[str, Entry] = {}
        for name, value in model.state_dict().items():
            parameter = parameters.get(name)
            if parameter is not None:
                kind = "parameter"
            else:
                kind = "buffer" if value.is_floating_point() else "counter"
            trainable = parameter is not None and parameter.requires_grad
            entries[name] = Entry(
                kind, trainable, bool(is_personal(name, owners[name])), tuple(value.shape), value.dtype
            )
        return cls(entries, dict(getattr(model, "groups", {})))

    def num_groups(self, kind: str) -> int:
        """Number of groups of a kind (`depth`, `modality`, `task`). Raises `UserError` if the model has none."""
        return len(self._prefixes(kind))

    def group_of(self, kind: str) -> dict[str, int]:
        """Group index of every entry, matched on whole dotted components. Raises `UserError` for an entry outside all groups."""
        prefixes = self._prefixes(kind)
        # The longest prefix wins, so that a nested stage can be told from its parent.
        by_length = sorted(enumerate(prefixes), key=lambda pair: -len(pair[1]))
        out: dict[str, int] = {}
        for name in self.entries:
            index = next((i for i, p in by_length if name == p or name.startswith(p + ".")), None)
            if index is None:
                raise UserError(
                    f"model entry {name!r} belongs to none of the {kind} groups {', '.join(prefixes)}; the model must name them all"
                )
            out[name] = index
        return out

    def _prefixes(self, kind: str) -> tuple[str, ...]:
        if not self._groups.get(kind):
            raise UserError(
                f"the method needs a model with ordered {kind!r} groups; this model names {sorted(self._groups) or 'none'}"
            )
        return self._groups[kind]

    def misfit(self, arrays: dict[str, Tensor] | State, optional: tuple[str, ...] = ()) -> str | None:
        """Why `arrays` is not an exchanged state of this layout (missing, unknown or misshapen entry), or None.

        `optional` are prefixes of announced groups that may be absent.
        """
        for name in self.exchanged:
            if name not in arrays:
                if any(name == p or name.startswith(p + ".") for p in optional):
                    continue
                return f"entry {name!r} is missing"
            if tuple(arrays[name].shape) != self.entries[name].shape:
                return f"entry {name!r}: expected shape {self.entries[name].shape}, got {tuple(arrays[name].shape)}"
            if arrays[name].dtype != self.entries[name].dtype:
                return f"entry {name!r}: expected {self.entries[name].dtype}, got {arrays[name].dtype}"
        unknown = sorted(set(arrays) - set(self.exchanged))
        return f"unexpected entry {unknown[0]!r}" if unknown else None

    def exchanged_state(self, model: nn.Module) -> State:
        """The exchanged entries of a model, by reference."""
        full = model.state_dict()
        return {name: full[name] for name in self.exchanged}


def hand_over(model: nn.Module, layout: Layout, *, keep: bool = False) -> State:
    """Give the exchanged entries of a model away as a state on the CPU that nothing else refers to.

    On the CPU nothing is copied: the model's own tensors leave, and the model goes on in other memory, whose content is undefined until a state
    is loaded into it (with `keep`: the same values). On another device the values are copied and the model keeps its own.
    """
    full = model.state_dict(keep_vars=True)
    entries = {name: full[name] for name in layout.exchanged}
    if any(value.device.type != "cpu" for value in entries.values()):
        return clone_state(entries)
    blank = plan_of(entries).blank()
    if keep:
        copy_state(entries, blank)
    given = {name: value.detach() for name, value in entries.items()}
    for name, value in entries.items():
        value.data = blank[name]
    return given
