"""A file gets all of its new bytes or keeps all of its old ones."""

import os
import stat
from pathlib import Path

import pytest

from vrpo_plugin.errors import PatchConflictError, VRPOError
from vrpo_plugin.files import replace_bytes, why_read_only


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o600, 0o664])
def test_mode_bits_stay(script: Path, mode: int) -> None:
    script.chmod(mode)
    replace_bytes(script, b"old", b"new")
    assert script.read_bytes() == b"new" and stat.S_IMODE(script.stat().st_mode) == mode
    assert os.listdir(script.parent) == ["train.py"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_owner_stays(script: Path) -> None:
    os.chown(script, 12345, 23456)
    replace_bytes(script, b"old", b"new")
    assert (script.stat().st_uid, script.stat().st_gid) == (12345, 23456)


def test_owner_that_cannot_be_kept_is_no_failure(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", denied, raising=False)
    replace_bytes(script, b"old", b"new")
    assert script.read_bytes() == b"new"


def test_open_reader_keeps_the_old_bytes(script: Path) -> None:
    with script.open("rb") as reader:  # rewriting in place would show it half of each
        replace_bytes(script, b"old", b"new")
        assert reader.read() == b"old"


def test_bytes_are_on_disk_before_they_take_the_place(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), rename(*paths)))
    replace_bytes(script, b"old", b"new")
    assert calls == ["fsync", "replace"]


def test_edit_made_meanwhile_wins(script: Path) -> None:
    script.write_bytes(b"edited")
    with pytest.raises(
        PatchConflictError, match=r"train\.py: expected the bytes read a moment ago, got others\. Close"
    ):
        replace_bytes(script, b"old", b"new")
    assert script.read_bytes() == b"edited" and os.listdir(script.parent) == ["train.py"]


def test_leftover_of_a_killed_run_is_not_touched(script: Path) -> None:
    leftover = script.parent / ".train.py.vrpo"
    leftover.write_bytes(b"half")
    replace_bytes(script, b"old", b"new")
    assert script.read_bytes() == b"new" and leftover.read_bytes() == b"half"
    assert sorted(os.listdir(script.parent)) == [".train.py.vrpo", "train.py"]


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_any_step_leaves_nothing(
    script: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(VRPOError if isinstance(error, OSError) else KeyboardInterrupt):
        replace_bytes(script, b"old", b"new")
    assert script.read_bytes() == b"old" and os.listdir(script.parent) == ["train.py"]


def test_file_that_is_gone_is_a_typed_error(script: Path) -> None:
    script.unlink()
    with pytest.raises(VRPOError, match="No such file"):
        replace_bytes(script, b"old", b"new")
    assert os.listdir(script.parent) == []


def test_mode_bits_tell_even_root(script: Path) -> None:
    assert why_read_only(script) == ""
    script.chmod(0o444)
    assert why_read_only(script) == "no write permission on the file 'train.py'"
    script.chmod(0o644)
    script.parent.chmod(0o555)
    assert why_read_only(script) == f"no write permission on the folder '{script.parent.name}'"
    script.parent.chmod(0o755)


@pytest.mark.parametrize("denied", ["file", "folder"])
def test_system_may_refuse_what_the_mode_bits_allow(script: Path, monkeypatch: pytest.MonkeyPatch, denied: str) -> None:
    place = script if denied == "file" else script.parent
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)  # as on a read-only file system
    assert denied in why_read_only(script)
