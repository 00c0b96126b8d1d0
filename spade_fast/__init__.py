"""SPADE and layer-wise OBS, fast: explain one decision of a network on a network pruned for that one sample.

>>> import spade_fast                                            # doctest: +SKIP
>>> trace = spade_fast.trace(model, batches, sparsity=0.5)       # doctest: +SKIP
>>> with trace.applied(model):                                   # doctest: +SKIP
...     ...  # any saliency method
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_fast import ops
from spade_fast._util.ranges import emit_nvtx_if_asked_for
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import FallbackError, FallbackWarning, trace, trace_batch
from spade_fast.pruning.tuning import tune
from spade_fast.pruning.tuning_result import Tuning, load_sparsity

if TYPE_CHECKING:
    from spade_fast.attribution.spade import Spade

__version__ = "0.1.0"
__all__ = [
    "FallbackError",
    "FallbackWarning",
    "ImageAugmenter",
    "Spade",
    "Trace",
    "Tuning",
    "load_sparsity",
    "ops",
    "prepare_for_attribution",
    "trace",
    "trace_batch",
    "tune",
]

emit_nvtx_if_asked_for()


def __getattr__(name: str) -> Any:
    if name == "Spade":  # needs captum, an extra
        from spade_fast.attribution.spade import Spade

        return Spade
    raise AttributeError(f"module 'spade_fast' has no attribute {name!r}")
