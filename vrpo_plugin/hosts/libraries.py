"""Methods of libraries that are replaced for the whole process, and the comparison of what is installed."""

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from vrpo_plugin.errors import HostChangedError
from vrpo_plugin.hosts.base import HostSpec, LibrarySeam, Session, Shim, point
from vrpo_plugin.patching.fingerprint import Finding, inspect_point


def libraries_of(spec: HostSpec, shims: Sequence[Shim]) -> Iterator[LibrarySeam]:
    """What an application of a host replaces in libraries."""
    candidates = [*spec.libraries, *(one for shim in shims for one in shim.libraries)]
    if spec.read_arguments is not None or any(shim.fix_arguments is not None for shim in shims):
        candidates.append(PARSE_ARGS)
    yield from (one for one in candidates if one.needed())


def inspect_library(seam: LibrarySeam) -> Finding | None:
    """The installed method against the expected parameters, without importing it; None where it is not installed.

    Raises:
        HostChangedError: its file is no Python source.
    """
    try:
        package = importlib.util.find_spec(seam.point.file.partition("/")[0].removesuffix(".py"))
    except ValueError:  # somebody's stand-in for the module, that has no spec
        package = None
    if package is None or package.origin is None:
        return None
    depth = seam.point.file.count("/") and 1  # of the package's __init__.py, or of a module alone
    return inspect_point(Path(package.origin).resolve().parents[depth], seam.point)


def verify_libraries(seams: Sequence[LibrarySeam]) -> None:
    """Compares every method of a library before it is replaced. Its body may be any: libraries have versions.

    Raises:
        HostChangedError: it is missing, or has other parameters.
    """
    for seam in seams:
        finding = inspect_library(seam)
        if finding is None or finding.status in ("known", "changed"):
            continue
        raise HostChangedError(
            seam.label,
            expected=f"parameters ({', '.join(seam.point.parameters)})",
            got=finding.reason or f"({', '.join(finding.parameters)})",
            do=f"Install a version of {seam.module.partition('.')[0]} that pyproject.toml names.",
        )


def _parse_args(session: Session, original: Any) -> Any:
    @wraps(original)
    def parse_args(self: Any, *args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed = original(self, *args, **kwargs)
        for shim in session.shims:
            if shim.fix_arguments is not None:
                shim.fix_arguments(session, shim, parsed)
        if session.spec.read_arguments is not None:
            session.spec.read_arguments(session, parsed)
        return parsed

    return parse_args


def _log(session: Session, original: Any) -> Any:
    @wraps(original)
    def log(self: Any, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if session.spec.log_key in values:
            values = {**values, **session.tracker.latest()}
        return original(self, values, *args, **kwargs)

    return log


def _add_scalar(session: Session, original: Any) -> Any:
    @wraps(original)
    def add_scalar(self: Any, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kw: Any) -> Any:
        if tag == "Loss/train":
            for name, value in session.tracker.latest().items():
                original(self, name, value, global_step)
        return original(self, tag, scalar_value, global_step, *args, **kw)

    return add_scalar


def _encode(session: Session, original: Any) -> Any:
    @wraps(original)
    def encode(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if session.encoder == "pixels":
            session.cache["pixels"] = x
        return original(self, x, *args, **kwargs)

    return encode


PARSE_ARGS = LibrarySeam(
    "argparse",
    point("argparse.py", "ArgumentParser.parse_args", "self args namespace"),
    "the run's length, for the schedules, and shims of arguments",
    _parse_args,
)
ACCELERATE_LOG = LibrarySeam(
    "accelerate",
    point("accelerate/accelerator.py", "Accelerator.log", "self values step log_kwargs"),
    "our metrics beside the host's losses",
    _log,
)
TENSORBOARD = LibrarySeam(
    "torch.utils.tensorboard",
    point(
        "torch/utils/tensorboard/writer.py",
        "SummaryWriter.add_scalar",
        "self tag scalar_value global_step walltime new_style double_precision",
    ),
    "our metrics beside Loss/train",
    _add_scalar,
)
VAE = LibrarySeam(
    "diffusers.models",
    point("diffusers/models/autoencoders/autoencoder_kl.py", "AutoencoderKL.encode", "self x return_dict"),
    "the pixels that the host encodes right before its loss, for the frozen encoder",
    _encode,
)
