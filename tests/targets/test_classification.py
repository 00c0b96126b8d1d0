"""The targets that are classes, on outputs of all forms, and what is taken as a target."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spade_fast.targets import Target, class_against, class_score, log_probability
from spade_fast.targets.classification import as_target

LOGITS = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]], dtype=torch.float64)
SHARES = LOGITS.softmax(1)
FORMS = {
    "tensor": LOGITS,
    "dict": {"loss": torch.tensor(1.0), "logits": LOGITS},
    "segmentation": {"out": LOGITS, "aux": LOGITS + 1},
    "tuple": (LOGITS, torch.zeros(2)),
    "named tuple": namedtuple("Output", "logits aux")(LOGITS, LOGITS + 1),
    "object": SimpleNamespace(logits=LOGITS),
}


@pytest.mark.parametrize("form", FORMS)
def test_classes(form):
    output = FORMS[form]
    for target, numbers, kept in (
        (class_score(2), LOGITS[:, 2], SHARES[:, 2]),
        (log_probability(2), SHARES[:, 2].log(), SHARES[:, 2]),
        (class_against(2, 0), LOGITS[:, 2] - LOGITS[:, 0], SHARES[:, 2] / (SHARES[:, 2] + SHARES[:, 0])),
    ):
        torch.testing.assert_close(target(output), numbers)
        torch.testing.assert_close(target.kept(output), kept)


def test_a_network_that_ends_in_a_softmax():
    torch.testing.assert_close(class_score(1).kept(SHARES), SHARES[:, 1])
    torch.testing.assert_close(log_probability(1)(SHARES), SHARES[:, 1].log())
    torch.testing.assert_close(class_against(1, 2).kept(SHARES), SHARES[:, 1] / (SHARES[:, 1] + SHARES[:, 2]))


def test_one_logit():
    assert class_score(0).kept(torch.tensor([[4.0]])) == class_score(0)(torch.tensor([[4.0]])) == 4.0
    for target in (log_probability(0), class_against(0, 1)):
        with pytest.raises(ValueError, match=r"a single logit: give spade_fast\.inputs\.two_classes"):
            target(torch.tensor([[4.0]]))


def test_what_can_be_a_target():
    assert [str(as_target(one, ("ant", "bee"))) for one in (1, "bee", np.int64(1), torch.tensor(1))] == ["class 1"] * 4
    own = class_score(1)
    assert as_target(own) is own and as_target(len).name == "len" and as_target(len).kept([1]) == 1
    assert isinstance(as_target(lambda output: output), Target)
    for given in (True, 0.5, None, torch.tensor(0.5), torch.tensor(True)):
        with pytest.raises(TypeError, match="target must be the index or name of a class, or a function"):
            as_target(given)
    with pytest.raises(ValueError, match="no class 'bea': did you mean 'bee'"):
        as_target("bea", ("ant", "bee"))
    with pytest.raises(ValueError, match="no class names: give the index of a class instead of 'bee'"):
        as_target("bee")
    with pytest.raises(ValueError, match="a class of at least 0, got -1"):
        as_target(-1)
