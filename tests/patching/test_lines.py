"""Lines as bytes, with every kind of newline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrpo_plugin.patching.lines import insert_line, newline_of, remove_line


@pytest.mark.parametrize(
    ("data", "number", "newline"),
    [
        (b"a\nb\r\nc\r", 1, b"\n"),
        (b"a\nb\r\nc\r", 2, b"\r\n"),
        (b"a\nb\r\nc\r", 3, b"\r"),
        (b"a\r\nb\r\nc\nd", 4, b"\r\n"),  # the most frequent one
        (b"a\r\nb\nc", 3, b"\n"),  # a draw
        (b"a", 1, b"\n"),
    ],
)
def test_newline_is_the_lines_own_or_the_usual_one(data: bytes, number: int, newline: bytes) -> None:
    assert newline_of(data, number) == newline


@given(
    lines=st.lists(st.tuples(st.binary(max_size=3), st.sampled_from([b"\n", b"\r\n", b"\r"])), min_size=1),
    data=st.data(),
)
def test_remove_inverts_insert(lines: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    text = b"".join(body + end for body, end in lines)
    text = data.draw(st.sampled_from([text, text + b"x"]))
    number = data.draw(st.integers(1, len(text.splitlines())))
    inserted = insert_line(text, number, b"ours")
    assert inserted.splitlines() == [*text.splitlines()[:number], b"ours", *text.splitlines()[number:]]
    assert remove_line(inserted, number + 1) == text
    assert inserted.endswith((b"\n", b"\r")) == text.endswith((b"\n", b"\r"))


def test_last_line_takes_one_newline_with_it() -> None:
    assert remove_line(b"a\n\nours", 3) == b"a\n"
    assert remove_line(b"ours", 1) == b""
