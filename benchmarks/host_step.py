"""Step time and peak memory of REPA's own training step, patched against unpatched, on the CPU.

    python benchmarks/host_step.py --repa REPA     # REPA: a checkout; by default SiT-S/2's sizes
    python benchmarks/host_step.py --repa REPA --encoder --variants "VRPO, targets=critic" "VRPO, frozen critic"

One group of ``benchmarks/gpu.py``'s step stage, which measures the same on a GPU: see there for what a step is.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from gpu_stages.stage import Stage
from gpu_stages.step import WITH_ENCODER, Group, describe, measure, table
from gpu_stages.trainers import Size

from vrpo_plugin.standalone.sit import SIT_MODELS

NAMES = ("REPA", "VRPO, online critic", "VRPO, frozen critic", "VRPO, targets=critic", "VRPO, features only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repa", type=Path, required=True, help="a checkout of sihyun-yu/REPA")
    parser.add_argument("--model", choices=list(SIT_MODELS), default="SiT-S/2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--variants", nargs="+", choices=NAMES[1:], default=NAMES[1:], help="what is compared with REPA"
    )
    parser.add_argument(
        "--encoder", action="store_true", help="also time REPA and the frozen critic with DINOv2-B's sizes in the step"
    )
    options = parser.parse_args()
    size = Size(options.model, options.batch_size, bf16=options.precision == "bf16")
    names = ("REPA", *options.variants)
    encoded = tuple(name for name in names if options.encoder and name in WITH_ENCODER)
    group = Group(options.model, size, names, encoded)
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cpu")
        stage = Stage("host_step", Path(folder), Path(folder), device, toy=False, seconds=math.inf, stamp={})
        rows = measure(group, options.repa.resolve(), stage)
    print(f"{describe(group)}; torch {torch.__version__}, CPU, {torch.get_num_threads()} threads\n\n{table(rows)}")


if __name__ == "__main__":
    main()
