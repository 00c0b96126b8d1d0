"""SPADE and layer-wise OBS, fast: explain one decision of a network on a network pruned for that one sample.

>>> import spade_fast                                            # doctest: +SKIP
>>> trace = spade_fast.trace(model, batches, sparsity=0.5)       # doctest: +SKIP
>>> with trace.applied(model):                                   # doctest: +SKIP
...     ...  # any saliency method
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_fast import ops
from spade_fast.pipeline import FallbackError, FallbackWarning, trace, trace_batch
from spade_fast.stages import emit_nvtx_if_asked_for
from spade_fast.trace import Trace
from spade_fast.tune import tune
from spade_fast.tuning import Tuning, load_sparsity

if TYPE_CHECKING:
    from spade_fast.attribution import Spade
    from spade_fast.augment import ImageAugmenter
    from spade_fast.prepare import prepare_for_attribution

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

_LAZY = {
    "ImageAugmenter": "spade_fast.augment",
    "Spade": "spade_fast.attribution",
    "prepare_for_attribution": "spade_fast.prepare",
}


emit_nvtx_if_asked_for()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'spade_fast' has no attribute {name!r}")
