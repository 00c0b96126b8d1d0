"""Errors that a user can cause. The commands print these, and only these, as one line."""

from __future__ import annotations

import torch


class UserError(Exception):
    """Base of all errors that arguments, files, installed packages or the machine can cause."""


class InvalidValueError(UserError, ValueError):
    """An argument, or the content of a file, of the right type but not an allowed value."""


class InvalidTypeError(UserError, TypeError):
    """An argument of the wrong type."""


class UnknownLayerError(UserError, KeyError, ValueError):
    """A layer name that the model does not have, or a pattern that matches none of its layers."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownSampleError(UserError, KeyError):
    """A sample that a batch has not finished, or has not explained."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder to be read does not exist."""


class OutputError(UserError, OSError):
    """A result cannot be written."""


class InputError(UserError, OSError):
    """A file or folder exists, but cannot be read."""


class MissingExtraError(UserError, ImportError):
    """A package is not installed; the message names the extra that brings it."""


class MemoryLimitError(UserError, MemoryError):
    """One layer alone needs more than `memory_limit`."""


class NotPositiveDefiniteError(UserError, torch.linalg.LinAlgError):
    """A Hessian cannot be factorised, whatever the damping."""


class TraceAppliedError(UserError, RuntimeError):
    """A trace is applied to the model already."""


class FallbackError(UserError, RuntimeError):
    """Something could not be done as asked, and ``strict=True`` forbids doing otherwise."""


class FallbackWarning(UserWarning):
    """Something was done otherwise than asked for the layers that the message names."""


class ClusterError(UserError, ConnectionError):
    """A cluster cannot be reached or started."""


class WorkerError(UserError, ChildProcessError):
    """No worker of a batch can work."""
