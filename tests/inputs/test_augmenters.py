"""What all augmenters have in common: guarantees, batches, traces, and errors that name the right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spade_fast import ImageAugmenter, NoiseAugmenter, TokenAugmenter, trace
from spade_fast._util.errors import UserError
from spade_fast.inputs.setup import Setup

ROW = torch.arange(1.0, 25.0)[None]
TEXT = {"input_ids": torch.arange(24)[None], "attention_mask": torch.ones(1, 24).long()}
Make = Callable[..., Any]


def tokens(**options: Any) -> TokenAugmenter:
    return TokenAugmenter(**{"special_ids": [0, 23], "mask_id": 99, "mask": 0.2, **options})


KINDS = [(NoiseAugmenter, ROW), (tokens, TEXT)]


def members(batches: Any) -> list[tuple[float, ...]]:
    """All augmentations, in the order in which they come."""
    found = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in batches]
    return [tuple(one.flatten().tolist()) for batch in found for one in batch]


@pytest.mark.parametrize(("make", "sample"), KINDS)
def test_seed_sample_and_index_alone_determine_an_augmentation(make: Make, sample: Any) -> None:
    batches = make(n=9, seed=5, batch_size=9)(sample, "a")
    first = members(batches)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert members(batches) == first == members(make(n=9, seed=5, batch_size=2)(sample, "a"))
    assert torch.equal(torch.get_rng_state(), state)
    fewer = members(make(n=4, seed=5)(sample, "a"))
    assert set(fewer) < set(first) and len(set(first)) == 9
    assert not set(members(make(n=9, seed=6)(sample, "a"))) & set(first)
    assert not set(members(make(n=9, seed=5)(sample, "b"))) & set(first)
    assert members(make(n=3)(sample, 3)) == members(make(n=3)(sample, "3"))


@pytest.mark.parametrize(("make", "sample"), KINDS)
def test_batches_are_streamed(make: Make, sample: Any) -> None:
    batches = make(n=30, batch_size=4)(sample)
    sizes = [len(batch["input_ids"] if isinstance(batch, dict) else batch) for batch in batches]
    assert len(batches) == len(sizes) and sum(sizes) == 30 and max(sizes) == 4
    assert iter(batches) is not iter(batches)


def test_one_default_number() -> None:
    makes: list[Make] = [ImageAugmenter, NoiseAugmenter, tokens]
    assert {make().n for make in makes} == {Setup().augmentations} == {64}


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 1.5}, {"seed": "x"}, {"batch_size": 0}])
@pytest.mark.parametrize("make", [ImageAugmenter, NoiseAugmenter, tokens])
def test_bad_options_of_all(make: Make, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        make(**options)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 12)
        self.layer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.table(input_ids)).relu() * attention_mask[..., None]
        return self.head(hidden.sum(1) / attention_mask.sum(1, keepdim=True))


def test_traces_of_a_row_and_of_a_text() -> None:
    row = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    table = ROW + torch.randn(50, 24)
    augmenter = NoiseAugmenter(mean=table.mean(0), std=table.std(0))
    assert trace(row, augmenter(ROW), inputs=ROW).layers == ("0", "2")
    made = trace(Reader(), tokens()(TEXT), inputs=TEXT, layers=["layer", "head"])
    assert made.layers == ("layer", "head") and made.decision is not None


@pytest.mark.parametrize(
    ("make", "sample", "error", "message"),
    [
        (NoiseAugmenter, "some text", TypeError, "got str; TokenAugmenter takes"),
        (NoiseAugmenter, ["some", "text"], TypeError, "got str, str; TokenAugmenter"),
        (NoiseAugmenter, TEXT, TypeError, r"got torch.int64 tensor, torch.int64 tensor; TokenAugmenter"),
        (NoiseAugmenter, [], TypeError, "got nothing; TokenAugmenter"),
        (tokens, "some text", TypeError, r'got str: tokenize text with tokenizer\(text, return_tensors="pt"\)'),
        (tokens, {"input_ids": [[0, 1, 2]]}, TypeError, "got list: tokenize text with"),
        (tokens, ROW, TypeError, "integers, got torch.float32 tensor; NoiseAugmenter takes"),
        (tokens, {"pixel_values": ROW}, ValueError, "'input_ids', got 'pixel_values'; NoiseAugmenter takes"),
        (ImageAugmenter, ROW, ValueError, r"got \[1, 24\]; NoiseAugmenter takes samples of any shape"),
    ],
)
def test_the_right_augmenter_is_named(make: Make, sample: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()(sample)
    assert isinstance(caught.value, UserError)
