"""FedMed: federated learning for medical imaging on imperfect data, on top of Flower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedmed.version import __version__

if TYPE_CHECKING:  # a plain `import fedmed` stays free of torch
    from fedmed.engines.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `fedmed.load` when it is first used (it needs torch)."""
    if name == "load":
        from fedmed.engines.loading import load

        return load
    raise AttributeError(f"module 'fedmed' has no attribute {name!r}")
