"""Random calls of all native ops: sound, on the border, and wrong. From the repository's root:

    python -m tests.fuzz.ops --calls 100000 --seed 0

A call must return what the oracle returns, or raise TypeError or ValueError (LinAlgError where that is documented) and
leave `gram` unchanged. The fake kernel must accept or refuse it like the native op. Exit code 0 if all did; otherwise
the failures are listed, and ``--only NUMBER`` repeats one in this process.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spade_fast import ops
from spade_fast.ops import reference

from .watch import watch

CALLS_OF_CHILD = 5000
PATIENCE = 30.0  # seconds
MEMORY = 12 << 30  # bytes of address space: what a call may not ask for
EDGES = [0, 1, 2, 3, 4, 7, 2**15, 2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64]
INTEGERS: list[Any] = [sign * edge for edge in EDGES for sign in (1, -1)]
NOT_INTEGERS: list[Any] = [True, 2.0, "2", None, [2], np.float64(2), torch.tensor(2)]
# Errors that depend on values or memory, which a fake kernel does not have.
OF_VALUES = ("counts must lie", "order must hold", "order removes", "share memory", "negated", "not positive definite")

Arguments = dict[str, Any]


def normal(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def positive(rng: random.Random, problems: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = normal(rng, problems, columns, 2 * columns + 2)
    return (x @ x.mT / (2 * columns + 2) + 0.1 * torch.eye(columns, dtype=torch.float64)).to(dtype)


def draw_linear(rng: random.Random, dtype: torch.dtype) -> Arguments:
    samples, positions, columns = rng.randint(0, 3), rng.randint(0, 40), rng.randint(0, 20)
    x = normal(rng, samples, positions, columns, dtype=dtype)
    return {"gram": normal(rng, samples, columns, columns, dtype=dtype), "x": x.mT.contiguous().mT}


def draw_conv2d(rng: random.Random, dtype: torch.dtype) -> Arguments:
    samples, images, groups, channels = (rng.randint(1, most) for most in (2, 2, 3, 4))
    kernel, stride, padding, dilation = (
        tuple(rng.randint(least, most) for _ in range(2)) for least, most in ((1, 3), (1, 3), (0, 3), (1, 3))
    )
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + rng.randint(0, 6) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    x = normal(rng, samples * images, groups * channels, *size, dtype=dtype)
    columns = kernel[0] * kernel[1] * channels
    gram = normal(rng, samples, groups, columns, columns, dtype=dtype)
    geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return {"gram": gram, "x": x.contiguous(memory_format=torch.channels_last) if rng.random() < 0.5 else x, **geometry}


def draw_mirror(rng: random.Random, dtype: torch.dtype) -> Arguments:
    columns = rng.randint(0, 40)
    return {"gram": normal(rng, rng.randint(0, 3), columns, columns, dtype=dtype)}


def draw_factor(rng: random.Random, dtype: torch.dtype) -> Arguments:
    hessian = positive(rng, rng.randint(0, 3), rng.randint(0, 12), dtype)
    return {"hessian": hessian, "damp": rng.choice([0, 0.5, torch.rand(len(hessian)), torch.tensor(0.5)])}


def draw_path(rng: random.Random, dtype: torch.dtype) -> Arguments:
    block = rng.randint(1, 4)
    weight, matrix = draw_problem(rng, dtype, block * rng.randint(0, 4))
    return {"weight": weight, "hinv": matrix, "block": block}


def draw_nm(rng: random.Random, dtype: torch.dtype) -> Arguments:
    m = rng.randint(1, 4)
    weight, matrix = draw_problem(rng, dtype, m * rng.randint(0, 4))
    return {"weight": weight, "hinv": matrix, "n": rng.randint(0, m), "m": m}


def draw_problem(rng: random.Random, dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor]:
    problems = rng.randint(0, 2)
    return normal(rng, problems, rng.randint(0, 3), columns, dtype=dtype), positive(rng, problems, columns, dtype)


def draw_solution(rng: random.Random, dtype: torch.dtype) -> Arguments:
    block, blocks = rng.randint(1, 3), rng.randint(0, 4)
    weight, hessian = draw_problem(rng, dtype, block * blocks)
    problems, rows, _ = weight.shape
    steps = rng.randint(0, blocks)
    order = normal(rng, problems, rows, blocks).argsort(2)[..., :steps]
    levels = [] if rng.random() < 0.5 else [rng.randint(0, 3)]
    counts = torch.tensor([rng.randint(0, steps) for _ in range(problems * rows * (levels or [1])[0])])
    index = rng.choice([torch.int32, torch.int64])
    return {
        "weight": weight,
        "hessian": hessian,
        "hinv": torch.linalg.inv(hessian),
        "order": order.to(index),
        "counts": counts.to(index).reshape(*levels, problems, rows),
        "block": block,
    }


def draw_sparsegpt(rng: random.Random, dtype: torch.dtype) -> Arguments:
    m = rng.choice([0, 0, rng.randint(1, 4)])
    weight, hessian = draw_problem(rng, dtype, max(m, 1) * rng.randint(0, 10))
    problems, rows, columns = weight.shape
    if rng.random() < 0.5:
        weight = weight.where(normal(rng, *weight.shape) > 0, 0)
    mask_block = rng.randint(1, columns + 2)
    sizes = [rows * (min(columns, start + mask_block) - start) for start in range(0, columns, mask_block)]
    counts = [[rng.randint(0, size) for size in sizes] for _ in range(problems)]
    of_inverse = rng.random() < 0.5
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return {
        "weight": weight,
        "factor": upper if of_inverse else torch.linalg.inv(upper).mT,
        "counts": torch.tensor(counts, dtype=torch.int64).reshape(problems, len(sizes)),
        "mask_block": mask_block,
        "n": rng.randint(0, m),
        "m": m,
        "include_ties": rng.random() < 0.3,
        "keep_zeros": rng.random() < 0.5,
        "of_inverse": of_inverse,
    }


DRAWS: dict[str, Callable[[random.Random, torch.dtype], Arguments]] = {
    "gram_linear_": draw_linear,
    "gram_conv2d_": draw_conv2d,
    "mirror_upper_": draw_mirror,
    "inverse_cholesky": draw_factor,
    "reverse_cholesky": draw_factor,
    "obs_path": draw_path,
    "nm_path": draw_nm,
    "obs_solution": draw_solution,
    "sparsegpt": draw_sparsegpt,
}


def change_tensor(rng: random.Random, tensor: Tensor, others: list[Any]) -> Any:
    """Another tensor, or something else, in its place."""
    if tensor.numel() > 10**6:  # an earlier change made it
        return tensor
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool, torch.int32]
    changes: list[Callable[[], Any]] = [
        lambda: tensor.to(rng.choice(dtypes)),
        lambda: tensor.tolist(),
        lambda: tensor.numpy(),
        lambda: rng.choice([None, 1.0, 1j, "weight", np.float32(1)]),
        lambda: torch.tensor(1.0, dtype=tensor.dtype),
        lambda: tensor[None],
        lambda: tensor[0],
        lambda: tensor[..., :-1],
        lambda: tensor[:0],
        lambda: torch.cat([tensor, tensor], rng.randrange(max(1, tensor.dim()))),
        lambda: tensor[:1].expand(rng.randint(0, 3), *tensor.shape[1:]),
        lambda: tensor[..., :1].expand(tensor.shape),
        lambda: torch.cat([tensor, tensor], -1)[..., ::2],
        lambda: tensor.mT,
        lambda: torch._neg_view(tensor),
        lambda: torch.complex(tensor, tensor).conj().imag,
        lambda: tensor.to_sparse(),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.quint8),
        lambda: tensor.to("meta"),
        lambda: torch.zeros(1, dtype=tensor.dtype).expand(*tensor.shape[:-1], rng.choice([2**31, 2**40])),
        lambda: torch.empty(0, *(2**20 for _ in range(tensor.dim() - 1)), dtype=tensor.dtype),
        lambda: rng.choice([other for other in others if isinstance(other, Tensor)]),
        lambda: tensor * rng.choice([float("nan"), float("inf"), -1, 0, 1e30, 1e-30]),
        lambda: tensor + rng.choice([x for x in INTEGERS if -(2**63) <= x < 2**63]),
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError, TypeError, ValueError):  # torch cannot make it of this tensor
        return tensor


def change(rng: random.Random, arguments: Arguments) -> None:
    """Replace one argument."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, Tensor):
        arguments[name] = change_tensor(rng, value, list(arguments.values()))
    elif isinstance(value, (tuple, list)) and value:
        pair = [*value, *value][:2]
        for place in rng.choice([[0], [1], [0, 1]]):
            pair[place] = rng.choice([*INTEGERS, *INTEGERS, *INTEGERS, *NOT_INTEGERS])
        arguments[name] = rng.choice([tuple(pair), tuple(pair), pair, tuple(pair[:1]), (*pair, 1), pair[0]])
    else:
        arguments[name] = rng.choice([*INTEGERS, *INTEGERS, *NOT_INTEGERS, 1e300, 1j, float("nan")])


def finite(arguments: Arguments) -> bool:
    """Whether the oracle has an answer: nothing is NaN, infinite or so large that something overflows."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    small = all(t.numel() < 10**6 for t in tensors)
    return small and all(bool((t.double().abs() < 1e6).all()) for t in tensors if t.numel())


def compare(name: str, arguments: Arguments, before: Tensor | None, result: Any) -> str:
    """What is wrong with a result; empty if nothing is."""
    given = dict(arguments)
    exact = all(t.dtype != torch.float32 for t in given.values() if isinstance(t, Tensor))
    if name in ("gram_linear_", "gram_conv2d_"):
        x, gram = given.pop("x"), given.pop("gram")
        if gram.numel() == 0 or not (finite({"x": x}) and bool((before.abs() < 1e6).all())):
            return ""
        if x.numel() == 0:
            truth = torch.zeros_like(before)
        elif name == "gram_linear_":
            truth = reference.gram_linear(x)
        elif any(size > 1000 for size in np.ravel(given["padding"])):
            return ""  # the oracle would fill the memory
        else:
            pairs = {key: value if isinstance(value, (tuple, list)) else (value, value) for key, value in given.items()}
            truth = reference.gram_conv2d(x, gram.shape[1], samples=gram.shape[0], **pairs)
        error = (gram.double() - before.double() - truth).triu().abs().max()
        scale = 1 + truth.abs().max() + before.double().abs().max()
        return "" if error <= (1e-12 if exact else 1e-5) * scale else f"differs from the oracle by {error:g}"
    if not finite(given):
        return ""
    if name == "mirror_upper_":
        assert before is not None
        upper = before.triu()
        return "" if torch.equal(result, upper + upper.triu(1).mT) else "is not the mirror image"
    if not exact:
        return ""  # masks may differ from those in float64; float64 shows the rest
    if name.endswith("_cholesky") and result[0].numel() == 0:
        return ""
    if name.endswith("_cholesky"):
        damp = given["damp"]
        oracle = getattr(reference, name)
        factor, info = oracle(given["hessian"], damp if isinstance(damp, Tensor) else float(damp))
        hessian = given["hessian"]
        good = (info == 0) & (result[1] == 0)
        same = torch.allclose(result[0][good], factor[good], rtol=1e-6, atol=1e-8)
        positive_damp = bool((damp >= 0).all()) if isinstance(damp, Tensor) else damp >= 0
        definite_too = positive_damp and definite(hessian)
        if definite_too and bool(result[1].any()):
            return "calls a positive definite matrix indefinite"
        return "" if same or not torch.equal(hessian, hessian.mT) else "differs from the oracle"
    if not all(definite(given[key]) for key in ("hinv", "hessian", "factor") if key in given):
        return ""
    if name == "obs_solution":
        product = given["hessian"] @ given["hinv"]
        if result.numel() == 0 or not torch.allclose(product, torch.eye(product.shape[-1]).to(product)):
            return ""
    if given.get("m", 0) > 0 and name == "sparsegpt":
        given["mask_block"] = max(1, given["weight"].shape[2])  # not used by the op
    truth = getattr(reference, name)(**given)
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (result, truth))
    same = all(a.shape == b.shape for a, b in zip(found, expected, strict=True)) and all(
        torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7) for a, b in zip(found, expected, strict=True)
    )
    return "" if same else "differs from the oracle"


def definite(matrix: Tensor) -> bool:
    """Whether matrices are well-conditioned, as Hessians are, or triangular with such a diagonal."""
    if matrix.numel() == 0:
        return True
    triangular = torch.equal(matrix, matrix.triu()) or torch.equal(matrix, matrix.tril())
    if triangular and not torch.equal(matrix, matrix.mT):
        return bool((matrix.diagonal(dim1=1, dim2=2).abs() > 1e-3).all())
    if not torch.allclose(matrix, matrix.mT):
        return False
    values = torch.linalg.eigvalsh(matrix)
    return bool((values > 1e-4).all())


def on_meta(value: Any) -> Any:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    if dense:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def outcome(call: Callable[..., Any], arguments: Arguments) -> tuple[str, Any]:
    """The kind of error and its message, or "accepted" and the result."""
    try:
        return "accepted", call(**arguments)
    except (TypeError, ValueError) as error:
        return "TypeError" if isinstance(error, TypeError) else "ValueError", str(error)
    except torch.linalg.LinAlgError as error:
        return "LinAlgError", str(error)


def run(number: int, seed: int) -> tuple[str, str]:
    """Make one call; return its outcome, and what is wrong or nothing."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(DRAWS))
    ops.set_simd_level(rng.choice(ops.simd_levels()))
    arguments = DRAWS[name](rng, rng.choice([torch.float32, torch.float64, torch.float64]))
    changes = rng.choice([0, 1, 1, 1, 2])
    for _ in range(changes):
        change(rng, arguments)
    gram = arguments.get("gram")
    known = isinstance(gram, Tensor) and gram.layout == torch.strided and not gram.is_meta
    known = known and not (gram.is_nested or gram.is_quantized or gram.dtype == torch.bool)
    before = gram.clone() if known and gram.numel() < 10**6 else None
    call = getattr(ops, name)
    kind, result = outcome(call, arguments)
    if changes == 0 and kind != "accepted":
        return kind, f"{name} refuses a sound call: {result}"
    if kind == "LinAlgError" and name != "obs_solution":
        return kind, f"{name} raises LinAlgError: {result}"
    if kind != "accepted" and before is not None and not torch.equal(gram.nan_to_num(), before.nan_to_num()):
        return kind, f"{name} refuses a call, but changed gram: {result}"
    fake, message = outcome(call, {key: on_meta(value) for key, value in arguments.items()})
    anywhere = any(isinstance(value, Tensor) and value.is_meta for value in arguments.values())
    if kind != "accepted" and any(text in result for text in OF_VALUES):
        fake = kind
    if fake != kind and not anywhere:
        return kind, f"{name}: native {kind} ({result}), fake {fake} ({message})"
    if kind != "accepted" or anywhere:
        return kind, ""
    wrong = compare(name, arguments, before, result)
    return kind, f"{name} {wrong}" if wrong else ""


def child(first: int, last: int, seed: int) -> None:
    torch.set_num_threads(2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, last):
        print("call", number, flush=True)
        try:
            kind, wrong = run(number, seed)
        except Exception as error:
            kind, wrong = "", f"raises {type(error).__name__}: {error}"
        print("fail " + " ".join(wrong.split()) if wrong else f"ok {kind}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(run(options.only, options.seed))
        return 0
    if options.child:
        child(*options.child, options.seed)
        return 0
    outcomes: Counter[str] = Counter()
    failures: dict[int, str] = {}
    for first in range(0, options.calls, CALLS_OF_CHILD):
        last = min(options.calls, first + CALLS_OF_CHILD)
        script = [sys.executable, "-m", __spec__.name, "--seed", str(options.seed), "--child"]
        found = watch(lambda number, last=last, script=script: [*script, str(number), str(last)], first, last, PATIENCE)
        outcomes += found.outcomes
        failures |= found.failures
    print(f"{options.calls} calls: {dict(outcomes)}, {len(failures)} failures")
    for number, text in failures.items():
        print(f"{number}: {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
