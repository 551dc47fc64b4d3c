"""Every site alone (`federation.local_only`): the client of the experiment, of which nothing travels.

The third view of a personalised method beside global and personal. All entries are personal, so weights, statistics and moments go on
from what the site kept; seeds, data order and schedule are those of the federated run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fedmed.errors import FedMedError, UserError
from fedmed.federation.client import Client
from fedmed.federation.state import State, first_non_finite
from fedmed.models.output import Output


class LocalOnly(Client):
    """What `alone` puts before a client class. Raises `UserError` where the client asks for the model a server would have sent."""

    views: ClassVar[tuple[str, ...]] = ("personal",)

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        """True: every entry stays, at both ends."""
        return True

    @property
    def received(self) -> State:
        """Empty; asking for an entry raises."""
        return _Nothing(self._refusal())

    @received.setter
    def received(self, arrays: State) -> None:
        """Nothing comes with a message."""

    def _refusal(self) -> UserError:
        return UserError(
            f"client {self.config.client.name!r} works with the model the server sends, and with federation.local_only=true there is none; "
            "choose one that needs none, such as client.name=supervised client.args=null"
        )

    def load_view(self, view: str) -> None:
        """Load what the site keeps. Raises `UserError` for the global view."""
        if view == "global":
            raise self._refusal()
        super().load_view(view)

    def teacher(self, images: Tensor, extras: Mapping[str, Tensor] | None = None) -> Output:
        """Raises `UserError`: there is no received model to learn from."""
        raise self._refusal()

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Metrics only. Raises `FedMedError` for a model that diverged: the server sees none, and the site must not keep it."""
        _, metrics = super().end_round()
        broken = first_non_finite(self.model.state_dict())
        if broken:
            raise FedMedError(f"entry {broken!r} holds NaN or infinite values (the local training diverged)")
        return {}, metrics


class _Nothing(dict[str, Tensor]):
    """A state without entries that says why."""

    def __init__(self, refusal: UserError) -> None:
        super().__init__()
        self._refusal = refusal

    def __missing__(self, name: str) -> Tensor:
        raise self._refusal


def alone(cls: type[Client]) -> type[Client]:
    """The class that trains as `cls` does and keeps all of it at the site."""
    made: type[Client] = type(cls.__name__, (LocalOnly, cls), {})
    return made
