"""``accelerate`` swaps the published classes in other modules."""

from __future__ import annotations

from types import ModuleType

import pytest

from spade_fast import compat


def module(name: str, **names: object) -> ModuleType:
    result = ModuleType(name)
    vars(result).update(names)
    return result


def published(name: str) -> type:
    return type(name, (), {})


def test_accelerate_replaces_classes_under_any_name() -> None:
    script = module("script", TrueOBS=published("TrueOBS"), Fast=published("SparseGPTSuperFast"), other=int, n=3)
    helper = module("helper", SparseGPT=published("SparseGPT"))
    assert compat.accelerate(script, helper) == ["script.TrueOBS", "script.Fast", "helper.SparseGPT"]
    assert script.TrueOBS is compat.TrueOBS
    assert script.Fast is compat.SparseGPTSuperFast
    assert helper.SparseGPT is compat.SparseGPT
    assert (script.other, script.n) == (int, 3)


def test_accelerate_twice_changes_nothing() -> None:
    script = module("script", TrueOBS=published("TrueOBS"))
    compat.accelerate(script)
    assert compat.accelerate(script) == []
    assert script.TrueOBS is compat.TrueOBS


def test_accelerate_errors_change_no_module() -> None:
    script = module("script", TrueOBS=published("TrueOBS"))
    original = script.TrueOBS
    with pytest.raises(ValueError, match="module 'empty' has no class called TrueOBS"):
        compat.accelerate(script, module("empty", TrueOBS="not a class"))
    with pytest.raises(TypeError, match="got str: 'script'"):
        compat.accelerate(script, "script")
    with pytest.raises(ValueError, match="none was given"):
        compat.accelerate()
    assert script.TrueOBS is original
