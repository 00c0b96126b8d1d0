"""Hashes of the weights of a network, to detect whether two networks have the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return dtype, shape and a hash of the values of each tensor, by name, in the form ``"float32[3, 4]:hash"``."""
    hashes = {}
    for name, tensor in named:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        hashes[name] = f"{dtype}{list(tensor.shape)}:{hashlib.sha256(values).hexdigest()[:32]}"
    return hashes
