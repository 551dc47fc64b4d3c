"""Site files: what opens, what is read, and how wrong files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fedmed.data.site_file import SiteFile, read_truth
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

from .conftest import META, make_site

Broken = Callable[[Callable[[h5py.File], None]], Path]
