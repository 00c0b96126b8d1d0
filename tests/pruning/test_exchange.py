"""Weights are exchanged as a whole and restored as a whole, whatever happens meanwhile."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from spade_fast import InvalidValueError, TraceAppliedError, trace, tune
from spade_fast._util import signals
from spade_fast.pruning import exchange
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.traces import Trace


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])


@pytest.fixture
def made(model: nn.Sequential) -> Trace:
    return trace(model, torch.randn(40, 6), sparsity=0.5)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    assert not exchange._exchanged and not exchange._held and not signals.pending and not signals._watching
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(one.detach(), other) for one, other in zip(model.parameters(), before, strict=True))


def rebuilt(made: Trace, pruned: list[PrunedLayer]) -> Trace:
    """A trace made in memory of the same model."""
    return Trace(pruned, made.reports, made.header)


def other_parameter(layers: list[PrunedLayer]) -> None:
    layers[0] = replace(layers[0], parameter="9.weight")


def same_parameter(layers: list[PrunedLayer]) -> None:
    layers[0] = replace(layers[0], parameter="1.weight")


def other_shape(layers: list[PrunedLayer]) -> None:
    layers[2] = replace(layers[2], shape=(36,))


def other_parameter_of_other_shape(layers: list[PrunedLayer]) -> None:
    layers[2] = replace(layers[2], parameter="2.bias")


def other_dtype(layers: list[PrunedLayer]) -> None:
    layers[2] = replace(layers[2], dtype=torch.float64, values=layers[2].values.double())


def test_autocast_sees_the_exchanged_weights(model, made):
    sample = torch.randn(1, 6)
    with made.applied(model), torch.autocast("cpu", torch.bfloat16):
        expected = model(sample)
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(sample)  # its casts of the weights are cached until the end of the block
        with made.applied(model):
            assert torch.equal(model(sample), expected) and not torch.equal(dense, expected)
        assert torch.equal(model(sample), dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_parameter, "layer '0' of the trace has parameter '9.weight', which the model lacks"),
        (same_parameter, "layers '0' and '1' of the trace stand for the same weights"),
        (other_shape, r"'2.weight' is torch.float32 \[36\] in the trace, torch.float32 \[6, 6\] in the model"),
        (other_parameter_of_other_shape, r"'2.bias' is torch.float32 \[6, 6\] in the trace, torch.float32 \[6\] in"),
        (other_dtype, r"'2.weight' is torch.float64 \[6, 6\] in the trace, torch.float32 \[6, 6\] in the model"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_layers_that_the_model_does_not_have(model, made, tmp_path, change, message, from_file):
    layers = list(made._pruned.values())
    change(layers)
    wrong, before = rebuilt(made, layers), weights(model)
    if from_file:
        wrong.save(tmp_path / "t")
        wrong = Trace.load(tmp_path / "t")
    versions = [parameter._version for parameter in model.parameters()]
    with pytest.raises(InvalidValueError, match=message), wrong.applied(model):
        raise AssertionError
    assert equal(model, before) and [parameter._version for parameter in model.parameters()] == versions
    with made.applied(model):
        pass


def test_layers_of_one_name(made):
    with pytest.raises(InvalidValueError, match="two layers of the trace have the same name"):
        rebuilt(made, [made._pruned["0"], made._pruned["0"]])


@pytest.mark.parametrize(
    "changes",
    [{"shape": (0, 6)}, {"shape": (-6, -6)}, {"shape": (6, 7)}, {"values": torch.zeros(3)}, {"dtype": torch.float16}],
)
def test_layers_that_make_no_sense(made, changes):
    with pytest.raises(InvalidValueError, match="layer '0'"):
        replace(made._pruned["0"], **changes)


@pytest.mark.parametrize("tied", ["same parameter", "same memory", "part of the memory"])
def test_two_names_of_one_weight(model, made, tied):
    first = model[0].weight
    if tied == "same parameter":
        model[1].weight = first
    elif tied == "same memory":
        model[1].weight = nn.Parameter(first.data)
    else:
        memory = torch.randn(54)
        model[0].weight, model[1].weight = (nn.Parameter(memory[at : at + 36].view(6, 6)) for at in (0, 18))
    before, layers = weights(model), list(made._pruned.values())
    with pytest.raises(InvalidValueError, match="layers '0' and '1'"), WeightsApplied(model, layers):
        raise AssertionError
    assert equal(model, before)


def test_weights_side_by_side_in_memory(model, made):
    memory = torch.randn(6, 12)
    model[0].weight, model[1].weight = nn.Parameter(memory[:, :6]), nn.Parameter(memory[:, 6:])
    before = weights(model)
    with WeightsApplied(model, made._pruned.values()):
        assert all(torch.equal(model[int(name)].weight, made.weight(name)) for name in made.layers)
    assert equal(model, before)


@pytest.mark.parametrize("failing", ["0", "1", "2"])
@pytest.mark.parametrize("error", [None, KeyError("in the block")])
def test_all_are_restored_if_one_cannot_be(model, made, failing, error):
    before = weights(model)
    message = f"'{failing}.weight' could not be restored in place"
    with pytest.raises(TraceAppliedError, match=message), made.applied(model):
        model[int(failing)].weight.data = torch.zeros(5)
        if error is not None:
            raise error
    assert equal(model, before)
    with made.applied(model):
        pass


def test_a_context_serves_once(model, made):
    before, applied = weights(model), made.applied(model)
    with applied:
        with pytest.raises(TraceAppliedError, match="one `with` statement"), applied:
            raise AssertionError
        assert torch.equal(model[1].weight, made.weight("1"))
    with pytest.raises(TraceAppliedError), applied:
        raise AssertionError
    assert equal(model, before)


def test_nothing_is_pruned_while_a_trace_is_applied(model, made):
    x, refused = torch.randn(20, 6), []

    def prune() -> None:
        for action in (
            lambda: trace(model, x, sparsity=0.5),
            lambda: tune(model, [x], lambda network, sample: 0.0, candidates=[0.5], stages="blocks"),
        ):
            with pytest.raises(TraceAppliedError, match="a trace is applied to this model: prune it after"):
                action()
            refused.append(action)

    with made.applied(model):
        prune()
        thread = threading.Thread(target=prune)
        thread.start()
        thread.join()
    assert len(refused) == 4
    assert torch.equal(trace(model, x, sparsity=0.5).weight("0"), trace(model, x, sparsity=0.5).weight("0"))


def test_no_trace_is_applied_while_the_model_is_pruned(model, made):
    before = weights(model)

    def batches() -> Iterator[Tensor]:
        with pytest.raises(TraceAppliedError, match="the model is being pruned"), made.applied(model):
            raise AssertionError
        other = trace(model, torch.randn(20, 6), sparsity=0.25)  # pruning again is harmless
        assert other.sparsity == 0.25
        yield torch.randn(20, 6)

    trace(model, batches(), sparsity=0.5)
    assert equal(model, before)


class Interrupt(BaseException):
    """What the handlers of these tests raise."""


def interrupt(number, frame):
    raise Interrupt


@pytest.fixture
def raising(request):
    """A signal whose handler raises, as that of SIGINT does."""
    number = getattr(request, "param", signal.SIGINT)
    before = signal.signal(number, interrupt)
    yield number
    signal.signal(number, before)


@pytest.mark.parametrize("raising", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], indirect=True)
def test_a_signal_between_any_two_lines(model, made, raising):
    """Also in the first instruction of each function, where Python runs handlers too."""
    before, files = weights(model), (exchange.__file__, signals.__file__)
    for place in count():
        left, inside = place, False

        def tracer(frame, event, argument, place=place):
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event in ("call", "line"):
                left -= 1
                if left == -1:
                    signal.raise_signal(raising)
            return tracer

        tracing = sys.gettrace()
        sys.settrace(tracer)
        try:
            with made.applied(model):
                inside = True
                assert torch.equal(model[1].weight, made.weight("1"))
        except Interrupt:
            arrived = True
        else:
            arrived = False
        finally:
            sys.settrace(tracing)
        assert equal(model, before) and not exchange._exchanged and not signals.pending, f"{place}, {inside}"
        assert signal.getsignal(raising) is interrupt and not signals._watching
        if not arrived:
            assert left >= 0, "every signal arrives"
            break
    assert place > 100


def test_signals_at_random_moments(raising):
    """From another process, while the weights of a network are exchanged that takes some milliseconds."""
    tries, arrived, moments = 60, 0, random.Random(0)
    model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(8)])
    made = trace(model, torch.randn(300, 200), sparsity=0.5, solver="sparsegpt")
    before, start = weights(model), time.perf_counter()
    with made.applied(model):
        pass
    once = time.perf_counter() - start
    sender = (
        "import os, signal, sys, time\n"
        "print(flush=True)\n"
        "for line in sys.stdin:\n"
        "    end = time.perf_counter() + float(line)\n"
        "    while time.perf_counter() < end: pass\n"
        f"    os.kill(os.getppid(), {int(raising)})\n"
    )
    command = [sys.executable, "-S", "-c", sender]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        for _ in range(tries):
            line = f"{1.3 * once * moments.random():.9f}\n"
            try:
                child.stdin.write(line)
                with made.applied(model):
                    pass
                time.sleep(10)
            except Interrupt:
                arrived += 1
            assert equal(model, before) and not exchange._exchanged and not signals.pending
            assert signal.getsignal(raising) is interrupt
        child.stdin.close()
    assert arrived == tries


def test_handlers_that_do_not_raise(model, made):
    seen: list[tuple[int, bool]] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append((number, frame is not None)))
    try:
        with WeightsApplied(model, made._pruned.values(), lambda _: signal.raise_signal(signal.SIGUSR1)):
            assert seen == [(signal.SIGUSR1, True)] and torch.equal(model[1].weight, made.weight("1"))
            signal.raise_signal(signal.SIGUSR1)
            assert len(seen) == 2
            own = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN, "what the block installs stays"
        signal.signal(signal.SIGUSR1, own)
        signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_several_waiting_signals_all_arrive(model, made, raising):
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))

    def both(_: nn.Module) -> None:
        signal.raise_signal(raising)
        signal.raise_signal(signal.SIGUSR1)
        assert not seen

    try:
        with pytest.raises(Interrupt), WeightsApplied(model, made._pruned.values(), both):
            raise AssertionError
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_traces_that_end_in_another_order(model, made, raising):
    twin = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    twin.load_state_dict(model.state_dict())
    before, one, other = weights(model), made.applied(model), made.applied(twin)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert equal(model, before) and not equal(twin, before)
    with pytest.raises(Interrupt):
        signal.raise_signal(raising)
    other.__exit__(None, None, None)
    assert equal(twin, before)


def test_other_threads(model, made, raising):
    """They receive no signals, and leave those of the main thread alone."""
    failed: list[BaseException] = []

    def apply() -> None:
        try:
            with made.applied(model):
                assert signal.getsignal(raising) is interrupt
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=apply)
    thread.start()
    thread.join()
    assert not failed
