"""The command line on damaged hosts and the loaders of hostile files: the parts hold, and can fail."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz.damage
import fuzz.pickles
from fuzz.hosts import hosts
from fuzz.pickles import LOADERS, pickles
from vrpo_plugin import encoders
from vrpo_plugin.errors import VRPOError
from vrpo_plugin.hosts import tree
from vrpo_plugin.patching import source
from vrpo_plugin.patching.source import Insertion, SourceState


@pytest.fixture(autouse=True)
def fakes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VRPO_HOSTS_DIR", raising=False)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_hosts_are_restored_or_refused(count: int, tmp_path: Path) -> None:
    part = hosts(tmp_path, count, seed=0)
    assert not part.failures
    assert {"patched", "restored", "patch refused", "export refused", "exported"} <= part.outcomes.keys()
    assert list(tmp_path.iterdir()) == []


def writes_more(write: Callable[..., None]) -> Callable[..., None]:
    return lambda path, old, new: write(path, old, new + b"# more\n")


def leaves_a_file(write: Callable[..., None]) -> Callable[..., None]:
    def work(path: Path, old: bytes, new: bytes) -> None:
        path.with_name(".left").write_bytes(old)
        write(path, old, new)

    return work


def changes_the_mode(write: Callable[..., None]) -> Callable[..., None]:
    def work(path: Path, old: bytes, new: bytes) -> None:
        write(path, old, new)
        path.chmod(0o600)

    return work


@pytest.mark.parametrize("wrong", [writes_more, leaves_a_file, changes_the_mode], ids=lambda f: f.__name__)
def test_a_wrong_writer_is_noticed(wrong: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "replace_bytes", wrong(source.replace_bytes))
    assert any("patch wrote something else" in text for text in hosts(tmp_path, 15, seed=0).failures)


def test_half_a_patch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tree.patch_file

    def patch_file(folder: Path, one: Insertion) -> SourceState:
        if one.file in ("train_t2i.py", "train_ldm_only.py"):  # the second ones of their repositories
            raise VRPOError("script: expected another, got this. Do nothing.")
        return original(folder, one)

    monkeypatch.setattr(tree, "patch_file", patch_file)
    monkeypatch.setattr(tree, "replace_bytes", lambda *_: None)  # which puts the first one back
    assert any("a refused patch changed" in text for text in hosts(tmp_path, 30, seed=0).failures)


def test_a_write_through_a_link_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "outside", lambda *_: "")
    monkeypatch.setattr(fuzz.damage, "DAMAGES", {"a link": fuzz.damage.DAMAGES["a link"]})
    failures = hosts(tmp_path, 40, seed=0).failures
    assert any("patch wrote something else: ['outside/train" in text for text in failures)


def test_an_untyped_error_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("untyped")

    monkeypatch.setattr(tree, "verify_points", fail)
    assert any("no typed refusal" in text for text in hosts(tmp_path, 15, seed=0).failures)


@pytest.mark.parametrize("count", [28, pytest.param(1000, marks=pytest.mark.slow)])
def test_files_that_would_run_code_are_refused_and_do_not(count: int, tmp_path: Path) -> None:
    part = pickles(tmp_path / "files", count, seed=0)
    assert not part.failures
    assert part.outcomes.keys() == {f"refused by {loader}" for loader in LOADERS}


def test_a_loader_that_runs_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.load

    def unsafe(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "weights_only": False})

    monkeypatch.setattr(torch, "load", unsafe)
    failures = pickles(tmp_path / "files", 42, seed=0).failures
    for loader in ("vrpo export", "encoder_checkpoint", "lpips backbone", "host's resume"):
        assert any(text.startswith(loader) and text.endswith("its code ran") for text in failures), loader


def test_an_untyped_refusal_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise pickle.UnpicklingError("untyped")

    monkeypatch.setattr(encoders, "_load_checkpoint", load)
    failures = pickles(tmp_path / "files", 40, seed=0).failures
    assert failures and all("UnpicklingError" in text for text in failures)


def test_a_bomb_that_is_a_dud_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.pickles.BOMBS, "a dud", lambda marker: 1)
    assert any("a dud does nothing" in text for text in pickles(tmp_path / "files", 0, seed=0).failures)


def test_a_refusal_that_names_no_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path, data: bytes) -> None:
        raise VRPOError("expected a file, got another")

    monkeypatch.setitem(fuzz.pickles.LOADERS, "images", load)
    failures = pickles(tmp_path / "files", 42, seed=0).failures
    assert failures and all("does not name the file" in text for text in failures)
