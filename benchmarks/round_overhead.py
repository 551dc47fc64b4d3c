"""What FedMed adds to the training itself: a FedAvg round of the local engine against a bare PyTorch loop, and an empty round.

    python benchmarks/round_overhead.py           10 clients x 200 images of 28x28 pixels, batch 20, a CNN of 0.58 million parameters
    python benchmarks/round_overhead.py --tiny    a small case, equality check only

Engine and loop take turns round by round inside one run, from the same initial model on the same batches with the same optimiser, so their
models must be equal bit for bit; that is checked before anything is timed, and once more at the end. The loop does nothing but load, train
and average. Nothing is evaluated and no checkpoint is written in the timed rounds. The empty round is a round whose clients do
not train: what remains is sending, loading, copying the reply, checking it for NaN and averaging, at 7.8 million parameters.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from clients_for_benchmarks import Idle  # noqa: F401  (named in the configuration)
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmed.config import Config, from_tree
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.engines import run
from fedmed.federation.seeding import torch_rng
from fedmed.federation.site import make_model

CLASSES = 10
