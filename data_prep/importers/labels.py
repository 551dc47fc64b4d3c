"""Labels of images from a table: finding an image's row, and class ids from names, joined names or 0/1 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.importers.folders import stem
from data_prep.importers.tables import Table, is_absent, read_table
from fedmed.errors import UserError

MOST_CLASSES = 200  # more are rather names or ids than classes
NO_ROW = "no row in the label table"
NO_LABEL = "no label in the label table, or rows that disagree"
_ONES = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}


class ImageTable:
    """A table with a row per image. An image is looked up by its path from the source, then by its name, each with and without ending."""

    def __init__(self, path: Path, image_column: str, images: Sequence[str]) -> None:
        """images: paths of all images; a name that several of them have stands for none of them."""
        self.table: Table = read_table(path, "label table")
        self._rows: dict[str, list[int]] = {}
        for number, cell in enumerate(self.table.column(image_column)):
            name = cell.replace("\\", "/").removeprefix("./")
            if name:
                self._rows.setdefault(name, []).append(number)
        self._names = Counter(stem(path) for path in images)

    def rows(self, path: str) -> list[int]:
        """Rows of an image, [] where there is none."""
        name = path.rpartition("/")[2]
        whole = path[: len(path) - len(name)] + stem(name)
        keys = [path, whole] + ([name, stem(name)] if self._names[stem(name)] == 1 else [])
        return next((self._rows[key] for key in keys if key in self._rows), [])

    def cell(self, path: str, column: str) -> str:
        """What a column says of an image; "" where it has no row, says nothing, or its rows disagree."""
        place = self.table.index(column)
        found = {self.table.rows[row][place] for row in self.rows(path)}
        value = next(iter(found)) if len(found) == 1 else ""
        return "" if is_absent(value) else value


@dataclass(frozen=True)
class Labelled:
    """Task, classes, and for each image its label (an id, or (L,) 0/1 uint8) or the reason why it has none."""

    task: str
    classes: tuple[str, ...]
    labels: Mapping[str, int | np.ndarray | str]


def from_column(
    table: ImageTable,
    images: Sequence[str],
    column: str,
    task: str,
    classes: Sequence[str] | None,
    joint: str,
    nothing: str,
) -> Labelled:
    """Labels from one column of names. task: classification, multilabel or auto (multilabel where a cell has the sign `joint`).

    nothing: in a multi-label table, the name that stands for no class. Raises UserError where the column gives no classes.
    """
    cells = {image: (table.cell(image, column) if table.rows(image) else None) for image in images}
    said = [cell for cell in cells.values() if cell]
    if not said:
        raise UserError(
            f"{table.table.path}: column {column!r} has a label for none of the {len(images)} images. Does the column of images fit?"
        )
    if task == "auto":
        task = "multilabel" if any(joint in cell for cell in said) else "classification"
    split = {cell: [word.strip() for word in cell.split(joint)] if task == "multilabel" else [cell] for cell in said}
    found = {
        word for words in split.values() for word in words if word and not (task == "multilabel" and word == nothing)
    }
    names = check_classes(tuple(classes) if classes else in_order(found))
    ids = {name: number for number, name in enumerate(names)}

    def label(cell: str | None) -> int | np.ndarray | str:
        if not cell:
            return NO_ROW if cell is None else NO_LABEL
        words = [word for word in split[cell] if word and word != nothing] if task == "multilabel" else [cell]
        if any(word not in ids for word in words):
            return "label that is none of the classes"
        if task == "classification":
            return ids[cell]
        vector = np.zeros(len(names), dtype=np.uint8)
        vector[[ids[word] for word in words]] = 1
        return vector

    return Labelled(task, names, {image: label(cell) for image, cell in cells.items()})


def from_columns(
    table: ImageTable, images: Sequence[str], columns: Sequence[str], task: str, classes: Sequence[str] | None
) -> Labelled:
    """Labels from a 0/1 column per class. task auto: classification where every row has a single 1, else multilabel."""
    names = check_classes(tuple(classes or columns))
    if len(names) != len(columns):
        raise UserError(f"classes names {len(names)} classes, label_columns {len(columns)} columns; give as many")
    places = [table.table.index(column) for column in columns]
    found: dict[str, np.ndarray | str] = {}
    for image in images:
        rows = {tuple(table.table.rows[row][place] for place in places) for row in table.rows(image)}
        values = [_ONES.get(cell.casefold(), -1) for cell in next(iter(rows))] if len(rows) == 1 else []
        if not rows:
            found[image] = NO_ROW
        elif not values or min(values) < 0:
            found[image] = "label that is neither 0 nor 1" if values else "rows in the label table that disagree"
        else:
            found[image] = np.array(values, dtype=np.uint8)
    vectors = [vector for vector in found.values() if not isinstance(vector, str)]
    if task == "auto":
        task = "classification" if vectors and all(vector.sum() == 1 for vector in vectors) else "multilabel"
    if task == "multilabel":
        return Labelled(task, names, found)
    return Labelled(task, names, {image: _only(vector) for image, vector in found.items()})


def _only(vector: np.ndarray | str) -> int | str:
    if isinstance(vector, str):
        return vector
    return int(vector.argmax()) if vector.sum() == 1 else "not exactly one class"


def from_folders(folders: Mapping[str, str], classes: Sequence[str] | None) -> Labelled:
    """Labels from the name of the folder each image lies in ("": in none)."""
    names = check_classes(tuple(classes) if classes else in_order({name for name in folders.values() if name}))
    ids = {name: number for number, name in enumerate(names)}
    return Labelled(
        "classification", names, {image: ids.get(name, "in no folder of a class") for image, name in folders.items()}
    )


def in_order(names: set[str]) -> tuple[str, ...]:
    """Names sorted, as numbers where they all are numbers."""
    if names and all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def check_classes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Give `names` back. Raises UserError where there is none, one stands there twice, or there are too many to be meant as classes."""
    if not names:
        raise UserError("no class was found; give classes=a,b,c")
    if len(set(names)) != len(names):
        raise UserError("classes: a name stands there twice")
    if len(names) > MOST_CLASSES:
        raise UserError(
            f"{len(names)} different labels were found, at most {MOST_CLASSES} are taken as classes. Is it the right column?"
        )
    return names
