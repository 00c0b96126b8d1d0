"""The result of a search for sparsities, and its YAML file, which can also be written by hand."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade_fast._util.checks import integer, is_number
from spade_fast._util.errors import InvalidValueError, MissingFileError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import is_file, read_bytes, write_whole
from spade_fast.pruning.config import check_shares

_DEPTH, _LENGTH = 40, 10_000  # of the YAML that is read
_HEADING = """\
# Sparsities found by spade_fast.tune. Use them as `--sparsity {name}`, or in Python as
# spade_fast.trace(..., sparsity=spade_fast.load_sparsity("{name}")).
"""


@dataclass(frozen=True)
class Trial:
    """One step of the search: the score with all layers of a stage at one sparsity, given the earlier choices.

    Attributes
    ----------
    round
        Pass over all stages, from 1.
    stage, sparsity
        The stage, and the sparsity tried for it; the other stages have the sparsities chosen so far.
    score
        Mean score over the samples.
    """

    round: int
    stage: str
    sparsity: float
    score: float


@dataclass(frozen=True)
class Tuning:
    """Sparsities found by :func:`spade_fast.tune`.

    Attributes
    ----------
    sparsity
        Share of weights to remove from each tuned layer, in the model's order, as ``sparsity=`` of
        :func:`spade_fast.trace` takes it.
    before, after
        Mean score over the samples of the dense model, and of the traces with these sparsities.
    history
        All trials, in order.
    settings
        Settings of the search. ``stages`` lists the layers of each stage, in the order of the search.

    Examples
    --------
    >>> from spade_fast import Tuning
    >>> tuning = Tuning({"0": 0.5, "2": 0.9}, 0.7, 0.8, (), {"stages": {"head": ["2"], "stem": ["0"]}})
    >>> tuning.stages
    {'head': 0.9, 'stem': 0.5}
    """

    sparsity: dict[str, float]
    before: float
    after: float
    history: tuple[Trial, ...]
    settings: dict[str, Any]

    @property
    def stages(self) -> dict[str, float]:
        """The sparsity of each stage, in the order of the search."""
        return {stage: self.sparsity[layers[0]] for stage, layers in self.settings["stages"].items()}

    def summary(self) -> str:
        """Return the sparsity of each stage and the scores as text."""
        width = max(map(len, self.stages), default=0)
        lines = [f"{stage:{width}}  {share:g}" for stage, share in self.stages.items()]
        return "\n".join([*lines, f"mean score {self.before:.4f} -> {self.after:.4f} after {len(self.history)} trials"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file, which appears only when it is complete.

        Raises
        ------
        ImportError
            PyYAML is not installed; the message names the extra.
        OSError
            The file cannot be written.
        """
        yaml = _import_yaml()
        path = Path(path)
        dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})

        def dump(contents: dict[str, Any], flow: bool | None = False) -> str:
            options = {"sort_keys": False, "default_flow_style": flow, "allow_unicode": True, "width": 110}
            text: str = yaml.dump(contents, Dumper=dumper, **options)
            return text

        text = _HEADING.format(name=path.name)
        text += dump({"sparsity": self.sparsity, "score": {"before": self.before, "after": self.after}})
        text += dump({"settings": self.settings}, None)
        text += dump({"history": [asdict(trial) for trial in self.history]}, None)
        write_whole(path, text.encode(), "the sparsities")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        ImportError
            PyYAML is not installed; the message names the extra.
        FileNotFoundError, OSError
            The file does not exist or cannot be read.
        ValueError
            The file is not YAML, has an alias or a key twice, or is not the result of a search.
        """
        contents, sparsity = _read(Path(path))
        try:
            score = contents["score"]
            numbers = {f"score {name}": score[name] for name in ("before", "after")}
            if not isinstance(contents["history"], list):
                raise InvalidValueError(f"history must be a list, got {contents['history']!r}")
            history = tuple(Trial(**trial) for trial in contents["history"])
            for trial in history:
                integer("round", trial.round, 1)
                check_shares({f"the sparsity of {trial.stage}": trial.sparsity})
                numbers[f"the score of {trial.stage}"] = trial.score
            for name, number in numbers.items():
                if not is_number(number) or not math.isfinite(number):
                    raise InvalidValueError(f"{name} must be a finite number, got {number!r}")
            found = cls(sparsity, float(score["before"]), float(score["after"]), history, dict(contents["settings"]))
            if not all(isinstance(stage, str) for stage in [*found.stages, *(trial.stage for trial in history)]):
                raise InvalidValueError("the names of stages must be strings")
            if not all(isinstance(layers, list) for layers in found.settings["stages"].values()):
                raise InvalidValueError("the layers of a stage must be a list")
            return found
        except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidValueError(
                f"{path} has sparsities, but is not the complete result of a search: {error!r}"
            ) from error


def load_sparsity(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the sparsities of a YAML file: a saved :class:`Tuning`, or a file written by hand.

    Only the entry ``sparsity`` is used, a mapping of layer names or patterns to shares between 0 and 1:

    .. code-block:: yaml

        sparsity:
          "_blocks.*": 0.5
          _fc: 0.9

    Raises
    ------
    ImportError
        PyYAML is not installed; the message names the extra.
    FileNotFoundError, OSError
        The file does not exist or cannot be read.
    ValueError
        The file is not YAML, has an alias or a key twice, or its entry ``sparsity`` is missing or invalid.
    """
    return _read(Path(path))[1]


def _import_yaml() -> Any:
    with extra_for("sparsity files need"):
        import yaml
    return yaml


def _strict_loader(yaml: Any) -> Any:
    """Return a loader without aliases, which a small file can multiply to any size, and with each key once.

    Depth and length are limited: PyYAML's time grows with the square of either (numbers as in ``1:30:30``).
    """

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"it has an alias ({event.anchor!r}), which is not supported here")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LENGTH:
                raise yaml.YAMLError(f"it has a name or value of more than {_LENGTH} characters")
            if self.depth == _DEPTH:
                raise yaml.YAMLError("it is nested too deeply")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for (_, key), count in keys.items():
                if count > 1:
                    raise yaml.YAMLError(f"it has key {key!r} twice")
            return super().construct_mapping(node, deep)

    return Loader


def _read(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    yaml = _import_yaml()
    if not is_file(path):
        raise MissingFileError(f"no such sparsity file: {path}")
    text = read_bytes(path)
    try:
        contents = yaml.load(text.decode("utf-8"), _strict_loader(yaml))
    except RecursionError as error:
        raise InvalidValueError(f"{path} is not a YAML file: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise InvalidValueError(f"{path} is not a YAML file: {error}") from error
    sparsity = contents.get("sparsity") if isinstance(contents, dict) else None
    if not isinstance(sparsity, dict) or not sparsity:
        raise InvalidValueError(f"{path} has no entry 'sparsity' with a share for each layer or pattern")
    for name in sparsity:
        if not isinstance(name, str):
            raise InvalidValueError(f'{path}: layer names must be strings; write "{name}" in quotes')
    try:
        check_shares({f"the sparsity of {name!r}": share for name, share in sparsity.items()})
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{path}: {error}") from error
    return contents, {name: float(share) for name, share in sparsity.items()}
