"""The experiment of the idea: a small CNN on handwritten digits, plainconv's layer and torch's side by side."""

from plainconv.train.data import DATASETS, Data, Recipe, load
from plainconv.train.loop import Point, fit, race, steps
from plainconv.train.net import DROPOUT, LAYERS, Net, layers
from plainconv.train.processes import Team, joined, local_device

__all__ = [
    "DATASETS",
    "DROPOUT",
    "LAYERS",
    "Data",
    "Net",
    "Point",
    "Recipe",
    "Team",
    "fit",
    "joined",
    "layers",
    "load",
    "local_device",
    "race",
    "steps",
]
