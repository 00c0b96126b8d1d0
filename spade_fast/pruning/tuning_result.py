"""The result of a search for sparsities, and its YAML file, which can also be written by hand."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade_fast._util.checks import integer, is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError, MissingFileError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import is_file, read_bytes, write_whole
from spade_fast.pruning.config import AUTO, PruneConfig, check_shares

_DEPTH, _LENGTH = 40, 10_000  # of the YAML that is read
_HEADING = """\
# Sparsity found by spade_fast.tune. Use it as `--sparsity {name}`, or in Python as
# spade_fast.trace(..., **spade_fast.load_sparsity("{name}")).
"""


@dataclass(frozen=True)
class Trial:
    """One step of the search: what a candidate gives.

    Attributes
    ----------
    round
        Pass over all stages, from 1.
    stage
        The stage; ``"auto"`` if the candidate is a share that automatic sparsity is to keep.
    candidate
        The sparsity tried for the stage, where the other stages have the sparsities chosen so far; or the share to
        keep.
    sparsity
        Share of zeros in the layers that are tuned, mean over the samples.
    kept
        Mean share of the dense model's scores that the traces keep; None if nothing was to be kept.
    score
        Mean score over the samples; None if they keep too little, so that it was not computed.
    """

    round: int
    stage: str
    candidate: float
    sparsity: float
    kept: float | None
    score: float | None


@dataclass(frozen=True)
class Tuning:
    """What :func:`spade_fast.tune` found.

    Attributes
    ----------
    options
        The keyword arguments of :func:`spade_fast.trace` that stand for it: `sparsity`, the share of weights to remove
        from each tuned layer, in the model's order; or the sparsity ``"auto"``, the share to `keep` and, unless they
        are all, the `layers`.
    before, after
        Mean score over the samples of the dense model, and of the traces with these options.
    kept
        Mean share of the dense model's probabilities that these traces keep; None if nothing was to be kept.
    history
        All trials, in order.
    settings
        Settings of the search. ``stages`` lists the layers of each stage, in the order of the search, or is ``"auto"``.

    Examples
    --------
    >>> from spade_fast import Tuning
    >>> settings = {"stages": {"head": ["2"], "stem": ["0"]}}
    >>> tuning = Tuning({"sparsity": {"0": 0.5, "2": 0.9}}, 0.7, 0.8, None, (), settings)
    >>> tuning.stages
    {'head': 0.9, 'stem': 0.5}
    """

    options: dict[str, Any]
    before: float
    after: float
    kept: float | None
    history: tuple[Trial, ...]
    settings: dict[str, Any]

    @property
    def sparsity(self) -> dict[str, float] | str:
        """The sparsity of each tuned layer, or ``"auto"``."""
        sparsity: dict[str, float] | str = self.options["sparsity"]
        return sparsity

    @property
    def stages(self) -> dict[str, float]:
        """The sparsity of each stage, in the order of the search; empty for automatic sparsity."""
        sparsity = self.sparsity
        if isinstance(sparsity, str):
            return {}
        return {stage: sparsity[layers[0]] for stage, layers in self.settings["stages"].items()}

    def summary(self) -> str:
        """Return what was found, and the scores, as text."""
        if self.sparsity == AUTO:
            lines = [_line(trial) for trial in self.history]
            equal = sum(trial.score == self.after for trial in self.history)
            tie = f", the largest of {equal} shares with this score" if equal > 1 else ""
            lines.append(f"sparsity auto, keep {self.options['keep']:g}{tie}")
        else:
            width = max(map(len, self.stages), default=0)
            lines = [f"{stage:{width}}  {share:g}" for stage, share in self.stages.items()]
        lines.append(f"mean score {self.before:.4f} -> {self.after:.4f} after {len(self.history)} trials")
        if self.kept is not None:
            lines.append(f"the traces keep {self.kept:.1%} of the dense network's probability")
        return "\n".join(lines)

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
        text += dump({**self.options, "score": {"before": self.before, "after": self.after}, "kept": self.kept})
        text += dump({"settings": self.settings}, None)
        text += dump({"history": [asdict(trial) for trial in self.history]}, None)
        write_whole(path, text.encode(), "the sparsity")

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
        contents, options = _read(Path(path))
        try:
            score = contents["score"]
            numbers = [("score before", score["before"]), ("score after", score["after"])]
            if not isinstance(contents["history"], list):
                raise InvalidValueError(f"history must be a list, got {contents['history']!r}")
            history = tuple(Trial(**trial) for trial in contents["history"])
            optional = [("kept", contents["kept"])]
            for trial in history:
                integer("round", trial.round, 1)
                shares = {"candidate": trial.candidate, "sparsity": trial.sparsity}
                check_shares({f"the {name} of {trial.stage}": share for name, share in shares.items()})
                optional += [(f"kept of {trial.stage}", trial.kept), (f"the score of {trial.stage}", trial.score)]
            for name, number in [*numbers, *(one for one in optional if one[1] is not None)]:
                if not is_number(number) or not math.isfinite(number):
                    raise InvalidValueError(f"{name} must be a finite number, got {number!r}")
            before, after = float(score["before"]), float(score["after"])
            found = cls(options, before, after, contents["kept"], history, dict(contents["settings"]))
            if not all(isinstance(stage, str) for stage in [*found.stages, *(trial.stage for trial in history)]):
                raise InvalidValueError("the names of stages must be strings")
            stages = found.settings["stages"]
            if found.sparsity != AUTO and not all(isinstance(layers, list) for layers in stages.values()):
                raise InvalidValueError("the layers of a stage must be a list")
            return found
        except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidValueError(
                f"{path} has a sparsity, but is not the complete result of a search: {error!r}"
            ) from error


def _line(trial: Trial) -> str:
    """Describe a trial of a share to keep."""
    score = "keeps too little" if trial.score is None else f"score {trial.score:.4f}"
    return f"keep {trial.candidate:<4g}  sparsity {trial.sparsity:.1%}  kept {trial.kept:.1%}  {score}"


def load_sparsity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the sparsity in a YAML file: a saved :class:`Tuning`, or a file written by hand.

    The entry ``sparsity`` is a mapping of layer names or patterns to shares between 0 and 1:

    .. code-block:: yaml

        sparsity:
          "_blocks.*": 0.5
          _fc: 0.9

    or ``auto``, and then there can be entries for the share to keep (or several) and the layers to prune:

    .. code-block:: yaml

        sparsity: auto
        keep: 0.7
        layers: ["_blocks.*"]

    Returns
    -------
    dict
        These entries, as keyword arguments of :func:`spade_fast.trace`, :class:`spade_fast.PruneConfig` and all that
        takes its fields: ``trace(..., **load_sparsity("photos.yaml"))``.

    Raises
    ------
    ImportError
        PyYAML is not installed; the message names the extra.
    FileNotFoundError, OSError
        The file does not exist or cannot be read.
    ValueError
        The file is not YAML, has an alias or a key twice, or its entry ``sparsity`` is missing or one of the three is
        invalid.
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of a file, and the options in it."""
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
    if sparsity != AUTO and (not isinstance(sparsity, dict) or not sparsity):
        raise InvalidValueError(
            f"{path} has no entry 'sparsity' with a share for each layer or pattern, or with {AUTO!r}"
        )
    try:
        return contents, _automatic(contents) if sparsity == AUTO else _by_layer(contents)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{path}: {error}") from error


def _by_layer(contents: dict[str, Any]) -> dict[str, Any]:
    """Return the options in a file with a sparsity for each layer; TypeError or ValueError if they are invalid."""
    sparsity = contents["sparsity"]
    for name in sparsity:
        if not isinstance(name, str):
            raise InvalidTypeError(f'layer names must be strings; write "{name}" in quotes')
    check_shares({f"the sparsity of {name!r}": share for name, share in sparsity.items()})
    for name in ("keep", "layers"):
        if name in contents:
            raise InvalidValueError(f"{name} is an entry beside the sparsity {AUTO!r} only")
    return {"sparsity": {name: float(share) for name, share in sparsity.items()}}


def _automatic(contents: dict[str, Any]) -> dict[str, Any]:
    """Return the options in a file with automatic sparsity; TypeError or ValueError if they are invalid."""
    options: dict[str, Any] = {n: contents[n] for n in ("sparsity", "keep", "layers") if n in contents}
    layers = options.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise InvalidTypeError(f"layers must be a list of names or patterns, got {layers!r}")
    PruneConfig(**options)  # checks the share to keep
    return options
