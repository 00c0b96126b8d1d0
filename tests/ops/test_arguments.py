"""Arguments of wrong types, and integers that no op takes: documented errors that name them, on all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spade_fast import ops
from spade_fast._util.errors import UserError

EYE = torch.eye(4)[None]
SOUND: dict[str, dict[str, Any]] = {
    "gram_linear_": {"gram": torch.zeros(1, 4, 4), "x": torch.ones(1, 3, 4)},
    "gram_conv2d_": {
        "gram": torch.zeros(1, 1, 9, 9),
        "x": torch.ones(1, 1, 6, 7),
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
    },
    "mirror_upper_": {"gram": torch.zeros(2, 4, 4)},
    "inverse_cholesky": {"hessian": EYE, "damp": 0.5},
    "reverse_cholesky": {"hessian": EYE, "damp": 0.5},
    "obs_path": {"weight": torch.ones(1, 2, 4), "hinv": EYE, "block": 1},
    "nm_path": {"weight": torch.ones(1, 2, 4), "hinv": EYE, "n": 2, "m": 4},
    "obs_solution": {
        "weight": torch.ones(1, 2, 4),
        "hessian": EYE,
        "hinv": EYE,
        "order": torch.tensor([[[0, 1], [1, 2]]]),
        "counts": torch.tensor([[1, 2]]),
        "block": 1,
    },
    "sparsegpt": {
        "weight": torch.ones(1, 2, 4),
        "factor": EYE,
        "counts": torch.tensor([[1, 1]]),
        "mask_block": 2,
        "n": 0,
        "m": 0,
        "include_ties": False,
        "keep_zeros": False,
        "of_inverse": True,
    },
}
CALLS = [(op, name) for op, given in SOUND.items() for name in given]
TENSORS = [(op, name) for op, name in CALLS if isinstance(SOUND[op][name], Tensor)]
READ = [(op, name) for op, name in TENSORS if name != "gram" and SOUND[op][name].is_floating_point()]
INTEGERS = [(op, name) for op, name in CALLS if type(SOUND[op][name]) in (int, tuple)]


def call(op: str, device: str = "cpu", **changes: Any) -> Any:
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in SOUND[op].items()} | changes
    return getattr(ops, op)(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()})


@pytest.mark.parametrize("op", SOUND)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sound_calls(op: str, device: str) -> None:
    call(op, device)


def results(op: str, **changes: Any) -> tuple[Tensor, ...]:
    made = call(op, **changes)
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("op", "name"), [*READ, ("inverse_cholesky", "damp"), ("reverse_cholesky", "damp")])
def test_what_requires_grad_is_a_constant(op: str, name: str) -> None:
    value = torch.tensor(0.5) if name == "damp" else SOUND[op][name]
    for given in (value.clone().requires_grad_(), value.clone().requires_grad_() * 1):
        for made, expected in zip(results(op, **{name: given}), results(op), strict=True):
            assert not made.requires_grad and torch.equal(made, expected)
        assert given.requires_grad


@pytest.mark.parametrize("op", ["gram_linear_", "gram_conv2d_", "mirror_upper_"])
def test_a_gram_that_requires_grad_is_refused_unless_gradients_are_off(op: str) -> None:
    gram = SOUND[op]["gram"].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{op}: gram must not require grad"):
        getattr(ops, op)(**{**SOUND[op], "gram": gram})
    assert not gram.any()
    with torch.no_grad():
        assert getattr(ops, op)(**{**SOUND[op], "gram": gram}) is gram and torch.equal(gram, call(op))


NO_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda tensor: tensor.tolist(),
    "array": lambda tensor: tensor.numpy(),
    "number": lambda tensor: 1.0,
    "None": lambda tensor: None,
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_dense_tensor(op: str, name: str, kind: str) -> None:
    value = NO_TENSORS[kind](SOUND[op][name])
    with pytest.raises(TypeError, match=rf"{op}: {name} must be a (dense )?tensor, got ") as caught:
        call(op, **{name: value})
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float16])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op: str, name: str, dtype: torch.dtype, device: str) -> None:
    with pytest.raises(TypeError, match=f"{op}: {name} must "):
        call(op, device, **{name: SOUND[op][name].to(dtype)})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_negated_bool(op: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"{op}: {name} must be numbers"):
        call(op, **{name: torch._neg_view(SOUND[op][name].bool())})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_dimensions(op: str, name: str, device: str) -> None:
    with pytest.raises(ValueError, match=f"{op}: .* must "):
        call(op, device, **{name: torch.tensor(1, dtype=SOUND[op][name].dtype)})


def in_place_of(value: Any, integer: Any) -> Any:
    return (integer, value[1]) if isinstance(value, tuple) else integer


@pytest.mark.parametrize("value", [True, 2.0, "2", None, torch.tensor(2)], ids=str)
@pytest.mark.parametrize(("op", "name"), INTEGERS)
def test_no_integer(op: str, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{op}: {name} must be an integer, got ") as caught:
        call(op, **{name: in_place_of(SOUND[op][name], value)})
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("value", [-(2**64), -(2**63), -(2**62), -(2**31), -1, 2**62, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize(("op", "name"), [case for case in INTEGERS if case[1] != "mask_block"])
def test_integers_far_off(op: str, name: str, value: int, device: str) -> None:
    with pytest.raises(ValueError, match=f"{op}: .*must "):
        call(op, device, **{name: in_place_of(SOUND[op][name], value)})


def test_a_mask_block_may_be_longer_than_a_row() -> None:
    for mask_block in (4, 2**31, 2**63 - 1):
        call("sparsegpt", mask_block=mask_block, counts=torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"mask_block must be between -2\^62 and 2\^63 - 1"):
        call("sparsegpt", mask_block=2**63, counts=torch.tensor([[1]]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "changes"), [("obs_path", {"block": 0}), ("nm_path", {"m": 0}), ("obs_solution", {"block": 0})]
)
def test_nothing_is_divided_by_zero(op: str, changes: dict[str, int], device: str) -> None:
    with pytest.raises(ValueError, match="must divide the 4 columns, got 0"):
        call(op, device, **changes)


def test_numpy_integers_and_single_sizes() -> None:
    assert torch.equal(call("obs_path", block=np.int64(2))[0], call("obs_path", block=2)[0])
    assert torch.equal(call("gram_conv2d_", kernel_size=3), call("gram_conv2d_", kernel_size=[3, np.int32(3)]))


@pytest.mark.parametrize("flag", ["include_ties", "keep_zeros", "of_inverse"])
def test_flags(flag: str) -> None:
    with pytest.raises(TypeError, match=f"sparsegpt: {flag} must be a bool, got int"):
        call("sparsegpt", **{flag: 1})


@pytest.mark.parametrize(
    ("damp", "error", "message"),
    [
        (1j, TypeError, "damp must be a number or a tensor, got complex"),
        (True, TypeError, "damp must be a number or a tensor, got bool"),
        ("a", TypeError, "damp must be a number or a tensor, got str"),
        (None, TypeError, "damp must be a number or a tensor, got NoneType"),
        (np.ones(1), TypeError, "damp must be a number or a tensor, got ndarray"),
        (torch.tensor([1j]), TypeError, "damp must be real, got torch.complex64 tensor"),
        (torch.tensor([True]), TypeError, "damp must be real, got torch.bool tensor"),
        (torch.ones(1).to_sparse(), TypeError, "damp must be a dense tensor"),
        (torch.ones(2), ValueError, r"damp must have shape \[1\] or \[\], got \[2\]"),
        (torch.ones(1).expand(2**40), ValueError, r"damp must have shape \[1\] or \[\]"),
        (10**400, ValueError, "damp must be finite in torch.float32, got inf"),
        (1e300, ValueError, r"damp must be finite in torch.float32, got 1e\+300"),
        (float("nan"), ValueError, "damp must be finite in torch.float32, got nan"),
    ],
)
def test_damping(damp: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"inverse_cholesky: {message}") as caught:
        call("inverse_cholesky", damp=damp)
    assert isinstance(caught.value, UserError)


def test_damping_of_any_real_number() -> None:
    expected = ops.inverse_cholesky(EYE, 2.0)[0]
    for damp in (2, np.float32(2), torch.tensor(2), torch.tensor([2.0], dtype=torch.float64)):
        assert torch.equal(ops.inverse_cholesky(EYE, damp)[0], expected)
