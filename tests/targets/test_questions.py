"""The targets within outputs and layers: their numbers and what is kept of them; names and bad input of all targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spade_fast.targets import (
    box,
    class_against,
    class_score,
    log_probability,
    neuron,
    pixels,
    similarity,
    token,
)

LOGITS = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]], dtype=torch.float64)


def test_pixels():
    maps, mask = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.zeros(4, 5).bool()
    mask[1, 2] = mask[3, 4] = True
    for given in (mask, mask.numpy()):
        target = pixels(given, 1)
        torch.testing.assert_close(target({"out": maps}), (maps[:, 1, 1, 2] + maps[:, 1, 3, 4]) / 2)
        shares = maps.softmax(1)
        torch.testing.assert_close(target.kept(maps), (shares[:, 1, 1, 2] + shares[:, 1, 3, 4]) / 2)
        torch.testing.assert_close(target.answers(maps), (shares[..., 1, 2] + shares[..., 3, 4]) / 2)
    alone = maps[:, 0][:, mask].sigmoid().mean(1)
    torch.testing.assert_close(pixels(mask, 0).kept(maps[:, :1]), alone)
    torch.testing.assert_close(pixels(mask, 0).answers(maps[:, :1]), torch.stack([1 - alone, alone], 1))


def test_tokens():
    logits = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(token(-1, 5)((logits, None)), logits[:, 3, 5])
    torch.testing.assert_close(token(1, 0).kept({"logits": logits}), logits[:, 1].softmax(1)[:, 0])
    torch.testing.assert_close(token(1, 0).answers({"logits": logits}), logits[:, 1].softmax(1))


def test_boxes():
    found = [{"scores": torch.tensor([0.9, 0.4])}, {"scores": torch.tensor([0.7, 0.6, 0.5])}]
    assert box(1)(found).tolist() == box(1).kept(found).tolist() == pytest.approx([0.4, 0.6])
    with pytest.raises(ValueError, match="box 7: the detector found 3 boxes, which are counted from 0"):
        box(7)(found[1:])
    with pytest.raises(ValueError, match="box 2: the detector found 2 boxes in image 0"):
        box(2)(found)
    with pytest.raises(TypeError, match=r"must return detections, .* got a torch\.float64 tensor \[2, 3\]"):
        box(0)(LOGITS)


def test_similarity():
    own, other = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = torch.cosine_similarity(own, other[None])
    states = torch.stack([own, own], 1)
    for output in (own, states, {"pooler_output": own, "last_hidden_state": 0 * states}, (own,)):
        for given in (other, 3 * other[None], other.numpy(), other.tolist()):
            torch.testing.assert_close(similarity(given)(output).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(similarity(other)({"last_hidden_state": states}), expected)


def test_similarity_of_the_tokens_of_a_mask():
    states, other = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = torch.cosine_similarity(states[:, 1:3].mean(1), other[None])
    for mask in ([0, 1, 1, 0], torch.tensor([[0, 1, 1, 0]]), np.array([False, True, True, False])):
        for output in (states, (states, None), {"pooler_output": states[:, 0], "last_hidden_state": states}):
            torch.testing.assert_close(similarity(other, mask)(output), expected)
    with pytest.raises(ValueError, match=r"mask has 3 tokens, the network's 4"):
        similarity(other, [1, 1, 0])(states)
    with pytest.raises(TypeError, match=r"must return embeddings \[S, T, D\], of which mask chooses, got .* \[2, 8\]"):
        similarity(other, [1, 1, 0])(states[:, 0])
    for mask in ([0, 0], [[1, 1], [1, 1]], 1, []):
        with pytest.raises(ValueError, match=r"mask must be \[T\] or \[1, T\] with at least one token"):
            similarity(other, mask)


def test_later_changes_of_arguments_do_not_matter():
    mask, embedding = torch.ones(2, 2).bool(), torch.tensor([1.0, 0.0])
    one, two = pixels(mask, 0), similarity(embedding)
    mask[:], embedding[:] = False, torch.tensor([0.0, 1.0])
    assert one(torch.ones(1, 1, 2, 2)) == 1 and two(torch.tensor([[1.0, 0.0]])) == 1


def test_neurons_read_the_output_of_a_layer():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(neuron("0", (1, 2, 3))(maps), maps[:, 1, 2, 3])
    torch.testing.assert_close(neuron("0", 1)((maps, None)), maps[:, 1].mean((1, 2)))
    torch.testing.assert_close(neuron("0", (..., 4))(maps), maps[..., 4].mean((1, 2)))
    tokens = maps.flatten(2)
    torch.testing.assert_close(neuron("0", (1, 2))({"last_hidden_state": tokens}), tokens[:, 1, 2])
    with pytest.raises(TypeError, match=r"the layer.s output must be a .* tensor, got dict with the entries a"):
        neuron("0", 1)({"a": maps})
    assert neuron("block.0", 2).layer == "block.0"


def test_names():
    mask = torch.ones(2, 2).bool()
    assert [
        str(one)
        for one in (
            class_score(1),
            log_probability(1),
            class_against(1, 2),
            neuron("a.b", 1),
            neuron("a", (..., 1)),
            pixels(mask, 1),
            box(0),
            token(-1, 7),
            similarity([1.0, 2.0]),
        )
    ] == [
        "class 1",
        "log-probability of class 1",
        "class 1 against class 2",
        "neuron 1 of layer 'a.b'",
        "neuron (..., 1) of layer 'a'",
        "class 1 in 4 pixels",
        "box 0",
        "token 7 at position -1",
        "similarity to an embedding of 2 numbers",
    ]


def test_bad_arguments():
    for make in (class_score, log_probability, box):
        with pytest.raises(ValueError, match="index must be at least 0, got -1"):
            make(-1)
        with pytest.raises(TypeError, match="index must be an integer, got 'cat'"):
            make("cat")
    with pytest.raises(ValueError, match="two classes, got 1 twice"):
        class_against(1, 1)
    with pytest.raises(TypeError, match=r"index must be an integer, got 0\.5"):
        neuron("a", (1, 0.5))
    with pytest.raises(TypeError, match="layer must be the name of a module, got 3"):
        neuron(3, 1)
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch\.int64"):
        pixels(torch.ones(2, 2).long(), 1)
    for mask in (torch.zeros(2, 2).bool(), torch.ones(1, 2, 2).bool()):
        with pytest.raises(ValueError, match=r"mask must be \[H, W\] with at least one pixel"):
            pixels(mask, 1)
    for embedding in (torch.zeros(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"embedding must be \[D\] or \[1, D\] and not 0"):
            similarity(embedding)
    for make, name in ((similarity, "embedding"), (lambda one: pixels(one, 0), "mask")):
        for given in (None, "x", [[1], [1, 2]]):
            with pytest.raises(TypeError, match=f"{name} must be a tensor, an array or numbers, got"):
                make(given)
    with pytest.raises(ValueError, match=r"embedding must be \[D\] or \[1, D\] and not 0, got \[\]"):
        similarity(1.0)
    with pytest.raises(ValueError, match="embedding has NaN"):
        similarity([math.nan])


def test_outputs_that_do_not_fit():
    for target in (class_score(3), log_probability(3), class_against(0, 3)):
        with pytest.raises(ValueError, match="target must be a class from 0 to 2, got 3"):
            target(LOGITS)
    with pytest.raises(
        ValueError, match=r"must return \[S, classes\], got \[2, 1, 3\]: use spade_fast\.targets\.token"
    ):
        class_score(0)(LOGITS[:, None])
    with pytest.raises(TypeError, match="class 0: the network returns dict with the entries a, b, without logits"):
        class_score(0)({"a": LOGITS, "b": 1})
    with pytest.raises(TypeError, match=r"class 0: the network's logits must be .* got a torch\.int64 tensor \[2, 3\]"):
        class_score(0)(LOGITS.long())
    mask = torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"mask must have the size of the network's output, \[4, 5\], got \[2, 3\]"):
        pixels(mask, 0)(torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"must return \[S, classes, H, W\], got \[2, 3\]: use .*class_score"):
        pixels(mask, 0)(LOGITS)
    with pytest.raises(ValueError, match="the network returns 4 positions"):
        token(4, 0)(torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match="a class from 0 to 5, got 6"):
        token(0, 6)(torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match=r"the layer returns \[2, 3\], with no such place"):
        neuron("a", (0, 1))(LOGITS)
    with pytest.raises(TypeError, match=r"must return embeddings .* got a torch\.float32 tensor \[1, 2, 4, 5\]"):
        similarity([1.0])(torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"of 1 numbers: the network's embedding has 3, \[2, 3\]"):
        similarity([1.0])(LOGITS)
