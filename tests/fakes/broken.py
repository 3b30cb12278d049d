"""A file that must not be loaded, and a disk that takes nothing."""

from pathlib import Path
from typing import NoReturn


class Bomb:
    """Pickles to a call, as an untrusted file could: whoever runs it makes a file ``exploded``."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def disk_full(*_: object) -> NoReturn:
    """Stands for ``os.replace``, ``os.fsync`` and the like."""
    raise OSError(28, "No space left on device")
