"""Listeners of a run: progress on the terminal, Weights & Biases, TensorBoard. Importing this package imports none of
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedmed.tracking.callbacks import Callback, round_scalars

if TYPE_CHECKING:
    from fedmed.config import Config

__all__ = ["Callback", "build_callbacks", "round_scalars"]


def build_callbacks(config: Config, run_dir: str | Path, quiet: bool = False) -> list[Callback]:
    """Give the callbacks a configuration asks for: progress unless `quiet`, then the trackers that are on.

    Raises `UserError` when TensorBoard is asked for and not installed.
    """
    from fedmed.config import to_tree
    from fedmed.tracking.progress import ProgressBar
    from fedmed.tracking.trackers import TensorboardTracker, WandbTracker

    callbacks: list[Callback] = [] if quiet else [ProgressBar()]
    wandb, tensorboard = config.tracking.wandb, config.tracking.tensorboard
    if wandb.enabled:
        callbacks.append(WandbTracker(Path(run_dir), wandb.project, wandb.mode, to_tree(config)))
    if tensorboard.enabled:
        callbacks.append(TensorboardTracker(Path(run_dir)))
    return callbacks
