"""A file gets new bytes all at once, or keeps its old ones."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from vrpo_plugin.errors import PatchConflictError, VRPOError, explain


def why_read_only(path: Path) -> str:
    """Why a file may not be replaced, in words; empty if it may.

    Root can write anything, so the mode bits count too: they say what the owner wants.

    Raises:
        OSError: the file or its folder is gone.
    """
    target = Path(os.path.realpath(path))
    for place, kind, access in ((target, "file", os.W_OK), (target.parent, "folder", os.W_OK | os.X_OK)):
        if not place.stat().st_mode & 0o222 or not os.access(place, access):
            return f"no write permission on the {kind} '{place.name}'"
    return ""


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Puts ``new`` in the place of ``old``; mode bits stay, and the owner where the system allows it.

    Args:
        path: a file; if it is a symbolic link it stays one, and its target changes.
        old: what the file must hold, else somebody edited it meanwhile.
        new: what it holds afterwards.

    Raises:
        PatchConflictError: the file does not hold ``old``.
        VRPOError: the system refused. In both cases the file is as it was, and no temporary file is left.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        info = target.stat()
        # The same folder, hence the same file system: os.replace is atomic there alone.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):  # root alone gives files away
                os.chown(temporary, info.st_uid, info.st_gid)
        os.chmod(temporary, stat.S_IMODE(info.st_mode))
        if target.read_bytes() != old:
            do = "Close the editor that has it open, then run again."
            raise PatchConflictError(explain(str(path), expected="the bytes read a moment ago", got="others", do=do))
        os.replace(temporary, target)
    except OSError as error:
        do = "It is as it was; run again when the cause is gone."
        raise VRPOError(explain(str(path), expected="a file that can be replaced", got=error, do=do)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # gone already if it took the file's place
                os.unlink(temporary)
