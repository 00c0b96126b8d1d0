"""The result of a search for sparsities, and the YAML file that holds it, which people can also read and write."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade_fast._util.errors import InvalidValueError, MissingFileError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import write_whole
from spade_fast.pruning.config import check_shares

_HEADING = """\
# Sparsities found by spade_fast.tune. Use them as `--sparsity {name}`, or in Python as
# spade_fast.trace(..., sparsity=spade_fast.load_sparsity("{name}")).
"""


@dataclass(frozen=True)
class Trial:
    """One try: all layers of a stage at a sparsity, the other stages as chosen until then."""

    round: int
    stage: str
    sparsity: float
    score: float


@dataclass(frozen=True)
class Tuning:
    """Sparsities that a search found. Made by :func:`spade_fast.tune`.

    Attributes
    ----------
    sparsity
        Share of weights to remove of each layer that was tuned, in the model's order: what ``sparsity=`` of
        :func:`spade_fast.trace` takes.
    before, after
        Mean score over the samples: of the dense model, and of the traces with these sparsities.
    history
        All tries, in order.
    settings
        Settings of the search. ``stages`` has the layers of each stage, in the order of the search.
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
        """Return the sparsities by stage and the scores as text."""
        width = max(map(len, self.stages), default=0)
        lines = [f"{stage:{width}}  {share:g}" for stage, share in self.stages.items()]
        return "\n".join([*lines, f"score {self.before:.4f} -> {self.after:.4f}, {len(self.history)} tried"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file; it appears when it is complete.

        Raises
        ------
        ImportError
            PyYAML is missing; the message names the extra.
        OSError
            The file cannot be written.
        """
        yaml = _import_yaml()
        path = Path(path)

        def dump(contents: dict[str, Any], flow: bool | None = False) -> str:
            text: str = yaml.safe_dump(
                contents, sort_keys=False, default_flow_style=flow, allow_unicode=True, width=110
            )
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
            PyYAML is missing; the message names the extra.
        FileNotFoundError, OSError
            No such file, or it cannot be read.
        ValueError
            Not YAML, or it holds something else.
        """
        contents, sparsity = _read(Path(path))
        try:
            score = contents["score"]
            history = tuple(Trial(**trial) for trial in contents["history"])
            return cls(sparsity, float(score["before"]), float(score["after"]), history, dict(contents["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValueError(
                f"{path} has sparsities, but is not the complete result of a search: {error!r}"
            ) from error


def load_sparsity(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the sparsities of a YAML file: a saved :class:`Tuning`, or one written by hand.

    Only its entry ``sparsity`` counts, a mapping of layer names or patterns to shares between 0 and 1:

    .. code-block:: yaml

        sparsity:
          "_blocks.*": 0.5
          _fc: 0.9

    Raises
    ------
    ImportError, FileNotFoundError, OSError, ValueError
        As for :meth:`Tuning.load`.
    """
    return _read(Path(path))[1]


def _import_yaml() -> Any:
    with extra_for("files of sparsities need"):
        import yaml
    return yaml


def _read(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    yaml = _import_yaml()
    if not path.is_file():
        raise MissingFileError(f"no such file of sparsities: {path}")
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{path} is not a YAML file: {error}") from error
    sparsity = contents.get("sparsity") if isinstance(contents, dict) else None
    if not isinstance(sparsity, dict) or not sparsity:
        raise InvalidValueError(f"{path} has no entry 'sparsity' with a share for each layer or pattern")
    for name in sparsity:
        if not isinstance(name, str):
            raise InvalidValueError(f'{path}: a layer name must be text, write "{name}" in quotes')
    try:
        check_shares({f"the sparsity of {name!r}": share for name, share in sparsity.items()})
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{path}: {error}") from error
    return contents, {name: float(share) for name, share in sparsity.items()}
