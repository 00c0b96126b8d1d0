"""Evaluation mode during a block, and what is put back afterwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spade_fast._util.modes import evaluation_mode, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def data() -> Tensor:
    return torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def test_evaluation_mode_restores_modes_and_buffers(data):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), torch.jit.script(nn.BatchNorm1d(4)))
    model[1].eval()
    before = [(name, value.clone()) for name, value in model.state_dict().items()]
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        model.train()(data)
        raise KeyboardInterrupt
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_scale_their_rows_are_restored(kind):
    model = nn.Sequential(kind(6, 4, max_norm=0.5), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    with evaluation_mode(model):
        model(torch.arange(6).reshape(2, 3))
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, before)


def test_blocks_that_overlap(data):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout().eval())
    first, second = evaluation_mode(model), evaluation_mode(model[0])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, False, False]
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]
    with evaluation_mode(model):
        with evaluation_mode(model):
            model.train()
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


class Positions(nn.Module):
    """Builds a table again if it is too short, as rotary positions of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.built = torch.tensor(0)
        self.known: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.built:
            self.register_buffer("table", torch.arange(len(x)) / len(x))
            self.built, self.known, self.size = torch.tensor(len(x)), len(x), x.shape
        return x + self.table[: len(x), None]


@pytest.mark.parametrize("used_before", [False, True])
def test_buffers_that_are_replaced_and_what_is_known_of_them(data, used_before):
    model = Positions()
    if used_before:
        model(data[:5])
    before, expected = dict(vars(model)), copy.deepcopy(model)(data)
    for _ in range(2):
        with evaluation_mode(model):
            model(data)
        assert vars(model).keys() == before.keys() and all(value is before[name] for name, value in vars(model).items())
    assert torch.equal(model(data), expected) and model.known == 30


def test_settings_of_the_process_in_blocks_that_overlap(data):
    """The thread that ends first does not restore them for the other, and the last one does."""
    compilations: list[torch.fx.GraphModule] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        compilations.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(4, 2), backend=compile_graph)
    began, ended = threading.Event(), threading.Event()
    fused: list[bool] = []

    def outlive() -> None:
        with undisturbed(model):
            began.set()
            assert ended.wait(60)
            model(data)
            fused.append(torch.backends.mha.get_fastpath_enabled())

    thread = threading.Thread(target=outlive)
    with undisturbed(model):
        thread.start()
        assert began.wait(60)
    ended.set()
    thread.join()
    assert fused == [False] and not compilations
    model(data)
    assert torch.backends.mha.get_fastpath_enabled() and len(compilations) == 1


class Averages(nn.Module):
    """Updates a buffer in place by values that can have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0))
        return x


def test_evaluation_mode_frees_buffers_of_gradients(data):
    model = Averages()
    with evaluation_mode(model):
        model(data.requires_grad_())
    assert not model.mean.requires_grad and torch.equal(copy.deepcopy(model).mean, torch.zeros(4))


class MergesWeights(nn.Linear):
    """Changes its weights when its mode changes, as low-rank adapters do."""

    def train(self, mode: bool = True) -> MergesWeights:
        with torch.no_grad():
            self.weight.add_(-1.1 if mode else 1.1)
        return super().train(mode)


def test_evaluation_mode_does_not_run_what_train_and_eval_do(data):
    model = MergesWeights(4, 3)
    before = model.weight.clone()
    with evaluation_mode(model):
        assert not model.training and torch.equal(model.weight, before)
    assert model.training and torch.equal(model.weight, before)
