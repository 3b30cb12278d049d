"""Progress: a bar on a terminal, plain lines in a file, and signs of life while one item takes long."""

import io
import re
import threading
import time

import pytest

from vrpo_plugin.standalone.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_first_and_a_last_line_and_no_carriage_return() -> None:
    log = io.StringIO()
    assert list(progress(range(1000), "sampling", unit="image", file=log)) == list(range(1000))
    first, last = log.getvalue().splitlines()
    assert first == "sampling: 0/1000 (0%) [00:00<?, ?image/s]"
    assert re.fullmatch(r"sampling: 1000/1000 \(100%\) \[00:0\d<00:00, +[\d.]+image/s\]", last)
    assert "\r" not in log.getvalue() and log.getvalue().endswith("\n")


def test_an_item_that_takes_long_is_told_of_with_the_right_count() -> None:
    log = io.StringIO()
    deadline = time.monotonic() + 30
    for item in progress(["a", "b"], "encoding", interval=0.05, file=log):
        # The first item passes before an interval is over, so a loop that counts only when it draws says 0 here.
        while item == "b" and log.getvalue().count("encoding: 1/2 (50%)") < 3:
            assert time.monotonic() < deadline, log.getvalue()
            time.sleep(0.01)
    assert log.getvalue().splitlines()[-1].startswith("encoding: 2/2 (100%)")


def test_a_count_goes_on_from_an_interrupted_run() -> None:
    log = io.StringIO()
    with progress(10, "sampling", initial=6, file=log) as bar:
        bar.set_postfix(loss="0.5")  # draws no line of its own within an interval
        bar.update(4)
    first, last = log.getvalue().splitlines()
    assert first.startswith("sampling: 6/10 (60%)") and last.startswith("sampling: 10/10 (100%)")
    assert last.endswith("loss=0.5]")


def test_without_a_total_it_counts() -> None:
    log = io.StringIO()
    assert len(list(progress(iter("abc"), "scanning", unit="file", file=log))) == 3
    assert log.getvalue().splitlines()[-1].startswith("scanning: 3 [00:0")


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    assert len(list(progress(range(3), "sampling", file=terminal))) == 3
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_other_processes_show_nothing() -> None:
    log = io.StringIO()
    assert list(progress(range(3), "sampling", enabled=False, file=log)) == [0, 1, 2]
    assert log.getvalue() == ""


@pytest.mark.parametrize("closed", [True, False])
def test_no_thread_is_left(closed: bool) -> None:
    bar = progress(3, "sampling", interval=0.05, file=io.StringIO())
    if closed:
        bar.close()
    del bar
    deadline = time.monotonic() + 30
    while any(thread.name == "progress" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
