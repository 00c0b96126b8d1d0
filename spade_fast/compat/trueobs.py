"""The published class `TrueOBS`: exact greedy OBS of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spade_fast import ops
from spade_fast.compat.collect import LayerMatrix
from spade_fast.compat.problem import ObsProblem, invert
from spade_fast.compat.structured import structured_path
from spade_fast.compat.weight_paths import Traces


@dataclass(frozen=True)
class _Path:
    problem: ObsProblem
    order: Tensor  # [R, removals]
    losses: Tensor  # [R, removals]
    block: int
    natural: Callable[[Tensor], Tensor]

    def weights(self, counts: list[Tensor]) -> list[Tensor]:
        if not counts:
            return []
        return list(self.natural(self.problem.solution(self.order, torch.stack(counts), self.block)))


class TrueOBS:
    """Exact OBS solver of one layer (OBC, Frantar, Singh, Alistarh, NeurIPS 2022, arXiv 2208.11580).

    In shapes, R and C stand for `rows` and `columns`, and G for the groups of a grouped convolution.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d, nn.Conv2d or transformers' Conv1D
    log_file : path, optional
        Text file to which a line is added at the start and for every Hessian that is damped.
    always_damp : float
        This fraction of the Hessian's mean diagonal is added to its diagonal before solving.

    Attributes
    ----------
    H : Tensor ``[C, C]``, float64
        Running mean of ``2 x xᵀ``; columns ordered (in-channel, kh, kw). ``[G, C, C]`` for a grouped convolution, whose
        groups are solved one by one. It can be read and replaced.
    nsamples : int
        Number of images seen (first dimension of the inputs).
    rows, columns : int
        Shape of the weight matrix.
    Losses : Tensor ``[R, removals + 1]``
        Half the score of each removal, after :meth:`prepare_unstr` or :meth:`prepare_blocked`; column 0 is 0.
    Traces : sequence of Tensor ``[removals + 1, parallel, C]``
        Weights along the path of each chunk of rows, replayed on access.
    resolvemat : Tensor ``[C, R]``, float64
        Sum of ``x yᵀ`` over the batches added with ``resolve=True``. ``[G, C, R / G]`` for a grouped convolution.
    mask : Tensor or None
        See :meth:`set_mask`.

    Notes
    -----
    As in the published class, columns whose inputs were all zero lose their weights; if the float32 Hessian has no
    Cholesky factor, ``H + I`` is tried once; weights that are already zero are removed first, at no loss. The
    ``prune_*`` methods return weight matrices without changing the layer; `nmprune` and `resolve` write to the layer.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.compat import TrueOBS
    >>> solver = TrueOBS(torch.nn.Linear(8, 4))
    >>> solver.add_batch(torch.randn(64, 8), None)
    >>> solver.prepare_unstr()
    >>> half, most = solver.prune_unstr([0.5, 0.75])
    >>> int((half == 0).sum()), int((most == 0).sum())
    (16, 24)
    """

    def __init__(self, layer: nn.Module, log_file: str | None = None, always_damp: float = 0) -> None:
        self.layer = layer
        self.log_file = log_file
        self.always_damp = always_damp
        self._matrix = LayerMatrix(layer)
        self.dev = self._matrix.weight.device
        self.rows, self.columns = self._matrix.rows, self._matrix.columns
        if self._matrix.is_convolution:
            self.kernel_size = self._matrix.taps
        groups = (self._matrix.groups,) if self._matrix.groups > 1 else ()
        self.H: Tensor | None = torch.zeros(*groups, self.columns, self.columns, dtype=torch.float64, device=self.dev)
        self.nsamples = 0
        self.mask: Tensor | None = None
        self.resolvemat: Tensor | None = None
        self.Losses: Tensor | None = None
        self.Traces: Sequence[Tensor] | None = None
        self._path: _Path | None = None
        self._log(f"collecting the Hessian of the {self._matrix} (rows={self.rows}, columns={self.columns})")

    def set_mask(self, mask: Tensor | None) -> None:
        """Choose which input vectors to use, such as the attention mask of a linear layer's tokens; None for all.

        `mask` has one element per input vector of the batches that follow. Convolutions ignore it.
        """
        self.mask = mask

    def add_batch(self, inp: Tensor, out: Tensor | None, resolve: bool = False) -> None:
        """Add a batch to the Hessian.

        Parameters
        ----------
        inp : Tensor
            Input of the layer; its first dimension is the number of samples.
        out : Tensor or None
            Output of the layer; used only with `resolve`.
        resolve : bool
            Whether to add to `resolvemat` as well.

        Raises
        ------
        TypeError, ValueError
            The inputs (or outputs) have the wrong dtype or shape, are empty, or have NaN or infinite values.
        RuntimeError
            :meth:`free` was called.
        """
        hessian = self._hessian()
        product = None
        if resolve:
            if out is None:
                raise ValueError("add_batch(resolve=True) needs the layer's output, got None")
            product = self._matrix.outer(inp, out, self._keep()).double()
        self._matrix.accumulate(hessian, inp, self.nsamples, inp.shape[0], self._keep())
        self.nsamples += inp.shape[0]
        if product is not None:
            product = product if self._matrix.groups > 1 else product[0]
            self.resolvemat = product if self.resolvemat is None else self.resolvemat + product

    def resolve(self) -> None:
        """Write the least-squares weights for the collected inputs and outputs to the layer.

        Raises
        ------
        RuntimeError
            No batch was added with ``resolve=True``.
        torch.linalg.LinAlgError
            The Hessian is singular even with damping.
        """
        if self.resolvemat is None:
            raise RuntimeError("resolve() needs batches added with add_batch(inp, out, resolve=True)")
        groups = self._matrix.groups
        half = self.nsamples / 2
        hessian = self._stacked_hessian() * half
        hessian.diagonal(dim1=1, dim2=2).masked_fill_(hessian.diagonal(dim1=1, dim2=2) < 1e-3, 1)
        hinv, _ = invert(hessian, half, str(self._matrix), self._log)
        products = self.resolvemat.to(hinv.dtype).reshape(groups, self.columns, self.rows // groups)
        self._matrix.write((hinv @ products).mT.reshape(self.rows, self.columns))

    def prepare_unstr(self, parallel: int = 32) -> None:
        """Compute each row's path of single removals for the ``prune_*`` methods, and set `Losses` and `Traces`.

        Parameters
        ----------
        parallel : int
            Rows per item of `Traces`.

        Raises
        ------
        RuntimeError
            No batch was added, or :meth:`free` was called.
        ValueError
            The weights or the Hessian have NaN or infinite values.
        torch.linalg.LinAlgError
            ``H + I`` is not positive definite.
        """
        self._prepare(1, parallel, self._problem(_unchanged, zeros_first=True), _unchanged)

    def prepare_blocked(self, size: int = 4, parallel: int = 32) -> None:
        """Like :meth:`prepare_unstr`, but remove `size` neighbouring columns at a time.

        Columns are neighbours in the order (kh, kw, in-channel); `size` must divide the number of columns.
        """
        self._check_divides("size", size)
        self._prepare(size, parallel, self._problem(self._matrix.tap_major), self._matrix.natural)

    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """Return one weight matrix ``[R, C]`` per sparsity from the prepared path.

        The removals of all rows are ranked together by loss. Each row makes as many of its removals as it has among the
        first ``ceil(removals * sparsity)``.

        Raises
        ------
        RuntimeError
            No path was prepared.
        ValueError
            A sparsity is not between 0 and 1.
        """
        return self.prune_blocked(sparsities)

    def prune_blocked(self, sparsities: Sequence[float]) -> list[Tensor]:
        """Do the same as :meth:`prune_unstr`; both work with either kind of path."""
        path = self._prepared()
        _check_sparsities(sparsities)
        ranked = torch.argsort(path.losses.flatten(), stable=True) // path.losses.shape[1]
        removals = [math.ceil(ranked.numel() * sparsity) for sparsity in sparsities]
        return path.weights([torch.bincount(ranked[:number], minlength=self.rows) for number in removals])

    def prune_unstr_balanced(self, rem: int) -> Tensor:
        """Return a weight matrix ``[R, C]`` with `rem` remaining weights in every row.

        Raises
        ------
        RuntimeError
            :meth:`prepare_unstr` was not called.
        ValueError
            `rem` is negative or greater than the number of columns.
        """
        path = self._prepared()
        if path.block != 1:
            raise RuntimeError(f"prune_unstr_balanced() needs prepare_unstr(), not prepare_blocked({path.block})")
        if not 0 <= rem <= self.columns:
            raise ValueError(f"rem must be between 0 and {self.columns}, got {rem}")
        (pruned,) = path.weights([torch.full((self.rows,), self.columns - rem, device=self.dev)])
        return pruned

    def prune_struct(self, sparsities: Sequence[float], size: int = 1) -> list[Tensor]:
        """Return weight matrices ``[R, C]`` without whole blocks of `size` neighbouring columns, the same in all rows.

        As published, ``ceil(C / size * sparsity) + 1`` blocks are removed, but none for a sparsity of 0 (where dead
        columns are zero as well). In a grouped convolution each group loses that many blocks.

        Raises
        ------
        RuntimeError, torch.linalg.LinAlgError
            As for :meth:`prepare_unstr`.
        ValueError
            A sparsity is not between 0 and 1, or `size` does not divide the number of columns.
        """
        self._check_divides("size", size)
        _check_sparsities(sparsities)
        available = self.columns // size
        steps = [min(math.ceil(available * s) + 1, available) if s > 0 else 0 for s in sparsities]
        problem = self._problem(_unchanged)
        results = problem.weight[None].repeat(len(steps), 1, 1, 1)
        for group, (weight, hinv) in enumerate(zip(problem.weight, problem.hinv, strict=True)):
            path = structured_path(weight, hinv, size)
            for step, pruned in zip(range(1, max(steps, default=0) + 1), path, strict=False):
                for index in (i for i, wanted in enumerate(steps) if wanted == step):
                    results[index, group] = pruned
        return list(results.flatten(1, 2))

    def nmprune(self, n: int = 2, m: int = 4, parallel: int = 32) -> None:
        """Remove `n` of every `m` neighbouring columns, in the order (kh, kw, in-channel), and write to the layer.

        `parallel` is accepted, but has no effect.

        Raises
        ------
        RuntimeError, torch.linalg.LinAlgError
            As for :meth:`prepare_unstr`.
        ValueError
            `m` does not divide the number of columns, or `n` is not between 1 and `m`.
        """
        self._check_divides("m", m)
        if not 1 <= n <= m:
            raise ValueError(f"n must be between 1 and m = {m}, got {n}")
        problem = self._problem(self._matrix.tap_major)
        order, _ = ops.nm_path(problem.weight, problem.hinv, n, m)
        counts = torch.full((1, self.rows), order.shape[2], device=self.dev)
        (pruned,) = problem.solution(order.flatten(0, 1), counts, 1)
        self._matrix.write(self._matrix.natural(pruned))

    def free(self) -> None:
        """Free the Hessian and all results."""
        self.H = self.Losses = self.Traces = self.resolvemat = self._path = None

    def _prepare(self, block: int, parallel: int, problem: ObsProblem, natural: Callable[[Tensor], Tensor]) -> None:
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        order, losses = problem.path(block)
        self.Losses = torch.cat([losses.new_zeros(self.rows, 1), losses], 1)
        self.Traces = Traces(problem, order, block, parallel, natural)
        self._path = _Path(problem, order, self.Losses[:, 1:], block, natural)

    def _problem(self, arrange: Callable[[Tensor], Tensor], *, zeros_first: bool = False) -> ObsProblem:
        """Return the problem with dead columns and damping handled, and columns reordered by `arrange`."""
        weight, hessian = self._matrix.read(), self._stacked_hessian()
        if self.nsamples == 0 and not bool(hessian.any()):
            raise RuntimeError(f"no inputs of the {self._matrix} were collected: call add_batch() first")
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        diagonal.masked_fill_(dead, 1)
        weight.masked_fill_(dead[:, None], 0)
        if self.always_damp != 0:
            diagonal += self.always_damp * diagonal.mean(1, keepdim=True)
        weight, hessian = arrange(weight), arrange(arrange(hessian).mT).mT
        return ObsProblem(weight, hessian, str(self._matrix), self._log, zeros_first=zeros_first)

    def _stacked_hessian(self) -> Tensor:
        """Copy the Hessian to ``[G, C, C]`` in the dtype of the computation."""
        dtype = torch.promote_types(self._matrix.weight.dtype, torch.float32)
        hessian = self._hessian().to(dtype, copy=True).reshape(self._matrix.groups, self.columns, self.columns)
        if not bool(hessian.isfinite().all()):
            raise ValueError(f"NaN or infinite values in the Hessian of the {self._matrix}")
        return hessian

    def _hessian(self) -> Tensor:
        if self.H is None:
            raise RuntimeError("the Hessian was freed by free()")
        return self.H

    def _keep(self) -> Tensor | None:
        return None if self._matrix.is_convolution else self.mask

    def _prepared(self) -> _Path:
        if self._path is None:
            raise RuntimeError("no pruning path was prepared: call prepare_unstr() or prepare_blocked() first")
        return self._path

    def _check_divides(self, name: str, value: int) -> None:
        if value < 1 or self.columns % value:
            raise ValueError(f"{name} must divide the {self.columns} columns of the {self._matrix}, got {value}")

    def _log(self, line: str) -> None:
        if self.log_file is not None:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _check_sparsities(sparsities: Sequence[float]) -> None:
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsities must be between 0 and 1, got {sparsity}")


def _unchanged(matrix: Tensor) -> Tensor:
    return matrix
