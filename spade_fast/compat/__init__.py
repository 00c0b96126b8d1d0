"""Drop-in replacements for the published SPADE solver classes.

:class:`TrueOBS`, :class:`SparseGPT` and :class:`SparseGPTSuperFast` have the constructor arguments, methods,
attributes and return shapes of the published classes, including their quirks, and run on the native ops. Either import
them in place of the published classes, or let :func:`accelerate` replace those in modules that already imported them::

    import spade_fast.compat
    spade_fast.compat.accelerate(notebook_module)

The package's own API (:func:`spade_fast.trace`) has none of the quirks.
"""

from spade_fast.compat.sparsegpt_solvers import SparseGPT, SparseGPTSuperFast
from spade_fast.compat.swap import accelerate
from spade_fast.compat.trueobs import TrueOBS

__all__ = ["SparseGPT", "SparseGPTSuperFast", "TrueOBS", "accelerate"]
