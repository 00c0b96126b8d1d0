"""Sample-targeted pruning: from a network and the calibration data of a sample to the sample's pruned weights."""

from spade_fast.pruning.auto_sparsity import AutoSparsity
from spade_fast.pruning.config import PruneConfig
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.solve import LayerReport
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace, trace_batch
from spade_fast.pruning.tuning import tune
from spade_fast.pruning.tuning_result import Trial, Tuning, load_sparsity

__all__ = [
    "AutoSparsity",
    "Decision",
    "LayerReport",
    "PruneConfig",
    "Trace",
    "Trial",
    "Tuning",
    "load_sparsity",
    "trace",
    "trace_batch",
    "tune",
]
