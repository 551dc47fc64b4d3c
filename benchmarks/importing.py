"""How close the import of pictures comes to decoding alone.

    python benchmarks/importing.py                    10000 pairs of PNG, 256 x 256 pixels, one worker per CPU
    python benchmarks/importing.py --pairs 1000       a quick look

Makes pairs of a grey image and a binary mask, then compares two things: decoding all of them with the same library in the same number of threads,
results dropped, and `fedmed data import images` from the scan to the finished file. The cache is warm: the pictures were just written, so both find
them in the memory of the operating system, which also takes the file; what a disk adds to reading, it adds to both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import Stopwatch, Times, machine, require, show_ratio, show_times, spread
from PIL import Image

from data_prep.importers.reading import default_workers
from data_prep.importers.run import import_data
from fedmed.data.formats.pictures import read_levels, read_picture

SIDE = 256
_DISTINCT = 50  # pictures that are drawn; more pairs are copies, since drawing takes longer than decoding


def make_pairs(folder: Path, pairs: int) -> None:
    """Write images/ and masks/: smooth structure with sensor noise, which packs about as a radiograph does, and an ellipse."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    for name in ("images", "masks"):
        (folder / name).mkdir()
    packed = []
    for _ in range(min(pairs, _DISTINCT)):
        phase, speed = rng.uniform(0, 6, 4), rng.uniform(2, 9, 4)
        smooth = sum(np.sin(speed[i] * (rows if i % 2 else columns) * 6 + phase[i]) for i in range(4))
        grey = np.clip(128 + 25 * smooth + rng.normal(0, 3, (SIDE, SIDE)), 0, 255).astype(np.uint8)
        centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3, 2)
        mask = ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 < 1
        packed.append((_png(grey), _png(mask.astype(np.uint8) * 255)))
    for number in range(pairs):
        for name, content in zip(("images", "masks"), packed[number % len(packed)], strict=True):
            (folder / name / f"{number:06d}.png").write_bytes(content)


def _png(array: np.ndarray) -> bytes:
    with tempfile.TemporaryFile() as stream:
        Image.fromarray(array).save(stream, "PNG")
        stream.seek(0)
        return stream.read()


def decode_all(folder: Path, workers: int) -> Callable[[], None]:
    """A function that decodes every pair and drops it."""
    images, masks = (sorted((folder / name).iterdir()) for name in ("images", "masks"))

    def one(number: int) -> None:
        read_picture(images[number])
        read_levels(masks[number])

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(one, range(len(images)), chunksize=1):
                pass

    return run


def import_all(folder: Path, out: Path, workers: int) -> Callable[[], None]:
    """A function that imports the folder."""

    def run() -> None:
        import_data(
            "images", str(folder), str(out), [], size=None, split="70/10/20", seed=0, secret=str(out.with_suffix(".key")), trace=None,
            compression=0, workers=workers, site="bench", force=True, say=lambda _: None, note=lambda _: None, quiet=True,
        )  # fmt: skip

    return run


def same_pixels(folder: Path, out: Path) -> bool:
    """Whether the file holds the pixels of the pictures, in the order of their names."""
    import h5py

    with h5py.File(out, "r") as file:
        paths = sorted((folder / "images").iterdir())
        return len(file["image"]) == len(paths) and all(
            np.array_equal(file["image"][row], read_picture(path))
            and np.array_equal(file["mask"][row], read_levels(folder / "masks" / path.name) // 255)
            for row, path in enumerate(paths)
        )


def measure(cases: dict[str, Callable[[], None]], out: Path, repetitions: int) -> dict[str, Times]:
    """Run the cases in turn after one untimed turn; the file is removed between them, since giving its memory back takes time of its own."""
    times = {name: Times() for name in cases}
    for turn in range(repetitions + 1):
        for name in cases if turn % 2 else reversed(cases):
            out.unlink(missing_ok=True)
            os.sync()  # what the turn before left to be written
            watch = Stopwatch()
            cases[name]()
            watch.stop(times[name] if turn else Times())
    return times


def main() -> None:
    """Check that the import is right, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where the pictures and the file are made (a disk, a memory file system, ...)")
    parser.add_argument("--tiny", action="store_true", help="stop after the equality check, of 30 pairs")
    options = parser.parse_args()
    pairs = 30 if options.tiny else options.pairs
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, out = Path(name) / "pictures", Path(name) / "bench.h5"
        folder.mkdir()
        make_pairs(folder, pairs)
        print(f"{machine()}; {pairs} pairs, {options.workers} worker(s), files in the system's cache")
        importing = import_all(folder, out, options.workers)
        importing()
        require(same_pixels(folder, out), f"all {pairs} images and masks of the file are those of the pictures")
        if options.tiny:
            return
        times = measure({"decode": decode_all(folder, options.workers), "import": importing}, out, options.repetitions)
        show_times(times)
        for label, taken in times.items():
            print(f"{label}: {spread([pairs / wall for wall in taken.wall])} images/s")
        show_ratio("speed of the import as a share of decoding alone", times["decode"], times["import"], ">= 0.8")


if __name__ == "__main__":
    main()
