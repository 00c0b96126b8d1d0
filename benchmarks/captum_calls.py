"""Captum's own tests through `Spade`: each call of a method in them is made again as ``Spade(method, sparsity=0)``.

Captum's wheel lacks its tests; take those of the installed version from its repository::

    git clone --branch v0.9.0 https://github.com/pytorch/captum
    pip install parameterized
    python benchmarks/captum_calls.py captum [arguments of pytest, such as -k saliency]

A call counts if Captum returns a result. It agrees if `Spade` returns the same: the same tuples, shapes and numbers, up
to 1e-5 of the largest number of the result (a convergence delta is a difference of such numbers). The results of
methods that draw random numbers, which `Spade` draws for each sample, are compared without their numbers.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import captum
import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    DataLoaderAttribution,
    FeaturePermutation,
    GradientShap,
    LayerFeaturePermutation,
    LayerGradientShap,
    LimeBase,
    NeuronGradientShap,
    NoiseTunnel,
    ShapleyValues,
    ShapleyValueSampling,
)
from captum.attr._core.llm_attr import LLMAttributionResult
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast import Spade
from spade_fast.attribution.method_networks import undone
from spade_fast.attribution.sample_arguments import innermost

RANDOM = (
    FeaturePermutation,
    LayerFeaturePermutation,
    GradientShap,
    LayerGradientShap,
    NeuronGradientShap,
    LimeBase,
    NoiseTunnel,
    ShapleyValueSampling,
)
COMPARING_SAMPLES = (FeaturePermutation, LayerFeaturePermutation, DataLoaderAttribution)


class Calls:
    """Calls of attribution methods during tests, and what became of each in `Spade`."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)  # by method
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)  # by outcome
        self._busy = False

    def watch(self, kind: type[Attribution]) -> None:
        original: Callable[..., Any] = vars(kind)["attribute"]

        @functools.wraps(original)
        def attribute(method: Any, /, *args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return original(method, *args, **kwargs)
            self._busy = True
            try:
                states = torch.get_rng_state(), np.random.get_state()
                with undone(method, ()):
                    result = original(method, *args, **kwargs)
                after = torch.get_rng_state(), np.random.get_state()
                self._again(method, result, args, kwargs, states)
                torch.set_rng_state(after[0])
                np.random.set_state(after[1])
            finally:
                self._busy = False
            return result

        kind.attribute = attribute  # type: ignore[method-assign]  # Captum's tests call it by this name

    def _again(self, method: Any, result: Any, args: Any, kwargs: Any, states: Any) -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        name = type(method).__name__
        is_random = any(
            isinstance(one, RANDOM) and not isinstance(one, ShapleyValues) for one in (method, innermost(method))
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = through_spade(method, *tree_map(without_graph, (args, kwargs)))
        except Exception as error:
            outcome, reason = "error", f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', str(error))[:150]}"
            if self.verbose:
                traceback.print_exc()
        else:
            reason = difference(result, found, None if is_random else 1e-5 * max(1.0, largest(result)))
            outcome = "different" if reason else "random" if is_random else "same"
            if reason and draws_in_training(network_of(method)):
                reason += ", of a network in training mode with dropout"
        self.outcomes[name][outcome] += 1
        if reason:
            self.reasons[outcome][f"{name}: {reason}"] += 1
            if self.verbose:
                print(outcome, os.environ.get("PYTEST_CURRENT_TEST"), name, reason, file=sys.__stdout__)

    def report(self) -> str:
        outcomes = ("same", "random", "different", "error")
        lines = [f"{'method':32}{'calls':>7}" + "".join(f"{one:>11}" for one in outcomes)]
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        for name, counts in [*sorted(self.outcomes.items()), ("all", total)]:
            lines.append(f"{name:32}{sum(counts.values()):7}" + "".join(f"{counts[one]:11}" for one in outcomes))
        for outcome, reasons in self.reasons.items():
            lines += ["", f"{outcome}:", *(f"{count:5}  {reason}" for reason, count in reasons.most_common())]
        return "\n".join(lines)


def through_spade(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = inspect.signature(method.attribute).bind(*args, **kwargs).args[0]
    calibration: Any = _itself
    if isinstance(innermost(method), COMPARING_SAMPLES) or isinstance(method, DataLoaderAttribution):
        calibration = inputs if isinstance(inputs, Tensor) else [inputs]
    return Spade(method, calibration, sparsity=0, model=network_of(method)).attribute(*args, **kwargs)


def _itself(sample: Any, name: str) -> list[Any]:
    return [sample]


def draws_in_training(network: nn.Module) -> bool:
    return any(one.training and isinstance(one, nn.modules.dropout._DropoutNd) for one in network.modules())


def without_graph(value: Any) -> Any:
    """Return a tensor without the operations that made it, through which the first call went backwards."""
    has_graph = isinstance(value, Tensor) and value.grad_fn is not None
    return value.detach().requires_grad_() if has_graph else value


def network_of(method: Any) -> nn.Module:
    """Return the network that a method runs; that of a function is one that its code names, if any."""
    function = innermost(method).forward_func
    if isinstance(function, nn.Module):
        return function
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(getattr(function, "__self__", None), nn.Module):
        return function.__self__
    try:
        names = inspect.getclosurevars(function)
    except TypeError:
        return nn.Identity()
    modules = [one for one in {**names.globals, **names.nonlocals}.values() if isinstance(one, nn.Module)]
    return modules[0] if modules else nn.Identity()


def largest(result: Any) -> float:
    numbers = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.numel()]
    return max((float(one.abs().max()) for one in numbers), default=0.0)


def difference(expected: Any, found: Any, tolerance: float | None) -> str:
    """Return in what two results differ; nothing if they agree. Without a tolerance, numbers are not compared."""
    if isinstance(expected, (tuple, list)):
        if type(expected) is not type(found):
            return f"{type(found).__name__} instead of {type(expected).__name__}"
        if len(expected) != len(found):
            return f"{len(found)} entries instead of {len(expected)}"
        return next(filter(None, (difference(*pair, tolerance) for pair in zip(expected, found, strict=True))), "")
    if isinstance(expected, LLMAttributionResult) and isinstance(found, LLMAttributionResult):
        pairs = [[one.seq_attr, one.token_attr, one.input_tokens, one.output_tokens] for one in (expected, found)]
        return difference(*pairs, tolerance)
    if not isinstance(expected, Tensor):
        return "" if expected is found or expected == found else f"{found!r} instead of {expected!r}"
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} instead of a tensor"
    if expected.shape != found.shape:
        return f"{list(found.shape)} instead of {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    if tolerance is None or torch.allclose(expected, found, rtol=0, atol=tolerance, equal_nan=True):
        return ""
    return f"numbers that differ by up to {largest(expected - found) / largest(expected):.0e}"


def kinds_below(kind: type[Attribution]) -> Iterator[type[Attribution]]:
    for below in kind.__subclasses__():
        yield below
        yield from kinds_below(below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of Captum's repository")
    parser.add_argument("--tests", nargs="+", default=["tests/attr"], help="files and folders in it")
    parser.add_argument("--verbose", action="store_true", help="print each call that fails, with its test")
    given, arguments = parser.parse_known_args()
    calls = Calls(given.verbose)
    for kind in set(kinds_below(Attribution)):
        if "attribute" in vars(kind) and kind is not Spade and kind.__module__.startswith("captum."):
            calls.watch(kind)
    os.chdir(given.checkout)
    sys.path.insert(0, os.getcwd())
    torch.set_num_threads(1)
    pytest.main([*given.tests, "-q", "--tb=line", "-p", "no:cacheprovider", "-c", os.devnull, *arguments])
    print(f"Captum {captum.__version__}\n\n{calls.report()}")


if __name__ == "__main__":
    main()
