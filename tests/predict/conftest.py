"""A tiny trained run on grey phantoms, copies of it with another model.json, and a stand-in for the network whose answer is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.config import from_tree
from fedmed.engines import run
from fedmed.engines.loading import TrainedModel
from fedmed.predict.command import Request, predict

SEGMENTATION: dict[str, Any] = {
    "data.path": "phantom:segmentation",
    "data.phantom": {"num_sites": 2, "images_per_site": 12, "image_size": 32, "channels": 1},
    "model.name": "unet",
    "model.args": {"base_width": 4},
    "model.activation": "sigmoid",
}
CLASSIFICATION: dict[str, Any] = {
    "data.path": "phantom:classification",
    "data.phantom": {"num_sites": 2, "images_per_site": 24, "image_size": 16},
    "model.args": {"widths": [4, 4]},
}
COMMON: dict[str, Any] = {
    "optimizer.lr": 0.01, "training.batch_size": 8, "federation.rounds": 1, "evaluation.central": "none", "engine.device": "cpu",
}  # fmt: skip


class Runs:
    """Trains runs and keeps their folders."""

    classification = CLASSIFICATION

    def __init__(self, root: Path) -> None:
        self.root, self._count = root, 0

    def new(self) -> Path:
        """A path in the folder that is not used yet."""
        self._count += 1
        return self.root / f"made{self._count}"

    def config(self, base: dict[str, Any], **changes: Any) -> Any:
        """A configuration of dotted keys; `a__b=1` sets a.b."""
        flat = {**COMMON, **base, **{key.replace("__", "."): value for key, value in changes.items()}}
        flat = {"data.cache_dir": str(self.root / "cache"), "out": str(self.new()), **flat}
        tree: dict[str, Any] = {}
        for key, value in flat.items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return from_tree(tree)

    def train(self, base: dict[str, Any] = SEGMENTATION, **changes: Any) -> Path:
        """Run and give the folder."""
        config = self.config(base, **changes)
        run(config)
        return Path(config.out)

    def like(self, folder: Path, **facts: Any) -> Path:
        """A copy of a run folder whose model.json says something else."""
        copy = self.new()
        shutil.copytree(folder, copy)
        path = copy / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
        return copy


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A place for runs."""
    return Runs(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="session")
def grey_run(runs: Runs) -> Path:
    """Segmentation of grey images of 32 x 32, one foreground class."""
    return runs.train()


@pytest.fixture(scope="session")
def class_run(runs: Runs) -> Path:
    """Classification of colour images of 16 x 16."""
    return runs.train(CLASSIFICATION)


@pytest.fixture
def threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network answers with its first channel: the mask is the image above half of its range."""

    def answer(self: TrainedModel, images: Any, batch_size: int = 64, modality_present: Any = None) -> Any:
        stack = images[..., None] if images.ndim == 3 else images
        assert stack.shape[1:3] == tuple(self.facts["image_size"]) and stack.dtype == np.uint8
        return (stack[..., 0] / np.float32(255))[:, None].astype(np.float32)

    monkeypatch.setattr(TrainedModel, "predict", answer)


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Predict: `go(run, *inputs, **request)` gives the folder and all that was said."""

    def call(folder: Path, *inputs: Path, **request: Any) -> tuple[Path, str]:
        said: list[str] = []
        out = predict(
            Request(str(folder), [str(one) for one in inputs], **{"out": str(tmp_path / "out"), **request}),
            said.append,
            said.append,
        )
        return out, "\n".join(said)

    return call


@pytest.fixture
def write_dicom() -> Callable[..., Path]:
    """Function (path, pixels (H, W) uint16, **elements) -> path: a CT slice with all that a segmentation of it needs."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def write(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        values = {
            "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(), "StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": "1.2.3.2",
            "FrameOfReferenceUID": "1.2.3.3", "PositionReferenceIndicator": "", "Modality": "CT", "PatientID": "pat-17",
            "PatientName": "Doe^Jane", "PatientBirthDate": "19500102", "PatientSex": "F", "AccessionNumber": "A-99", "StudyID": "S-1",
            "StudyDate": "20200304", "StudyTime": "101112", "ReferringPhysicianName": "House^G", "Rows": pixels.shape[0],
            "Columns": pixels.shape[1], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
            "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "PixelSpacing": [0.5, 0.25], "SliceThickness": 2.5,
        }  # fmt: skip
        for name, value in {**values, **elements}.items():
            if value is not None:
                setattr(data, name, value)
        data.PixelData = pixels.tobytes()
        data["PixelData"].VR = "OW"
        data.save_as(path, enforce_file_format=True)
        return path

    return write
