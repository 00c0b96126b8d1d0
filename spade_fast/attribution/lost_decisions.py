"""Warns of traces that answer otherwise than the dense network, where its answer is what is explained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from spade_fast._util.errors import DecisionWarning
from spade_fast._util.text import listed
from spade_fast.pruning.traces import Trace


def has_answers(target: Any) -> bool:
    """Whether a method's target for one sample is a class, or a function that tells what the answers are."""
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    return not callable(target) or getattr(target, "answers", None) is not None


def warn_of_lost_decisions(lost: Sequence[Trace], traces: Sequence[Trace]) -> None:
    """Warn, at the caller of `Spade.attribute`, of some of its traces."""
    if not lost:
        return
    levels = len({made.auto.keep for made in traces if made.auto}) > 1
    names = [f"{made.sample_id!r}{f' with keep={made.auto.keep:g}' if levels and made.auto else ''}" for made in lost]
    warnings.warn(
        f"{len(lost)} of {len(traces)} traces lost the decision ({listed(names, 5)}): they predict another class, or "
        "give another answer, than the dense network, so that the result does not explain its prediction; less pruning "
        "(a larger keep or a lower sparsity) often preserves it, but not always",
        DecisionWarning,
        stacklevel=4,
    )
