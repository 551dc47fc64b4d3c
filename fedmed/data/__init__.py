"""Site files and what reads them: lazy HDF5 sites, compact splits, batched augmentation, embedded synthetic sites.

Names are imported when first used, so `import fedmed.data` stays free of torch and h5py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.data.augment import Augment
    from fedmed.data.loader import batches, num_batches
    from fedmed.data.phantom import PHANTOM_KINDS, make_phantom
    from fedmed.data.site_file import SiteData, SiteFile, SiteInfo, read_truth
    from fedmed.data.site_writer import SiteRows, SiteWriter
    from fedmed.data.split import Batch, Split, make_decoder
    from fedmed.data.writer import SiteArrays, write_site_file

_HOME = {
    "Augment": "augment",
    "Batch": "split",
    "PHANTOM_KINDS": "phantom",
    "SiteArrays": "writer",
    "SiteData": "site_file",
    "SiteFile": "site_file",
    "SiteInfo": "site_file",
    "SiteRows": "site_writer",
    "SiteWriter": "site_writer",
    "Split": "split",
    "batches": "loader",
    "make_decoder": "split",
    "make_phantom": "phantom",
    "num_batches": "loader",
    "read_truth": "site_file",
    "write_site_file": "writer",
}
__all__ = [
    "PHANTOM_KINDS",
    "Augment",
    "Batch",
    "SiteArrays",
    "SiteData",
    "SiteFile",
    "SiteInfo",
    "SiteRows",
    "SiteWriter",
    "Split",
    "batches",
    "make_decoder",
    "make_phantom",
    "num_batches",
    "read_truth",
    "write_site_file",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name in _HOME:
        return getattr(importlib.import_module(f"fedmed.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fedmed.data' has no attribute {name!r}")
