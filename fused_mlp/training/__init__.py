"""A whole training step in one call."""

from .train_step import TrainStep

__all__ = ["TrainStep"]
