"""A sign of life for long work: a bar on a terminal, plain lines at intervals in a log file."""

import math
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

INTERVAL = 5.0  # seconds between two lines of a log
_LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%) [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def progress(
    items: Iterable[Any] | int | None,
    description: str,
    *,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    enabled: bool = True,
    interval: float = INTERVAL,
    file: TextIO | None = None,
) -> tqdm:
    """Shows how far a work is, its rate and the remaining time.

    On a terminal it is tqdm's bar. Elsewhere (a log file, a pipe) it is a plain line at the start, at intervals and
    at the end, without carriage returns. Both go on while a single item takes long.

    Args:
        items: what is iterated over; or how many steps there are (None: unknown), and ``update()`` counts them.
        description: what is being done, in a word or two.
        unit: what is counted, in the singular.
        total: how many items there are, where ``items`` has no length.
        initial: how many were done before, for instance by an interrupted run; they do not count in the rate.
        enabled: False shows nothing, for all processes but the first.
        interval: seconds between two lines of a log; on a terminal the bar is drawn ten times a second.
        file: where it is written; standard error if None.

    Returns:
        tqdm's object: iterate over it, or call ``update(n)``, ``set_postfix(...)`` and ``close()``; also a context
        manager.
    """
    file = sys.stderr if file is None else file
    counted = items is None or isinstance(items, int)
    common: dict[str, Any] = {
        "iterable": None if counted else items,
        "total": items if counted else total,
        "desc": description,
        "unit": unit,
        "initial": initial,
        "disable": not enabled,
        "file": file,
    }
    bar: _Bar
    if file.isatty():
        bar, interval = _Bar(**common, miniters=1, dynamic_ncols=True), 1.0
    else:
        bar = _Lines(**common, mininterval=interval, miniters=1, leave=True)
    if enabled:
        _keep_alive(bar, interval)
    return bar


class _Bar(tqdm):
    """tqdm whose count is right after every item: its own loop counts only when it draws."""

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()


class _Lines(_Bar):
    """tqdm that writes whole lines, at most one per interval."""

    shown = -math.inf

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes one line; the last one gets its end from ``close``."""
        closing, now = self.disable, time.monotonic()
        if not closing and now - self.shown < self.mininterval:
            return
        self.shown = now
        known = dict(self.format_dict)
        line = self.format_meter(**{**known, "bar_format": _LINE if known["total"] else _LINE_WITHOUT_TOTAL})
        self.fp.write(line if closing else f"{line}\n")
        self.fp.flush()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a line that is written stays."""

    def moveto(self, n: int) -> None:
        """Nothing: a line has no position on a screen."""


def _keep_alive(bar: tqdm, interval: float) -> None:
    """Shows the bar again and again from a thread of its own, for a single item may take minutes."""
    found = weakref.ref(bar)  # a bar that nobody holds any more ends, and with it the thread

    def tick() -> None:
        wait = interval
        while True:
            time.sleep(min(wait, 0.5))
            live = found()
            if live is None or live.disable:
                return
            wait = interval - (time.monotonic() - getattr(live, "shown", -math.inf))
            if wait <= 0:
                live.refresh()
                wait = interval
            del live

    threading.Thread(target=tick, name="progress", daemon=True).start()
