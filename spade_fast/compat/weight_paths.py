"""`Traces`, the attribute `TrueOBS.Traces`: every weight vector along the pruning paths, computed on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from spade_fast.compat.problem import ObsProblem


class Traces(Sequence[Tensor]):
    """Weights of all rows after 0, 1, 2, … removals, in chunks of rows.

    Item i is the chunk of rows ``i * parallel`` to ``(i + 1) * parallel - 1``: a Tensor
    ``[removals + 1, parallel, C]`` on the CPU; the last chunk can have fewer rows. No weights are stored: each access
    replays the removals. The last entry of a chunk is all zeros.

    Parameters
    ----------
    problem : ObsProblem
        Rows and Hessians.
    order : Tensor ``[R, C / block]``
        Block indices in order of removal.
    block : int
        Columns per block.
    parallel : int
        Rows per chunk.
    natural : callable
        Reorders the last dimension of a tensor from solver order to the caller's order.
    """

    def __init__(
        self, problem: ObsProblem, order: Tensor, block: int, parallel: int, natural: Callable[[Tensor], Tensor]
    ) -> None:
        self._problem = problem
        self._order = order
        self._block = block
        self._parallel = parallel
        self._natural = natural

    def __len__(self) -> int:
        return -(-self._problem.rows // self._parallel)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        rows = range(self._problem.rows)[position * self._parallel : (position + 1) * self._parallel]
        paths = [self._problem.replay(row, self._order[row], self._block) for row in rows]
        return self._natural(torch.stack(paths, 1)).cpu()
