"""Reading batches of a site: mapped from its file, from memory, and unpacked from a compressed file, against a flat NumPy memory map.

    python benchmarks/site_reading.py            4096 slices of 256 x 256 bytes in a temporary folder, one shuffled epoch, batches of 16
    python benchmarks/site_reading.py --tiny     a few small slices, equality check only

All but the flat file go the way of training: `Split.raw`, which gathers images, labels and positions. Limit: the copying of the same
bytes, 16 slices at a time and in order, from memory into one buffer. The files lie in the file cache of the system when they are timed;
from a disk, mapped and flat files alike wait for it. Of the compressed file only the first batches are read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch

from fedmed.data.site_file import SiteFile
from fedmed.data.site_writer import SiteWriter
from fedmed.data.split import Split

BATCH = 16
PACKED_BATCHES = 16  # timed of the compressed file


def make_slices(count: int, size: int) -> np.ndarray:
    """Slices (count, size, size) uint8: a smooth field of their own each, with some noise, as scans have."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 16, (size, size), dtype=np.uint8)
    axis = np.arange(size) / size
    slices = np.empty((count, size, size), np.uint8)
    for out, (down, right, phase) in zip(slices, rng.uniform(1, 9, (count, 3)), strict=True):
        out[...] = 120 + 60 * np.sin(down * axis + phase)[:, None] * np.cos(right * axis)
        out += np.roll(noise, int(100 * phase))
    return slices


def write_site(path: Path, slices: np.ndarray, compression: int) -> Path:
    """A site of these slices, all for training, with labels."""
    size = slices.shape[1]
    meta = {"task": "classification", "classes": ["a", "b"], "channels": ["grey"], "image_size": [size, size]}
    with SiteWriter(path, meta, compression) as writer:
        site = writer.site("site", len(slices))
        for number, image in enumerate(slices):
            site.append({"image": image}, str(number), str(number), {"label": number % 2})
        site.finish({"train": range(len(slices))})
    return path


def read_site(path: Path, load: str) -> Split:
    """The training split of the site."""
    with SiteFile.open(path) as file:
        return file.site("site", load=load).split("train")


class Readers:
    """The ways to read, each a function from positions (B,) int64 to images (B, 1, size, size)."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.slices = make_slices(count, size)
        flat = folder / "slices.bin"
        self.slices.tofile(flat)
        self.flat = np.memmap(flat, np.uint8, "r", shape=self.slices.shape)
        plain, packed = (write_site(folder / f"{level}.h5", self.slices, level) for level in (0, 1))
        self.splits = {
            "mapped": read_site(plain, "map"), "in memory": read_site(plain, "memory"), "compressed": read_site(packed, "map"),
        }  # fmt: skip
        self.order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        self.order_numpy = self.order.numpy()
        self.buffer = np.empty((BATCH, size, size), np.uint8)

    def memmap_epoch(self) -> None:
        """Fancy indexing of the flat file."""
        for start in range(0, len(self.order_numpy), BATCH):
            self.flat[self.order_numpy[start : start + BATCH]]

    def epoch(self, name: str, batches: int | None = None) -> Callable[[], None]:
        """The batches of an epoch of a site, or the first few."""
        split, count = self.splits[name], len(self.order) if batches is None else batches * BATCH

        def run() -> None:
            for start in range(0, count, BATCH):
                split.raw(self.order[start : start + BATCH])

        return run

    def copy_epoch(self) -> None:
        """The limit: every byte once from memory to memory, in order."""
        for start in range(0, len(self.slices), BATCH):
            np.copyto(self.buffer, self.slices[start : start + BATCH])

    def check(self) -> None:
        """All ways must give the same batches."""
        for start in range(0, min(len(self.order), 64 * BATCH), BATCH):
            positions = self.order[start : start + BATCH]
            expected = self.flat[positions.numpy()]
            for name, split in self.splits.items():
                images, labels, rows = split.raw(positions)
                same = np.array_equal(images[:, 0].numpy(), expected) and torch.equal(labels, positions % 2)
                if not (same and torch.equal(rows, positions)):
                    common.require(False, f"batches {name} = flat memory map, from position {start}")
        common.require(True, f"batches {', '.join(self.splits)} = flat memory map")


def measure(tiny: bool, repetitions: int) -> None:
    """Check, then time one epoch of every way in turns."""
    count, size = (64, 32) if tiny else (4096, 256)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        readers = Readers(Path(folder), count, size)
        readers.check()
        if tiny:
            return
        cases = {
            "memory map": readers.memmap_epoch, "mapped": readers.epoch("mapped"), "in memory": readers.epoch("in memory"),
            "compressed": readers.epoch("compressed", PACKED_BATCHES), "copy": readers.copy_epoch,
        }  # fmt: skip
        times = common.interleave(cases, repetitions, warmups=1)
    print(common.machine())
    images = {name: PACKED_BATCHES * BATCH if name == "compressed" else count for name in cases}
    print(f"{'':12}{'images/s':>10}{'GB/s':>8}    medians by wall time")
    for name, taken in times.items():
        speed = images[name] / statistics.median(taken.wall)
        print(f"{name:12}{speed:10.0f}{speed * size * size / 1e9:8.2f}")
    flat = times["memory map"]
    common.show_ratio("images/s mapped / memory map", flat, times["mapped"], ">= 0.5")
    common.show_ratio("images/s in memory / memory map", flat, times["in memory"], "none")
    common.show_ratio("images/s mapped / copy (limit)", times["copy"], times["mapped"], "none")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small input, equality check only")
    parser.add_argument("--repetitions", type=int, default=15, help="timed turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(arguments.tiny, arguments.repetitions)


if __name__ == "__main__":
    main()
