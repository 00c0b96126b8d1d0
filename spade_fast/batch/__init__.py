"""Batches: every sample of a folder, list or dataset traced, on one machine or several, nothing lost.

>>> from spade_fast.batch import run                          # doctest: +SKIP
>>> run("photos", "traces", solver="sparsegpt")               # doctest: +SKIP
"""

from spade_fast._util.errors import OutputError
from spade_fast.batch.driver import Summary, run
from spade_fast.batch.index import write_index
from spade_fast.batch.results import Results

__all__ = ["OutputError", "Results", "Summary", "run", "write_index"]
