"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from vrpo_plugin.errors import PatchConflictError, VRPOError

Content = bytes | str | Callable[[IO[bytes]], object]


def write_file(path: str | os.PathLike[str], content: Content, *, durable: bool = True) -> None:
    """Writes a file so that a reader, a kill or a full disk meets the old one or the new one, never a part.

    Args:
        path: the file; its folder exists. A new one, or one that is replaced, has the umask's mode.
        content: bytes, text (UTF-8), or a function that writes into an open binary file.
        durable: wait until the disk has it. Without, a power failure may leave an empty file; a kill may not. For
            many small files that can be made again.

    Raises:
        OSError: the disk's refusal; the old file is as it was, and no temporary file is left.
    """
    path = Path(path)
    _take_place(path, content, durable=durable)
    if durable:
        sync(path.parent)


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

    def keep_owner_and_mode(partial: Path) -> None:
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):  # root alone gives files away
                os.chown(partial, info.st_uid, info.st_gid)
        os.chmod(partial, stat.S_IMODE(info.st_mode))
        if target.read_bytes() != old:
            do = "Close the editor that has it open, then run again."
            raise PatchConflictError(str(path), expected="the bytes read a moment ago", got="others", do=do)

    try:
        info = target.stat()
        _take_place(target, new, mode=0o600, before_rename=keep_owner_and_mode)
    except OSError as error:
        do = "It is as it was; run again when the cause is gone."
        raise VRPOError(str(path), expected="a file that can be replaced", got=error, do=do) from error


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


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(
    target: Path,
    content: Content,
    *,
    mode: int = 0o666,
    durable: bool = True,
    before_rename: Callable[[Path], None] = lambda _: None,
) -> None:
    # In the same folder, hence the same file system: os.replace is atomic there alone.
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        before_rename(partial)
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # gone already if it took the target's place
            os.unlink(partial)
