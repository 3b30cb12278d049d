"""Lines of a script as bytes: no encoding, no byte order mark and no newline is ever converted."""


def newline_of(data: bytes, number: int) -> bytes:
    """What ends the 1-based line ``number``, or the most frequent newline if that is a last line without one."""
    endings = [_ending(line) for line in data.splitlines(keepends=True)]
    common = max((b"\n", b"\r\n", b"\r"), key=endings.count)
    return endings[number - 1] or common


def insert_line(data: bytes, number: int, line: bytes) -> bytes:
    """The bytes with ``line`` after line ``number``; a script without a final newline stays without."""
    lines, newline = data.splitlines(keepends=True), newline_of(data, number)
    added = line + newline if _ending(lines[number - 1]) else newline + line
    return b"".join([*lines[:number], added, *lines[number:]])


def remove_line(data: bytes, number: int) -> bytes:
    """The bytes without line ``number``: after :func:`insert_line`, with 1 more, the bytes of before."""
    lines = data.splitlines(keepends=True)
    before = b"".join(lines[: number - 1])
    if not _ending(lines[number - 1]):
        before = before.removesuffix(_ending(lines[number - 2]))
    return before + b"".join(lines[number:])


def _ending(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :]
