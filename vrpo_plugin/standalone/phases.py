"""What a run says beside its bars: a line for each phase, what was met in the data, and a summary at the end."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from vrpo_plugin.standalone.checkpoint import latest_checkpoint
from vrpo_plugin.standalone.progress import INTERVAL
from vrpo_plugin.standalone.sources import Source, remarks_on


def say(line: str, file: TextIO | None = None) -> None:
    """A line on standard error, where the bars are; in a log file it is there at once and has no carriage return."""
    file = sys.stderr if file is None else file
    if file.isatty():
        tqdm.write(line, file=file)  # above the bar
    else:
        file.write(f"{line}\n")
        file.flush()


class Phase:
    """A context manager that ends with ``name: what was made (seconds)``, and says at intervals that it goes on.

    Where a bar runs inside it, the bar is the sign of life.

    Args:
        name: of the phase.
        enabled: False says nothing, for all processes but the first.
        interval: seconds between two signs of life.
        file: where to; standard error if None.
    """

    def __init__(
        self, name: str, *, enabled: bool = True, interval: float = INTERVAL, file: TextIO | None = None
    ) -> None:
        self.name, self.made = name, "done"
        self._enabled, self._interval, self._file = enabled, interval, file
        self._over = threading.Event()

    def __enter__(self) -> "Phase":
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._go_on, name="phase", daemon=True)
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._enabled:
            self._thread.join()
            if error is None:
                say(f"{self.name}: {self.made} ({time.monotonic() - self._started:.1f} s)", self._file)

    def _go_on(self) -> None:
        while not self._over.wait(self._interval):
            if not getattr(tqdm, "_instances", ()):
                say(f"{self.name}: {time.monotonic() - self._started:.0f} s so far", self._file)


def describe_source(source: Source) -> str:
    """``so many images in so many classes, of so many pixels``."""
    channels, height, width = source.image_shape
    classes = f"{source.num_classes:,} class{'es' if source.num_classes != 1 else ''}"
    images = f"{len(source):,} image{'s' if len(source) != 1 else ''}"
    text = f"{images} in {classes}, {channels}x{height}x{width}"
    if source.latent_shape != source.image_shape:
        text += f", latents {'x'.join(map(str, source.latent_shape))}"
    return text


class Remarks:
    """Says what was met in the data: each thing once, and again whenever it is twice as often.

    Args:
        source: whose files are read.
        prefix: of the lines; names the process where there are several.
    """

    def __init__(self, source: Source, prefix: str = "data") -> None:
        self.source, self.prefix = source, prefix
        self._said: dict[str, int] = {}

    def say_new(self, *, all_of_them: bool = False) -> None:
        """Says what is new; ``all_of_them``: at the end, with the last counts."""
        for remark in remarks_on(self.source):
            said = self._said.get(remark.kind, 0)
            if remark.files >= max(1, 2 * said) or (all_of_them and remark.files > said):
                say(f"{self.prefix}: {remark.text}")
                self._said[remark.kind] = remark.files


def summary(folder: Path) -> list[str]:
    """The files of a run, as they are there, and what can be done with them next."""
    lines = [f"run: {folder}"]
    newest = latest_checkpoint(folder / "checkpoints")
    kept = sum(path.name.isdigit() for path in (folder / "checkpoints").iterdir()) if newest else 0
    grids = sorted((folder / "samples").glob("*.png"))
    found = {
        "checkpoints": f"checkpoints/{newest.name}{_and_more(kept)}" if newest else "",
        "samples": f"samples/{grids[-1].name}{_and_more(len(grids))}" if grids else "",
        "metrics": ", ".join(name for name in ("metrics.jsonl", "curves.png") if (folder / name).exists()),
        "evaluation": ", ".join(path.name for path in sorted(folder.glob("evaluation*"))),
    }
    lines += [f"  {name:<12} {files}" for name, files in found.items() if files]
    return [*lines, f"next: vrpo sample {folder} -o DIR", f"      vrpo plot {folder}"]


def _and_more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
