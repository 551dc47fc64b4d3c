"""Networks, what they return, and how they are built."""

from fedmed.models.build import build_model
from fedmed.models.heads import num_outputs, probabilities, resolve_activation
from fedmed.models.output import Output

__all__ = ["Output", "build_model", "num_outputs", "probabilities", "resolve_activation"]
