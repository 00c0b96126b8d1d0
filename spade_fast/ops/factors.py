"""The documented Python function of each op that factorises Hessians; `functions` says what holds for all ops."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import arguments


def inverse_cholesky(hessian: Tensor, damp: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the upper triangular factor ``U`` with ``UᵀU = (H + damp I)⁻¹``.

    Parameters
    ----------
    hessian : Tensor ``[B, C, C]``
        Symmetric.
    damp : float or Tensor ``[B]``
        Added to the diagonal of each problem.

    Returns
    -------
    factor : Tensor ``[B, C, C]``
        Undefined for a problem whose `info` is not 0.
    info : Tensor ``[B]``, int32
        0, or the order of the leading minor (in reversed column order) that is not positive definite.

    Raises
    ------
    TypeError, ValueError
        A dtype or a shape is wrong.

    Notes
    -----
    This is the Cholesky factor of the inverse that SparseGPT uses (arXiv 2301.00774, section 3.3), computed by one
    factorisation of the reversed matrix and one triangular inverse. Memory: one ``C x C`` matrix per problem in
    progress, which is one problem at a time, or one per thread if there are at least as many problems as threads. On a
    GPU it uses torch's batched linear algebra and four times the size of `hessian`.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> factor, info = ops.inverse_cholesky(torch.tensor([[[4.0, 0.0], [0.0, 16.0]]]))
    >>> factor
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.2500]]])
    """
    (home,) = arguments.tensors("inverse_cholesky", hessian=hessian)
    return _factors("inverse_cholesky", hessian, home, damp)


def reverse_cholesky(hessian: Tensor, damp: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the lower triangular factor ``L`` with ``LᵀL = H + damp I``, in half the time of `inverse_cholesky`.

    Parameters
    ----------
    hessian : Tensor ``[B, C, C]``
        Symmetric.
    damp : float or Tensor ``[B]``
        Added to the diagonal of each problem.

    Returns
    -------
    factor : Tensor ``[B, C, C]``
        Undefined for a problem whose `info` is not 0.
    info : Tensor ``[B]``, int32
        0, or the order of the leading minor (in reversed column order) that is not positive definite.

    Raises
    ------
    TypeError, ValueError
        A dtype or a shape is wrong.

    Notes
    -----
    This is the Cholesky factorisation of the matrix in reversed order, with the factor's columns put back in order. The
    factor of `inverse_cholesky` is the inverse of its transpose. Memory: one ``C x C`` matrix per problem in progress,
    which is one problem at a time, or one per thread if there are at least as many problems as threads. There are
    kernels for the CPU only; tensors on a GPU are processed there too.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> factor, info = ops.reverse_cholesky(torch.tensor([[[4.0, 0.0], [0.0, 16.0]]]))
    >>> factor
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    (home,) = arguments.tensors("reverse_cholesky", hessian=hessian)
    return _factors("reverse_cholesky", hessian, home.cpu() if home.is_cuda else home, damp)


def _factors(op: str, hessian: Tensor, home: Tensor, damp: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the factors of Hessians, and `info`, on their own device; `home` are those where the op runs."""
    factor, info = getattr(torch.ops.spade_fast, op)(home, arguments.damping(op, damp, home))
    return factor.to(hessian.device), info.to(hessian.device)
