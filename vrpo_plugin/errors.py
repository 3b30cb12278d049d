"""Exceptions. Every message has three parts: what was expected, what was got, what to do."""

from typing import Any


class VRPOError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        subject: what is wrong, by the name that the user gave it; or the whole message, with nothing else.
        expected, got, do: the message's three parts: ``subject: expected ..., got .... Do this.``
    """

    def __init__(self, subject: str, **parts: Any) -> None:
        super().__init__(explain(subject, **parts) if parts else subject)


class ConfigError(VRPOError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ShapeError(VRPOError, ValueError):
    """A tensor has the wrong shape."""


class DataError(VRPOError, ValueError):
    """Training data is missing, empty, or not finite."""


class WeightsNotFoundError(VRPOError, FileNotFoundError):
    """Pretrained weights are not on disk and may not be downloaded."""


class HostNotFoundError(VRPOError):
    """No supported codebase was found, or a model has not the parts that a hook needs."""


class HostChangedError(VRPOError):
    """A codebase is not at a version that was verified."""


class PatchConflictError(VRPOError):
    """Something is already patched or attached, with another configuration."""


class NonFiniteError(VRPOError):
    """Too many steps in a row were not finite."""


class CheckpointError(VRPOError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


def explain(subject: str, *, expected: object, got: object, do: str) -> str:
    """Builds the three-part message: ``subject: expected ..., got .... Do this.``"""
    return f"{subject}: expected {expected}, got {got}. {do}"
