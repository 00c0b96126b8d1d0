"""Layer-wise relevance propagation (LRP) as a Captum method, for convolutional networks and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.extras import extra_for
from spade_fast.attribution.asking import answering_functions
from spade_fast.attribution.relevance_rules import run_with_rules
from spade_fast.targets.network_outputs import floating

with extra_for("LRP needs"):
    from captum._utils.gradient import compute_gradients
    from captum.attr import InputXGradient
    from captum.log import log_usage


class LRP(InputXGradient):
    """Layer-wise relevance propagation by EpsilonPlus in convolutional networks and AttnLRP in transformers.

    ============================================  ==================================================================
    function                                      rule
    ============================================  ==================================================================
    convolution, with the batch norm behind it    z+ [2]_
    linear layer                                  epsilon [1]_
    sum, mean, pooling, selection, fixed norm     its gradient
    function of single elements, such as GELU     identity: passes the relevance on
    product of two activations, as in attention   uniform: half to each factor [3]_
    softmax                                       Taylor decomposition, with a bias that absorbs relevance [3]_
    layer, RMS, group and instance norm           the standard deviation is held constant [3]_
    ============================================  ==================================================================

    Functions have these rules wherever they are called, in a module or not. The backward pass propagates relevance
    divided by activation; sums need no rule then, and products no epsilon.

    Parameters
    ----------
    model : callable
        A network in evaluation mode, or a function of it, such as one of embedded tokens.
    epsilon : float
        Added to the magnitude of the denominators.

    Raises
    ------
    ValueError
        From `attribute`: the network calls a function without a rule, such as a quotient of two activations, or one
        that cannot be given another gradient, such as a custom autograd function.

    References
    ----------
    .. [1] Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
       Propagation, PLOS ONE 2015.
    .. [2] Kohlbrenner et al., Towards Best Practice in Explaining Neural Network Decisions with LRP, IJCNN 2020.
    .. [3] Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, ICML 2024.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import LRP
    >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> model = torch.nn.Sequential(encoder, torch.nn.Flatten(), torch.nn.Linear(24, 5)).eval()
    >>> LRP(model).attribute(torch.rand(1, 3, 8), target=2).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, model: Callable[..., Any], epsilon: float = 1e-6) -> None:
        super().__init__(model)
        self.model = model
        self.epsilon = epsilon
        self.gradient_func = self._gradients

    @log_usage()
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Compute the relevance of the inputs; arguments and result are those of Captum's `InputXGradient`.

        `target` may also be a function of the network's output, such as those of `spade_fast.targets`.

        The relevance sums to the target's output minus what is absorbed: by biases and all other terms that do not
        depend on the inputs, such as position embeddings; by softmax, which has more than its inputs' contributions
        (the bias of its Taylor decomposition); and by convolutions at outputs without any positive product to receive
        the relevance.
        """
        for one in inputs if isinstance(inputs, tuple) else (inputs,):
            floating("inputs of LRP (embedded tokens, where these are integers)", one)
        with answering_functions(self, target) as asked:
            return super().attribute(inputs, asked, additional_forward_args)

    def check(self, *inputs: Tensor) -> None:
        """Raise ValueError if the network calls, for these inputs, a function without a rule."""
        with torch.enable_grad():
            run_with_rules(self.model, tuple(one.detach().requires_grad_() for one in inputs), self.epsilon)

    def _gradients(self, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return compute_gradients(partial(self._run, network), *args, **kwargs)

    def _run(self, network: Callable[..., Any], *inputs: Any) -> Any:
        return run_with_rules(network, inputs, self.epsilon)
