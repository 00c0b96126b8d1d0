"""What the build decides, and the error on import when it does not match torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spade_fast.ops import _native

ROOT = Path(__file__).parents[2]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spade_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_module_() -> ModuleType:
    return load_setup()


TOOLKIT = ("toolkit", "13.0")


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "found", "build", "says"),
    [
        ("0", "13.0", TOOLKIT, False, "SPADE_FAST_CUDA=0"),
        ("auto", None, TOOLKIT, False, "CPU build"),
        ("auto", "13.0", None, False, "no toolkit was found"),
        ("auto", "13.1", TOOLKIT, True, "CUDA 13.0"),
        ("1", "13.0", TOOLKIT, True, "CUDA 13.0"),
        ("auto", "12.8", TOOLKIT, False, "torch has CUDA 12.8, but the toolkit in toolkit is 13.0"),
    ],
)
def test_cuda_decision(setup_module_, setting, torch_cuda, found, build, says):
    decided, sentence = setup_module_.decide_cuda(setting, torch_cuda, found)
    assert decided is build and says in sentence


def test_a_mismatch_warns(setup_module_, capsys):
    setup_module_.decide_cuda("auto", "12.8", TOOLKIT)
    assert "warning: torch has CUDA 12.8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "found", "says"),
    [
        ("1", "12.8", TOOLKIT, "torch has CUDA 12.8, but the toolkit in toolkit is 13.0"),
        ("1", None, TOOLKIT, "CPU build"),
        ("1", "13.0", None, "CUDA_HOME"),
        ("yes", "13.0", TOOLKIT, "must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_impossible_settings_stop_the_build(setup_module_, setting, torch_cuda, found, says):
    with pytest.raises(SystemExit, match=says):
        setup_module_.decide_cuda(setting, torch_cuda, found)


def test_another_torch_gives_one_clear_sentence():
    _native.check_torch_version("2.14.1+cu130", "2.14.0")
    with pytest.raises(ImportError, match=r"built for torch 2\.14\.1, but torch 2\.13\.0 is imported; rebuild"):
        _native.check_torch_version("2.14.1", "2.13.0")


def test_build_info():
    info = _native._C.build_info()
    assert info["torch"] == torch.__version__ and info["compiler"] and "cuda" in info


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is used on Linux")
def test_ops_run_on_several_threads():
    """Without OpenMP at build time torch's parallel loops are compiled to serial ones."""
    assert _native._C.build_info()["threads"] == "OpenMP"


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="'mmx' is not available here; available: generic"):
        _native._C.set_simd_level("mmx")


def test_import_needs_only_torch_numpy_and_safetensors():
    allowed = {"torch", "numpy", "safetensors"}
    optional = ("captum", "kornia", "typer", "rich", "matplotlib", "PIL", "torchvision", "foolbox", "scipy")
    code = f"import sys, spade_fast; print([m for m in {optional!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", f"beyond {allowed}"
