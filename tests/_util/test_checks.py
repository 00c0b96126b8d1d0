"""Unknown names, and what is suggested instead."""

from __future__ import annotations

import pytest

from spade_fast import InvalidValueError, PruneConfig
from spade_fast._util.checks import check_names, nearest
from spade_fast.attribution import METHODS

SCORES = ("probability", "deletion", "localisation")


@pytest.mark.parametrize(
    ("given", "allowed", "meant"),
    [
        ("GradCAM", METHODS, "gradcam"),
        ("Grad-CAM", METHODS, "gradcam"),
        ("Guided_GradCAM", METHODS, "guided-gradcam"),
        ("IntegratedGradients", METHODS, "integrated-gradients"),
        ("localization", SCORES, "localisation"),
        ("rey", ("local", "ray"), "ray"),
    ],
)
def test_the_nearest_name_is_suggested(given, allowed, meant):
    with pytest.raises(InvalidValueError) as error:
        check_names("thing", [given], allowed)
    assert str(error.value) == f"unknown thing {given!r}: did you mean {meant!r}? Choose from {', '.join(allowed)}"


def test_far_names_and_no_names():
    with pytest.raises(InvalidValueError, match=r"^unknown score 'beauty': choose from probability, deletion, local"):
        check_names("score", ["deletion", "beauty"], SCORES)
    with pytest.raises(InvalidValueError, match=r"^give at least one score of: probability"):
        check_names("score", [], SCORES)
    check_names("score", SCORES, SCORES)


@pytest.mark.parametrize(
    ("field", "given", "suggestion"),
    [
        ("solver", "fastspade", "'sparsegpt' (FastSPADE)"),
        ("solver", "spade", "'exact' (SPADE)"),
        ("solver", "SparseGPT", "'sparsegpt'"),
        ("precision", "fp32", "'float32' (fp32)"),
        ("precision", "bfloat16", "'bf16' (bfloat16)"),
    ],
)
def test_names_that_others_use(field, given, suggestion):
    with pytest.raises(InvalidValueError) as error:
        PruneConfig(sparsity=0.5, **{field: given})
    assert f"unknown {field} {given!r}: did you mean {suggestion}? Choose from" in str(error.value)


def test_nearest():
    assert nearest("LAYER3.conv", ["layer3.conv", "layer2.conv", "head"])[0] == "layer3.conv"
    assert nearest("bulmastif", ["cat", "bull mastiff", "dog"]) == ["bull mastiff"] and nearest("xyz", ["cat"]) == []
    assert nearest("a-b", ["A B", "a_b"]) == ["A B", "a_b"], "names that differ only in punctuation are all found"
