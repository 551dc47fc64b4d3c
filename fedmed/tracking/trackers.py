"""Outside trackers: Weights & Biases and TensorBoard. Both are off by default and imported only when on."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.tracking.callbacks import Callback, Record, round_scalars

_log = logging.getLogger("fedmed.tracking")

# Summary entries worth a number in a tracker's overview.
_HEADLINES = ("mean", "worst", "spread")


def _headlines(summary: Mapping[str, Any]) -> dict[str, float]:
    metric = summary.get("main_metric")
    found = {f"{metric}/{name}": summary.get(name) for name in _HEADLINES}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}


class WandbTracker(Callback):
    """Send each round's scalars to Weights & Biases; its files go into the run folder.

    The mode is that of the environment (`WANDB_MODE`), else `mode`, by default "offline": nothing is sent anywhere.
    Whatever goes wrong in the tracker is logged once, and the run goes on without it.
    """

    def __init__(
        self, run_dir: Path, project: str = "fedmed", mode: str = "offline", config: Mapping[str, Any] | None = None
    ) -> None:
        self._run_dir = Path(run_dir)
        self._project = project
        self._mode: Any = os.environ.get("WANDB_MODE") or mode or "offline"
        self._config = dict(config or {})
        self._session: Any = None

    def _safely(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # wandb may also end with SystemExit; no tracker fault may end a run
            _log.warning("wandb is off for this run: %s failed (%s: %s)", what, type(error).__name__, error)
            self._session = None
            return None

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Open a wandb run named like the run folder; a resumed run opens a new one in the same group."""

        def start() -> Any:
            """Import wandb and open the run."""
            import wandb

            return wandb.init(
                project=self._project,
                dir=str(self._run_dir),
                mode=self._mode,
                name=self._run_dir.name,
                group=str(info["name"]),
                config=self._config,
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )

        self._session = self._safely("start", start)

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        """Log the scalars of the round under the round's number."""
        if self._session is not None:
            self._safely(
                "log", lambda: self._session.log({**round_scalars(records), "seconds": elapsed}, step=round_number)
            )

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Store the headline numbers and finish."""
        if self._session is not None:
            self._safely("summary", lambda: self._session.summary.update(_headlines(summary)))
        self.close()

    def close(self) -> None:
        """Finish the wandb run; calling it twice does no harm."""
        session, self._session = self._session, None
        if session is not None:
            self._safely("finish", session.finish)


class TensorboardTracker(Callback):
    """Write each round's scalars as TensorBoard events into `<run folder>/tensorboard`.

    Raises `UserError` at construction, before anything has been trained, when the package tensorboard is missing.
    """

    def __init__(self, run_dir: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "tracking.tensorboard.enabled=true needs the package tensorboard, which is not installed; "
                "run `pip install tensorboard` or leave the setting out"
            )
        self._folder = Path(run_dir) / "tensorboard"
        self._writer: Any = None

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Open the event file; events of rounds that a resumed run does again are hidden (purge_step)."""
        from torch.utils.tensorboard import SummaryWriter

        first = int(info.get("start_round") or 1)
        self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=first if first > 1 else None)

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        """Write the scalars of the round."""
        if self._writer is None:
            return
        for key, value in {**round_scalars(records), "seconds": elapsed}.items():
            self._writer.add_scalar(key, value, global_step=round_number)
        self._writer.flush()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the headline numbers and close."""
        if self._writer is not None:
            for key, value in _headlines(summary).items():
                self._writer.add_scalar(f"final/{key}", value, global_step=int(summary.get("rounds", 0)))
        self.close()

    def close(self) -> None:
        """Close the event file; calling it twice does no harm."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
