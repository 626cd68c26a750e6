"""Every error and warning that misscompile raises on purpose.

Each message names the module, field or file, what was found there, and what to do about it. A kind that answers
a familiar Python mistake also derives from the built-in that callers already catch.
"""

from __future__ import annotations


class MissError(Exception):
    """Base of all errors of this library."""


class ConfigError(MissError, ValueError):
    """A field of a `MissConfig`, or a value it takes on this model, is not possible."""


class NoMatchError(MissError, ValueError):
    """The target rules choose no module of this model."""


class UnsupportedModuleError(MissError, TypeError):
    """A module was named as a target but an adapter on it could not take effect."""


class ArgumentError(MissError, TypeError):
    """An argument has the wrong type."""


class UnknownAdapterError(MissError, KeyError):
    """No adapter of this name is on the model."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class StateError(MissError, RuntimeError):
    """The model is not in a state in which this verb has a meaning (unmerge without merge, a name in use, …)."""


class MergeError(MissError, RuntimeError):
    """An adapter cannot be folded into the weights."""


class CheckpointError(MissError, ValueError):
    """An adapter folder does not hold what it should, or does not fit the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """An adapter folder or one of its files is not there."""

    def __str__(self) -> str:  # OSError would format its own arguments
        return str(self.args[0]) if self.args else ""


class CaptureError(MissError, RuntimeError):
    """A model cannot be captured as one graph."""


class MissWarning(UserWarning):
    """Something asked for has no effect, or less than one would think."""
