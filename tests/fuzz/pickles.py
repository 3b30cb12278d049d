"""Files that would run code, given to everything in the package that loads one."""

import argparse
import builtins
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fuzz.command import run
from fuzz.part import Part
from vrpo_plugin import VRPOConfig
from vrpo_plugin.encoders import load_encoder
from vrpo_plugin.errors import CheckpointError, VRPOError
from vrpo_plugin.hosts.compat import RESUME
from vrpo_plugin.hosts.pixels import read_critic_targets
from vrpo_plugin.modules.critic import LatentCritic, load_critic_weights
from vrpo_plugin.perceptual import LPIPSReward
from vrpo_plugin.standalone.checkpoint import load_checkpoint, save_checkpoint
from vrpo_plugin.standalone.frechet import FeatureStatistics
from vrpo_plugin.standalone.small_network import load_small_features
from vrpo_plugin.standalone.sources import ImageFolderSource, RepaSource

FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own way back to unsafe loading, for those who do not say


def pickles(output: Path, count: int, seed: int) -> Part:
    """Loads files that would make another one: a typed error that names the file, and no other file."""
    part, output = Part("files that would run code"), output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    marker = output / "it ran"
    _prove_live(part, output, marker)
    draw, loaders = random.Random(seed), sorted(LOADERS)
    files = [(bomb, form) for bomb in sorted(BOMBS) for form in FORMS]
    orders = {loader: draw.sample(files, len(files)) for loader in loaders}
    for i in range(count):
        loader = loaders[i % len(loaders)]
        bomb, form = orders[loader][i // len(loaders) % len(files)]
        protocol, forced = draw.randint(0, pickle.HIGHEST_PROTOCOL), draw.random() < 0.25 and loader not in HOSTS_OWN
        data = FORMS[form](BOMBS[bomb](marker), protocol)
        name = f"{loader}: {bomb} in {form}, protocol {protocol}{', ' + FORCED if forced else ''}"
        folder = output / str(i)
        folder.mkdir()
        try:
            with _environment(forced):
                LOADERS[loader](folder, data)
        except (VRPOError, *HOSTS_OWN.get(loader, ())) as error:
            part.add(f"refused by {loader}")
            if loader not in HOSTS_OWN and str(folder) not in str(error):
                part.fail(f"{name}: the error does not name the file: {error}")
        except Exception as error:  # any other is what this looks for
            part.add("not refused as it should be")
            part.fail(f"{name}: {error!r:.300}")
        else:
            part.add("not refused as it should be")
            part.fail(f"{name}: it was loaded")
        if marker.exists():
            part.fail(f"{name}: its code ran")
            marker.unlink()
        shutil.rmtree(folder)
    return part


def _prove_live(part: Part, output: Path, marker: Path) -> None:
    """A bomb that is a dud would pass everywhere."""
    for bomb, make in BOMBS.items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickle.loads(pickle.dumps(make(marker), protocol))
            if not marker.exists():
                part.fail(f"{bomb} does nothing under protocol {protocol}")
            marker.unlink(missing_ok=True)


@contextmanager
def _environment(forced: bool) -> Any:
    before = os.environ.pop(FORCED, None)
    if forced:
        os.environ[FORCED] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCED, None)
        if before is not None:
            os.environ[FORCED] = before


class Calls:
    """Unpickles to what a function returns, and calls it for that."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class OfTheProject:
    """Restores itself by code of its own, as any class of a training script may."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).touch()


BOMBS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Calls(os.system, f"touch '{marker}'"),
    "builtins.exec": lambda marker: Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
    "builtins.eval": lambda marker: Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
    "pathlib": lambda marker: Calls(Path.touch, marker),
    "a class's own state": lambda marker: OfTheProject(str(marker)),
    # Functions that torch itself lets pass, on the way to one that it does not.
    "an allowed class": lambda marker: argparse.Namespace(a=Calls(os.system, f"touch '{marker}'")),
}


def _with(bomb: Any) -> dict[str, Any]:
    """A checkpoint that is right in all but one value."""
    weights = {"a": torch.ones(2)}
    return {"model": weights, "ema": weights, "args": bomb, "state_dict": {"cls_token": bomb}, "vrpo_critic": bomb}


def _torch(bomb: Any, protocol: int, *, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(_with(bomb), buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _inside_zip(bomb: Any, protocol: int) -> bytes:
    """An archive as torch's, with a second pickle where tensors should lie."""
    buffer = io.BytesIO(_torch(1, 2, legacy=False))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("archive/data/1", pickle.dumps(bomb, protocol))
        file.writestr("archive/constants.pkl", pickle.dumps(bomb, protocol))  # as a TorchScript archive has it
    return buffer.getvalue()


def _numpy(bomb: Any, protocol: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([bomb], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _archive(bomb: Any, protocol: int) -> bytes:
    buffer = io.BytesIO()
    objects = np.array([bomb], dtype=object)
    np.savez(buffer, mu=objects, sigma=objects, count=objects)
    return buffer.getvalue()


def _type_error(bomb: Any, protocol: int) -> bytes:
    """A call that fails with TypeError: where a loader takes that for an old torch, it tries again unsafely."""
    broken = Calls(torch._utils._rebuild_tensor_v2, 1)
    buffer = io.BytesIO()
    torch.save([broken, bomb], buffer, pickle_protocol=max(2, protocol))
    return buffer.getvalue()


FORMS: dict[str, Callable[[Any, int], bytes]] = {
    "a bare pickle": lambda bomb, protocol: pickle.dumps(bomb, protocol),
    "a pickled checkpoint": lambda bomb, protocol: pickle.dumps(_with(bomb), protocol),
    "torch.save's zip": lambda bomb, protocol: _torch(bomb, max(2, protocol), legacy=False),
    "torch.save's old format": lambda bomb, protocol: _torch(bomb, max(2, protocol), legacy=True),
    "a second pickle in the zip": _inside_zip,
    "a call that fails first": _type_error,
    "an array of objects": _numpy,
    "an archive of arrays of objects": _archive,
    "a pickle behind a safetensors header": lambda bomb, protocol: (
        (2).to_bytes(8, "little") + b"{}" + pickle.dumps(bomb)
    ),
}


def _file(name: str, load: Callable[[Path], Any]) -> Callable[[Path, bytes], None]:
    def work(folder: Path, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        load(path)

    return work


def _export(path: Path) -> None:
    ended = run("export", path, path.with_name("plain.pt"))
    if ended.fault:
        raise RuntimeError(ended.fault)
    if ended.refused and not path.with_name("plain.pt").exists():
        raise CheckpointError(ended.error)


def _resume(path: Path) -> None:
    """The host's own ``torch.load`` while our shim is on."""
    (hook,) = RESUME.hooks(cast(Any, None), RESUME)
    take_away = hook.add()
    try:
        torch.load(path, map_location="cpu")
    finally:
        take_away()


def _checkpoint(folder: Path, data: bytes) -> None:
    """A checkpoint of the trainer whose manifest vouches for the file, as whoever wrote it can arrange."""
    path = save_checkpoint(folder / "checkpoints", 1, {"model": {"a": torch.ones(2)}}, {"step": 1})
    (path / "model.safetensors").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(path)


def _latents(folder: Path, data: bytes) -> None:
    for name in ("images", "vae-sd"):
        (folder / name).mkdir()
        (folder / name / "0.npy").write_bytes(data)
    np.save(folder / "images" / "0.npy", np.zeros((3, 8, 8), np.uint8))
    (folder / "vae-sd" / "dataset.json").write_text('{"labels": [["0.npy", 0]]}')
    RepaSource(folder)


def _images(folder: Path, data: bytes) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "0.png").write_bytes(data)
    ImageFolderSource(folder, 8).load(0)


def _critic(path: Path) -> None:
    load_critic_weights(LatentCritic((4, 8, 8), (12,), (4, 4), width=16), path)


def _encoder(path: Path) -> None:
    load_encoder("test_vit", resolution=32, checkpoint=path)


LOADERS: dict[str, Callable[[Path, bytes], None]] = {
    "vrpo export": _file("0000100.pt", _export),
    "critic_checkpoint": _file("critic.safetensors", _critic),
    "critic_checkpoint of latents": _file(
        "critic.pt",
        lambda path: read_critic_targets(VRPOConfig(critic_checkpoint=str(path), critic_trainable=False), "sit"),
    ),
    "encoder_checkpoint .pt": _file("encoder.pt", _encoder),
    "encoder_checkpoint .pth": _file("encoder.pth", _encoder),
    "encoder_checkpoint .safetensors": _file("encoder.safetensors", _encoder),
    "lpips backbone": _file("squeezenet.pth", lambda path: LPIPSReward(net="squeeze", backbone_checkpoint=path)),
    "evaluation network": _file("network.safetensors", load_small_features),
    "reference statistics": _file("statistics.npz", FeatureStatistics.load),
    "latents as arrays": _latents,
    "images": _images,
    "trainer's checkpoint": _checkpoint,
    "host's resume": _file("0000100.pt", _resume),
}
# The host calls torch.load itself: what it raises is torch's, as without us, and the host may wait for it.
HOSTS_OWN: dict[str, tuple[type[Exception], ...]] = {"host's resume": (Exception,)}
