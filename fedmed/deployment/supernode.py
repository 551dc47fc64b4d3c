"""Run as a module by `fedmed site start`: `flower-supernode`, which says how its connection is and ends once it has given it up.

On its own it would stay, connected to nobody: the thread that serves its API keeps the process alive.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from fedmed.deployment.site_log import BACK, CONNECTED, LOST, marked
from fedmed.engines.flower_tasks import mend_supernode

GAVE_UP = 3  # exit code


class Listener(logging.Handler):
    """Turns what Flower logs about its connection into lines for people, one for each change."""

    def __init__(self) -> None:
        super().__init__()
        self._lost = False

    def emit(self, record: logging.LogRecord) -> None:
        """Hear a record of Flower's."""
        text = record.getMessage()
        if text.startswith("SuperNode ID:"):
            self._change(False, CONNECTED)
        elif text.startswith("Connection successful") and self._lost:
            self._change(False, BACK)
        elif text.startswith("Connection attempt failed") and not self._lost:
            self._change(True, LOST)

    def _change(self, lost: bool, text: str) -> None:
        self._lost = lost
        print(marked(text), flush=True)


def main() -> None:
    """Be `flower-supernode` with the arguments of this process; does not return."""
    from flwr.supernode.cli import flower_supernode

    os.umask(0o077)
    mend_supernode()
    logging.getLogger("flwr").addHandler(Listener())
    try:
        flower_supernode()
        print(marked("the connection was given up", "ERROR"), flush=True)
    except SystemExit:  # Flower's own ways out have stopped that thread
        raise
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(GAVE_UP)


if __name__ == "__main__":
    main()
