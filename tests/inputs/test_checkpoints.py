"""Files of weights: the common forms of checkpoints, and what is said of others."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spade_fast.inputs.checkpoints import load_weights


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


class Wrapper(nn.Module):
    """A network with a child called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


STATE = network().state_dict()


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


OTHERS = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}


@pytest.mark.parametrize(
    "contents",
    [
        STATE,
        *({key: STATE, **OTHERS} for key in ("state_dict", "model", "model_state_dict", "net", "ema")),
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {"3._orig_mod.weight" if name == "3.weight" else name: tensor for name, tensor in STATE.items()},
        {"state_dict": prefixed("module."), **OTHERS},
        {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}, **OTHERS},
    ],
)
def test_forms_of_checkpoints(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth")
    model = network()
    load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in model.state_dict().items())


def test_safetensors_files(tmp_path):
    save_file(prefixed("module."), tmp_path / "weights.safetensors")
    model = network()
    load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model[3].weight, STATE["3.weight"])
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"damaged\.safetensors does not contain weights of Sequential"):
        load_weights(model, tmp_path / "damaged.safetensors")


def test_a_prefix_that_the_network_has_too_is_kept(tmp_path):
    torch.save(prefixed("module."), tmp_path / "weights.pth")
    model = Wrapper()
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.module[3].weight, STATE["3.weight"])


@pytest.mark.parametrize("wrap", [lambda one: one, nn.DataParallel, torch.compile])
def test_versions_of_modules_are_kept(tmp_path, wrap):
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
            assert local_metadata["version"] == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    model = nn.Sequential(Versioned(2, 2))
    torch.save({"state_dict": wrap(model).state_dict()}, tmp_path / "weights.pth")
    load_weights(nn.Sequential(Versioned(2, 2)), tmp_path / "weights.pth")


def test_what_modules_translate_is_loaded(tmp_path):
    old = {name: tensor for name, tensor in STATE.items() if name != "1.num_batches_tracked"}
    torch.save(old, tmp_path / "weights.pth")
    load_weights(network(), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (network(5).state_dict(), r"of another shape: 3.weight is \[5, 16\] instead of \[3, 16\], 3.bias is \[5\]"),
        (
            {name: tensor for name, tensor in STATE.items() if not name.startswith("0.")},
            "missing: 0.weight, 0.bias$",
        ),
        ({**STATE, **prefixed("x.")}, "unexpected: x.0.weight, x.0.bias, x.1.weight and 6 more$"),
        ({"other.weight": torch.ones(2)}, "missing: 0.weight, 0.bias, 1.weight and 5 more; unexpected: other.weight$"),
        ({"model": STATE, "model_ema": STATE}, r"several sets of weights \('model', 'model_ema'\)"),
        (OTHERS, "it holds a dict with 'epoch', 'optimizer'; save model.state_dict"),
        ([1, 2], "it holds list; save"),
        (torch.ones(3), "it holds Tensor; save"),
        ({}, "it holds a dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, contents, message):
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth does not contain weights of Sequential: .*{message}"):
        load_weights(network(), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("contents", "name"),
    [(network(), "torch.nn.modules.container.Sequential"), ({"a": argparse.Namespace()}, "argparse.Namespace")],
)
def test_pickled_objects_are_refused_by_name(tmp_path, contents, name):
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"pickled {name}, whose loading would run code; save model.state_dict\(\)"):
        load_weights(network(), tmp_path / "weights.pth")


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="TorchScript"):
        load_weights(network(), tmp_path / "weights.pt")


@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000])
def test_damaged_files(tmp_path, size):
    torch.save(STATE, tmp_path / "whole.pth")
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes((tmp_path / "whole.pth").read_bytes()[:size])
        with pytest.raises(ValueError, match="does not contain weights"):
            load_weights(network(), path)
