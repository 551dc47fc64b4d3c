"""One torch thread everywhere: the tests compare bits, and several threads on small tensors only get into each other's way."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
