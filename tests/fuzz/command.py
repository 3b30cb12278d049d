"""Runs a command line of the package in this process, and says what a user would have seen."""

import contextlib
import hashlib
import io
import os
import re
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vrpo_plugin import cli, errors, launch

LIMIT = 30  # seconds; the slowest command takes two


class Late(BaseException):
    """A command waits for ever; no OSError, as TimeoutError is, for the package may catch that."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: as the shell sees it.
        out: what it printed.
        error: the error's one line; empty if there is none.
        fault: why that may not be; empty if it may.
    """

    status: int
    out: str
    error: str
    fault: str

    @property
    def refused(self) -> bool:
        return self.status != 0


@dataclass(frozen=True)
class Snapshot:
    """Mode, and bytes or a link's target, of everything below a folder, by path; perhaps with the times of writing."""

    files: dict[str, tuple[int, bytes]]
    times: dict[str, tuple[int, int]]

    def changed(self, other: "Snapshot") -> list[str]:
        names = sorted({*self.files, *other.files})
        return [
            name
            for name in names
            if self.files.get(name) != other.files.get(name) or self.times.get(name) != other.times.get(name)
        ]


def snapshot(folder: Path, *, times: bool = False) -> Snapshot:
    """What a folder holds, links not followed."""
    found, stamps = {}, {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files, "."]:
            path = os.path.join(place, name)
            info = os.lstat(path)
            content = b""
            if stat.S_ISLNK(info.st_mode):
                content = os.fsencode(os.readlink(path))
            elif stat.S_ISREG(info.st_mode):
                content = _content(path, info)
            key = os.path.relpath(path, folder)
            found[key] = (info.st_mode, content)
            if times:
                stamps[key] = (info.st_mtime_ns, info.st_ino)
    return Snapshot(found, stamps)


def _content(path: str, info: os.stat_result) -> bytes:
    with open(path, "rb") as file:
        data = file.read()
    return data if path.endswith(".py") else hashlib.sha256(data).digest()


def run(command: str, *arguments: object) -> Ended:
    """``vrpo COMMAND ARGUMENTS``; the command ``launch`` stands for ``python -m vrpo_plugin.launch``."""
    argv = [str(argument) for argument in arguments]
    # As strict as a terminal's: text that it cannot encode ends the program there too.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code: Any = 0
    fault = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited():
            launch.main(argv) if command == "launch" else cli.main([command, *argv])
    except SystemExit as end:
        code = end.code or 0
    except (Exception, Late) as error:  # any other is what this looks for
        code, fault = 1, f"no typed refusal but {error!r:.500}"
    error = code if isinstance(code, str) else ""
    status = 1 if isinstance(code, str) else code
    printed, warned = (_text(stream) for stream in (out, err))
    if not fault and warned:
        fault = f"stderr holds {warned[:300]!r}"
    if not fault and status and not (command == "check" and status == 1 and printed and not error):
        fault = _fault_of(error)
    return Ended(status, printed, error, fault)


def _fault_of(error: str) -> str:
    """Why a text is no error of ours in one line."""
    name = error.partition(":")[0]
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.VRPOError)):
        return f"no typed refusal: {error[:300]!r}"
    if "\n" in error or not re.search(r" expected .*, got ", error):
        return f"not one line of three parts: {error[:500]!r}"
    return ""


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A command that waits for ever, as for a pipe, is ended; where there is no alarm, it is not."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late(f"it was still running after {LIMIT} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
