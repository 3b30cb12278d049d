"""All that needs a GPU, in one command: step time, waits, precision, kernels, convergence.

    python benchmarks/gpu.py --prepare INPUTS --data cifar10 --hosts CHECKOUTS   # on the CPU, before: its files
    python benchmarks/gpu.py --inputs INPUTS --output OUT                         # on the GPU: nine minutes on an H100
    python benchmarks/gpu.py --report OUT                                         # writes docs/results.md, stored JSON
    python benchmarks/gpu.py --device cpu --toy --output OUT                      # every stage at toy size, no GPU

Each stage runs in a process of its own, for its share of the budget; it prints its table as it ends and writes
OUT/gpu_STAGE.json whenever it has measured something, so that a run that is cut keeps what it has. A stage that fails
does not stop the others. Needed are torch, timm, einops, scipy, safetensors, accelerate, numpy, pillow, this checkout.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The package need not be installed; the processes that are started find it too.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from gpu_stages.inputs import fill_in, prepare, print_travelling  # noqa: E402  # without torch

# Shares of the budget. What a stage leaves goes to those after it.
STAGES = {"step": 0.26, "sync": 0.06, "precision": 0.1, "kernels": 0.08, "converge": 0.5}
BUDGET = 500.0  # nine minutes with what the stages overrun
TOY_BUDGET = 170.0
# That a stage is given, whatever those before it have taken; a toy's is not to be cut short by a busy machine.
SHORTEST, SHORTEST_TOY = 20.0, 90.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of results")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages; default: {BUDGET:g}")
    parser.add_argument("--inputs", type=Path, help="folder that --prepare has made; stands for the next three")
    parser.add_argument("--hosts", type=Path, help="folder of checkouts, REPA/ and SiT/")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/* and test/<class>/*, or its tar archive")
    parser.add_argument("--networks", type=Path, help="folder of networks and critics; default: benchmarks/networks")
    parser.add_argument("--groups", nargs="+", default=[], help="titles of the step stage's tables; default: all")
    parser.add_argument("--recipes", nargs="+", default=[], help="of the converge stage; default: all")
    parser.add_argument("--eager", action="store_true", help="converge: without torch.compile")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes that a CPU finishes in seconds, for tests")
    parser.add_argument("--scratch", type=Path, help="folder of unpacked data and states; a later call goes on from it")
    parser.add_argument("--commit", help="of this checkout, where it has no .git")
    parser.add_argument("--prepare", type=Path, metavar="INPUTS", help="make the folder of inputs, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print what would travel to another machine")
    parser.add_argument("--report", nargs="+", type=Path, metavar="OUT", help="write results and docs; the last wins")
    parser.add_argument("--run-stage", choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.prepare:
        fill_in(arguments)
    if not (arguments.prepare or arguments.dry_run or arguments.report) and arguments.output is None:
        parser.error("--output is missing")
    return arguments


def stamp(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    """What every result says of where it comes from."""
    import timm
    import torch

    cuda = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "timm": timm.__version__,
        "commit": arguments.commit or _commit(),
        "command": " ".join(["python", "benchmarks/gpu.py", *_public(sys.argv[1:])]),
        "toy": arguments.toy,
    }


def _public(words: list[str]) -> list[str]:
    """The command line without this machine's paths, as it was given for all stages."""
    words = words[: words.index("--run-stage")] if "--run-stage" in words else words
    return [Path(word).name if Path(word).exists() else shlex.quote(word) for word in words]


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_stage(arguments: argparse.Namespace) -> None:
    """One stage, in this process."""
    import torch
    from gpu_stages.stage import Stage

    device = torch.device(arguments.device)
    stage = Stage(
        name=arguments.run_stage,
        output=arguments.output,
        scratch=arguments.scratch,
        device=device,
        toy=arguments.toy,
        seconds=arguments.budget,
        stamp=stamp(arguments, device),
        hosts=arguments.hosts,
        data=arguments.data,
        networks=arguments.networks,
    )
    stage.keep()
    module = importlib.import_module(f"gpu_stages.{stage.name}")
    extra: dict[str, Any] = {}
    if stage.name == "step":
        extra = {"titles": arguments.groups}
    if stage.name == "converge":
        module.OPTIONS["compiled"] = not arguments.eager
        earlier = arguments.inputs / "gpu_converge.json" if arguments.inputs else None
        extra = {"recipes": arguments.recipes, "earlier": earlier if earlier and earlier.exists() else None}
    text = module.run(stage, **extra)
    stage.keep(finished=True)
    print(f"\n## {stage.name} ({stage.stamp['card']}, {stage.seconds - stage.left:.0f} s)\n\n{text}\n", flush=True)
    sys.exit(1 if stage.record.get("errors") else 0)


def run_stages(arguments: argparse.Namespace) -> int:
    """All stages, each in a process of its own.

    Returns:
        0 if none failed.
    """
    began = time.monotonic()
    budget = arguments.budget or (TOY_BUDGET if arguments.toy else BUDGET)
    failed = []
    for number, name in enumerate(arguments.stages):
        left = budget - (time.monotonic() - began)
        shortest = SHORTEST_TOY if arguments.toy else SHORTEST
        share = max(shortest, left * STAGES[name] / sum(STAGES[later] for later in arguments.stages[number:]))
        words = [*sys.argv[1:], "--run-stage", name, "--budget", f"{share:.0f}", "--scratch", str(arguments.scratch)]
        print(f"== {name}: {share:.0f} s of {left:.0f}", flush=True)
        try:
            # A stage looks at the clock itself; this is for one that hangs.
            code = subprocess.run([sys.executable, __file__, *words], timeout=share + 90).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            failed.append(f"{name} ({code})")
    print(f"== {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def main() -> None:
    arguments = parse_arguments()
    if arguments.prepare or arguments.dry_run:
        if arguments.prepare:
            prepare(arguments.prepare, arguments.data, arguments.hosts)
        print_travelling(ROOT, arguments.prepare or arguments.inputs)
    elif arguments.report:
        from gpu_stages.report import write_report

        write_report(arguments.report, ROOT)
    elif arguments.run_stage:
        run_stage(arguments)
    elif arguments.scratch:
        sys.exit(run_stages(arguments))
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments.scratch = Path(folder)
            sys.exit(run_stages(arguments))


if __name__ == "__main__":
    main()
