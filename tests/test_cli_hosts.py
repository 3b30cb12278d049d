"""``vrpo check``, ``patch``, ``unpatch`` and ``export`` as a user types them."""

import argparse
import io
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fakes.host_trees import COMMIT, contents, verify_as_it_is, write_tree

from vrpo_plugin import cli
from vrpo_plugin.hosts.known import HOSTS


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    error: str


@pytest.fixture
def vrpo(capsys: pytest.CaptureFixture[str]):
    """Runs a command line; what is no exit status 0, 1 or 2 fails the test."""

    def run(*arguments: object) -> Ended:
        error = ""
        try:
            cli.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as end:
            # As the interpreter does: a text goes to stderr, and the status is 1.
            status, error = (1, str(end.code)) if isinstance(end.code, str) else (end.code or 0, "")
        shown = capsys.readouterr()
        return Ended(status, shown.out, shown.err + error)

    return run


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A REPA tree at a known commit."""
    write_tree(tmp_path / "REPA", "repa")
    verify_as_it_is(tmp_path / "REPA", "repa", monkeypatch)
    return tmp_path / "REPA"


def test_check_says_which_host_and_commit_and_what_would_happen(vrpo, tree: Path) -> None:
    before = contents(tree)
    shown = vrpo("check", tree)
    assert (shown.status, shown.error) == (0, "")
    lines = shown.out.splitlines()
    for line in (
        f"host        repa (sihyun-yu/REPA@{COMMIT}) in {tree}",
        f"seam        models/sit.py: SiT.forward: as at {COMMIT}",
        f"seam        loss.py: SILoss.__call__: as at {COMMIT}",
        "script      train.py: ready, line 3",
        f"host        repa_t2i (sihyun-yu/REPA@{COMMIT}) in {tree}",
        "script      train_t2i.py: ready, line 3",
        f"result      repa: can be applied with no line: accelerate launch -m vrpo_plugin.launch {tree}/train.py ...",
        f"result      or by one line: 'vrpo patch {tree}', then start it as ever",
    ):
        assert line in lines
    for shim in HOSTS["repa"].shims:
        assert any(line.startswith(f"compat      {shim.name}: ") and shim.issue in line for line in lines)
    (note,) = HOSTS["repa"].notes
    assert any(line.startswith("breaks      train.py: ") and note.do in line for line in lines)
    assert [line.startswith("result") for line in lines] == sorted(
        (line.startswith("result") for line in lines), reverse=True
    )  # the verdict comes first
    assert contents(tree) == before


OPTIMIZER = "torch.optim.Optimizer.load_state_dict"
OF_REPA = ["accelerate.Accelerator.log", OPTIMIZER, "argparse.ArgumentParser.parse_args"]
PROCESS_WIDE = {
    **dict.fromkeys(("repa", "repa_t2i", "reg", "irepa", "repae"), OF_REPA),
    **{key: ["diffusers.models.AutoencoderKL.encode", OPTIMIZER] for key in ("sit", "dit")},
    "lightningdit": ["torch.utils.tensorboard.SummaryWriter.add_scalar", OPTIMIZER],
}


@pytest.mark.parametrize("name", PROCESS_WIDE)
def test_check_lists_what_is_replaced_for_the_whole_process(
    vrpo, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("sit", "dit"):
        pytest.importorskip("diffusers", reason="compared with the installed library")
    write_tree(tmp_path / "host", name)
    verify_as_it_is(tmp_path / "host", name, monkeypatch)
    shown = vrpo("check", tmp_path / "host", "--host", name).out.splitlines()
    *replaced, hooks = [line.removeprefix("process     ") for line in shown if line.startswith("process     ")]
    assert [line.partition(":")[0] for line in replaced] == PROCESS_WIDE[name]
    assert all(": as expected; " in line for line in replaced)
    assert hooks.startswith("torch.optim step hooks (added, nothing replaced)")


def test_a_library_that_has_changed_is_refused(vrpo, tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "libraries/accelerate").mkdir(parents=True)
    (tmp_path / "libraries/accelerate/__init__.py").write_text("")
    (tmp_path / "libraries/accelerate/accelerator.py").write_text("class Accelerator:\n    def log(self, rows): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    shown = vrpo("check", tree, "--host", "repa")
    assert shown.status == 1
    name = "accelerate.Accelerator.log"
    assert f"result      repa: cannot be applied: {name}: expected parameters (self, values" in shown.out
    assert f"process     {name}: REFUSED: parameters (self rows), expected (self values " in shown.out


def test_a_stand_in_for_a_library_is_not_compared(vrpo, tree: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))  # its __spec__ is None
    shown = vrpo("check", tree, "--host", "repa")
    assert shown.status == 0 and "accelerate.Accelerator.log" in shown.out


@pytest.mark.parametrize("command", [("--version",), ("check", "{tree}"), ("--help",), ("patch", "--help")])
def test_these_commands_do_without_torch(tree: Path, command: tuple[str, ...]) -> None:
    code = "import sys; sys.modules['torch'] = None; from vrpo_plugin.cli import main; main(sys.argv[1:])"
    argv = [one.format(tree=tree) for one in command]
    shown = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert "torch" not in shown.stderr and shown.returncode == (1 if command[0] == "check" else 0), shown.stderr
    assert shown.stdout


def test_commands_that_are_suggested_can_be_pasted(vrpo, tree: Path) -> None:
    folder = tree.rename(tree.with_name("my host"))
    shown = vrpo("check", folder).out
    assert f"accelerate launch -m vrpo_plugin.launch '{folder}/train.py'" in shown
    assert f"vrpo patch '{folder}'" in shown
    vrpo("patch", folder)
    assert f"vrpo unpatch '{folder}'" in vrpo("check", folder).out


def test_check_of_a_patched_tree(vrpo, tree: Path) -> None:
    vrpo("patch", tree, "--script", "train.py")
    shown = vrpo("check", tree, "--host", "repa")
    assert shown.status == 0
    assert "script      train.py: patched, line 4" in shown.out.splitlines()
    assert f"result      is patched: start it as ever; 'vrpo unpatch {tree}' takes the line out" in shown.out
    assert "repa_t2i" not in shown.out


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        (
            "loss.py",
            "def __call__(",
            "def __call(",
            "seam        loss.py: SILoss.__call__: REFUSED: no such definition; the nearest is SILoss.__call",
        ),
        (
            "loss.py",
            "images, ",
            "",
            "seam        loss.py: SILoss.__call__: REFUSED: parameters (self model model_kwargs zs), "
            "expected (self model images model_kwargs zs)",
        ),
        (
            "loss.py",
            "return 1",
            "return 2",
            f"seam        loss.py: SILoss.__call__: CHANGED: another body than at {COMMIT}; "
            "allow_unverified=true accepts it",
        ),
    ],
    ids=["renamed", "signature", "body"],
)
def test_check_of_a_changed_seam(vrpo, tree: Path, file: str, old: str, new: str, line: str) -> None:
    path = tree / file
    path.write_text(path.read_text().replace(old, new))
    before = contents(tree)
    shown = vrpo("check", tree)
    assert shown.status == 1
    assert line in shown.out.splitlines()
    assert f"result      repa: cannot be applied: {path}: SILoss.__call__: expected" in shown.out
    patched = vrpo("patch", tree)
    assert (patched.status, patched.out) == (1, "")
    assert patched.error.count("\n") == 0 and "SILoss.__call__" in patched.error
    assert contents(tree) == before


def test_unverified_is_accepted_by_option_and_by_environment(vrpo, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = tree / "loss.py"
    loss.write_text(loss.read_text().replace("return 1", "return 2"))
    assert vrpo("check", tree).status == 1
    assert vrpo("check", tree, "--allow-unverified").status == 0
    assert vrpo("patch", tree, "--allow-unverified").status == 0
    vrpo("unpatch", tree)
    monkeypatch.setenv("VRPO_ALLOW_UNVERIFIED", "true")
    assert vrpo("check", tree).status == 0
    assert vrpo("patch", tree).status == 0
    loss.write_text(loss.read_text().replace("images, ", ""))
    assert vrpo("check", tree, "--allow-unverified").status == 1


def test_check_tells_of_a_script_that_cannot_take_the_line(vrpo, tree: Path) -> None:
    script = tree / "train.py"
    script.write_text(script.read_text().replace("import sys", "import sys\nfrom loss import SILoss"))
    shown = vrpo("check", tree)
    assert shown.status == 0  # the launcher needs no line
    assert "script      train.py: REFUSED: it at lines [3, 5] (ambiguous)" in shown.out.splitlines()
    assert "result      no line can be put into train.py: it at lines [3, 5] (ambiguous)" in shown.out.splitlines()


def test_patch_and_unpatch_say_what_they_did(vrpo, tree: Path) -> None:
    before = contents(tree)
    scripts = [tree / "train.py", tree / "train_t2i.py"]
    shown = vrpo("patch", tree)
    assert shown == Ended(0, "".join(f"patched     {path}: patched, line 4\n" for path in scripts), "")
    assert all("vrpo_plugin.apply_vrpo_to_repa" in path.read_text() for path in scripts)
    again = vrpo("patch", tree)
    assert again.out == shown.out.replace("patched     ", "unchanged   ")
    assert vrpo("unpatch", tree, "--script", "train.py").out == (f"unpatched   {scripts[0]}: ready, line 3\n")
    assert vrpo("unpatch", tree).status == 0
    assert contents(tree) == before


@pytest.mark.parametrize("command", ["check", "patch", "unpatch"])
@pytest.mark.parametrize("kind", ["nothing", "a file", "empty", "half a host"])
def test_a_folder_that_is_no_host_gets_one_line(vrpo, command: str, kind: str, tmp_path: Path) -> None:
    root = tmp_path / "folder"
    if kind == "a file":
        root.write_text("text")
    elif kind == "empty":
        root.mkdir()
    elif kind == "half a host":
        write_tree(root, "repa")
        (root / "models/sit.py").unlink()
        (root / "models/mmdit.py").unlink()
    before = contents(tmp_path)
    shown = vrpo(command, root)
    assert (shown.status, shown.out) == (1, "")
    assert shown.error.startswith(f"HostNotFoundError: {root}: expected ") and "\n" not in shown.error
    if kind == "half a host":
        assert "sihyun-yu/REPA, the nearest host, got " in shown.error and "without models/" in shown.error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_terminal_cannot_encode_is_escaped(
    encoding: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback after the line went in would say that nothing was done."""
    folder = tree.rename(tree.with_name(os.fsdecode(b"h\xc3\xb6st caf\xe9")))
    before = contents(folder)
    for command in ("check", "patch", "unpatch"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        cli.main([command, str(folder)])
        out.flush()
        assert b"st caf\\udce9" in out.buffer.getvalue()
    assert contents(folder) == before


@pytest.mark.parametrize("moved", ["train.py", "models", "."])
def test_nothing_outside_the_checkout_is_changed(vrpo, moved: str, tree: Path, tmp_path: Path) -> None:
    """Who names a checkout does not expect changes in another folder; a link to the whole checkout is its name."""
    outside = tmp_path / "outside"
    (place := Path(os.path.normpath(tree / moved))).rename(outside)
    place.symlink_to(outside)
    before = contents(tmp_path)
    checked, patched = vrpo("check", tree), vrpo("patch", tree)
    if moved == "train.py":
        assert f"result      no line can be put into train.py: a link to {outside}" in checked.out.splitlines()
        assert patched.status == 1 and f"expected a file inside {tree}, got a link to {outside}. " in patched.error
        assert "\n" not in patched.error and contents(tmp_path) == before
        line = HOSTS["repa"].insertions[0]
        outside.write_text(outside.read_text().replace(line.anchor, f"{line.anchor}\n{line.line}"))
        before = contents(tmp_path)
        assert "no line can be put" in vrpo("check", tree).out
        assert vrpo("unpatch", tree).status == 1
    else:
        assert checked.status == patched.status == 0 and contents(tmp_path) != before
        assert vrpo("unpatch", tree).status == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["train.py", "loss.py"])
def test_a_pipe_is_no_script_and_is_not_waited_for(vrpo, file: str, tree: Path) -> None:
    (tree / file).unlink()
    os.mkfifo(tree / file)
    for command in ("check", "patch", "unpatch"):
        shown = vrpo(command, tree, "--host", "repa")
        if command == "check" and file == "train.py":  # a script of another name can be launched
            assert shown.status == 0 and "m vrpo_plugin.launch YOUR_SCRIPT.py ..." in shown.out
            assert "result      no line can be put into train.py: something else than a file" in shown.out
            continue
        assert shown.status == 1 and shown.error.startswith("HostNotFoundError: ") and "\n" not in shown.error


@pytest.mark.parametrize("command", ["check", "patch", "unpatch"])
def test_a_name_that_is_too_long_gets_one_line(vrpo, command: str, tmp_path: Path) -> None:
    shown = vrpo(command, tmp_path / ("a" * 300))
    assert shown.status == 1 and "expected a folder, got nothing there" in shown.error


def test_export(vrpo, tmp_path: Path) -> None:
    source, out = tmp_path / "c.pt", tmp_path / "plain.pt"
    weights = {"a": torch.ones(2), "vrpo.step": torch.tensor(3)}
    torch.save({"model": weights, "ema": {"a": torch.ones(2)}, "args": argparse.Namespace(a=1)}, source)
    assert vrpo("export", source, out) == Ended(0, f"wrote {out}: left out 1 tensors of the aligner\n", "")
    assert (
        vrpo("export", out, tmp_path / "e.safetensors").out == f"wrote {tmp_path}/e.safetensors: it held no aligner\n"
    )
    refused = vrpo("export", source, out)
    assert refused.status == 1 and refused.error.startswith("CheckpointError: ")
    assert vrpo("export", source, out, "--overwrite").status == 0


def test_each_command_explains_itself(vrpo) -> None:
    shown = vrpo("--help")
    assert shown.status == 0
    for command in ("check", "patch", "unpatch", "export", "train-critic"):
        assert command in shown.out
        assert vrpo(command, "--help").status == 0
    assert all(name in vrpo("check", "--help").out for name in HOSTS)


def test_any_command_line_ends_with_a_status_and_check_writes_nothing(vrpo, tree: Path, tmp_path: Path) -> None:
    words = ["check", "patch", "unpatch", "export", "--host", "--script", "--allow-unverified", "--overwrite", "repa"]
    words += ["sit", "nonsense", "train.py", "", "-", "--", str(tree), str(tmp_path / "none"), str(tree / "loss.py")]
    words += ["--hosts", "ü", "a\nb", "." * 300]
    draw = random.Random(0)
    statuses = set()
    for _ in range(300):
        arguments = draw.choices(words, k=draw.randint(0, 5))
        if draw.random() < 0.5:
            arguments = [draw.choice(["check", "patch", "unpatch", "export"]), str(tree), *arguments]
        before = contents(tree)
        shown = vrpo(*arguments)
        assert shown.status in (0, 1, 2), (arguments, shown)
        assert shown.status == 0 or shown.error or arguments[0] == "check", (arguments, shown)
        if arguments[:1] == ["check"] or shown.status:
            assert contents(tree) == before, arguments
        statuses.add(shown.status)
    assert statuses == {0, 1, 2}


def test_as_a_process(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vrpo_plugin.cli", "check"]
    shown = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.startswith("HostNotFoundError: ") and shown.stderr.count("\n") == 1
    # The tree is at no commit that this process knows.
    shown = subprocess.run([*command, str(tree)], capture_output=True, text=True)
    assert shown.returncode == 1 and "CHANGED" in shown.stdout
