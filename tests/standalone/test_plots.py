"""vrpo plot, by its command line."""

import base64
import importlib.util
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fakes.run_folders import PROTOCOL, make_run, row
from PIL import Image

from vrpo_plugin.cli import main
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone import plots
from vrpo_plugin.standalone.evaluate import EvalResult
from vrpo_plugin.standalone.host_logs import read_log
from vrpo_plugin.standalone.runs import read_runs


def png(colour: int = 0) -> bytes:
    picture = io.BytesIO()
    Image.new("L", (4, 4), colour).save(picture, "png")
    return picture.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    result = EvalResult(PROTOCOL, 1.25, 0.5, 0.75)
    return make_run(tmp_path / "a", map(row, range(1, 11)), {"max_train_steps": 10}, result, grid=png())


class Page(HTMLParser):
    """Tags, sources and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_the_report_needs_no_other_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(run)])
    assert capsys.readouterr().out.startswith(f"wrote {run / 'report.html'}")
    page = Page((run / "report.html").read_text("utf-8"))
    assert page.open == [] and not {"script", "link"} & set(page.tags)
    assert len(page.sources) == 2 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    curves, grid = (base64.b64decode(source.partition(",")[2]) for source in page.sources)
    assert grid == png() and Image.open(io.BytesIO(curves)).width > 400
    for shown in ("a, step 10", "frechet_distance", "1.25", "feature_network small-1", "max_train_steps"):
        assert shown in page.text


def test_settings_are_text_and_not_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>", map(row, range(1, 3)), {"data_dir": "<script>alert(1)</script>"})
    main(["plot", str(run)])
    page = Page((run / "report.html").read_text("utf-8"))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text


def test_each_run_has_its_colour_and_the_legend_its_name(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", (row(step, loss=3.0) for step in range(1, 11)))
    alone, both = tmp_path / "one.png", tmp_path / "two.png"
    main(["plot", str(run), "-o", str(alone)])
    main(["plot", str(run), str(other), "-o", str(both)])

    def has(path: Path, colour: tuple[int, int, int]) -> bool:
        return bool((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).any())

    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    assert has(alone, blue) and not has(alone, orange)
    assert has(both, blue) and has(both, orange)


@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(1, loss=None), row(2, loss=float("nan"))],
        [row(step, **{"vrpo/gradient_ratio": 0.0, "grad_norm": -1.0}) for step in range(1, 4)],
    ],
    ids=["one step", "no numbers", "no positive numbers"],
)
def test_odd_runs_are_drawn(rows: list[dict], tmp_path: Path) -> None:
    make_run(tmp_path / "a", rows)
    main(["plot", str(tmp_path / "a"), "-o", str(tmp_path / "a.png")])
    assert size(tmp_path / "a.png") > (400, 200)


def test_more_runs_than_colours_of_the_small_map(tmp_path: Path) -> None:
    assert len({tuple(colour) for colour in plots._colours(13)}) == 13


def test_metrics_are_chosen_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = read_runs([run])
    assert plots.chosen_metrics(runs) == [
        "loss", "vrpo/reward/semantic", "vrpo/weight/semantic", "vrpo/critic_cos", "grad_norm",
    ]  # fmt: skip
    assert plots.chosen_metrics(runs, ["skip*", "loss"]) == ["skipped", "loss"]
    with pytest.raises(SystemExit, match="metrics: expected nothing-like-it, got loss,"):
        main(["plot", str(run), "--metric", "nothing-like-it"])
    assert not (run / "report.html").exists()


def test_only_its_own_file_is_replaced(run: Path, tmp_path: Path) -> None:
    for name in ("x.png", "x.html"):
        file = tmp_path / name
        file.write_bytes(png())
        with pytest.raises(SystemExit, match="expected a new file, or one of vrpo plot"):
            main(["plot", str(run), "-o", str(file)])
        assert file.read_bytes() == png()
        main(["plot", str(run), "-o", str(file), "--overwrite"])
        first = file.read_bytes()
        main(["plot", str(run), "-o", str(file), "--smooth", "3"])
        assert file.read_bytes() != first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "x.pdf"], "expected a file that ends in .png or .html"),
        (["-o", "no/such/x.png"], "expected a file in an existing folder"),
        (["--smooth", "0"], "expected >= 1 step"),
    ],
)
def test_wrong_options_are_refused(run: Path, options: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["plot", str(run), *options])


def test_without_matplotlib_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        main(["plot", str(run)])


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.md").write_text("x")
    (tmp_path / "repa").mkdir()
    (tmp_path / "repa" / "log.txt").write_text("[2026] Dataset contains 10 images\n")
    for name, said in (
        ("foreign", "got a folder of notes.md. Give the folder that holds config.json"),
        ("repa", "--report-to tensorboard"),
        ("nowhere", "got no folder"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(["plot", str(tmp_path / name), "-o", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


def test_a_damaged_grid_or_line_is_named_and_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "samples" / "0000020.png").write_bytes(b"not a picture")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    main(["plot", str(run)])
    assert "no row of metrics in line 11: skipped" in capsys.readouterr().err
    page = Page((run / "report.html").read_text("utf-8"))
    assert len(page.sources) == 1 and "0000020.png: no PNG: left out" in page.text and "in line 11" in page.text


HOST_LOG = """[2026-11-26 15:37:36] (step=0000100) Train Loss: 1.0393, Train Steps/Sec: 2.00
[2026-11-26 15:37:36] vrpo (call=0000100) align_cos: 0.1000, reward/semantic: -0.2000, gradient_ratio: nan
[2026-11-26 15:37:37] (step=0000200) Train Loss: 0.9000, Train Steps/Sec: 4.00
[2026-11-26 15:37:37] vrpo (call=0000200) align_cos: 0.3000, reward/semantic: 0.4000, gradient_ratio: nan
[2026-11-26 15:37:38] (step=0000200) Train Loss: 0.8000, Train Steps/Sec: 4.00
"""


def test_a_hosts_log_is_drawn(tmp_path: Path, run: Path) -> None:
    (tmp_path / "000-SiT").mkdir()
    log = tmp_path / "000-SiT" / "log.txt"
    log.write_text(HOST_LOG)
    found = read_log(log)
    assert found.series["vrpo/align_cos"].mean.tolist() == [0.1, 0.3]
    assert found.series["vrpo/reward/semantic"].mean.tolist() == [-0.2, 0.4]
    assert found.series["loss"].mean.tolist() == [1.0393, 0.8] and "vrpo/gradient_ratio" not in found.series
    assert found.seconds.tolist() == [0.5, 0.25] and found.last_step == 200
    assert "1 lines are of an earlier start" in found.notes[0]
    main(["plot", str(log.parent), str(run), "-o", str(tmp_path / "x.png")])
    assert size(tmp_path / "x.png") > (400, 200)


def test_tensorboard_files_are_drawn(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    for first, value in ((0, 1.0), (5, 2.0)):  # the second start writes steps 5 to 7 again
        with tensorboard.SummaryWriter(str(tmp_path / "run" / "logs")) as writer:
            for step in range(first, first + 8):
                writer.add_scalar("vrpo/critic_cos", value, step)
    (read,) = read_runs([tmp_path / "run"])
    series = read.metrics.series["vrpo/critic_cos"]
    assert series.steps.tolist() == list(range(13)) and series.mean.tolist() == [1.0] * 5 + [2.0] * 8
    with tensorboard.SummaryWriter(str(tmp_path / "run" / "other")) as writer:
        writer.add_scalar("vrpo/critic_cos", 1, 0)
    with pytest.raises(ConfigError, match="the event files of one run"):
        read_runs([tmp_path / "run"])


def test_tensorboard_files_without_tensorboard_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setattr("vrpo_plugin.standalone.runs.can_read_events", lambda: False)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        main(["plot", str(tmp_path / "run")])


def test_help_says_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plot", "compare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        listed = re.findall(r"^  (-.*?)(?:  |\n)", capsys.readouterr().out, flags=re.MULTILINE)
        assert len(listed) >= 2
