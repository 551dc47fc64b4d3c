"""For all tests: one torch thread, since they compare bits and several threads on small tensors only get into each other's way, and Ctrl-C as
usual, since a shell starts what runs in the background with SIGINT ignored, and what the tests start would inherit that."""

from __future__ import annotations

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
signal.signal(signal.SIGINT, signal.default_int_handler)
