"""Captions of a trace: what it was made for, how much it removes, and what it records of the decision."""

from __future__ import annotations

from spade_fast._util.text import counted
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.traces import Trace
from spade_fast.targets.class_names import class_label


def removed(trace: Trace) -> str:
    """Say how much of its layers a trace removes."""
    return f"{trace.sparsity:.1%} removed in {counted(len(trace.layers), 'layer')}"


def decision(trace: Trace, network: LoadedModel) -> list[str]:
    """Say which class a trace was made to keep, and with which probability, in two lines; none if that is unknown."""
    found = trace.decision
    if found is None:
        return []
    before, after = found.probability_before, found.probability_after_of_class_before
    label = class_label(found.class_before, network.class_name(found.class_before))
    return [label, f"probability {before:.1%} → {after:.1%}{', kept' if found.kept else ''}"]


def lost(trace: Trace, network: LoadedModel) -> list[str]:
    """Say, in one line, to which class a trace lost the decision; none if it kept it or that is unknown."""
    if trace.decision is None or trace.decision.kept:
        return []
    after = trace.decision.class_after
    return [f"lost the decision to {class_label(after, network.class_name(after))}"]
