"""Lists of files that sources read, and what was met in which of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vrpo_plugin.errors import DataError
from vrpo_plugin.standalone.images import UnreadableError

NAMED = 3  # files that a line of remarks names


class Remark(NamedTuple):
    """What was met in some files: of which kind, in how many, and in words with the first names."""

    kind: str
    files: int
    text: str


class FileFlags:
    """What was met in which of N files, shared with the data loader's processes.

    Args:
        count: N.
    """

    UNREADABLE, COMPOSED, LATENT = 1, 2, 4  # LATENT: of the two files, it is that of the latent
    MOST_IN_A_ROW = 100

    def __init__(self, count: int) -> None:
        self._flags = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def set(self, index: int, flag: int) -> None:
        """Marks a file."""
        self._flags[index] |= flag

    def indices(self, flag: int) -> list[int]:
        """The files with a mark, in order."""
        return (self._flags & flag).nonzero().flatten().tolist()


class OfFiles:
    """Images in files, of which some may be unreadable: the next readable one takes the place of such a file."""

    _files: "FileList"
    _labels: np.ndarray
    _flags: FileFlags

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        """See :meth:`Source.load`.

        Raises:
            DataError: a file is unlike the others, or many in a row cannot be read.
        """
        tried = min(len(self), FileFlags.MOST_IN_A_ROW)
        for place in range(index, index + tried):
            try:
                return self._read(place % len(self))
            except UnreadableError as error:
                self._flags.set(place % len(self), FileFlags.UNREADABLE)
                last = error
        got, do = f"{tried} in a row that cannot; the last one: {last}", "Look at these files, and at what they lie on."
        raise DataError("images", expected="files that can be read", got=got, do=do)

    def _read(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        raise NotImplementedError

    def _named(self, index: int) -> Path:
        return self._files.path(index)

    def unreadable(self) -> list[int]:
        """Indices of the files that could not be read, as far as they were met, by any process of the data loader."""
        return self._flags.indices(FileFlags.UNREADABLE)

    def remarks(self) -> list[Remark]:
        """What there is to say of the files that were read so far."""
        lines = []
        for flag, text in (
            (FileFlags.UNREADABLE, "skipped {} that cannot be read"),
            (FileFlags.COMPOSED, "composed {} with transparency on white"),
        ):
            if found := self._flags.indices(flag):
                count = f"{len(found):,} of {len(self):,} files"
                names = ", ".join(str(self._named(index)) for index in found[:NAMED])
                text = f"{text.format(count)}: {names}{', ...' if len(found) > NAMED else ''}"
                lines.append(Remark(str(flag), len(found), text))
        return lines


class FileList:
    """Relative names under a folder, in one array: reference counts of a list of strings would copy the list
    into every worker.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        if not names:
            raise data_error(root, "images or npy files", "none", "Point at the folder that holds the data.")
        self._root, self._names = root, np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._names[index])

    def parts(self) -> list[bytes]:
        # One stat per file would take minutes on a network file system.
        sizes = [self.path(index).stat().st_size for index in evenly_spaced(len(self), 1000)]
        return [b"\0".join(self._names.tolist()), repr(sizes).encode()]


def evenly_spaced(count: int, limit: int) -> list[int]:
    taken = min(count, limit)
    return [i * count // taken for i in range(taken)]


def entries_of(root: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(root))
    except OSError as error:
        raise data_error(root, "a readable folder", error.strerror, "Check the path.") from error


def names_below(root: Path, extensions: Sequence[str]) -> list[str]:
    entries_of(root)
    names = []
    for folder, _, files in os.walk(root):
        prefix = os.path.relpath(folder, root)
        kept = [name for name in files if os.path.splitext(name)[1].lower() in extensions]
        names += kept if prefix == os.curdir else [os.path.join(prefix, name) for name in kept]
    return sorted(names)


def data_error(where: str | Path, expected: object, got: object, do: str) -> DataError:
    """A DataError that names the file or folder."""
    return DataError(str(where), expected=expected, got=got, do=do)
