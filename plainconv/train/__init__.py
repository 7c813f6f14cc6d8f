"""The experiment of the idea: a small CNN on handwritten digits, plainconv's layer and torch's side by side."""

from plainconv.train.data import DATASETS, Data, Recipe, load
from plainconv.train.loop import Point, fit, race, steps
from plainconv.train.net import LAYERS, Net, layers

__all__ = ["DATASETS", "LAYERS", "Data", "Net", "Point", "Recipe", "fit", "layers", "load", "race", "steps"]
