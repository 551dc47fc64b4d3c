"""How many valid answers a phase needs."""

from __future__ import annotations

from collections.abc import Callable

from fedmed.errors import QuorumLost, UserError


class Quorum:
    """Counts valid answers of one phase and says whether they are enough: at least `share` of those asked, and at least one."""

    def __init__(self, phase: str, round_number: int, asked: int, share: float, resume_hint: Callable[[], str]) -> None:
        self._phase, self._round, self._asked = phase, round_number, asked
        self.needed = max(
            1, -(-round(share * asked * 1e9) // 10**9)
        )  # ceil, safe against 0.1 * 30 = 3.0000000000000004
        self.valid = 0
        self.failures: list[str] = []
        self._resume_hint = resume_hint

    def check(self) -> None:
        """Raise `QuorumLost` if too few answers were valid, `UserError` if all sites refuse for one and the same fault of the user's."""
        if self.valid < self.needed:
            reasons = {failure.partition(": ")[2] for failure in self.failures}
            if (
                len(reasons) == 1
                and len(self.failures) == self._asked
                and (reason := reasons.pop()).startswith("UserError: ")
            ):
                raise UserError(
                    f"{reason.removeprefix('UserError: ')} (all {self._asked} sites answered this in round {self._round}, {self._phase})"
                )
            failures = "; ".join(self.failures[:5]) or "no site was online"
            raise QuorumLost(
                f"round {self._round}, {self._phase}: {self.valid} valid answers of {self._asked} asked, {self.needed} needed ({failures}). "
                f"{self._resume_hint()}"
            )
