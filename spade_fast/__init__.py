"""SPADE and layer-wise OBS on fast native ops: explain a prediction with a network pruned for that sample alone.

>>> import torch, spade_fast
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> trace = spade_fast.trace(model, torch.randn(64, 8), sparsity=0.5)
>>> with trace.applied(model):
...     logits = model(torch.randn(1, 8))  # or any attribution method
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_fast import compat, ops, targets
from spade_fast._util.errors import (
    AssumptionWarning,
    ClusterError,
    DeadFeatureError,
    DecisionWarning,
    FallbackError,
    FallbackWarning,
    InputError,
    InvalidTypeError,
    InvalidValueError,
    MemoryLimitError,
    MissingExtraError,
    MissingFileError,
    NotPositiveDefiniteError,
    OutputError,
    TraceAppliedError,
    UnknownLayerError,
    UnknownSampleError,
    UserError,
    WorkerError,
)
from spade_fast._util.ranges import emit_nvtx_if_asked_for
from spade_fast.attribution import Feature, Visualization, prepare_for_attribution, visualize
from spade_fast.inputs import ImageAugmenter, NoiseAugmenter, TokenAugmenter, load_model
from spade_fast.pruning import (
    AutoSparsity,
    Decision,
    LayerReport,
    PruneConfig,
    Trace,
    Tuning,
    load_sparsity,
    trace,
    trace_batch,
    tune,
)

if TYPE_CHECKING:
    from spade_fast.attribution import Spade

__version__ = "0.1.0"
__all__ = [
    "AssumptionWarning",
    "AutoSparsity",
    "ClusterError",
    "DeadFeatureError",
    "Decision",
    "DecisionWarning",
    "FallbackError",
    "FallbackWarning",
    "Feature",
    "ImageAugmenter",
    "InputError",
    "InvalidTypeError",
    "InvalidValueError",
    "LayerReport",
    "MemoryLimitError",
    "MissingExtraError",
    "MissingFileError",
    "NoiseAugmenter",
    "NotPositiveDefiniteError",
    "OutputError",
    "PruneConfig",
    "Spade",
    "TokenAugmenter",
    "Trace",
    "TraceAppliedError",
    "Tuning",
    "UnknownLayerError",
    "UnknownSampleError",
    "UserError",
    "Visualization",
    "WorkerError",
    "compat",
    "load_model",
    "load_sparsity",
    "ops",
    "prepare_for_attribution",
    "targets",
    "trace",
    "trace_batch",
    "tune",
    "visualize",
]

emit_nvtx_if_asked_for()


def __getattr__(name: str) -> Any:
    if name == "Spade":  # needs captum, an extra
        from spade_fast.attribution import Spade

        return Spade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
