"""A file gets all of its new content or keeps all of its old one; test_replace_bytes.py has the rest of files.py."""

import os
import re
from pathlib import Path

import pytest
from fakes.broken import disk_full

from vrpo_plugin.files import write_file


def half(file: object) -> None:
    file.write(b"ne")  # type: ignore[attr-defined]
    disk_full()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    write_file(path, "old é")
    write_file(path, "older")
    assert path.read_text(encoding="utf-8") == "older"
    return path


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_refusal_of_the_disk_leaves_the_old_text(config: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, stage, disk_full)
        with pytest.raises(OSError, match="No space"):
            write_file(config, "new")
    assert config.read_text(encoding="utf-8") == "older"
    write_file(config, "new")
    assert os.listdir(config.parent) == ["config.json"] and config.read_text(encoding="utf-8") == "new"


def test_a_writer_that_fails_half_way_leaves_the_old_text(config: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        write_file(config, half)
    assert os.listdir(config.parent) == ["config.json"] and config.read_text(encoding="utf-8") == "older"


def test_text_bytes_and_writers_give_the_same_file(tmp_path: Path) -> None:
    for content in ("é\n", "é\n".encode(), lambda file: file.write("é\n".encode())):
        write_file(str(tmp_path / "a"), content)
        assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"


def test_the_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: (synced.append("rename"), rename(*paths)))
    write_file(tmp_path / "config.json", "{}")
    # What a kill leaves begins with the file's own name: the trainer tells by that whose it is.
    assert re.fullmatch(r"config\.json\.[0-9a-f]{8}\.partial", synced[0])
    assert synced[1:] == ["rename", tmp_path.name]
