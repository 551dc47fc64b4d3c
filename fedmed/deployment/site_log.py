"""Lines for people among the output of a site's processes: marked, so that the supervisor passes them on to the console."""

from __future__ import annotations

import logging
import time

MARK = "site: "  # begins every such line
CONNECTED = "connected to the coordinator"
LOST = "no connection to the coordinator, Flower tries again"
BACK = "connected to the coordinator again"


def marked(text: str, level: str = "INFO") -> str:
    """A line with mark and time; the level is named unless it is INFO."""
    return f"{MARK}{time.strftime('%Y-%m-%d %H:%M:%S')} {'' if level == 'INFO' else f'{level}: '}{text}"


class MarkedFormatter(logging.Formatter):
    """Marks the first line of a record; what follows (a traceback) stays in the log."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return marked(super().format(record), record.levelname)
