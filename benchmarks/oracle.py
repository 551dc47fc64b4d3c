"""FedNoRo that is told who is noisy: what would be gained if its identification made no mistake. A measuring device, no method."""

from __future__ import annotations

from dataclasses import replace

from fedmed.data.site_file import read_truth
from fedmed.engines.prepare import site_file
from fedmed.federation.messages import Answer
from strategies.noise_robust import FedNoRo


class TrueRoles(FedNoRo):
    """Identifies as FedNoRo does, notes it, and then takes the roles from the record of the corruption (simulations only)."""

    def on_query(self, round: int, name: str, answers: list[Answer]) -> None:
        """Replace the roles by the true ones."""
        super().on_query(round, name, answers)
        truth = read_truth(site_file(self.config))
        self.state = replace(
            self.state, roles={s: "noisy" if truth[s]["is_noisy"] else "clean" for s in self.state.roles}
        )
