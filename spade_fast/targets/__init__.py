"""Targets: what is explained. A class, or a function of a network's output that returns one number per sample."""

from spade_fast.targets.answers import answering
from spade_fast.targets.classification import class_against, class_score, log_probability
from spade_fast.targets.questions import box, neuron, pixels, similarity, token
from spade_fast.targets.target import Target

__all__ = [
    "Target",
    "answering",
    "box",
    "class_against",
    "class_score",
    "log_probability",
    "neuron",
    "pixels",
    "similarity",
    "token",
]
