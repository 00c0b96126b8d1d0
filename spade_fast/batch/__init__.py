"""Batches: every sample of a folder, list or dataset traced, on one machine or several, nothing lost.

>>> from spade_fast.batch import BatchSettings, run                          # doctest: +SKIP
>>> run("photos", "traces", BatchSettings(model="demo", solver="sparsegpt"))   # doctest: +SKIP
"""

from spade_fast.batch.driver import Summary, run
from spade_fast.batch.index import write_index
from spade_fast.batch.job import BatchSettings
from spade_fast.batch.results import OutputError, Results

__all__ = ["BatchSettings", "OutputError", "Results", "Summary", "run", "write_index"]
