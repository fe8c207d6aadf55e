"""Stick-breaking attention: one operator, interchangeable backends, one reference. See README.md."""

from . import tuning as tuning  # asked for configs
from .api import stickbreaking_attention, stickbreaking_attention_varlen
from .dispatch import BackendError, use_backend

__version__ = "0.1.0"
__all__ = ["BackendError", "stickbreaking_attention", "stickbreaking_attention_varlen", "use_backend"]
