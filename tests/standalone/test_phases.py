"""What a run says in a log file and on a terminal."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrpo_plugin.standalone.phases import Phase, Remarks, describe_source, summary
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.sources import DigitsSource, ImageFolderSource


class Lines(io.StringIO):
    """A log file that tells when a line is there."""

    def wait_for(self, count: int, phase: Phase) -> None:
        while self.getvalue().count("\n") < count:
            assert phase._thread.is_alive()


@pytest.mark.filterwarnings("error")
def test_a_phase_says_that_it_goes_on_and_what_it_made() -> None:
    log = Lines()
    with Phase("data", interval=0.01, file=log) as phase:
        log.wait_for(2, phase)
        phase.made = "12 images"
    *during, last = log.getvalue().splitlines()
    assert len(during) >= 2 and set(during) == {"data: 0 s so far"}
    assert last.startswith("data: 12 images (0.") and "\r" not in log.getvalue()


def test_a_bar_is_sign_enough() -> None:
    log, bars = Lines(), io.StringIO()
    with progress(range(3), "steps", file=bars) as bar, Phase("encoder", interval=0.001, file=log) as phase:
        for _ in bar:
            phase._over.wait(0.02)
    assert log.getvalue().splitlines() == [log.getvalue().strip()] and "encoder: done" in log.getvalue()


def test_other_processes_and_failed_phases_say_nothing() -> None:
    log = Lines()
    with Phase("data", enabled=False, file=log):
        pass
    with pytest.raises(ValueError, match="broken"), Phase("data", file=log):
        raise ValueError("broken")
    assert log.getvalue() == ""


def test_a_source_in_words(tmp_path: Path) -> None:
    assert describe_source(DigitsSource()) == "1,797 images in 10 classes, 1x8x8"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert describe_source(ImageFolderSource(tmp_path, 8)) == "1 image in 1 class, 3x8x8"


def test_remarks_are_made_once_and_when_they_doubled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("text")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "9.png")
    source = ImageFolderSource(tmp_path, 8)
    remarks = Remarks(source)
    for count in range(8, 0, -1):
        source.load(count - 1)
        remarks.say_new()
    said = capsys.readouterr().err.splitlines()
    assert [int(line.split()[2]) for line in said] == [1, 2, 4, 8]
    assert said[0] == f"data: skipped 1 of 9 files that cannot be read: {tmp_path / '7.png'}"
    remarks.say_new(all_of_them=True)
    assert capsys.readouterr().err == ""


def test_the_summary_names_what_is_there(tmp_path: Path) -> None:
    for name in ("samples/0000006.png", "samples/0000012.png", "metrics.jsonl", "evaluation.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert summary(tmp_path) == [
        f"run: {tmp_path}",
        "  samples      samples/0000012.png and 1 more",
        "  metrics      metrics.jsonl",
        "  evaluation   evaluation.json",
        f"next: vrpo sample {tmp_path} -o DIR",
        f"      vrpo plot {tmp_path}",
    ]
