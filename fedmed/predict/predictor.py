"""One source through the model: planes prepared, predicted in batches, and brought back to the shape of the source.

Letters: n planes of a source, H W their height and width, K classes with a probability, F foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedmed.engines.loading import TrainedModel
from fedmed.metrics.segmentation import label_map

Show = Callable[[int, np.ndarray, np.ndarray], None]  # place, plane as prepared, label map (H, W) or probabilities (K,)


@dataclass(frozen=True)
class Predictor:
    """A trained model with the preparation of its images (found by `fedmed.registry.PREPARE`)."""

    model: TrainedModel
    preparation: Any
    batch_size: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, of segmentation with the background."""
        return self.model.classes

    @property
    def has_background(self) -> bool:
        """True where the first of the probabilities of a pixel is that of the background."""
        return self.model.activation == "softmax"

    def probabilities(self, planes: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Place, plane and probabilities of every plane in order: (K, h, w), or (K,) of the whole image. Raises `BadFile`."""
        for start in range(0, planes.count, self.batch_size):
            places = range(start, min(start + self.batch_size, planes.count))
            stored = [planes.read(place) for place in places]
            stack = np.stack([self.preparation.fitted(plane) for plane in stored])
            found = self.model.predict(stack, self.batch_size, self._present(planes, places))
            yield from zip(places, stored, found, strict=True)

    def masks(self, planes: Any, show: Show | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Label map (H, W) uint8 and foreground probabilities (F, H, W) float32 of every plane, at the source's shape."""
        for place, plane, prob in self.probabilities(planes):
            large = self.preparation.to_source(prob, planes.shape, self.has_background)
            labels = label_map(torch.from_numpy(large)[None], self.model.activation)[0].numpy().astype(np.uint8)
            if show is not None:
                show(place, plane, labels)
            yield labels, large[1:] if self.has_background else large

    def scores(self, planes: Any, show: Show | None = None) -> np.ndarray:
        """Probabilities of every plane as a whole, (n, K) float32."""
        found = []
        for place, plane, prob in self.probabilities(planes):
            if show is not None:
                show(place, plane, prob)
            found.append(prob)
        return np.stack(found)

    def said(self, prob: np.ndarray) -> str:
        """What probabilities (K,) say: the class, of multi-label tasks all above 0.5, joined by |."""
        if self.model.task == "classification":
            return self.classes[int(prob.argmax())]
        return "|".join(name for name, value in zip(self.classes, prob, strict=True) if value > 0.5)

    def _present(self, planes: Any, places: range) -> np.ndarray | None:
        if planes.present is None:
            return None
        flags = planes.present
        return np.stack([flags] * len(places)) if flags.ndim == 1 else flags[places.start : places.stop]
