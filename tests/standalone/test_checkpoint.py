import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from fakes.broken import disk_full

from vrpo_plugin.errors import CheckpointError, ConfigError
from vrpo_plugin.standalone import checkpoint
from vrpo_plugin.standalone.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

FORK = multiprocessing.get_context("fork")


def content(step, *, size=64):
    """Tensors and state that tell which step, and which writing of it, they belong to."""
    tensors = {
        "model": {"w": torch.full((size,), float(step)), "b": torch.tensor(step)},
        "optimizer": {"w.exp_avg": torch.full((size,), step + 0.5, dtype=torch.bfloat16)},
    }
    return tensors, {"step": step, "loss": step / 3}


def save(root, step, value=None, **kwargs):
    return save_checkpoint(root, step, *content(step if value is None else value), **kwargs)


def check(path, value):
    """The checkpoint at ``path`` is whole and holds ``content(value)``."""
    loaded, state = load_checkpoint(path)
    tensors, expected_state = content(value)
    assert state == expected_state
    assert loaded.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded[group].keys() == named.keys()
        for name, tensor in named.items():
            assert loaded[group][name].dtype == tensor.dtype
            assert torch.equal(loaded[group][name], tensor)


def names(root):
    return sorted(path.name for path in root.iterdir())


# Round trip.


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(5).half(),
        torch.randn(2, dtype=torch.float64),
        torch.tensor([2**62 + 1, -3]),
        torch.tensor(7),
        torch.tensor(math.pi),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.arange(256, dtype=torch.uint8),
        torch.tensor([math.nan, math.inf, -0.0]),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}".removeprefix("torch."),
)
def test_tensors_come_back_bitwise(tmp_path, tensor):
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, {"g": {"x": tensor}, "none": {}}, {}))
    assert loaded["none"] == {}
    result = loaded["g"]["x"]
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(result.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_aliased_strided_and_trainable_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    weight = torch.nn.Parameter(base[1])
    tensors = {"a": base, "same": base, "view": base[:, 1], "t": base.T, "e": base[:1].expand(5, 4), "p": weight}
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 0, {"g": {**tensors, "images": images}}, {}))
    for name, tensor in {**tensors, "images": images}.items():
        assert torch.equal(loaded["g"][name], tensor), name
    loaded["g"]["a"].zero_()
    assert loaded["g"]["same"].sum() == base.sum()


def test_loaded_tensors_do_not_write_through(tmp_path):
    path = save(tmp_path, 1)
    load_checkpoint(path)[0]["model"]["w"].zero_()
    check(path, 1)


def test_state_comes_back_exactly(tmp_path):
    generator = random.Random(0)
    floats = [math.ldexp(generator.random(), generator.randint(-1070, 1020)) for _ in range(500)]
    state = {
        "floats": [*floats, -0.0, 5e-324, math.inf],
        "big": 2**100,
        "b": True,
        "none": None,
        "s": "é\n",
        "d": {"x": [1]},
    }
    _, loaded = load_checkpoint(save_checkpoint(tmp_path, 12, {}, state))
    assert loaded == state
    assert [x.hex() for x in loaded["floats"]] == [x.hex() for x in state["floats"]]
    assert loaded["b"] is True
    _, loaded = load_checkpoint(save_checkpoint(tmp_path, 13, {}, {"loss": math.nan}))
    assert math.isnan(loaded["loss"])


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"betas": (0.9, 0.95)}, "state.betas: .*tuple"),
        ({"a": {1: 2}}, "state.a: .*dict"),
        ({"a": [1, torch.tensor(2)]}, r"state.a\[1\]: .*Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, where):
    with pytest.raises(ConfigError, match=where):
        save_checkpoint(tmp_path / "root", 1, {}, state)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("step", "group", "keep_last"), [(-1, "model", None), (1, "../model", None), (1, "", None), (1, "model", 0)]
)
def test_bad_arguments_are_refused(tmp_path, step, group, keep_last):
    with pytest.raises(ConfigError, match=r"expected .*, got .*\. [A-Z]"):
        save_checkpoint(tmp_path, step, {group: {}}, {}, keep_last=keep_last)
    assert names(tmp_path) == []


def test_layout_and_permissions(tmp_path):
    path = save(tmp_path / "new" / "root", 100)
    assert path == tmp_path / "new" / "root" / "0000100"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    assert save(tmp_path, 123_456_789).name == "123456789"


# Which checkpoint is the latest, and what is deleted.


def test_latest_goes_by_manifest_not_by_time(tmp_path):
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (300, 100, 200):
        save(tmp_path, step)
    os.utime(tmp_path / "0000100", (2e9, 2e9))
    assert latest_checkpoint(tmp_path) == tmp_path / "0000300"


def test_foreign_and_incomplete_folders_are_ignored(tmp_path):
    good = save(tmp_path, 5)
    for name in ("best", "0000009.bak", "12", "0000009x", ".saving-0000009", ".deleting-0000009"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "0000010").mkdir()
    (tmp_path / "0000011").write_text("a file")
    for name in ("model.safetensors", "state.json", "manifest.json"):
        shutil.copytree(save(tmp_path, 20), tmp_path / "0000021", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "0000020")
        (tmp_path / "0000021" / name).unlink()
    broken = save(tmp_path, 30)
    os.truncate(broken / "model.safetensors", 20)
    assert latest_checkpoint(tmp_path) == good


def test_keep_last_deletes_older_ones_only(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["0000003", "0000004"]
    # A run resumed from an older step: what it saves stays, and so does the later branch.
    shutil.copytree(tmp_path / "0000003", tmp_path / "foreign")
    check(save(tmp_path, 2, keep_last=1), 2)
    assert names(tmp_path) == ["0000002", "0000003", "0000004", "foreign"]
    save(tmp_path, 10, keep_last=10)
    assert len(names(tmp_path)) == 5
    save(tmp_path, 11, keep_last=1)
    assert names(tmp_path) == ["0000011", "foreign"]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = shutil.rmtree

    def rmtree(path, **kwargs):
        check(tmp_path / "0000002", 2)
        real(path, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["0000002"]


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, 7)
    check(save(tmp_path, 7, value=8), 8)
    assert names(tmp_path) == ["0000007"]


def test_leftovers_are_removed_and_the_only_copy_is_restored(tmp_path):
    save(tmp_path, 1)
    os.replace(tmp_path / "0000001", tmp_path / ".replaced-0000001")
    save_checkpoint(tmp_path / "other", 2, *content(2))
    for name in (".saving-0000002", ".deleting-0000000"):
        shutil.copytree(tmp_path / "other" / "0000002", tmp_path / name)
    shutil.rmtree(tmp_path / "other")
    check(latest_checkpoint(tmp_path), 1)
    save(tmp_path, 3)
    assert names(tmp_path) == ["0000001", "0000003"]
    check(tmp_path / "0000001", 1)


# Crashes.


def interrupt(stop, action):
    """Makes the ``stop``-th write or rename or sync call ``action`` instead; returns the list of calls so far."""
    calls = []

    def wrap(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            calls.append((name, args))
            if len(calls) - 1 == stop:
                action(name, original, args)
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    for module, name in (
        (checkpoint, "save_file"),
        (checkpoint.Path, "write_text"),
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
    ):
        wrap(module, name)
    return calls


def partly_then_kill(name, original, args):
    """What a kill in the middle of a call leaves: half a file, or half a folder."""
    if name == "save_file":
        original(*args)
        os.truncate(args[1], os.path.getsize(args[1]) // 2)
    elif name == "write_text":
        original(args[0], args[1][: len(args[1]) // 2])
    elif name == "rmtree":
        for file in list(args[0].glob("*"))[:1]:
            file.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def child(root, step, value, stop, action, results):
    calls = interrupt(stop, action)
    try:
        save(root, step, value, keep_last=2)
    except OSError:
        results.put("refused")
    else:
        results.put(len(calls))


def in_child(*args):
    results = FORK.SimpleQueue()
    process = FORK.Process(target=child, args=(*args, results))
    process.start()
    process.join()
    return process.exitcode, None if results.empty() else results.get()


# Saving 3 over 1 and 2 with keep_last=2 also deletes; saving 2 again, or over the only copy, replaces.
@pytest.mark.parametrize("action", [partly_then_kill, disk_full])
@pytest.mark.parametrize(("before", "step"), [((1, 2), 3), ((1, 2), 2), ((2,), 2)])
def test_crash_at_every_stage(tmp_path, monkeypatch, before, step, action):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and a kill is no power cut
    for old in before:
        save(tmp_path / "before", old)
    stages = 0
    while True:
        root = shutil.copytree(tmp_path / "before", tmp_path / str(stages))
        exitcode, result = in_child(root, step, 30, stages, action)
        latest = latest_checkpoint(root)
        if result not in (None, "refused"):
            break
        assert (exitcode, result) == ((-signal.SIGKILL, None) if action is partly_then_kill else (0, "refused"))
        complete = load_checkpoint(latest)[1]["step"]
        assert complete in (before[-1], 30)
        check(latest, complete)
        final = root / f"{step:07d}"
        if final.exists() and load_checkpoint(final)[1]["step"] == 30:
            assert latest == final
        # The next run cleans up, and nothing of the crash is left.
        check(save(root, 4, keep_last=1), 4)
        assert names(root) == ["0000004"]
        stages += 1
    check(latest, 30)
    # 2 groups, 2 texts; 4 files and 2 folders synced; 1 rename or 2; deletions.
    assert stages == result
    assert stages >= 2 + 2 + 6 + 1


def test_old_checkpoint_is_latest_until_the_rename(tmp_path, monkeypatch):
    save(tmp_path, 1)
    seen = []
    real = os.replace

    def replace(source, target):
        seen.append(latest_checkpoint(tmp_path).name)
        real(source, target)
        seen.append(latest_checkpoint(tmp_path).name)

    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 2)
    assert seen == ["0000001", "0000002"]


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    real = os.replace

    def replace(source, target):
        synced.append("rename")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    root = tmp_path / "root"
    save(root, 1)
    files = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(synced[:4]) == files
    assert synced[4:] == [".saving-0000001", "rename", "root"]


def save_for_ever(root):
    for step in range(2, 10**6):
        save_checkpoint(root, step, *content(step, size=20_000), keep_last=2)


def test_kill_at_random_moments(tmp_path):
    last = 1
    save_checkpoint(tmp_path, last, *content(last, size=20_000))
    generator = random.Random(0)
    for _ in range(8):
        process = FORK.Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.05 + 0.15 * generator.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        tensors, state = load_checkpoint(latest_checkpoint(tmp_path))
        step = state["step"]
        assert torch.equal(tensors["model"]["w"], torch.full((20_000,), float(step)))
        last = max(last, step)
    assert last > 2


# Damage.


def assert_refused(path, file):
    with pytest.raises(CheckpointError, match=file.name) as caught:
        load_checkpoint(path)
    assert "expected " in str(caught.value)
    assert ", got " in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_truncation_and_growth_is_refused(tmp_path, name):
    path = save(tmp_path, 1)
    file, whole = path / name, (path / name).read_bytes()
    generator = random.Random(0)
    for length in {0, 1, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(40))}:
        file.write_bytes(whole[:length])
        assert_refused(path, file)
    assert latest_checkpoint(tmp_path) is None
    file.write_bytes(whole + b"\0")
    assert_refused(path, file)
    file.unlink()
    assert_refused(path, file)
    file.write_bytes(whole)
    check(path, 1)


def flip(file, bit):
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_bit_flips_are_refused(tmp_path, name):
    path = save(tmp_path, 1)
    file, whole = path / name, (path / name).read_bytes()
    bits = range(8 * len(whole))
    # The manifest vouches for the rest, and for itself: each of its bits.
    for bit in bits if name == "manifest.json" else random.Random(0).sample(bits, 300):
        flip(file, bit)
        assert_refused(path, file)
        flip(file, bit)
    assert file.read_bytes() == whole
    check(path, 1)


def test_file_of_another_checkpoint_is_refused(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(two / "model.safetensors", one / "model.safetensors")
    assert_refused(one, one / "model.safetensors")


def test_unlisted_files_have_no_effect(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra.safetensors").write_bytes(b"junk")
    (path / "note.txt").write_text("mine")
    check(path, 1)
    assert latest_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": {}},
        {"files": {"state.json": {"size": 1}}},
        {"files": {"state.json": {"size": 2, "sha256": ""}, "../x.safetensors": {"size": 2, "sha256": ""}}},
        {"step": None},
    ],
)
def test_foreign_manifest_is_refused(tmp_path, change):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest.update(change)
    manifest["sha256"] = checkpoint._manifest_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(path, path / "manifest.json")
    assert latest_checkpoint(tmp_path) is None


def test_foreign_content_behind_a_right_checksum_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    (path / "model.safetensors").write_bytes(b"not safetensors")
    manifest["files"]["model.safetensors"] = {
        "size": 15,
        "sha256": checkpoint.file_sha256(path / "model.safetensors"),
    }
    manifest["sha256"] = checkpoint._manifest_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(path, path)


@pytest.mark.parametrize("name", ["missing", ""])
def test_not_a_checkpoint(tmp_path, name):
    assert_refused(tmp_path / name, tmp_path / name / "manifest.json")
