"""Errors that a user can cause, all derived from `UserError`. The commands print these, and only these, as one line."""

from __future__ import annotations

import torch


class UserError(Exception):
    """Base class of all errors caused by arguments, files, missing packages or the machine."""


class InvalidValueError(UserError, ValueError):
    """An argument, or the content of a file, has the right type but an invalid value."""


class DeadFeatureError(InvalidValueError):
    """A feature cannot be visualised: its weights are zero, or no picture that was tried changes it."""


class InvalidTypeError(UserError, TypeError):
    """An argument has the wrong type."""


class UnknownLayerError(UserError, KeyError, ValueError):
    """The model has no layer of this name, or none that matches this pattern."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownSampleError(UserError, KeyError):
    """A batch has no finished sample with this id, or no explanation of it."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingFileError(UserError, FileNotFoundError):
    """A file, or the folder of a file to write, does not exist."""


class OutputError(UserError, OSError):
    """A result cannot be written."""


class InputError(UserError, OSError):
    """A file or folder exists, but cannot be read."""


class MissingExtraError(UserError, ImportError):
    """A package is not installed; the message names the extra that provides it."""


class MemoryLimitError(UserError, MemoryError):
    """A single layer needs more than `memory_limit`."""


class NotPositiveDefiniteError(UserError, torch.linalg.LinAlgError):
    """A Hessian cannot be factorised even with the largest damping."""


class TraceAppliedError(UserError, RuntimeError):
    """A trace is already applied to the model."""


class FallbackError(UserError, RuntimeError):
    """A request could not be met exactly, and ``strict=True`` forbids a fallback."""


class FallbackWarning(UserWarning):
    """A fallback was used for the layers that the message names."""


class DecisionWarning(UserWarning):
    """Traces predict other classes than the dense network, so explanations on them do not explain its predictions.

    Where the target is one class against another, pixels or a token, it is given of what the network answers there;
    where it is a neuron or another function of the output, there is none.
    """


class AssumptionWarning(UserWarning):
    """Something was assumed, as the message says.

    Preprocessing that a network does not state, or that a trace need not keep its score on noisy copies of a sample
    because the noise destroys the dense network's.
    """


class ClusterError(UserError, ConnectionError):
    """A cluster cannot be reached or started."""


class WorkerError(UserError, ChildProcessError):
    """No worker of a batch can run."""
