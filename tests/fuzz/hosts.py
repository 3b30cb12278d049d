"""The command line against damaged checkouts of hosts and damaged checkpoints.

Trees are the tests' fakes and, where ``VRPO_HOSTS_DIR`` names them, copies of real checkouts.
"""

import os
import random
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.host_trees import verify_as_it_is, write_tree

from fuzz.command import Ended, Snapshot, run, snapshot
from fuzz.damage import LINES, Sandbox, damage
from fuzz.exports import export
from fuzz.part import Part
from vrpo_plugin.patching.fingerprint import NOT_PYTHON

FAKES = Path(__file__).resolve().parents[1] / "fakes" / "hosts"
REPOSITORIES = ("repa", "reg", "irepa", "sit", "dit", "repae", "lightningdit")
CHECKOUTS = ("REPA", "REG", "iREPA", "SiT", "DiT", "REPA-E", "LightningDiT")
FOLDERS = ("host", "host", "a folder", "h\u00f6st", os.fsdecode(b"caf\xe9"))
IGNORED = shutil.ignore_patterns(".git", "__pycache__", "*.png", "*.jpg", "*.pdf", "*.ipynb", "*.npz", "*.pt")


def hosts(output: Path, count: int, seed: int) -> Part:
    """Checks, patches, unpatches and exports what is damaged: typed refusals that change nothing, or the one line.

    ``count`` trees or checkpoints; what is counted is what came of each command, several for one tree.
    """
    part, output = Part("command line on damaged hosts"), output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        draw = random.Random(f"{seed}/{i}")  # of its own, so that one try can be repeated alone
        folder = output / "sandbox"
        _clear(folder)
        with pytest.MonkeyPatch.context() as patch:
            part.prefix = f"seed {seed}, try {i}"
            if draw.random() < 0.2:
                export(part, folder, draw)
            else:
                _try_tree(part, folder, draw, patch)
    _clear(output / "sandbox")
    return part


def _try_tree(part: Part, folder: Path, draw: random.Random, patch: pytest.MonkeyPatch) -> None:
    box = Sandbox(folder / draw.choice(FOLDERS), folder / "outside", draw)
    box.outside.mkdir(parents=True)
    kind = _make_tree(box, patch)
    waived = [] if kind == "known" and draw.random() < 0.8 else ["--allow-unverified"]
    if draw.random() < 0.2:
        run("patch", box.tree, *waived)
    done = [damage(box) for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))]
    part.prefix = f"{part.prefix}: {kind} {' and '.join(done) or 'whole'}"
    Round(part, box, waived).play()


def _make_tree(box: Sandbox, patch: pytest.MonkeyPatch) -> str:
    """A tree of the smallest kind at a known commit, a fake that could train, or a real checkout."""
    real = os.environ.get("VRPO_HOSTS_DIR")
    kind = box.draw.choice(("known", "known", "known", "fake", *(["real"] if real else [])))
    number = box.draw.randrange(len(REPOSITORIES))
    if kind == "known":
        write_tree(box.tree, REPOSITORIES[number])
        verify_as_it_is(box.tree, REPOSITORIES[number], patch)
    else:
        source = FAKES / REPOSITORIES[number] if kind == "fake" else Path(str(real)) / CHECKOUTS[number]
        shutil.copytree(source, box.tree, ignore=IGNORED, symlinks=True)
    return kind


class Round:
    """The commands that a user would give one after the other, and what may come of each."""

    def __init__(self, part: Part, box: Sandbox, waived: list[str]) -> None:
        self.part, self.box, self.waived = part, box, waived

    def play(self) -> None:
        before = self.snapshot()
        checked = self.reading("check", self.box.tree, *self.waived)
        for path in self.box.tree.rglob("train*.py"):
            self.reading("launch", "--vrpo-dry-run", path)
            break
        ended = self.run("patch", self.box.tree, *self.waived)
        after = self.snapshot()
        if ended.refused:
            self.part.add("patch refused")
            self.expect(after == before, f"a refused patch changed {after.changed(before)}")
        else:
            self.part.add("patched" if after != before else "patched before")
        promised = checked.status == 0 and "no line can be put" not in checked.out  # into all scripts, or into none
        self.expect(ended.refused != promised, f"check said otherwise than patch: {checked} {ended}")
        changed = after.changed(before)
        self.expect(all(_is_patched(before, after, path) for path in changed), f"patch wrote something else: {changed}")
        self.reading("check", self.box.tree, *self.waived)
        self.unpatch(before, after, changed)

    def unpatch(self, before: Snapshot, patched: Snapshot, changed: list[str]) -> None:
        """What is taken out is the line; a patched tree is as it was before."""
        ended = self.run("unpatch", self.box.tree)
        after = self.snapshot()
        if ended.refused:
            self.part.add("unpatch refused")
            self.expect(after == patched, f"a refused unpatch changed {after.changed(patched)}")
            # Another script may keep both from being changed; each alone then shows that its line can go.
            for script in {Path(path).name for path in changed}:
                self.run("unpatch", self.box.tree, "--script", script)
            after = self.snapshot()
        elif not changed:
            self.part.add("unpatched" if after != patched else "nothing to unpatch")
        for path in changed:
            self.expect(after.files.get(path) == before.files.get(path), f"not restored: {path}: {ended}")
        if changed and all(after.files.get(path) == before.files.get(path) for path in changed):
            self.part.add("restored")
        for path in after.changed(patched):
            if path not in changed:  # a line that was there before
                self.expect(_is_patched(after, patched, path), f"unpatch wrote something else: {path}")

    def reading(self, *arguments: object) -> Ended:
        """Runs what may not write, not even the same bytes."""
        before = snapshot(self.box.tree.parent, times=True)
        ended = self.run(*arguments)
        after = snapshot(self.box.tree.parent, times=True)
        self.expect(after == before, f"{arguments[0]} wrote {after.changed(before)}")
        return ended

    def run(self, *arguments: object) -> Ended:
        ended = run(*arguments)
        self.expect(not ended.fault, f"{arguments}: {ended.fault}")
        return ended

    def snapshot(self) -> Snapshot:
        return snapshot(self.box.tree.parent)

    def expect(self, truth: bool, text: str) -> None:
        if not truth:
            self.part.fail(f"{self.part.prefix}: {text}")


def _is_patched(before: Snapshot, after: Snapshot, path: str) -> bool:
    """Whether a file of the tree has one line of ours more than before, the mode that it had, and still compiles."""
    if path not in before.files or path not in after.files or path.startswith("outside"):
        return False
    (mode, old), (new_mode, new) = before.files[path], after.files[path]
    if mode != new_mode or not _is_one_line_more(old, new):
        return False
    return _compiles(new) or not _compiles(old)


def _compiles(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the script's own
        try:
            compile(data, "<script>", "exec", dont_inherit=True)
        except NOT_PYTHON:
            return False
    return True


def _is_one_line_more(old: bytes, new: bytes) -> bool:
    return any(new[:at] + new[end:] == old for at, end in _our_lines(new))


def _our_lines(data: bytes) -> Iterator[tuple[int, int]]:
    """Where a line of ours and one newline beside it begin and end."""
    # With an edited comment it is ours still.
    for line in (edited for ours in LINES for edited in (ours, ours.replace(b"# ", b"#"), ours + b" ")):
        at = data.find(line)
        while at >= 0:
            end = at + len(line)
            for newline in (b"\r\n", b"\n", b"\r"):
                begins = at == 0 or data[:at].endswith((b"\n", b"\r"))
                if begins and data.startswith(newline, end):
                    yield at, end + len(newline)
                if end == len(data) and data[:at].endswith(newline):
                    yield at - len(newline), end
            at = data.find(line, end)


def _clear(folder: Path) -> None:
    """Removes a sandbox, also what its damages made read-only."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)
