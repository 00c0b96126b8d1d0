"""What the tests of explanations share."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from spade_fast.cli.explain import Explanation, explain_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning import PruneConfig


def explain(photo: Path, model: str, out: Path, **options: Any) -> Explanation:
    """Explain a photo with options of `PruneConfig`, `Setup` and `explain_photo` alike."""
    pruning = {one.name: options.pop(one.name) for one in fields(PruneConfig) if one.name in options}
    setup = {one.name: options.pop(one.name) for one in fields(Setup) if one.name in options}
    config = PruneConfig(**{"seed": 0, **pruning})
    return explain_photo(photo, out, config, Setup(model, **setup), **options)
