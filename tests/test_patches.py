"""patches/: each file is what the specs give, and does what ``vrpo patch`` does; git alone does not notice a shift."""

import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hosts.host_runs import checkout

from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.patching.source import Insertion, patch_file, read_state

PATCHES = Path(__file__).resolve().parents[1] / "patches"
README = (PATCHES / "README.md").read_text("utf-8")
CHECKOUTS = {
    "sihyun-yu/REPA": "REPA",
    "Martinser/REG": "REG",
    "End2End-Diffusion/iREPA": "iREPA",
    "willisma/SiT": "SiT",
    "facebookresearch/DiT": "DiT",
    "End2End-Diffusion/REPA-E": "REPA-E",
    "hustvl/LightningDiT": "LightningDiT",
}


@dataclass(frozen=True)
class Script:
    """A script, its path taken from the repository's root."""

    spec: HostSpec
    insertion: Insertion

    @property
    def file(self) -> Path:
        return PATCHES / f"{self.spec.name.removesuffix('_t2i')}-{Path(self.insertion.file).stem}.patch"


SCRIPTS = [
    Script(spec, replace(one, file=(Path(spec.folder) / one.file).as_posix()))
    for spec in HOSTS.values()
    for one in spec.insertions
]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.file.stem)


def line_number(patch: str) -> int:
    """The line that ours goes after: the specs do not know it, the checkouts do (below)."""
    found = re.search(r"^@@ -(\d+),0 \+(\d+) @@$", patch, re.M)
    assert found is not None
    assert int(found[2]) == int(found[1]) + 1
    return int(found[1])


def git_apply(folder: Path, patch: Path, *options: str) -> int:
    command = ["git", "apply", "--unidiff-zero", *options, str(patch)]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode


def test_there_is_one_patch_per_script_and_no_other() -> None:
    files = [script.file for script in SCRIPTS]
    assert sorted(PATCHES.iterdir()) == sorted([*files, PATCHES / "README.md"])
    assert len({*files}) == len(files) == 9


def commit_of(script: Script) -> str:
    (commit,) = script.spec.model.fingerprints
    return commit


@each_script
def test_the_patch_is_one_line_of_ours_and_no_line_of_the_host(script: Script) -> None:
    head, _, hunk = script.file.read_bytes().decode().partition(f"diff --git a/{script.insertion.file} b/")
    for word in (f"# repository: {script.spec.repository}\n", f"# commit: {commit_of(script)}\n", "vrpo patch ROOT"):
        assert word in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"^# blob: [0-9a-f]{40}$", head, re.M) and f"git hash-object {script.insertion.file}" in head
    lines = hunk.splitlines()
    assert lines[1:3] == [f"--- a/{script.insertion.file}", f"+++ b/{script.insertion.file}"]
    assert lines[3].startswith("@@ ") and lines[4:] == ["+" + script.insertion.line]


@each_script
def test_readme_lists_the_patch(script: Script) -> None:
    name, where = script.file.name, f"{script.spec.repository}@{commit_of(script)}"
    assert f"| [{name}]({name}) | {where} | `{script.insertion.file}` |\n" in README


SOURCE = """\
import os
from loss import SILoss
model = dict(
    a=1,
    b=2,
)
"""


@pytest.fixture
def shifted(tmp_path: Path) -> tuple[Path, Path, Insertion]:
    """A patch, and a checkout whose script has one line less above than the patch knows."""
    insertion = HOSTS["repa"].insertions[0]
    text = (PATCHES / "repa-train.patch").read_text()
    text = re.sub(r"^@@ .* @@$", "@@ -2,0 +3 @@", text, flags=re.M)
    text = re.sub(r"^# blob: \w+$", f"# blob: {hash_object(tmp_path, SOURCE)}", text, flags=re.M)
    (tmp_path / "one.patch").write_text(text)
    folder = tmp_path / "host"
    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / "train.py").write_text(SOURCE.replace("import os\n", ""))
    return folder, tmp_path / "one.patch", insertion


def hash_object(folder: Path, source: str) -> str:
    command = ["git", "hash-object", "--stdin"]
    return subprocess.run(command, cwd=folder, input=source, capture_output=True, text=True, check=True).stdout.strip()


def test_git_alone_puts_the_line_into_the_middle_of_a_call(shifted: tuple[Path, Path, Insertion]) -> None:
    folder, patch, insertion = shifted
    assert git_apply(folder, patch) == 0
    lines = (folder / "train.py").read_text().splitlines()
    assert lines[1:4] == ["model = dict(", insertion.line, "    a=1,"]


def test_an_index_line_does_not_stop_git(shifted: tuple[Path, Path, Insertion]) -> None:
    folder, patch, insertion = shifted
    index = f"index {hash_object(folder, SOURCE)}..{'1' * 40} 100644\n--- a/"
    patch.write_text(patch.read_text().replace("--- a/", index))
    assert git_apply(folder, patch) == 0
    assert insertion.line in (folder / "train.py").read_text()


def test_the_comparison_of_the_readme_tells_them_apart(shifted: tuple[Path, Path, Insertion]) -> None:
    folder, patch, _ = shifted
    blob = re.search(r"^# blob: (\w+)$", patch.read_text(), re.M)
    assert blob is not None

    assert hash_object(folder, (folder / "train.py").read_text()) != blob[1]
    assert hash_object(folder, SOURCE) == blob[1]


def test_vrpo_patch_finds_the_place(shifted: tuple[Path, Path, Insertion]) -> None:
    folder, _, insertion = shifted
    patch_file(folder, insertion)
    assert (folder / "train.py").read_text().splitlines()[:3] == [insertion.anchor, insertion.line, "model = dict("]


@pytest.mark.host
@each_script
def test_git_applies_the_patch_to_the_real_script_as_vrpo_does(script: Script, tmp_path: Path) -> None:
    root = checkout(CHECKOUTS[script.spec.repository])
    copies = []
    for name in ("git", "vrpo"):
        copies.append(tmp_path / name / script.insertion.file)
        copies[-1].parent.mkdir(parents=True)
        shutil.copyfile(root / script.insertion.file, copies[-1])
    before = copies[0].read_bytes()
    by_git, by_vrpo = tmp_path / "git", tmp_path / "vrpo"
    subprocess.run(["git", "init", "-q"], cwd=by_git, check=True)
    state = read_state(by_vrpo, script.insertion)
    assert state.status == "ready"
    assert f"# blob: {hash_object(by_git, before.decode())}\n" in script.file.read_text()
    assert state.line_number == line_number(script.file.read_text())
    assert git_apply(by_git, script.file, "--check") == 0
    assert git_apply(by_git, script.file) == 0
    assert patch_file(by_vrpo, script.insertion).changed
    assert copies[0].read_bytes() == copies[1].read_bytes() != before
    assert git_apply(by_git, script.file, "--reverse") == 0
    assert copies[0].read_bytes() == before
