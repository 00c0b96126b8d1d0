"""Drop-in replacements of the published SPADE solver classes.

:class:`TrueOBS`, :class:`SparseGPT` and :class:`SparseGPTSuperFast` have the constructor arguments, methods,
attributes and return shapes of the published classes, quirks included, and run on the native ops. Either import
them instead, or let :func:`accelerate` swap them inside modules that already imported the published ones::

    import spade_fast.compat
    spade_fast.compat.accelerate(notebook_module)

The package's own API (:func:`spade_fast.trace`) has none of the quirks.
"""

from spade_fast.compat.sparsegpt_solvers import SparseGPT, SparseGPTSuperFast
from spade_fast.compat.swap import accelerate
from spade_fast.compat.trueobs import TrueOBS

__all__ = ["SparseGPT", "SparseGPTSuperFast", "TrueOBS", "accelerate"]
