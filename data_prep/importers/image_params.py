"""Arguments of the format `images`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from data_prep.importers.fit import Fit, choose
from data_prep.importers.folders import check_pattern
from data_prep.importers.levels import check_values

IMAGES, MASKS = "images", "masks"
FOLDER = "folder"
TASKS = ("auto", "segmentation", "classification", "multilabel")


@dataclass(frozen=True)
class ImagesParams(Fit):
    """Where images, annotation, patients and sites are found, and what the values mean."""

    images: str = IMAGES  # folder's name or pattern (*/photo/*.png); all pictures where no folder is called images
    masks: str = MASKS  # the same of the masks; "." for beside the images (with mask_suffix)
    mask_suffix: str = ""  # what the name of a mask has in addition, such as _mask
    scribbles: str | None = None  # folder or pattern of scribbles; pixels that hold no class are not drawn
    labels: str | None = None  # CSV with a row per image, or "folder": the name of its folder is the class
    image_column: str = "image"  # column of the image's path or name, with or without ending
    label_column: str = "label"  # column of the class, or of classes joined by label_sign
    label_columns: tuple[str, ...] = ()  # instead: 0/1 columns, one per class
    label_sign: str = "|"  # joins classes; a table that has it is multi-label
    label_none: str = "No Finding"  # in a multi-label table, stands for no class
    task: str = "auto"  # segmentation, classification or multilabel; auto: what masks or table show
    classes: tuple[str, ...] = ()  # names in the order of ids, segmentation: background first; else as found, sorted
    mask_values: dict[str, int] | None = None  # {level: class id, ...}; null: 0/1 or 0/255, or the ids themselves
    mask_threshold: int | None = None  # foreground is above this level, 0..65534, for masks with soft edges
    scribble_values: dict[str, int] | None = None  # {level: class id, ...}, others not drawn; null: the ids themselves
    group: str | None = None  # patient: column, or pattern with one (...) for the path; null: each image its own
    site: str | None = None  # several sites: column, or level of the folder (1: below the source); null: one site
    split_column: str | None = None  # column that says train, val or test; null: folders of these names
    colour: str = "auto"  # "grey" or "rgb" for all; auto: grey if the first pictures are

    PRIVATE: ClassVar[tuple[str, ...]] = (
        "images", "masks", "mask_suffix", "scribbles", "labels", "image_column", "label_column", "label_columns", "label_none", "group", "site",
        "split_column",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        choose("task", self.task, TASKS)
        choose("colour", self.colour, ("auto", "grey", "rgb"))
        check_values("mask_values", self.mask_values)
        check_values("scribble_values", self.scribble_values)
        if self.mask_threshold is not None and not 0 <= self.mask_threshold <= 65534:
            raise ValueError(f"mask_threshold: expected 0..65534, got {self.mask_threshold}")
        if len(self.classes) > 254:
            raise ValueError(f"classes: at most 254, got {len(self.classes)}")
        if self.group is not None and "(" in self.group:
            check_pattern("group", self.group)
