"""Compares methods on a folder of images: the same data order, noise, labels and seeds for all.

    python benchmarks/convergence --recipe benchmarks/recipes/digits.yaml --output exps/digits      # a smoke test
    python benchmarks/convergence --data cifar10 --recipe benchmarks/recipes/cifar16.yaml --output exps/cifar16

Runs train with ``examples/train_repa_vrpo.py``; judges are small networks, independent of the aligned encoder. All
that is there already is only read, so it can be interrupted at any time. Results: OUTPUT/NAME.json, a table, plots; the
ratios are printed last.
"""

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __name__ == "__main__":  # Python puts this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convergence.cost import measure_costs
from convergence.parts import Benchmark, Run
from convergence.recipe import read_recipe
from convergence.report import alarms, plot, ratio_lines, summarize, table
from convergence.run import Judge
from vrpo_plugin import VRPOError, __version__
from vrpo_plugin.files import write_file

WORKER = Path(__file__).with_name("run.py")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of images, or one with train/ and test/; none: the digits")
    parser.add_argument("--output", type=Path, required=True, help="folder of networks, runs and results")
    parser.add_argument("--methods", nargs="+", help="of the recipe's; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the recipe's")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; default: one per CPU core, or per GPU")
    parser.add_argument("--launch", default="", help="options of accelerate launch, for runs on several GPUs")
    parser.add_argument("--report-only", action="store_true", help="no run: results of what is there")
    return parser.parse_args()


def run_all(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Trains and judges what is missing, several runs side by side.

    Raises:
        subprocess.CalledProcessError: a run failed; those beside it were let finish. It has printed its error.
    """
    jobs = arguments.jobs or (torch.cuda.device_count() or os.cpu_count() or 1)
    jobs = max(1, min(jobs, len(runs)))
    shared = environment_of(jobs, os.environ)
    places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for place in gpu_of_each_job(jobs, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        places.put({} if arguments.launch else place)
    stop = threading.Event()
    steps = runs[0].benchmark.recipe.evaluation.steps[-1]

    def work(run: Run) -> Run:
        command = [sys.executable, str(WORKER), "--recipe", str(arguments.recipe), "--output", str(arguments.output)]
        command += ["--method", run.method, "--seed", str(run.seed), f"--launch={arguments.launch}"]
        command += ["--data", str(arguments.data)] if arguments.data else []
        if stop.is_set():
            return run
        place = places.get()
        try:
            subprocess.run(command, check=True, env={**shared, **place})
        finally:
            places.put(place)
        return run

    bar = tqdm(total=steps * len(runs), unit="step")
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(work, run) for run in runs}
        try:
            while pending:
                done, pending = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
                bar.n = sum(min(steps, run.trained_steps()) for run in runs)
                bar.set_postfix(judged=sum(len(run.record()["points"]) for run in runs))
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            raise
    bar.close()


def environment_of(jobs: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What runs side by side share: the cores between them, unless the user says how many threads each has."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(threads), **environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def gpu_of_each_job(jobs: int, gpus: int, visible: str | None) -> list[dict[str, str]]:
    """The variable that gives each job side by side a GPU, in turn; nothing without GPUs."""
    names = visible.split(",")[:gpus] if visible else [str(i) for i in range(gpus)]
    return [{"CUDA_VISIBLE_DEVICES": names[i % gpus]} if gpus else {} for i in range(jobs)]


def protocol_of(benchmark: Benchmark, accuracy: dict[str, float | None]) -> dict[str, Any]:
    """All that moves a number and is no method."""
    return {
        "recipe": benchmark.recipe.to_dict(),
        "data": benchmark.source().fingerprint(),
        "networks": {name: {"name": benchmark.network(name).name, "accuracy": a} for name, a in accuracy.items()},
        "labels": "balanced",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {_accelerator()}",
        "versions": {"vrpo_plugin": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def main() -> None:
    arguments = parse_arguments()
    recipe = read_recipe(arguments.recipe)
    benchmark = Benchmark(recipe, arguments.data, arguments.output)
    methods = arguments.methods or list(recipe.methods)
    seeds = arguments.seeds or list(recipe.seeds)
    unknown = sorted(set(methods) - set(recipe.methods))
    if unknown:
        sys.exit(f"--methods: expected some of {', '.join(recipe.methods)}; got {', '.join(unknown)}. Correct it.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accuracy = benchmark.train_networks(device)
    # Seed by seed: after the first one there is a table.
    runs = [Run(benchmark, method, seed) for seed in seeds for method in methods]
    for run in runs:
        run.check()
    if not arguments.report_only:
        run_all(runs, arguments)
    records = [record for run in runs if (record := run.record())["points"]]
    costs = _costs(benchmark, methods, device)
    summary = summarize(records, recipe.baseline, recipe.candidate, recipe.judges, costs)
    floor = _floor(benchmark, device)
    result = {"protocol": protocol_of(benchmark, accuracy), "costs": costs, "runs": records, "summary": summary}
    result["floor"] = floor
    write_file(arguments.output / f"{recipe.name}.json", json.dumps(result, indent=1) + "\n")
    plot(records, recipe.judges, costs, arguments.output / f"{recipe.name}.png")
    print(table(records, recipe.judges, costs, floor))
    for alarm in alarms(records):
        print("ALARM:", alarm)
    print(ratio_lines(summary))


def _floor(benchmark: Benchmark, device: torch.device) -> dict[str, Any] | None:
    """Measured once per way of judging, and kept."""
    file = benchmark.output / "floor.json"
    judging = json.loads(json.dumps(Run(benchmark, benchmark.recipe.baseline, 0).judging()))
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if known.get("judging") != judging:
        known = {"judging": judging, "floor": Judge(benchmark, device).floor()}
        write_file(file, json.dumps(known, indent=1) + "\n")
    return known["floor"]


def _costs(benchmark: Benchmark, methods: list[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """Measured once per set of methods and their settings, and kept."""
    file = benchmark.output / "costs.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings = json.loads(json.dumps({m: Run(benchmark, m, 0).settings() for m in methods}))
    if any(known.get(method, {}).get("settings") != settings[method] for method in methods):
        costs = measure_costs(benchmark, methods, device)
        known = {method: {**cost, "settings": settings[method]} for method, cost in costs.items()}
        write_file(file, json.dumps(known, indent=1) + "\n")
    return {method: known[method] for method in methods}


if __name__ == "__main__":
    try:
        main()
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")
