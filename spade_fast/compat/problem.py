"""Exact OBS of one layer in the published solver's manner: retries, rows with zero weights, paths and solutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spade_fast import ops

# Number of rows whose private Hessians are held at the same time.
_CHUNK = 32


def invert(hessian: Tensor, damp: float, name: str, log: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Invert Hessians by Cholesky, with one retry at ``H + damp I`` for those that are not positive definite.

    Parameters
    ----------
    hessian : Tensor ``[B, C, C]``
    damp : float
        Added to the diagonal for the retry.
    name : str
        Name of the layer in messages.
    log : callable
        Called with one line of text per failure.

    Returns
    -------
    hinv : Tensor ``[B, C, C]``
    damping : Tensor ``[B]``
        Amount added to each diagonal: 0 or `damp`.

    Raises
    ------
    torch.linalg.LinAlgError
        The damped matrix is not positive definite either.
    """
    lower, info = torch.linalg.cholesky_ex(hessian)
    damping = torch.where(info > 0, damp, 0.0).to(hessian.dtype)
    for b in info.nonzero().flatten().tolist():
        log(f"Hessian {b} of the {name} is not positive definite (leading minor {int(info[b])}), adding {damp:g}")
        lower[b], failed = torch.linalg.cholesky_ex(hessian[b] + damp * torch.eye(hessian.shape[-1]).to(hessian))
        if failed > 0:
            raise torch.linalg.LinAlgError(
                f"the Hessian of the {name} is not positive definite, even with {damp:g} added to its diagonal; "
                "collect more inputs or increase always_damp"
            )
    return torch.cholesky_inverse(lower), damping


class ObsProblem:
    """The rows of one layer and the Hessian of each group.

    A group's Hessian is damped if it is singular. A row with zero weights needs only the Hessian of its other weights;
    if that is regular, the row is solved without damping (with `zeros_first`), as in the published code.

    Parameters
    ----------
    weight : Tensor ``[G, R, C]``
    hessian : Tensor ``[G, C, C]``
    name : str
        Name of the layer in messages.
    log : callable
        Called with one line of text per Hessian that is damped.
    zeros_first : bool
        Whether zero weights count as removed from the start.

    Raises
    ------
    torch.linalg.LinAlgError
        A Hessian is not positive definite even with 1 added to its diagonal.
    """

    def __init__(
        self, weight: Tensor, hessian: Tensor, name: str, log: Callable[[str], None], *, zeros_first: bool = False
    ) -> None:
        self.weight = weight
        self.regular = hessian
        self.hinv, damping = invert(hessian, 1.0, name, log)
        self.hessian = hessian
        self.private = torch.zeros(0, dtype=torch.long, device=weight.device)
        if bool(damping.any()):
            self.hessian = hessian + torch.diag_embed(damping[:, None].expand(-1, hessian.shape[-1]))
            if zeros_first:
                self.private = self._regular_rows(damping)

    @property
    def rows(self) -> int:
        """Number of rows of all groups, G * R; row r belongs to group r // R."""
        return self.weight.shape[0] * self.weight.shape[1]

    def path(self, block: int) -> tuple[Tensor, Tensor]:
        """Return order (int32) and losses of the removals, each ``[G * R, C / block]``."""
        order, losses = (t.flatten(0, 1) for t in ops.obs_path(self.weight, self.hinv, block))
        for rows in self.private.split(_CHUNK):
            own_order, own_losses = ops.obs_path(self._single(rows), self._restricted(rows)[1], block)
            order[rows], losses[rows] = own_order[:, 0], own_losses[:, 0]
        return order, losses

    def solution(self, order: Tensor, counts: Tensor, block: int) -> Tensor:
        """Return the weights ``[levels, G * R, C]`` after the first ``counts[level, r]`` removals of each row r."""
        try:
            return self._solution(order, counts.to(torch.int32), block)
        except torch.linalg.LinAlgError:
            # A Hessian was positive definite only by rounding. The published update rule does not need positive
            # definite matrices, so it can continue.
            rows = zip(order, counts.T, strict=True)
            return torch.stack([self.replay(row, removed, block)[at] for row, (removed, at) in enumerate(rows)], 1)

    def _solution(self, order: Tensor, counts: Tensor, block: int) -> Tensor:
        groups = self.weight.shape[:2]
        weight = ops.obs_solution(
            self.weight, self.hessian, self.hinv, order.unflatten(0, groups), counts.unflatten(1, groups), block
        ).flatten(1, 2)
        for rows in self.private.split(_CHUNK):
            restricted, hinv = self._restricted(rows)
            weight[:, rows] = ops.obs_solution(
                self._single(rows), restricted, hinv, order[rows, None], counts[:, rows, None], block
            )[:, :, 0]
        return weight

    def replay(self, row: int, order: Tensor, block: int) -> Tensor:
        """Return the weights ``[removals + 1, C]`` of one row along its path: OBC equation 3 for all removals at once.

        With the removed columns first and ``H⁻¹ = L D Lᵀ``, removal k subtracts column k of the unit triangular L times
        entry k of ``L⁻¹ w``.
        """
        weight = self.weight.flatten(0, 1)[row]
        hinv = self.hinv[row // self.weight.shape[1]]
        if bool((self.private == row).any()):
            hinv = self._restricted(torch.tensor([row], device=weight.device))[1][0]
        removed = (order.long()[:, None] * block + torch.arange(block, device=weight.device)).flatten()
        kept = torch.ones_like(weight, dtype=torch.bool).index_fill(0, removed, False).nonzero().flatten()
        columns = torch.cat([removed, kept])
        w = weight.double()[columns]
        lower = _unit_lower(hinv.double()[columns][:, columns])
        steps = torch.linalg.solve_triangular(lower, w[:, None], upper=False, unitriangular=True) * lower.mT
        path = torch.cat([w[None], w - steps[: len(removed)].cumsum(0)]).triu()[::block]
        result = torch.zeros_like(path, dtype=weight.dtype)
        result[:, columns] = path.to(weight.dtype)
        return result

    def _single(self, rows: Tensor) -> Tensor:
        return self.weight.flatten(0, 1)[rows, None]

    def _regular_rows(self, damping: Tensor) -> Tensor:
        candidates = ((self.weight == 0).any(2) & (damping > 0)[:, None]).flatten().nonzero().flatten()
        regular = [torch.linalg.cholesky_ex(self._without_zeros(rows))[1] == 0 for rows in candidates.split(_CHUNK)]
        return candidates[torch.cat(regular)]

    def _without_zeros(self, rows: Tensor) -> Tensor:
        """Return undamped Hessians ``[R, C, C]`` of the given rows, with identity columns in place of zero weights."""
        zero = self._single(rows)[:, 0] == 0
        hessian = self.regular[rows // self.weight.shape[1]].masked_fill(zero[:, :, None] | zero[:, None, :], 0)
        hessian.diagonal(dim1=1, dim2=2).masked_fill_(zero, 1)
        return hessian

    def _restricted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        hessian = self._without_zeros(rows)
        return hessian, torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _unit_lower(matrix: Tensor) -> Tensor:
    """Return the unit lower triangular ``L`` with ``matrix = L D Lᵀ``."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info == 0:
        return lower / lower.diagonal()
    # Rounding made a pivot negative. The path continued there, and so can a factorisation without square roots.
    lower = matrix.clone()
    for k in range(matrix.shape[0]):
        lower[k + 1 :, k + 1 :] -= torch.outer(lower[k + 1 :, k] / lower[k, k], lower[k + 1 :, k])
        lower[k:, k] = lower[k:, k] / lower[k, k]
    return lower.tril()
