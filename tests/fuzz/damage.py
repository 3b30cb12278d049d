"""Damages to a host's checkout, each drawn from a seeded generator."""

import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.patching.lines import insert_line

LINES = [one.line.encode() for spec in HOSTS.values() for one in spec.insertions]
ANCHORS = sorted({one.anchor.encode() for spec in HOSTS.values() for one in spec.insertions})
# Codecs under which bytes and text have other lines, or that are none.
CODECS = (b"latin-1", b"utf-7", b"utf-16", b"unicode_escape", b"rot13", b"no-such", b"cp037", b"ascii")


@dataclass(frozen=True)
class Sandbox:
    """A folder that holds a copy of a checkout and a folder beside it, which nobody may write.

    Attributes:
        tree: the checkout.
        outside: the folder beside it.
        draw: every choice comes from it.
    """

    tree: Path
    outside: Path
    draw: random.Random

    def files(self) -> list[Path]:
        """Regular files of the tree: the scripts and seams of the hosts count four times."""
        everything = [path for path in sorted(self.tree.rglob("*")) if path.is_file() and not path.is_symlink()]
        wanted = {Path(name).name for spec in HOSTS.values() for name in spec.files}
        return everything + 3 * [path for path in everything if path.name in wanted]

    def file(self) -> Path:
        return self.draw.choice(self.files() or [self._first()])

    def folder(self) -> Path:
        folders = [path for path in sorted(self.tree.rglob("*")) if path.is_dir() and not path.is_symlink()]
        return self.draw.choice([self.tree, *folders])

    def _first(self) -> Path:
        path = self.tree / "train.py"
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(b"import os\n")
        return path


def damage(box: Sandbox) -> str:
    """Does one thing to the tree, and says which."""
    name = box.draw.choice(sorted(DAMAGES))
    DAMAGES[name](box)
    return name


def _bytes(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Sandbox], None]:
    """A damage to the bytes of one file; its mode stays."""

    def work(box: Sandbox) -> None:
        path = box.file()
        mode = path.stat().st_mode
        path.chmod(mode | 0o200)
        path.write_bytes(change(path.read_bytes(), box.draw))
        path.chmod(mode)

    return work


def _flip(data: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 4)) if data else 0):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _cut_out(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.randint(1, 20) :]


def _put_in(data: bytes, draw: random.Random) -> bytes:
    piece = draw.choice([draw.randbytes(draw.randint(1, 8)), *PIECES, *LINES])
    at = draw.randrange(len(data) + 1)
    return data[:at] + piece + data[at:]


def _lines(change: Callable[[list[bytes], int, int], None]) -> Callable[[Sandbox], None]:
    """A damage to the lines of one file, at two of their indices."""

    def work(data: bytes, draw: random.Random) -> bytes:
        lines = data.splitlines(keepends=True) or [b"\n"]
        change(lines, draw.randrange(len(lines)), draw.randrange(len(lines)))
        return b"".join(lines)

    return _bytes(work)


def _swap_lines(lines: list[bytes], i: int, j: int) -> None:
    lines[i], lines[j] = lines[j], lines[i]


def _our_line(data: bytes, draw: random.Random) -> bytes:
    """A line of ours after an import, as it is or edited by hand, once or twice."""
    line = draw.choice(LINES)
    for anchor in ANCHORS:
        at = data.find(anchor)
        if at >= 0:
            own = [one.line.encode() for s in HOSTS.values() for one in s.insertions if one.anchor.encode() == anchor]
            line, number = draw.choice(own), data.count(b"\n", 0, at) + 1
            edit = draw.choice([lambda x: x, lambda x: x.replace(b"# ", b"#"), lambda x: b"# " + x, lambda x: x + b" "])
            try:
                for _ in range(draw.choice((1, 1, 2))):
                    data = insert_line(data, number, edit(line))
            except IndexError:  # where lines end by carriage returns
                break
            return data
    return data + b"\n" + line


def _rename(data: bytes, draw: random.Random) -> bytes:
    names = re.findall(rb"(?:def|class) +(\w+)", data)
    return data.replace(draw.choice(names), b"renamed") if names else data


def _parameter(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"def \w+\((?:self, *)?(\w+)", data))
    if not found:
        return data
    at, end = draw.choice(found).span(1)
    return data[:at] + draw.choice((b"renamed", b"extra, " + data[at:end], b"*")) + data[end:]


def _codec(data: bytes, draw: random.Random) -> bytes:
    # Two of the comments are a newline more in their encoding.
    odd = (
        (b"utf-7", b"# +AAo-\n"),
        (b"unicode_escape", b"# \\n\n"),
        (draw.choice(CODECS), draw.choice((b"", b"#\xe9\n"))),
    )
    codec, comment = draw.choice(odd)
    for anchor in ANCHORS if draw.random() < 0.5 else ():
        data = data.replace(anchor + b"\n", anchor + b"\n# one\n# more\n")  # among which a line can go astray
    return b"# coding: " + codec + b"\n" + comment + data


def _nested(data: bytes, draw: random.Random) -> bytes:
    """Code that a recursive reader of its tree cannot hold."""
    deep = draw.choice((b"a" + b"+a" * 20000, b"(" * 150 + b")" * 150, b"-" * 5000 + b"1", b"a" + b".a" * 5000))
    return data + b"\nif 0:\n    " + deep + b"\n"


def _delete(box: Sandbox) -> None:
    box.file().unlink()


def _swap_files(box: Sandbox) -> None:
    one, other = box.file(), box.file()
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _folder_for_file(box: Sandbox) -> None:
    path = box.file()
    path.unlink()
    path.mkdir()


def _pipe_for_file(box: Sandbox) -> None:
    path = box.file()
    path.unlink()
    os.mkfifo(path)


def _link(box: Sandbox) -> None:
    """A symbolic link in a file's place: to itself, to nothing, outside, or elsewhere in the tree."""
    path = box.file()
    kind = box.draw.choice(("loop", "dangling", "outside", "outside", "inside"))
    target = {"loop": path, "dangling": path.with_name("nowhere.py"), "inside": path.with_name("real_" + path.name)}
    if kind == "outside":
        target["outside"] = box.outside / path.name
    if kind in ("outside", "inside"):
        shutil.copy2(path, target[kind])
    path.unlink()
    path.symlink_to(os.path.relpath(target[kind], path.parent) if box.draw.random() < 0.5 else target[kind])


def _linked_folder(box: Sandbox) -> None:
    """A folder of the tree moves outside, and a link stays."""
    folder = box.folder()
    if folder != box.tree and not (box.outside / folder.name).exists():
        shutil.move(folder, box.outside / folder.name)
        folder.symlink_to(box.outside / folder.name)


def _hard_link(box: Sandbox) -> None:
    path = box.file()
    if not (box.outside / path.name).exists():
        os.link(path, box.outside / path.name)


def _read_only_file(box: Sandbox) -> None:
    box.file().chmod(box.draw.choice((0o444, 0o000, 0o555)))


def _read_only_folder(box: Sandbox) -> None:
    box.folder().chmod(0o555)


def _git(box: Sandbox) -> None:
    git = box.folder() / ".git"
    if os.path.lexists(git):
        return
    if box.draw.random() < 0.3:
        git.write_bytes(box.draw.choice((b"gitdir: ../nowhere\n", b"", b"\xff")))
        return
    (git / "refs").mkdir(parents=True)
    (git / "HEAD").write_bytes(box.draw.choice((b"ref: refs/heads/none\n", b"0" * 40, b"", b"\x00\xff")))
    (git / box.draw.choice(("index.lock", "MERGE_HEAD", "rebase-merge"))).write_bytes(b"")


def _nested_checkout(box: Sandbox) -> None:
    """The tree once more in a folder of itself, which is a host's name for its scripts or is not."""
    target = box.tree / box.draw.choice(("ldm", "copy", "models"))
    if not os.path.lexists(target):
        shutil.copytree(box.tree, target, symlinks=True, ignore=lambda at, names: [n for n in names if _odd(at, n)])


def _odd(at: str, name: str) -> bool:
    path = Path(at, name)
    return not (path.is_symlink() or path.is_file() or path.is_dir())


def _empty(box: Sandbox) -> None:
    for path in sorted(box.tree.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
            path.rmdir()
        else:
            path.unlink()


PIECES = (b"\\\n", b";", b"'''", b"\r", b"\x0c", b"#", b"\t", b"\x00", b"\xff", b"\xc3\xa9", b"import vrpo_plugin\n")
DAMAGES: dict[str, Callable[[Sandbox], None]] = {
    "flipped bits": _bytes(_flip),
    "bytes cut out": _bytes(_cut_out),
    "bytes put in": _bytes(_put_in),
    "a truncation": _bytes(lambda data, draw: data[: draw.randrange(len(data) + 1)]),
    "no final newline": _bytes(lambda data, draw: data.rstrip(b"\r\n")),
    "carriage returns": _bytes(lambda data, draw: data.replace(b"\n", draw.choice((b"\r\n", b"\r")))),
    "a byte order mark": _bytes(lambda data, draw: draw.choice((b"\xef\xbb\xbf", b"\xff\xfe")) + data),
    "a codec": _bytes(_codec),
    "a deep tree": _bytes(_nested),
    "an invalid escape": _bytes(lambda data, draw: data + b'\nodd = "\\d" is 1\n'),
    "a line less": _lines(lambda lines, i, j: lines.__delitem__(i)),
    "a line twice": _lines(lambda lines, i, j: lines.insert(i, lines[i])),
    "a line elsewhere": _lines(lambda lines, i, j: lines.insert(j, lines.pop(i))),
    "two lines swapped": _lines(_swap_lines),
    "a comment": _lines(lambda lines, i, j: lines.insert(i, b"# added\n")),
    "a definition renamed": _bytes(_rename),
    "a parameter changed": _bytes(_parameter),
    "a line of ours": _bytes(_our_line),
    "a file deleted": _delete,
    "two files swapped": _swap_files,
    "a folder for a file": _folder_for_file,
    "a pipe for a file": _pipe_for_file,
    "a link": _link,
    "a linked folder": _linked_folder,
    "a hard link": _hard_link,
    "a read-only file": _read_only_file,
    "a read-only folder": _read_only_folder,
    "an odd git folder": _git,
    "a checkout inside": _nested_checkout,
    "an empty tree": _empty,
}
