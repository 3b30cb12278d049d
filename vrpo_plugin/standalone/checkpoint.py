"""Checkpoints without pickle, safe against a kill at any moment, a full disk and flipped bits.

A checkpoint is a folder ``0000100/`` with one ``<name>.safetensors`` per group of tensors, ``state.json`` and
``manifest.json`` (sizes and sha256 of all files, and of itself). It gets its name by one rename, when it is
complete and on disk.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError
from vrpo_plugin.files import sync

FORMAT = 1
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
# Beside the checkpoints: one that is being written; one of the same step, moved aside until the new one
# stands; one that is being deleted.
SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_last: int | None = None,
) -> Path:
    """Writes a checkpoint so that at every moment an older one, or this one, is complete. One process only.

    Args:
        root: folder of the checkpoints; made where missing.
        step: training step, at least 0; an existing checkpoint of this step is replaced.
        tensors: groups (letters, digits, ``_`` and ``-``) of named tensors, any device, strides or aliasing.
        state: JSON: dicts with string keys, lists, str, int, float, bool, None; floats come back exactly.
        keep_last: keep this one and so many older ones that there are ``keep_last``; None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: a step, group name, ``state`` value or ``keep_last`` that cannot be saved or obeyed.
        OSError: the disk's refusal; older checkpoints are as they were.
    """
    _check_arguments(step, tensors, state, keep_last)
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    name = f"{step:07d}"
    final, saving, replaced = root / name, root / (SAVING + name), root / (REPLACED + name)
    saving.mkdir()
    for group, named in tensors.items():
        # A copy of its own for each tensor: safetensors refuses shared memory.
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in named.items()}
        save_file(copies, saving / (group + SUFFIX))
    (saving / STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
    files = {p.name: {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(saving.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _manifest_sha256(manifest)
    (saving / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    mode = (saving / STATE).stat().st_mode
    for file in saving.iterdir():
        file.chmod(mode)  # safetensors makes files that only their owner can read
        sync(file)
    sync(saving)
    if final.exists():
        os.replace(final, replaced)
    os.replace(saving, final)
    sync(root)
    # A file that cannot be deleted now (somebody reads it) must not end the run: the next save tries again.
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last is not None:
        older = sorted((s, path) for s, path in _complete(root) if s < step)
        for _, path in older[: max(0, len(older) + 1 - keep_last)]:
            _delete(path)
    return final


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint after every file's size and sha256 were found right.

    Args:
        path: the folder that :func:`save_checkpoint` or :func:`latest_checkpoint` gave.
        device: where the tensors go.

    Returns:
        ``tensors, state`` as they were saved.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or not of this format; the text names it.
    """
    path = Path(path)
    _, files = _read_manifest(path)
    for name, (size, digest) in files.items():
        _verify(path / name, size, digest)
    try:
        tensors = {
            name.removesuffix(SUFFIX): load_file(path / name, device=str(device))
            for name in files
            if name.endswith(SUFFIX)
        }
        return tensors, json.loads((path / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, "readable files", error) from error


def load_group(path: str | Path, group: str) -> tuple[dict[str, Tensor], int, str]:
    """Reads one group of a checkpoint's tensors after its file's size and sha256 were found right.

    Args:
        path: the checkpoint's folder.
        group: for instance ``ema`` or ``model``.

    Returns:
        Its tensors, the step of the checkpoint, and the file's sha256.

    Raises:
        CheckpointError: there is no such group, or its file is missing, truncated or changed.
    """
    path = Path(path)
    step, files = _read_manifest(path)
    if (name := group + SUFFIX) not in files:
        raise _damaged(path, name, sorted(files))
    _verify(path / name, *files[name])
    try:
        return load_file(path / name), step, files[name][1]
    except (SafetensorError, OSError) as error:
        raise _damaged(path / name, "a readable file", error) from error


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint of the highest step: its manifest is whole and all files have their sizes.

    Args:
        root: folder of the checkpoints; may be missing.

    Returns:
        Its folder, or None.
    """
    complete = _complete(Path(root))
    # Of two with one step, the one that was moved aside is the older.
    return max(complete, key=lambda c: (c[0], not c[1].name.startswith(REPLACED)))[1] if complete else None


def _check_arguments(step: int, tensors: Mapping[str, object], state: Mapping[str, Any], keep_last: int | None) -> None:
    if step < 0 or (keep_last is not None and keep_last < 1):
        got = f"step {step}, keep_last {keep_last}"
        expected = "step >= 0 and keep_last >= 1 or None"
        raise ConfigError("checkpoint", expected=expected, got=got, do="Correct the number.")
    for group in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
            expected = "letters, digits, _ and -"
            raise ConfigError("group of tensors", expected=expected, got=repr(group), do="Rename it.")
    _check_json(dict(state), "state")


def _check_json(value: object, where: str) -> None:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        # json.dumps would turn tuples into lists and integer keys into strings without a word.
        expected = "JSON: dict with string keys, list, str, int, float, bool or None"
        got = f"{type(value).__name__} {value!r}"
        raise ConfigError(where, expected=expected, got=got, do="Convert it first.")


def _clear_leftovers(root: Path) -> None:
    """Removes what a killed run left, except the only copy of a step."""
    for leftover in sorted(root.glob(REPLACED + "*")):
        original = root / leftover.name.removeprefix(REPLACED)
        if not original.exists():
            os.replace(leftover, original)
    for prefix in (SAVING, REPLACED, DELETING):
        for leftover in sorted(root.glob(prefix + "*")):
            shutil.rmtree(leftover, ignore_errors=True)


def _delete(path: Path) -> None:
    # Renamed first, so that a kill leaves no half of it under its name.
    deleting = path.with_name(DELETING + path.name)
    os.replace(path, deleting)
    shutil.rmtree(deleting, ignore_errors=True)


def _complete(root: Path) -> list[tuple[int, Path]]:
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if re.fullmatch(r"\d{7,}", path.name.removeprefix(REPLACED)):
            try:
                step, files = _read_manifest(path)
            except CheckpointError:
                continue
            if all(_size(path / name) == size for name, (size, _) in files.items()):
                found.append((step, path))
    return found


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        wanted = manifest.pop("sha256")
        if wanted != _manifest_sha256(manifest):
            raise ValueError("another sha256 than it states")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        files = {name: (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        # A foreign manifest must not make us read outside its folder.
        if STATE not in files or any(Path(name).name != name for name in files):
            raise ValueError(f"files {sorted(files)}")
        return int(manifest["step"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"a manifest of format {FORMAT}", f"{type(error).__name__}: {error}") from error


def _verify(file: Path, size: int, digest: str) -> None:
    if (found := _size(file)) != size:
        raise _damaged(file, f"{size} bytes", "no file" if found is None else f"{found} bytes")
    if (hashed := file_sha256(file)) != digest:
        raise _damaged(file, f"sha256 {digest}", hashed)


def _manifest_sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def file_sha256(file: Path) -> str:
    """Of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damaged(file: Path, expected: object, got: object) -> CheckpointError:
    do = "Resume from another checkpoint, or copy this one again."
    return CheckpointError(str(file), expected=expected, got=got, do=do)
