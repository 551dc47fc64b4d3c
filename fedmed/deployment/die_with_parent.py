"""Run as a script (`python die_with_parent.py PARENT COMMAND...`): become COMMAND, which the kernel kills when process PARENT ends.

Standard library only, since it runs in front of every child. Linux keeps the promise, whatever way the parent ends; other systems have no
such switch, and there a child outlives a parent that was killed with SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # option of prctl(2)
NOT_STARTED = 127  # exit code of a shell for a command it cannot find


def main(parent: int, command: list[str]) -> int:
    """Replace this process by the command; gives an exit code only when that fails."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the switch was set
            return NOT_STARTED
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"ERROR: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
    return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
