"""Classes given by index or name."""

from __future__ import annotations

import pytest

from spade_fast import InvalidValueError
from spade_fast.targets.class_names import class_index, class_label

NAMES = ("bull mastiff", "Tibetan mastiff", "tabby, tabby cat", "crane", "crane", "tiger cat", "C", "C++", "日本")


@pytest.mark.parametrize(
    ("given", "index"),
    [
        (3, 3),
        ("3", 3),
        ("-1", -1),
        ("bull mastiff", 0),
        ("Bullmastiff", 0),
        ("TIBETAN MASTIFF", 1),
        ("tabby", 2),
        ("Tabby Cat", 2),
        ("tabby, tabby cat", 2),
        ("c++", 7),
        ("c", 6),
        ("日本", 8),
    ],
)
def test_found(given, index):
    assert class_index(given, NAMES, "an index") == index


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("crane", "'crane' names several classes: choose the index of 'crane' (3), 'crane' (4)"),
        ("mastiff", "no class 'mastiff': did you mean 'bull mastiff' (0), 'Tibetan mastiff' (1)?"),
        ("bul mastif", "no class 'bul mastif': did you mean 'bull mastiff' (0)"),
        ("zebra", "the network has no class 'zebra'"),
        ("++", "the network has no class '++'"),
        ("", "the network has no class ''"),
    ],
)
def test_not_found(given, message):
    with pytest.raises(InvalidValueError) as error:
        class_index(given, NAMES, "an index")
    assert message in str(error.value)


def test_no_names_and_many_names():
    with pytest.raises(InvalidValueError, match="brings no class names: give a class from 0 to 9 instead of 'cat'"):
        class_index("cat", (), "a class from 0 to 9")
    with pytest.raises(InvalidValueError, match=r"'dog 9' \(9\) and 90 more\?"):
        class_index("dog", [f"dog {number}" for number in range(100)], "an index")


def test_labels_tell_classes_of_one_name_apart():
    assert class_label(3, "crane") == "“crane” (3)" and class_label(4, "crane") == "“crane” (4)"
    assert class_label(7, "class 7") == "class 7"
