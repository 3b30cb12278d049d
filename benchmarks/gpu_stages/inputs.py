"""What a GPU's machine needs as files: images, networks, checkouts, and results of an earlier call."""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]

LIMIT = 60 * 2**20
RECIPES = {"cifar16": "cifar16.yaml", "cifar32": "cifar32_gpu.yaml"}  # folder of networks: the recipe that makes them
HOSTS = ("REPA", "SiT")
ARCHIVES = (".tar", ".xz", ".gz", ".bz2", ".tgz")


def fill_in(arguments: argparse.Namespace) -> None:
    """Gives the options that are not given what ``--prepare`` has put into the folder, or what the checkout holds."""
    inputs: Path | None = arguments.inputs
    for name, default in (("hosts", None), ("networks", BENCHMARKS / "networks")):
        prepared = inputs / name if inputs else None
        if getattr(arguments, name) is None:
            setattr(arguments, name, prepared if prepared is not None and prepared.is_dir() else default)
    if arguments.data is None and inputs is not None:
        found = [p for p in sorted(inputs.glob("data*")) if p.suffix in ARCHIVES or p.is_dir()]
        arguments.data = found[0] if found else None


def prepare(inputs: Path, data: Path | None, hosts: Path | None) -> None:
    """Copies data, checkouts and stored results; trains, on the CPU, the networks that the checkout does not hold."""
    inputs.mkdir(parents=True, exist_ok=True)
    stored = BENCHMARKS / "results" / "gpu_converge.json"
    if stored.exists():
        shutil.copy2(stored, inputs)  # what is finished there is not trained again
    if data is not None and data.is_file():
        shutil.copy2(data, inputs / f"data{''.join(data.suffixes)}")
    for name in HOSTS:
        if hosts is not None and (hosts / name).is_dir():
            # Its code alone: no history, no pictures.
            ignored = shutil.ignore_patterns(".git", "*.png", "*.jpg", "*.gif", "*.ipynb", "*.pdf", "visuals", "assets")
            shutil.copytree(hosts / name, inputs / "hosts" / name, ignore=ignored, dirs_exist_ok=True)
    missing = [name for name in RECIPES if not (BENCHMARKS / "networks" / name).is_dir()]
    if data is not None and missing:
        with unpacked(data) as folder:
            for name in missing:
                _train_networks(name, folder, inputs)


def _train_networks(name: str, data: Path, inputs: Path) -> None:
    import torch
    from convergence.parts import Benchmark
    from convergence.recipe import read_recipe

    benchmark = Benchmark(read_recipe(BENCHMARKS / "recipes" / RECIPES[name]), data, inputs / "made" / name)
    print(f"{name}: networks {benchmark.train_networks(torch.device('cpu'))}", flush=True)
    shutil.copytree(benchmark.output / "networks", inputs / "networks" / name, dirs_exist_ok=True)


@contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """The folder that an archive holds, for a while; a folder as it is."""
    if data.is_dir():
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(data) as archive:
            archive.extractall(folder, filter="data")
        found = sorted(path.parent for path in Path(folder).rglob("train") if path.is_dir())
        if not found:
            sys.exit(f"{data}: expected an archive with train/<class>/* in it; got none. Pass another --data.")
        yield found[0]


def print_travelling(root: Path, inputs: Path | None) -> None:
    """What a machine elsewhere would be sent: this checkout's files and the inputs."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    sizes = {"this checkout": sum((root / name).stat().st_size for name in listed if (root / name).is_file())}
    for path in sorted(inputs.iterdir()) if inputs and inputs.is_dir() else ():
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        sizes[path.name] = sum(file.stat().st_size for file in files)
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  in all; at most {LIMIT / 2**20:.0f} travel")
    if total > LIMIT:
        sys.exit("Too much: leave out a recipe's networks, or archive fewer images.")
