"""Words left out and masked by TokenAugmenter: what stays, what follows its token, and tokenizers of all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spade_fast import TokenAugmenter
from spade_fast._util.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "weather", "was", "good", "un", "##known", "##s", "."]
PAD, UNK, CLS, SEP, MASK = range(5)


def texts(batches: Any) -> Iterator[list[int]]:
    for batch in batches:
        yield from (batch["input_ids"] if isinstance(batch, dict) else batch).tolist()


def sample(*ids: int, padding: int = 0) -> dict[str, Tensor]:
    row = torch.tensor([[CLS, *ids, SEP, *[PAD] * padding]])
    mask = torch.tensor([[1] * (len(ids) + 2) + [0] * padding])
    return {"input_ids": row, "token_type_ids": 7 * row, "attention_mask": mask}


def augmenter(**options: Any) -> TokenAugmenter:
    return TokenAugmenter(**{"special_ids": [PAD, CLS, SEP], "mask_id": MASK, "n": 200, "seed": 1, **options})


def test_words_are_left_out_and_masked_as_often_as_asked() -> None:
    given = sample(*range(10, 30))
    made = list(texts(augmenter(n=1000, drop=0.2, mask=0.3)(given)))
    assert len(made) == 1000 and all(one[0] == CLS and one[-1] == SEP for one in made)
    assert abs(sum(22 - len(one) for one in made) / 20000 - 0.2) < 0.01
    assert abs(sum(one.count(MASK) for one in made) / 20000 - 0.3) < 0.01
    for one in made:
        kept = [token for token in one[1:-1] if token != MASK]
        assert kept == sorted(kept) and set(kept) <= set(range(10, 30))


def test_everything_follows_its_token() -> None:
    given = {
        **sample(*range(10, 20), padding=3),
        "bbox": torch.arange(15)[None, :, None].expand(1, 15, 4),
        "decoder_input_ids": torch.arange(15)[None],
        "pixel_values": torch.randn(1, 15, 4),
        "labels": torch.tensor([1]),
        "return_dict": True,
    }
    for batch in augmenter(n=40, batch_size=4)(given):
        count, length = batch["input_ids"].shape
        assert list(batch) == list(given) and batch["return_dict"] is True
        assert torch.equal(batch["token_type_ids"], 7 * batch["input_ids"])
        places = batch["bbox"][..., 0]
        assert torch.equal(given["input_ids"][0][places], batch["input_ids"]) and batch["bbox"].shape[1:] == (length, 4)
        assert bool(batch["attention_mask"].all()) and int(places.max()) == 11, "padding is left out"
        for name in ("decoder_input_ids", "pixel_values", "labels"):
            assert torch.equal(batch[name], given[name].expand_as(batch[name])) and len(batch[name]) == count


def test_texts_of_one_length_form_a_batch() -> None:
    batches = list(augmenter(n=64)(sample(*range(10, 22))["input_ids"]))
    assert all(isinstance(one, Tensor) for one in batches)
    lengths = [one.shape[1] for one in batches]
    assert lengths == sorted(lengths) and len(lengths) < 20 and max(map(len, batches)) == 8


def test_at_least_one_word_stays() -> None:
    made = list(texts(augmenter(drop=1.0)(sample(10, 11, 12))))
    assert {tuple(one) for one in made} == {(CLS, word, SEP) for word in (10, 11, 12)}
    masked = list(texts(augmenter(drop=0, mask=1.0)(sample(10, 11, 12))))
    assert all(one.count(MASK) == 2 and len(one) == 5 for one in masked)


def test_sequences_and_integer_types() -> None:
    ids = torch.tensor([[CLS, 10, 11, 12, SEP]], dtype=torch.int32)
    (batch, *_) = augmenter(mask=0.3)((ids, torch.ones_like(ids), 0.5))
    assert isinstance(batch, tuple) and batch[0].dtype == torch.int32 and batch[0].shape == batch[1].shape
    assert batch[2] == 0.5
    assert torch.equal(ids, torch.tensor([[CLS, 10, 11, 12, SEP]])), "the sample is as it was"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))


def test_words_of_a_tokenizer(tokenizer: Any) -> None:
    given = tokenizer("The weather was unknowns good.", return_tensors="pt")
    assert given["input_ids"].tolist() == [[CLS, 5, 6, 7, 9, 10, 11, 8, 12, SEP]]
    made = list(texts(TokenAugmenter(300, tokenizer, mask=0.3)(given)))
    assert {(9 in one, 10 in one, 11 in one) for one in made} == {(True,) * 3, (False,) * 3}
    assert {one.count(MASK) for one in made if 9 not in one} >= {0, 3}, "dropped, or masked token by token"
    single = list(texts(TokenAugmenter(300, tokenizer, words=False)(given)))
    assert len({(9 in one, 10 in one, 11 in one) for one in single}) == 8
    plain = list(texts(TokenAugmenter(300, tokenizer)(dict(given))))
    assert len({(9 in one, 10 in one, 11 in one) for one in plain}) == 8, "a plain dict does not know the words"


def test_words_of_a_pair_of_texts(tokenizer: Any) -> None:
    given = tokenizer("weather unknowns", "good unknowns", return_tensors="pt")
    assert given.word_ids(0) == [None, 0, 1, 1, 1, None, 0, 1, 1, 1, None]
    made = list(texts(TokenAugmenter(300, tokenizer)(given)))
    assert {(6 in one, 8 in one) for one in made} == {(True, True), (True, False), (False, True), (False, False)}
    assert {one.count(10) for one in made} == {0, 1, 2}


def test_positions_are_those_of_the_shorter_text() -> None:
    given = {**sample(*range(10, 20)), "position_ids": torch.arange(2, 14)[None]}
    for batch in augmenter(n=40)(given):
        count, length = batch["input_ids"].shape
        assert torch.equal(batch["position_ids"], torch.arange(2, 2 + length).expand(count, length))


def test_padding_before_the_text() -> None:
    given = {name: value.flip(1) for name, value in sample(*range(10, 16), padding=3).items()}
    given["position_ids"] = torch.tensor([[9, 9, 9, 0, 1, 2, 3, 4, 5, 6, 7]])
    for batch in augmenter(n=20)(given):
        assert bool(batch["attention_mask"].all()) and PAD not in batch["input_ids"]
        assert batch["position_ids"][0].tolist() == list(range(batch["input_ids"].shape[1]))


def test_unknown_words_are_words(tokenizer: Any) -> None:
    given = tokenizer("The zebra was good.", return_tensors="pt")
    assert UNK in given["input_ids"] and TokenAugmenter(tokenizer=tokenizer).special_ids == {PAD, CLS, SEP}
    assert {UNK in one for one in texts(TokenAugmenter(tokenizer=tokenizer)(given))} == {True, False}


def test_one_special_token_for_everything(tokenizer: Any) -> None:
    """As GPT-2 has it: no mask token, and the unknown token is also the first and the last."""

    class Generator:
        all_special_ids = (SEP,)
        bos_token_id = eos_token_id = unk_token_id = SEP
        mask_token_id = pad_token_id = None

    made = list(texts(TokenAugmenter(tokenizer=Generator())(torch.tensor([[SEP, 10, 11, 12]]))))
    assert all(one[0] == SEP for one in made)
    with pytest.raises(ValueError, match="mask needs a mask token: the tokenizer has none"):
        TokenAugmenter(tokenizer=Generator(), mask=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"special_ids": None}, "give the tokenizer, or the special_ids"),
        ({"special_ids": None, "tokenizer": str}, "tokenizer must be one of transformers, .* got type"),
        ({"special_ids": 3}, "special_ids must be integers, got 3"),
        ({"special_ids": ["a"]}, "special_ids must be an integer, got 'a'"),
        ({"mask_id": -1}, "mask_id must be at least 0"),
        ({"mask_id": None, "mask": 0.1}, "mask needs a mask token"),
        ({"drop": 1.5}, "drop must lie between 0 and 1"),
        ({"drop": 0.6, "mask": 0.6}, "drop and mask must add up to at most 1"),
        ({"words": 1}, "words must be True or False"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        augmenter(**options)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sample(), "'a' has only special tokens of 2 tokens"),
        (sample(10), "'a' has one word of 3 tokens.*needs two"),
        (sample(padding=4), "only special tokens"),
        (torch.zeros(1, 0, dtype=torch.long), "not be empty"),
        (torch.arange(5), r"must be one sample \[1, ...\].*got \[5\]"),
        (torch.zeros(2, 4, dtype=torch.long), r"got \[2, 4\]"),
        (torch.zeros(1, 4, 2, dtype=torch.long), r"shape \[1, T\], got \[1, 4, 2\]"),
        ({"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 1, 5, 5)}, "must have the same shape"),
    ],
)
def test_bad_samples(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        augmenter()(given, "a")
    assert isinstance(caught.value, UserError)
