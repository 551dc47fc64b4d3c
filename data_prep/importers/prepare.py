"""How a run's training images were prepared, read from its model.json, as something that prepares others in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.importers.dicom import DicomParams
from data_prep.importers.fit import FILTERS, HOW
from data_prep.importers.nifti import NiftiParams
from data_prep.importers.planes import Preparation, Size
from data_prep.importers.presets.brats import BratsParams
from fedmed.config import params_from
from fedmed.errors import UserError

COLOUR_FORMATS = ("ham10000", "isic", "chase", "lgg")
PICTURE_FORMATS = ("images", "medmnist", "chestxray14", *COLOUR_FORMATS)
KINDS = {"nifti": "volume", "brats": "volume", "dicom": "series", **dict.fromkeys(PICTURE_FORMATS, "picture")}


def make_preparation(
    facts: Mapping[str, Any], size: Size | None = None, fit: str | None = None, window: Size | None = None
) -> Preparation:
    """The preparation of a run's images, from its model.json.

    facts: `channels`, `image_size`, and `preprocessing`, `stored_size` where they are known; size, fit, window (centre, width): what the
    user asks for instead. Raises UserError for what does not go together.
    """
    made = facts.get("preprocessing")
    made = made if isinstance(made, dict) else {}
    format, arguments = str(made.get("format", "")), made.get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {}
    model_size = _size(facts["image_size"])
    known = made.get("size") or facts.get("stored_size") or model_size
    fit = fit or str(arguments.get("fit", "stretch"))
    if fit not in HOW:
        raise UserError(f"--fit: expected {', '.join(HOW)}, got {fit!r}")
    filter = str(arguments.get("filter", "bilinear"))
    nifti = _params(NiftiParams, arguments if format == "nifti" else {})
    dicom = _params(DicomParams, arguments if format == "dicom" else {})
    brats = _params(BratsParams, arguments) if format == "brats" else None
    if window is not None:
        if not window[1] >= 1:
            raise UserError(
                f"--window: expected centre,width with a width of at least 1, got {window[0]:g},{window[1]:g}"
            )
        nifti = dataclasses.replace(nifti, scale="window", window=window)
        dicom = dataclasses.replace(dicom, window=f"{window[0]},{window[1]}")
        brats = None
    return Preparation(
        channels=len(facts["channels"]),
        size=_chosen_size(size, _size(known), model_size),
        model_size=model_size,
        fit=fit,
        filter=filter if filter in FILTERS else "bilinear",
        colour=_colour(format, arguments),
        nifti_params=nifti,
        dicom_params=dicom,
        brats_params=brats,
        made_of=KINDS.get(format, ""),
    )


def _colour(format: str, arguments: Mapping[str, Any]) -> str:
    """How pictures of a format come to grey or colour."""
    if format in COLOUR_FORMATS:
        return "bytes"
    return "luma" if format == "chestxray14" else str(arguments.get("colour", "auto"))


def _params(cls: type[Any], arguments: Mapping[str, Any]) -> Any:
    """Arguments of an importer as it was called; those that a later version dropped are left out."""
    names = {one.name for one in dataclasses.fields(cls)}
    kept = {name: value for name, value in arguments.items() if name in names}
    return params_from(cls, kept, "preprocessing of the run's site file")


def _size(sides: Sequence[int]) -> Size:
    return int(sides[0]), int(sides[1])


def _chosen_size(asked: Size | None, known: Size, model: Size) -> Size:
    """The size images get before they are made smaller by area means, as data.resize does: squares, never larger."""
    size = asked or known
    shrinks = model[0] == model[1] and min(size) >= model[0]
    if size == model or shrinks:
        return size
    if asked is None:  # the file says what cannot have been: straight to the model's size
        return model
    raise UserError(
        f"--size {size[0]}x{size[1]}: the model reads {model[0]}x{model[1]}; give that size, or for a square one a larger size"
    )
