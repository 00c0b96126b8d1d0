"""The inputs of a recurrent layer's weights, from the calls of fused ops that run it over all time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_CUDNN_MODES: tuple[Callable[..., tuple[Tensor, ...]], ...] = (  # in the order of cuDNN's numbers
    torch.rnn_relu,
    torch.rnn_tanh,
    torch.lstm,
    torch.gru,
)


def fused_inputs(args: Sequence[Any], result: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of an `aten.mkldnn_rnn_layer` call, one layer and direction, each with its inputs ``[N, C]``.

    The hidden state that a time step takes is the output of the step before.
    """
    x, weight_ih, weight_hh, _, _, hx, _, backwards = args[:8]
    output = result[0]
    first = hx.reshape(1, *output.shape[1:])
    hidden = torch.cat([output[1:], first] if backwards else [first, output[:-1]])
    return [(weight_ih, x.flatten(0, 1)), (weight_hh, hidden.flatten(0, 1))]


def without_cudnn(args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Run an `aten._cudnn_rnn` call as separate matrix products, and return what it returns without gradients."""
    x, weights, stride, buffer, hx, cx, mode, _, _, layers, batch_first, dropout, train, both, batch_sizes, _ = args
    state = hx if cx is None else (hx, cx)
    biases = stride > 3  # of two or three weights and two biases per layer
    options = (weights, biases, layers, dropout, train, both)
    with torch.backends.cudnn.flags(enabled=False):
        if batch_sizes:
            sizes = torch.tensor(batch_sizes, dtype=torch.int64)
            output, *states = _CUDNN_MODES[mode](x, sizes, state, *options)
        else:
            output, *states = _CUDNN_MODES[mode](x, state, *options, batch_first)
    nothing = x.new_empty(0)
    cell = states[1] if cx is not None else nothing
    return output, states[0], cell, nothing, nothing if buffer is None else buffer
