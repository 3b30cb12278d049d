"""README and docs/: their code runs, their links lead somewhere, they name what the code has, in plain English."""

import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from vrpo_plugin import VRPOAligner, VRPOConfig, __version__
from vrpo_plugin.cli import main
from vrpo_plugin.config import describe_fields
from vrpo_plugin.hosts.options import KEYS

REPO = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))}

# What docs are not written like, and why: a reader has to read it twice, or has to know our own words.
UNWANTED = [
    r"\blet(s|ting)? go of\b",
    r"\bbeforehand\b",
    r"\bdear(er)?\b",
    r"\bat its best guidance\b",
    r"\bnetworks? of (classes|rotations?|denoising)\b",
    r"\bdistances? of (classes|rotations?|denoising)\b",
    r"\bjudges?\b",
    r"\bwent round\b",
    r"\bcur(e|es|ed)\b",
    r"\bwhose encoder we make\b",
    r"\bflattered\b|\bweights are detached\b",
    r"\bnoise strata\b|\bthe last one holds\b",
    r"\bsound\b|\bmade_before\b|\bnever_fired\b|\bpromoted?\b|\bPainter\b",
]


def prose(page: str) -> str:
    """A page without its code, on one line."""
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`", " ", PAGES[page].read_text("utf-8"), flags=re.DOTALL)
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES)
def test_plain_words(page: str) -> None:
    found = [
        prose(page)[max(0, m.start() - 40) : m.end() + 20] for word in UNWANTED for m in re.finditer(word, prose(page))
    ]
    assert found == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = PAGES[page].read_text("utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = (PAGES[page].parent / file) if file else PAGES[page]
        if not path.exists() or (heading and heading not in headings(path)):
            broken.append(target)
    assert broken == []


def headings(path: Path) -> set[str]:
    """The anchors that GitHub and mkdocs give a page's headings."""
    lines = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_readme_is_short_and_starts_with_how_to_use_it() -> None:
    lines = PAGES["README.md"].read_text("utf-8").splitlines()
    assert len(lines) < 150
    first_screen = "\n".join(lines[:50])
    assert "pip install" in first_screen and "accelerate launch -m vrpo_plugin.launch train.py" in first_screen


def test_options_in_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(path.read_text("utf-8") for path in PAGES.values())
    flags = {name.replace("-", "_") for name in re.findall(r"--vrpo-([a-z-]+)", text)}
    variables = {name.lower() for name in re.findall(r"VRPO_([A-Z_]+)=", text)}
    assert flags and flags | variables <= KEYS | {"config", "host", "dry_run", "hosts_dir"}
    (command,) = re.findall(r"(vrpo train-critic --data-dir cifar10.*?)\n```", text, flags=re.DOTALL)
    with pytest.raises(SystemExit):
        main(["train-critic", "--help"])
    assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.host
def test_the_first_command_has_repas_own_options() -> None:
    (command,) = re.findall(
        r"launch train\.py (--model.*?)\n```", PAGES["README.md"].read_text("utf-8"), flags=re.DOTALL
    )
    script = (Path(os.environ["VRPO_HOSTS_DIR"]) / "REPA" / "train.py").read_text("utf-8")
    assert {flag for flag in re.findall(r"--[a-z0-9-]+", command) if f'"{flag}"' not in script} == set()


def python_blocks(page: str) -> Iterator[tuple[str, str]]:
    """The comment before each Python block ("" without one), and the block."""
    text = PAGES[page].read_text("utf-8")
    yield from re.findall(r"(?:<!-- (.*?) -->\n)?```python\n(.*?)```", text, flags=re.DOTALL)


def test_getting_started_runs_from_top_to_bottom() -> None:
    namespace: dict = {}
    run, left_out = 0, []
    for mark, block in python_blocks("getting-started.md"):
        if mark.startswith("not run"):
            left_out.append(block)
        elif mark == "needs diffusers" and not has("diffusers"):
            continue
        else:
            exec(compile(block, "getting-started.md", "exec"), namespace)
            run += 1
    assert run >= 8 and len(left_out) == 1
    assert namespace["loss"].isfinite()
    compile(left_out[0], "getting-started.md", "exec")


def has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def test_every_setting_says_what_when_and_what_was_measured() -> None:
    groups = describe_fields(VRPOConfig)
    assert next(len(entries) for entries in groups.values()) == 6
    assert [name for entries in groups.values() for name in entries] == [f.name for f in fields(VRPOConfig)]
    for entries in groups.values():
        for name, text in entries.items():
            assert re.search(r"\. When: .+\. (Measured: |Not measured)", text), name


def test_the_settings_page_is_what_its_command_writes() -> None:
    made = runpy.run_path(str(REPO / "docs" / "make_settings.py"))["page"]()
    assert PAGES["settings.md"].read_text("utf-8") == made  # python docs/make_settings.py > docs/settings.md


def test_measured_figures_are_those_of_the_results_page() -> None:
    results = PAGES["results.md"].read_text("utf-8")
    measured = re.findall(r"\*\*Measured\*\*: (.*)", PAGES["settings.md"].read_text("utf-8"))
    figures = {figure for text in measured for figure in re.findall(r"(?<![\w.])\d\.\d\d(?![\w.]*\d)", text)}
    assert len(figures) > 15
    assert {figure for figure in figures if figure not in results} == set()


def test_every_metric_has_its_range_on_the_page() -> None:
    aligner = VRPOAligner(
        hidden_dim=8, depth=2, latent_shape=(4, 8, 8), target_dims=(8,), projector_dim=8, critic_width=8
    )
    x0 = torch.randn(4, 4, 8, 8)
    out = aligner(
        torch.randn(4, 16, 8),
        x0=x0,
        x_t=x0,
        t=torch.rand(4),
        velocity=torch.randn_like(x0).requires_grad_(),
        hidden=torch.randn(4, 16, 8, requires_grad=True),
    )
    page = PAGES["healthy-run.md"].read_text("utf-8")
    hosts_only = {"vrpo/skipped", "vrpo/skipped_in_a_row", "vrpo/norm/x0_hat"}
    assert {name for name in {*out.metrics, *hosts_only} if f"`{name}`" not in page and "/std/" not in name} == set()
    known = {*out.metrics, *hosts_only} | {"vrpo/std/NAME", "vrpo/weight/NAME", "vrpo/std/*"}
    assert set(re.findall(r"`(vrpo/[\w/*]+)`", page)) <= known


def test_one_version_everywhere() -> None:
    assert f"## [{__version__}]" in (REPO / "CHANGELOG.md").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in (REPO / "CITATION.cff").read_text("utf-8")


def test_changelog_names_settings_that_are_gone_and_no_other() -> None:
    section = (REPO / "CHANGELOG.md").read_text("utf-8").split("### Removed")[1].split("\n### ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    gone = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    assert gone and not gone & {f.name for f in fields(VRPOConfig)}


def test_a_source_distribution_holds_the_whole_repository() -> None:
    shown = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    tops = {name.split("/")[0] for name in shown.split()}
    by_itself = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "vrpo_plugin"}
    listed = set((REPO / "MANIFEST.in").read_text("utf-8").split())
    assert tops - by_itself - listed == {".gitignore"}
