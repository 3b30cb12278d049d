"""Every Python block of README.md runs, in order, in one namespace; every command it names exists."""

import re
import shlex
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_blocks_run() -> None:
    blocks = _blocks("python")
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["loss"].isfinite()
    assert all(p.grad is not None for p in namespace["model"].parameters() if p.requires_grad)


def test_python_of_the_reliability_page_runs() -> None:
    (block,) = _blocks("python", (REPO / "docs" / "reliability.md").read_text(encoding="utf-8"))
    namespace: dict = {}
    exec(compile(block, "reliability.md", "exec"), namespace)
    assert namespace["skipped"] == 0


def test_files_in_commands_and_links_exist() -> None:
    words = [word for block in _blocks("bash") for word in shlex.split(block.replace("\\\n", " "), comments=True)]
    files = [word for word in words if word.startswith(("examples/", "benchmarks/", "tests/"))]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert files and links
    missing = [name for name in {*files, *links} if not (REPO / name).exists()]
    assert not missing
