"""Runs a host's own training script, unmodified, in subprocesses on the CPU without a network, and reads what it did.

``offline/`` holds the stand-ins for downloads and GPUs. ``VRPO_HOSTS_DIR`` names the folder of the checkouts.
"""

import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import host_data

REPO = Path(__file__).resolve().parents[2]
PREVIEW = {"VRPO_TEST_PREVIEW_STEPS": "2"}  # the hosts' own 50 steps cost 25 seconds; pass env={...: ""} for those

ACCELERATE = """
--exp-name run --output-dir out --data-dir data --encoder-depth 2 --batch-size 4 --num-workers 0
--max-train-steps 20 --checkpointing-steps 100000 --sampling-steps 100000 --mixed-precision no
"""
SIT = "--data-path data --results-dir out --image-size 256 --global-batch-size 4 --num-workers 0 --log-every 1"


@dataclass(frozen=True)
class Host:
    """How one training script is started."""

    checkout: str  # folder below VRPO_HOSTS_DIR
    script: str
    arguments: str  # small settings, 20 steps; "{root}" is the checkout
    make_data: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()  # packages beyond the plugin's [repa] extra
    cuda: bool = False  # asks for CUDA and torchrun's environment
    folder: str = "."  # where it runs, below the work folder
    environment: tuple[tuple[str, str], ...] = ()


HOSTS = {
    "REPA": Host("REPA", "train.py", ACCELERATE + "--model SiT-T/2", host_data.repa),
    "REPA-t2i": Host(
        "REPA",
        "train_t2i.py",
        ACCELERATE + "--encoder-depth 1 --batch-size 64 --max-train-steps 3",
        host_data.captioned,
        ("transformers",),
    ),
    "REG": Host("REG", "train.py", ACCELERATE + "--model SiT-T/2", host_data.reg),
    "iREPA": Host(
        "iREPA",
        "ldm/train.py",
        ACCELERATE + "--model SiT-T/2 --repa-loss --no-compile --n-samples 4",
        host_data.irepa,
        ("datasets", "dictdot"),
        folder="ldm",
    ),
    "REPA-E": Host(
        "REPA-E",
        "train_repae.py",
        ACCELERATE + "--model SiT-T/2 --no-compile --vae-ckpt pretrained/vae.pt "
        "--loss-cfg-path {root}/configs/l1_lpips_kl_gan.yaml",
        host_data.repae,
        ("h5py", "omegaconf", "dictdot"),
    ),
    "REPA-E-ldm": Host(
        "REPA-E",
        "train_ldm_only.py",
        ACCELERATE + "--model SiT-T/2 --no-compile --vae f8d4 --vae-ckpt pretrained/vae.pt --vae-latents-name latents",
        host_data.repae,
        ("h5py", "dictdot"),
    ),
    "SiT": Host(
        "SiT",
        "train.py",
        SIT + " --model SiT-T/2 --epochs 5",
        host_data.image_folder,
        ("torchdiffeq",),
        cuda=True,
        environment=(("ENTITY", "nobody"), ("PROJECT", "none")),
    ),
    "DiT": Host("DiT", "train.py", SIT + " --model DiT-T/2 --epochs 5", host_data.image_folder, cuda=True),
    # Its accelerator wraps a model in DDP, and saves model.module, on two processes and more.
    "fast-DiT": Host(
        "fast-DiT",
        "train.py",
        "--model DiT-T/2 --epochs 5 --results-dir out --global-batch-size 4 --num-workers 0 --log-every 1",
        host_data.fast_dit,
        environment=(("VRPO_TEST_FAKE_CUDA", "1"),),
    ),
    "LightningDiT": Host(
        "LightningDiT",
        "train.py",
        "--config config.yaml",
        host_data.lightningdit,
        ("fairscale", "torchdiffeq", "tensorboard"),
        environment=(("VRPO_TEST_FAKE_CUDA", "1"), ("VRPO_TEST_NO_DATASETS", "1"), ("TORCHDYNAMO_DISABLE", "1")),
    ),
}


@dataclass(frozen=True)
class HostRun:
    """What a run left behind."""

    folder: Path  # where the script ran
    returncode: int
    stdout: str
    stderr: str
    seconds: float
    records: list[list[dict[str, Any]]]  # by rank

    def of(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        return [r for r in self.records[rank] if r["kind"] == kind]

    @property
    def rows(self) -> list[dict[str, float]]:
        """The scalars of rank 0 that reached ``Accelerator.log``, with their step."""
        return [{"step": r["step"], **r["values"]} for r in self.of("log") if r["step"] is not None]

    @property
    def previews(self) -> int:
        """How often pictures were logged."""
        return sum("samples" in r["others"] for r in self.of("log"))

    @property
    def losses(self) -> list[float]:
        """What ``backward`` was called on, rank 0."""
        return [r["value"] for r in self.of("loss")]

    @property
    def hashes(self) -> list[list[str]]:
        """After each optimizer step of rank 0: one hash a parameter, in the optimizer's order."""
        return [r["parameters"] for r in self.of("step")]

    def checkpoint(self, step: int) -> dict[str, Any]:
        (file,) = self.folder.glob(f"out/*/checkpoints/{step:07d}.pt")
        return torch.load(file, map_location="cpu", weights_only=False)


def checkout(name: str) -> Path:
    """The folder of a real checkout, or a skip that says why there is none."""
    hosts = os.environ.get("VRPO_HOSTS_DIR")
    if not hosts:
        pytest.skip("VRPO_HOSTS_DIR is not set: it names the folder that holds REPA/, REG/, SiT/, ...")
    root = Path(hosts).resolve() / name
    if not root.is_dir():
        pytest.skip(f"VRPO_HOSTS_DIR holds no folder {name}")
    return root


def edited_checkout(name: str, folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of a checkout in ``folder`` with one place of one file replaced."""
    copy = Path(shutil.copytree(checkout(name), folder / name, ignore=shutil.ignore_patterns(".git")))
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    (copy / file).write_text(text.replace(old, new))
    return copy


def run_host(
    name: str,
    workdir: Path,
    *arguments: str,
    processes: int = 1,
    launcher: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    root: Path | None = None,
    timeout: float = 300,
    check: bool = True,
) -> HostRun:
    """Trains ``HOSTS[name]`` in ``workdir``, where it makes the data unless an earlier run did.

    ``arguments`` follow the defaults, so that they win; ``launcher`` stands before the script, as in ``("-m",
    "vrpo_plugin.launch", "--vrpo-reward-coeff", "0")``; ``root`` replaces the checkout. With ``check`` a run that ends
    with an error fails the test and shows its output.
    """
    host = HOSTS[name]
    root = root or checkout(host.checkout)
    for package in host.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs the package {package}")
    folder = workdir / host.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        host.make_data(folder, root)
    log = folder / f"record{len(list(folder.glob('record*.0')))}"
    command = [
        *_launch(host, processes),
        *launcher,
        str(root / host.script),
        *shlex.split(host.arguments.format(root=root)),
        *arguments,
    ]
    begin = time.perf_counter()
    returncode, stdout, stderr = _run(command, folder, _environment(host, log) | dict(env or {}), timeout)
    if check and returncode:
        pytest.fail(f"{shlex.join(command)} ended with {returncode}\n{stdout}\n{stderr}")
    records = [_read(Path(f"{log}.{rank}")) for rank in range(processes)]
    return HostRun(folder, returncode, stdout, stderr, time.perf_counter() - begin, records)


def differences(patched: HostRun, plain: HostRun) -> list[str]:
    """Where two runs differ in what the plain one recorded, on every rank; bit by bit.

    The patched one may log further scalars and train further parameters, which come last.
    """
    if len(patched.records) != len(plain.records):
        return [f"{len(patched.records)} and {len(plain.records)} processes"]
    found = []
    for rank, (ours, theirs) in enumerate(zip(patched.records, plain.records, strict=True)):
        if [r["kind"] for r in ours] != [r["kind"] for r in theirs]:
            found.append(f"rank {rank}: other events, {len(ours)} and {len(theirs)}")
            continue
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            found += [f"rank {rank}, event {number} ({b['kind']}): {key}" for key in b if _unlike(a[key], b[key])]
    return found


def _unlike(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return any(k not in ours or _unlike(ours[k], v) for k, v in theirs.items())
    if isinstance(theirs, list):
        return ours[: len(theirs)] != theirs
    return json.dumps(ours) != json.dumps(theirs)  # as text, so that NaN equals NaN


def _launch(host: Host, processes: int) -> list[str]:
    port = str(free_port())
    if host.cuda:
        where = ["--master_addr", "127.0.0.1", "--master_port", port]
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *where]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # accelerate's --cpu would start one process; a "GPU" launch on the CPU is a gloo one.
    return [*launch, "--multi_gpu", "--main_process_port", port] if processes > 1 else launch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(host: Host, log: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "VRPO_", "WANDB_"))}
    ours = {
        "PYTHONPATH": os.pathsep.join([str(host_data.OFFLINE), str(REPO)]),
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkouts stay as they are
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "VRPO_TEST_LOG": str(log),
        "VRPO_TEST_FAKE_CUDA": "1" if host.cuda else "0",
    }
    return kept | ours | PREVIEW | dict(host.environment)


def _run(command: list[str], folder: Path, environment: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """In a session of its own: at a timeout the workers end with their launcher."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    end = functools.partial(os.killpg, process.pid, signal.SIGKILL)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end()
        stdout, stderr = process.communicate()
        pytest.fail(f"{shlex.join(command)} took more than {timeout} seconds\n{stdout}\n{stderr}")
    except BaseException:
        end()
        raise
    return process.returncode, stdout, stderr


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
