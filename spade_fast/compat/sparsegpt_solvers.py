"""The published classes `SparseGPT` and `SparseGPTSuperFast`: SparseGPT of one layer, for one or several samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spade_fast import ops
from spade_fast.compat.collect import LayerMatrix


class _Solver:
    """Base of both classes: the layer, one or several running Hessians, and the call of the solver."""

    H: Tensor | None
    nsamples: int

    def __init__(self, layer: nn.Module, *samples: int) -> None:
        self.layer = layer
        self._matrix = LayerMatrix(layer)
        self.dev = self._matrix.weight.device
        self.rows, self.columns = self._matrix.rows, self._matrix.columns
        groups = (self._matrix.groups,) if self._matrix.groups > 1 else ()
        self.H = torch.zeros(*samples, *groups, self.columns, self.columns, device=self.dev)
        self.nsamples = 0

    def free(self) -> None:
        """Free the Hessian."""
        self.H = None

    def _hessian(self) -> Tensor:
        if self.H is None:
            raise RuntimeError("the Hessian was freed by free()")
        return self.H

    def _accumulate(self, hessian: Tensor, inp: Tensor) -> None:
        images = 1 if isinstance(inp, Tensor) and inp.dim() == 2 else len(inp)
        self._matrix.accumulate(hessian, inp, self.nsamples, images)
        self.nsamples += images

    def _stacked_hessian(self) -> Tensor:
        """Copy all Hessians to ``[S * G, C, C]`` in the dtype of the computation."""
        dtype = torch.promote_types(self._matrix.weight.dtype, torch.float32)
        hessian = self._hessian().to(dtype, copy=True).reshape(-1, self.columns, self.columns)
        if not bool(hessian.isfinite().all()):
            raise ValueError(f"NaN or infinite values in the Hessian of the {self._matrix}")
        return hessian

    def _solve(
        self, weight: Tensor, factor: Tensor, sparsity: float, prunen: int, prunem: int, blocksize: int
    ) -> Tensor:
        """Prune a weight ``[S * G, R, C]``; return ``[S, G * R, C]``."""
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
        if blocksize < 1:
            raise ValueError(f"blocksize must be at least 1, got {blocksize}")
        if (prunen, prunem) != (0, 0) and not 1 <= prunen <= prunem:
            raise ValueError(f"prunen must be between 1 and prunem, got prunen={prunen}, prunem={prunem}")
        if prunen > 0 and (self.columns % prunem or (blocksize < self.columns and blocksize % prunem)):
            raise ValueError(f"prunem must divide the {self.columns} columns and blocksize={blocksize}, got {prunem}")
        groups = self._matrix.groups
        if prunen == 0 and groups > 1:
            pruned = _joint_masks(weight, factor, groups, sparsity, blocksize)
        else:
            starts = range(0, self.columns, blocksize)
            sizes = [weight.shape[1] * min(blocksize, self.columns - start) for start in starts]
            counts = torch.tensor([_removals(size, sparsity) for size in sizes], device=weight.device)
            counts = counts.expand(weight.shape[0], -1).contiguous()
            pruned, _ = ops.sparsegpt(weight, factor, counts, blocksize, n=prunen, m=prunem, include_ties=True)
        return pruned.reshape(-1, self.rows, self.columns)


class SparseGPT(_Solver):
    """SparseGPT solver of one layer (Frantar, Alistarh, ICML 2023, arXiv 2301.00774).

    In shapes, R and C stand for `rows` and `columns`, and G for the groups of a grouped convolution.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d, nn.Conv2d or transformers' Conv1D

    Attributes
    ----------
    H : Tensor ``[C, C]``, float32
        Running mean of ``2 x xᵀ``; columns ordered (in-channel, kh, kw). ``[G, C, C]`` for a grouped convolution. It
        can be read and replaced, and is kept until :meth:`free`.
    nsamples : int
        Number of samples seen.
    rows, columns : int
        Shape of the weight matrix.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.compat import SparseGPT
    >>> layer = torch.nn.Linear(8, 4)
    >>> solver = SparseGPT(layer)
    >>> solver.add_batch(torch.randn(64, 8), None)
    >>> solver.fasterprune(0.5)
    >>> int((layer.weight == 0).sum())
    17
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)

    def add_batch(self, inp: Tensor, out: Tensor | None, blocksize: int = 1024) -> None:
        """Add a batch of the layer's inputs to the Hessian.

        The first dimension is the number of samples; a two-dimensional input counts as one sample. `out` and
        `blocksize` are accepted, but have no effect.

        Raises
        ------
        TypeError, ValueError
            The inputs have the wrong dtype or shape, are empty, or have NaN or infinite values.
        RuntimeError
            :meth:`free` was called.
        """
        self._accumulate(self._hessian(), inp)

    def fasterprune(
        self, sparsity: float, prunen: int = 0, prunem: int = 0, blocksize: int = 128, percdamp: float = 0.01
    ) -> None:
        """Prune the layer in place.

        Parameters
        ----------
        sparsity : float
            As published, ``int(weights * sparsity) + 1`` weights of each block of columns are removed, and also those
            that tie with the last of them. The groups of a grouped convolution share the choice.
        prunen, prunem : int
            If not 0: instead remove `prunen` of every `prunem` neighbouring columns. `prunem` must divide the number
            of columns and `blocksize`.
        blocksize : int
            Number of columns whose mask is chosen together.
        percdamp : float
            This fraction of the mean diagonal is added to the diagonal.

        Raises
        ------
        RuntimeError
            No batch was added, or :meth:`free` was called.
        ValueError
            An argument is out of range; the weights or the Hessian have NaN or infinite values.
        torch.linalg.LinAlgError
            The damped Hessian is singular; the layer is then unchanged.
        """
        weight, hessian = self._matrix.read(), self._stacked_hessian()
        if self.nsamples == 0 and not bool(hessian.any()):
            raise RuntimeError(f"no inputs of the {self._matrix} were collected: call add_batch() first")
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        diagonal.masked_fill_(dead, 1)
        weight.masked_fill_(dead[:, None], 0)
        factor, info = ops.inverse_cholesky(hessian, percdamp * diagonal.mean(1))
        if bool((info != 0).any()):
            raise torch.linalg.LinAlgError(
                f"the Hessian of the {self._matrix} is not positive definite with percdamp={percdamp}; increase it"
            )
        self._matrix.write(self._solve(weight, factor, sparsity, prunen, prunem, blocksize)[0])


class SparseGPTSuperFast(_Solver):
    """SparseGPT solver of one layer for several samples at once, with one pruned layer per sample.

    In shapes, S stands for `model_num`, R and C for `rows` and `columns`, G for the groups of a grouped convolution.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d, nn.Conv2d or transformers' Conv1D
    model_num : int
        Number of samples.

    Attributes
    ----------
    H : Tensor ``[S, C, C]``, float32
        Running mean of ``2 x xᵀ`` of each sample; columns ordered (in-channel, kh, kw). ``[S, G, C, C]`` for a grouped
        convolution. It can be read and replaced.
    model_counter : int
        Index of the current sample, to which :meth:`add_batch` adds.
    nsamples : int
        Number of images seen of the current sample.
    rows, columns : int
        Shape of the weight matrix.

    Examples
    --------
    >>> import copy, torch
    >>> from spade_fast.compat import SparseGPTSuperFast
    >>> layer = torch.nn.Linear(8, 4)
    >>> solver = SparseGPTSuperFast(layer, 2)
    >>> solver.add_batch(torch.randn(64, 8), None)
    >>> solver.inc_model_counter()
    >>> solver.add_batch(torch.randn(64, 8), None)
    >>> pruned = [copy.deepcopy(layer), copy.deepcopy(layer)]
    >>> solver.fasterprune(0.5, pruned)
    """

    def __init__(self, layer: nn.Module, model_num: int) -> None:
        if model_num < 1:
            raise ValueError(f"model_num must be at least 1, got {model_num}")
        super().__init__(layer, model_num)
        self.model_counter = 0

    def inc_model_counter(self) -> None:
        """Proceed to the next sample."""
        self.model_counter += 1
        self.nsamples = 0

    def add_batch(self, inp: Tensor, out: Tensor | None, blocksize: int = 1024) -> None:
        """Add a batch of the layer's inputs to the Hessian of the current sample; see :meth:`SparseGPT.add_batch`.

        Raises
        ------
        IndexError
            :meth:`inc_model_counter` was called after the last sample.
        TypeError, ValueError, RuntimeError
            As in :meth:`SparseGPT.add_batch`.
        """
        hessian = self._hessian()
        if self.model_counter >= len(hessian):
            raise IndexError(f"sample {self.model_counter} of {len(hessian)}: inc_model_counter() was called too often")
        self._accumulate(hessian[self.model_counter], inp)

    def fasterprune(
        self,
        sparsity: float,
        layers: Sequence[nn.Module],
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
    ) -> None:
        """Prune a copy of the layer for each sample, and write it to the corresponding entry of `layers`.

        As published, dead columns are not treated, the damping is at least 1e-6, and a sample whose damped Hessian is
        singular is pruned by magnitude (its Hessian is replaced by the identity). The other arguments are those of
        :meth:`SparseGPT.fasterprune`; `prunen` and `prunem`, which the published class ignores, are supported.

        Raises
        ------
        RuntimeError
            :meth:`free` was called.
        ValueError
            There is not one layer per sample, a layer has another shape, an argument is out of range, or the weights or
            a Hessian have NaN or infinite values.
        """
        hessian = self._stacked_hessian()
        groups = self._matrix.groups
        if len(layers) * groups != len(hessian):
            raise ValueError(f"layers must have one for each of {len(hessian) // groups} samples, got {len(layers)}")
        for target in layers:
            if getattr(target.weight, "shape", None) != self._matrix.weight.shape:
                raise ValueError(
                    f"every entry of layers must have the weight shape of the {self._matrix}, got {target}"
                )
        damp = (percdamp * hessian.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-6)
        factor, info = ops.inverse_cholesky(hessian, damp)
        factor[info != 0] = torch.eye(self.columns, dtype=factor.dtype, device=factor.device)
        weight = self._matrix.read().repeat(len(layers), 1, 1)
        pruned = self._solve(weight, factor, sparsity, prunen, prunem, blocksize)
        for target, matrix in zip(layers, pruned, strict=True):
            self._matrix.write(matrix, target)


def _removals(weights: int, sparsity: float) -> int:
    return min(int(weights * sparsity) + 1, weights)


def _joint_masks(weight: Tensor, factor: Tensor, groups: int, sparsity: float, blocksize: int) -> Tensor:
    """Prune a grouped layer with SparseGPT, with one threshold per block of columns for all groups of a sample.

    With separate thresholds, a depthwise filter (one row) would lose all its weights in blocks of one column. Groups
    have few columns, so the columns are processed one by one.
    """
    weight = weight.clone()
    scale = factor.diagonal(dim1=1, dim2=2)[:, None]
    for start in range(0, weight.shape[2], blocksize):
        columns = slice(start, start + blocksize)
        scores = (weight[..., columns] / scale[..., columns]).square().unflatten(0, (-1, groups)).flatten(1)
        thresholds = scores.kthvalue(_removals(scores.shape[1], sparsity), dim=1).values
        mask = (scores <= thresholds[:, None]).reshape(weight[..., columns].shape)
        for offset in range(mask.shape[2]):
            j = start + offset
            error = torch.where(mask[..., offset], weight[..., j], 0.0) / scale[..., j]
            weight[..., j + 1 :] -= error[..., None] * factor[:, None, j, j + 1 :]
            weight[..., j].masked_fill_(mask[..., offset], 0)
    return weight
