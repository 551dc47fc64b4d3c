"""Pictures and volumes as the import made them, for a trained model, and predictions brought back. `prepare` reads how from a run.

Letters: H W height and width of a source's planes, h w those the model reads, C channels, K classes with a probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.importers.dicom import DicomParams
from data_prep.importers.fit import fit_image, frame_shape
from data_prep.importers.nifti import NiftiParams
from data_prep.importers.presets import _pixels
from data_prep.importers.presets.brats import NAMES, BratsParams
from data_prep.importers.presets.brats import scale as scale_inside
from data_prep.importers.scaling import as_they_are, grey_of, scaled
from data_prep.resize import resize_images
from fedmed.data.formats.dicom import Series
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.nifti import Nifti
from fedmed.data.formats.pictures import read_picture

Size = tuple[int, int]


@dataclass(frozen=True)
class Planes:
    """The planes of one source before they are fitted to the model. The source is held as long as this is.

    count: planes; shape (H, W); read(i): plane i, (H, W) or (H, W, C), scaled as in a site file; axis: of a volume across which its planes lie;
    present: 0/1, which channels there are, (C,) or of every plane (count, C); None: all.
    """

    count: int
    shape: Size
    read: Callable[[int], np.ndarray]
    axis: int = 0
    present: np.ndarray | None = None


@dataclass(frozen=True)
class Preparation:
    """The way of the import for one source, and back.

    channels: that the model reads; size: (height, width) the import gave all images; model_size: (h, w), smaller where the run had
    data.resize; fit, filter, colour: as the importers' arguments ("bytes", "luma": as presets read colour and grey); nifti, dicom, brats:
    arguments by which volumes are scaled; made_of: kind of sources the model was trained on, "" where it is not known.
    """

    channels: int
    size: Size
    model_size: Size
    fit: str = "stretch"
    filter: str = "bilinear"
    colour: str = "auto"
    nifti_params: NiftiParams = field(default_factory=NiftiParams)
    dicom_params: DicomParams = field(default_factory=DicomParams)
    brats_params: BratsParams | None = None
    made_of: str = ""

    @property
    def contrasts(self) -> tuple[tuple[str, ...], ...]:
        """Endings of the names of the files that make a case, one tuple of alternatives per channel; () where one file has all channels."""
        if self.brats_params is not None:
            return tuple(NAMES[channel] for channel in self.brats_params.channels)
        return tuple((ending,) for ending in self.nifti_params.contrasts)

    @property
    def takes_missing(self) -> bool:
        """True where a case may lack a contrast (zeros take its place)."""
        return self.brats_params is not None and self.brats_params.missing == "zeros"

    def picture(self, path: Path) -> Planes:
        """The one plane of a picture. Raises `BadFile`, also for colour where the model reads grey."""
        if self.colour in ("bytes", "luma"):
            image = (_pixels.colour if self.colour == "bytes" else _pixels.grey)(path)
        else:
            image = read_picture(path)
        image = self._in_colour(image)
        return Planes(1, image.shape[:2], lambda _: image)

    def volume(self, files: Sequence[Path | None]) -> tuple[Planes, Nifti]:
        """Slices of a volume, or of the contrasts of a case (None: missing), and the volume in whose geometry a mask lies. Raises `BadFile`."""
        volumes = [None if path is None else Nifti.open(path) for path in files]
        found = [volume for volume in volumes if volume is not None]
        for other in found[1:]:
            if other.shape[:3] != found[0].shape[:3]:
                raise BadFile("two contrasts of a case differ in shape")
            if self.nifti_params.same_space and not np.allclose(
                found[0].affine, other.affine, rtol=1e-3, atol=0.05, equal_nan=True
            ):
                raise BadFile("two contrasts of a case lie differently in space")
        count = sum(1 if volume is None else volume.channels for volume in volumes)
        if count != self.channels:
            raise BadFile(f"a volume of {count} channels, the model reads {self.channels}")
        dtype = "uint8" if self.brats_params is not None else self.nifti_params.dtype
        image = np.zeros((*found[0].shape[:3], count), dtype=dtype)
        place = 0
        for volume in volumes:
            values = None if volume is None else volume.volume()
            for part in [None] if values is None else [values] if values.ndim == 3 else np.moveaxis(values, -1, 0):
                if part is not None:
                    image[..., place] = self._scaled(part)
                place += 1
        axis = 2 if self.brats_params is not None else self.nifti_params.axis
        height, width = (side for number, side in enumerate(image.shape[:3]) if number != axis)
        present = np.array([volume is not None for volume in volumes], np.uint8) if None in volumes else None
        return Planes(
            image.shape[axis], (height, width), lambda i: _flat(np.take(image, i, axis=axis)), axis, present
        ), found[0]

    def series(self, series: Series) -> Planes:
        """Slices of a DICOM series, read when asked for; `read` raises `BadFile`."""
        params = self.dicom_params
        window = params.limits()

        def read(number: int) -> np.ndarray:
            values = series.read(number, None if window == "none" else window)
            plane = as_they_are(values, params.dtype) if window == "none" else scaled(values, 0.0, 255.0, params.dtype)
            return self._in_colour(plane)

        return Planes(len(series), series.size, read)

    def rows(self, images: Any, rows: np.ndarray, present: np.ndarray | None = None) -> Planes:
        """Images of a site file: `images` (N, H, W) or (N, H, W, C) read by place, those at `rows` (n,); present (N, C): 0/1."""
        flags = None if present is None else present[rows]
        return Planes(len(rows), tuple(images.shape[1:3]), lambda i: images[int(rows[i])], present=flags)

    def fitted(self, plane: np.ndarray) -> np.ndarray:
        """A plane (H, W) or (H, W, C) as the model reads it, (h, w) or (h, w, C) of the same type: the import's size, then area means."""
        image = fit_image(plane, self.size, self.fit, self.filter)
        return image if self.size == self.model_size else resize_images(image[None], self.model_size[0])[0]

    def to_source(self, prob: np.ndarray, shape: Size, background: bool = False) -> np.ndarray:
        """Probabilities (K, h, w) float32 at the shape (H, W) of the plane they were made of: (K, H, W), bilinear.

        Outside of what `crop` left, all are 0; background: the first is of the background, and 1 there.
        """
        framed = frame_shape(shape, self.size, self.fit)
        large = np.stack([fit_image(np.ascontiguousarray(one, np.float32), framed) for one in prob])
        if framed == tuple(shape):
            return large
        top, left = (abs(new - old) // 2 for new, old in zip(framed, shape, strict=True))
        if self.fit == "pad":
            return large[:, top : top + shape[0], left : left + shape[1]]
        out = np.zeros((len(large), *shape), dtype=np.float32)
        out[: 1 if background else 0] = 1.0
        out[:, top : top + framed[0], left : left + framed[1]] = large
        return out

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Intensities of one contrast (X, Y, Z), as the importer scales them."""
        if self.brats_params is not None:
            return scale_inside(values, self.brats_params.low, self.brats_params.high)
        return self.nifti_params.scaled(values)

    def _in_colour(self, image: np.ndarray) -> np.ndarray:
        """A picture with the channels of the model: grey is repeated, equal colours become grey. Raises `BadFile` for anything else."""
        if self.channels not in (1, 3):
            raise BadFile(f"a single picture, the model reads {self.channels} channels")
        if self.channels == 3:
            return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        grey = grey_of(image, mixed=self.colour == "grey")
        if grey is None:
            raise BadFile("in colour, the model reads grey images")
        return grey


def _flat(plane: np.ndarray) -> np.ndarray:
    """(H, W, 1) as (H, W)."""
    return np.ascontiguousarray(plane[..., 0] if plane.shape[-1] == 1 else plane)
