"""Batches: every sample of a folder, list or dataset traced, on one machine or several, nothing lost.

>>> from spade_fast.cluster import BatchSettings, run                          # doctest: +SKIP
>>> run("photos", "traces", BatchSettings(model="demo", solver="sparsegpt"))   # doctest: +SKIP
"""

from spade_fast.cluster.index import write_index
from spade_fast.cluster.job import BatchSettings
from spade_fast.cluster.results import OutputError, Results
from spade_fast.cluster.run import Summary, run

__all__ = ["BatchSettings", "OutputError", "Results", "Summary", "run", "write_index"]
