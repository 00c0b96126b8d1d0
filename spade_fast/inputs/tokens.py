"""Calibration data of text: a sample's tokens with words masked or left out, determined by ``(seed, sample id)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.checks import integer, kind, number
from spade_fast._util.draws import generator_of
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.inputs.augmenters import (
    AUGMENTATIONS,
    Augmentations,
    Augmenter,
    check_single,
    entries_of,
    in_form_of,
    repeated,
)

_STRUCTURAL = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_CONTENT = ("unk_token_id", "mask_token_id")


class TokenAugmenter(Augmenter):
    """Makes the texts on which the trace of one text is calibrated: its tokens, with words left out or masked.

    Each word is left out with one probability, or replaced by the mask token with another. Special tokens stay, and at
    least one word. Padding, where an attention mask tells it, is left out. Texts are drawn independently, and text `i`
    depends only on ``(seed, sample id, i)``, not on `n`, the batch size, the device or torch's global random state.

    What follows a word that is left out moves up, and nothing is padded: texts of one length form a batch, shorter ones
    first. So attention masks are all ones, networks need none, and no layer is calibrated on padding.

    Parameters
    ----------
    n : int
        Number of texts.
    tokenizer : optional
        Tokenizer of transformers, which knows the special tokens and the mask token.
    seed : int
        Any integer.
    batch_size : int, optional
        Most texts per batch; None for 8 on a CPU and 64 elsewhere. It affects only memory and speed.
    special_ids : iterable of int, optional
        Ids that stay; by default the tokenizer's special ones, apart from those of unknown words and masks. Needed
        without a tokenizer.
    mask_id : int, optional
        Id of the mask token; by default the tokenizer's.
    drop : float
        Probability with which a word is left out.
    mask : float
        Probability with which a word is masked; at most ``1 - drop``.
    words : bool
        Treat the tokens of a word alike, where the sample comes from a fast tokenizer, which knows the words
        (``word_ids()``); otherwise, and with False, each token is a word.

    Raises
    ------
    TypeError, ValueError
        A parameter has the wrong type or is out of range, neither a tokenizer nor `special_ids` is given, or `mask` is
        above 0 without a mask token.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import TokenAugmenter
    >>> sample = {"input_ids": torch.tensor([[1, 7, 8, 9, 2]]), "attention_mask": torch.ones(1, 5).long()}
    >>> augmenter = TokenAugmenter(n=64, special_ids=[1, 2])
    >>> sorted({(len(ids), *ids[[0, -1]].tolist()) for batch in augmenter(sample) for ids in batch["input_ids"]})
    [(3, 1, 2), (4, 1, 2), (5, 1, 2)]
    """

    def __init__(
        self,
        n: int = AUGMENTATIONS,
        tokenizer: Any = None,
        seed: int = 0,
        batch_size: int | None = None,
        *,
        special_ids: Iterable[int] | None = None,
        mask_id: int | None = None,
        drop: float = 0.3,
        mask: float = 0.0,
        words: bool = True,
    ) -> None:
        super().__init__(n, seed, batch_size)
        self.special_ids = _special_ids(tokenizer, special_ids)
        self.mask_id = getattr(tokenizer, "mask_token_id", None) if mask_id is None else integer("mask_id", mask_id, 0)
        self.drop = number("drop", drop, 0, 1)
        self.mask = number("mask", mask, 0, 1)
        if self.drop + self.mask > 1:
            raise InvalidValueError(f"drop and mask must add up to at most 1, got {drop} and {mask}")
        if self.mask and self.mask_id is None:
            raise InvalidValueError("mask needs a mask token: the tokenizer has none; give mask_id, or drop alone")
        if not isinstance(words, bool):
            raise InvalidTypeError(f"words must be True or False, got {words!r}")
        self.words = words

    def __call__(self, sample: Any, sample_id: str | int = 0) -> Augmentations[Any]:
        """Return the texts made of one, which can be iterated any number of times.

        Parameters
        ----------
        sample : mapping, Tensor ``[1, T]`` or sequence
            What a tokenizer of transformers returns for one text, with ``return_tensors="pt"``: token ids as
            ``"input_ids"``, and more. Or the ids alone, or a sequence that begins with them. Other integers
            ``[1, T, ...]``, such as ``"attention_mask"`` and ``"token_type_ids"``, follow their tokens, except those
            named ``decoder_...``; ``"position_ids"`` lose the last ones; everything else is repeated as it is.
        sample_id : str or int
            Name of the sample. With the seed it determines all random numbers; ``0`` and ``"0"`` are the same sample.

        Returns
        -------
        iterable of dict, Tensor ``[N, T']`` or tuple
            Batches in the form of the sample, with its dtypes and devices; `len` is their number.

        Raises
        ------
        TypeError
            The ids are not integers in a tensor.
        ValueError
            The ids or the attention mask are not ``[1, T]``, or fewer than two words are not special.
        """
        return _Texts(self, sample, str(sample_id))

    def __repr__(self) -> str:
        return f"TokenAugmenter(n={self.n}, seed={self.seed}, drop={self.drop:g}, mask={self.mask:g})"


class _Texts(Augmentations[Any]):
    def __init__(self, augmenter: TokenAugmenter, sample: Any, sample_id: str) -> None:
        self._sample, self._entries = sample, entries_of(sample)
        self._key = "input_ids" if isinstance(sample, Mapping) else next(iter(self._entries), None)
        self._ids = _checked_ids(sample, self._entries, self._key)
        self._mask_id = augmenter.mask_id
        mask = self._entries.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else torch.ones_like(self._ids)
        if mask.shape != self._ids.shape:
            shapes = f"{list(self._ids.shape)} and {list(mask.shape)}"
            raise InvalidValueError(f"input_ids and attention_mask must have the same shape, got {shapes}")
        self._text = mask[0].cpu() != 0  # the rest is padding
        words = self._words(augmenter)
        numbers = {word: place for place, word in enumerate(sorted({one for one in words if one is not None}))}
        if len(numbers) < 2:
            found = "one word" if numbers else "only special tokens"
            hint = " (with words=False, each token is a word)" if augmenter.words and len(words) > 1 else ""
            raise InvalidValueError(
                f"the sample {sample_id!r} has {found} of {len(words)} tokens: to leave words out, TokenAugmenter "
                f"needs two{hint}"
            )
        generator = generator_of(f"tokens/{augmenter.seed}/{sample_id}")
        draws = torch.rand(augmenter.n, len(numbers), generator=generator, dtype=torch.float64)
        changed = draws < augmenter.drop + augmenter.mask
        changed[torch.arange(augmenter.n), draws.argmax(1)] &= ~changed.all(1)
        of_token = torch.tensor([-1 if word is None else numbers[word] for word in words])
        changed = changed[:, of_token] & (of_token >= 0)
        dropped = changed & (draws < augmenter.drop)[:, of_token]
        self._kept, self._masked = self._text & ~dropped, changed & ~dropped
        lengths = self._kept.sum(1).tolist()
        batches = [
            batch
            for length in sorted(set(lengths))
            for batch in augmenter.divide([i for i, one in enumerate(lengths) if one == length], self._ids.device)
        ]
        super().__init__(batches)

    def _words(self, augmenter: TokenAugmenter) -> list[tuple[int, int] | None]:
        """Return each token's word, as the number of its text in a pair of texts and its own; None if it stays."""
        ids: list[int] = self._ids[0].tolist()
        words: list[tuple[int, int] | None] = [(0, place) for place in range(len(ids))]
        if augmenter.words and getattr(self._sample, "is_fast", False):
            numbers, of_text = self._sample.word_ids(0), self._sample.sequence_ids(0)
            if len(numbers) != len(ids):
                raise InvalidValueError(f"the sample has {len(ids)} input_ids, but its word_ids() are {len(numbers)}")
            words = [
                None if number is None else (text or 0, number) for number, text in zip(numbers, of_text, strict=True)
            ]
        tokens = zip(words, ids, self._text.tolist(), strict=True)
        return [word if one not in augmenter.special_ids and is_text else None for word, one, is_text in tokens]

    def _batch(self, indices: Sequence[int]) -> Any:
        count = len(indices)
        chosen = list(indices)
        places = self._kept[chosen].nonzero()[:, 1].view(count, -1).to(self._ids.device)
        made = {}
        for key, value in self._entries.items():
            if key != self._key and not self._follows_tokens(key, value):
                made[key] = repeated(repr(key), value, count)
                continue
            # Positions are those of a text, not of its tokens, which move up.
            moved = key == "position_ids" and value.dim() == 2
            if moved:
                made[key] = repeated(key, value[:, self._text.to(value.device)][:, : places.shape[1]], count)
            else:
                made[key] = value[0][places]
            if key == self._key and self._mask_id is not None:
                masked = self._masked[chosen].to(self._ids.device).gather(1, places)
                made[key] = made[key].masked_fill(masked, self._mask_id)
        return in_form_of(self._sample, made)

    def _follows_tokens(self, key: Any, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.shape[:2] != self._ids.shape:
            return False
        return key == "attention_mask" or not (value.is_floating_point() or str(key).startswith("decoder_"))


def _special_ids(tokenizer: Any, given: Any) -> frozenset[int]:
    """Return the ids of the tokens that stay: those given, or those that a tokenizer puts around and beside text."""
    if given is not None:
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise InvalidTypeError(f"special_ids must be integers, got {given!r}")
        return frozenset(integer("special_ids", one) for one in given)
    if tokenizer is None:
        raise InvalidValueError("give the tokenizer, or the special_ids that stay (an empty list for none)")
    if not hasattr(tokenizer, "all_special_ids"):
        raise InvalidTypeError(
            f"tokenizer must be one of transformers, with all_special_ids, got {type(tokenizer).__name__}; give "
            "special_ids and mask_id instead"
        )
    content, structural = ({getattr(tokenizer, name, None) for name in names} for names in (_CONTENT, _STRUCTURAL))
    return frozenset(tokenizer.all_special_ids) - (content - structural)


def _checked_ids(sample: Any, entries: Mapping[Any, Any], key: Any) -> Tensor:
    """Return the token ids ``[1, T]`` of a sample, or raise TypeError or ValueError."""
    if isinstance(sample, Mapping) and key not in entries:
        names = ", ".join(map(repr, entries)) or "nothing"
        raise InvalidValueError(
            f"the sample must have token ids as 'input_ids', got {names}; NoiseAugmenter takes other data"
        )
    ids = entries.get(key)
    if not isinstance(ids, Tensor):
        raise InvalidTypeError(
            f'token ids must be a tensor, got {kind(ids)}: tokenize text with tokenizer(text, return_tensors="pt")'
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidTypeError(f"token ids must be integers, got {kind(ids)}; NoiseAugmenter takes other data")
    check_single("token ids", ids)
    if ids.dim() != 2:
        raise InvalidValueError(f"token ids must have shape [1, T], got {list(ids.shape)}")
    return ids
