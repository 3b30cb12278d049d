"""Runs the default example with each method and seed, and prints the table of docs/results.md.

``python benchmarks/digits.py --output-dir exps/digits``: runs that are there already are only read, so it can be
interrupted. One run takes 3 to 4 minutes on one CPU core.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from vrpo_plugin.standalone.evaluate import EvalResult, compare

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_repa_vrpo.py"


def result_of(folder: Path, method: str, seed: int) -> EvalResult:
    """Reads a run's result, or makes the run first."""
    run = folder / f"digits-{method}-seed{seed}"
    if not (run / "evaluation.json").exists():
        options = ["--method", method, "--seed", str(seed), "--output-dir", str(folder), "--resume"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(SCRIPT)]
        subprocess.run([*launch, *options], check=True)
    return EvalResult.from_json((run / "evaluation.json").read_text(encoding="utf-8"))


def denoising_loss(folder: Path, method: str, seed: int) -> float:
    """Mean of the last 100 training steps."""
    lines = (folder / f"digits-{method}-seed{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.mean(json.loads(line)["denoising_loss"] for line in lines[-100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("exps/digits"))
    parser.add_argument("--methods", nargs="+", default=["none", "repa", "vrpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    results = {m: [result_of(arguments.output_dir, m, s) for s in arguments.seeds] for m in arguments.methods}
    first = results[arguments.methods[0]][0]
    for row in results.values():
        for result in row:
            compare(first, result)  # refuses unlike protocols
    print(f"{first.protocol.name}, network {first.protocol.feature_network}")
    print("| method | Frechet distance by seed | mean | standard deviation | precision | recall | denoising loss |")
    print("|---|---|---|---|---|---|---|")
    for method, row in results.items():
        distances = [result.frechet_distance for result in row]
        spread = f"{statistics.stdev(distances):.3f}" if len(row) > 1 else "-"
        precision, recall = (statistics.mean(getattr(r, k) for r in row) for k in ("precision", "recall"))
        by_seed = ", ".join(f"{d:.3f}" for d in distances)
        mean = statistics.mean(distances)
        loss = statistics.mean(denoising_loss(arguments.output_dir, method, seed) for seed in arguments.seeds)
        print(f"| {method} | {by_seed} | {mean:.3f} | {spread} | {precision:.3f} | {recall:.3f} | {loss:.4f} |")


if __name__ == "__main__":
    main()
