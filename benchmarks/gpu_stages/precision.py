"""Does training come out alike in every precision, twice the same, and the same after a resume?

The example is run whole, in processes side by side; an overflow in fp16 is made by a loss scale that is far too large.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from gpu_stages.example import EXAMPLES, example_arguments, example_trainer
from gpu_stages.stage import Stage, markdown
from vrpo_plugin.standalone.checkpoint import load_checkpoint

STEPS, LAST = 100, 20
TOLERANCE = 0.02  # of the mean of the last 20 steps, against float32
LOSSES = ("denoising_loss", "proj_loss", "generation_loss")
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "TF32": {"allow_tf32": True},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "deterministic": {"deterministic": True},
    "deterministic again": {"deterministic": True},
    "deterministic, resumed": {"deterministic": True},
}
NEED_CUDA = ("TF32", "fp16")


def run(stage: Stage) -> str:
    """All runs, then what they say."""
    steps = STEPS if not stage.toy else 12
    skipped = {name: "needs CUDA" for name in NEED_CUDA if not stage.cuda}
    if stage.toy:
        skipped["deterministic again"] = "toy: the resumed run compares in the same way"
    for name, reason in skipped.items():
        stage.skip(name, reason)
    names = [name for name in RUNS if name not in skipped]
    # Data and encoder are made once, before the processes could make them at the same time.
    example_arguments(stage, "none")
    trained: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(len(names) if stage.cuda else 2) as pool:
        futures = {pool.submit(_train, stage, name, steps): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            metrics = stage.attempt(name, future.result)
            if metrics is not None:
                trained[name] = metrics
                print(f"precision: {name} is done, {stage.left:.0f} s left", flush=True)
            stage.keep(steps=steps, tolerance=TOLERANCE, losses={n: _losses(m, steps) for n, m in trained.items()})
    checks = _checks(stage, trained, steps)
    if stage.cuda:
        overflow = stage.attempt("an fp16 overflow", lambda: _overflow(stage))
        checks += [overflow] if overflow else []
    else:
        stage.skip("an fp16 overflow", "needs CUDA")
    stage.keep(checks=checks)
    return table(checks)


def table(checks: Sequence[Mapping[str, Any]]) -> str:
    """One row per check."""
    rows = [[c["check"], c["measured"], "holds" if c["holds"] else "**FAILS**"] for c in checks]
    return markdown(["check", "measured", ""], rows)


def _train(stage: Stage, name: str, steps: int) -> list[dict[str, Any]]:
    folder = name.replace(" ", "-").replace(",", "")
    half = steps // 2
    common = {**RUNS[name], "checkpointing_steps": steps, "reward_release_steps": steps}
    # The first run's fresh folder; a resumption goes on in it.
    words = example_arguments(stage, folder, **common)
    ends = [half, steps] if name.endswith("resumed") else [steps]
    for end in ends:
        command = [sys.executable, str(EXAMPLES / "train_repa_vrpo.py"), *words, "--max-train-steps", str(end)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if stage.cuda else {"ACCELERATE_USE_CPU": "true"})
        result = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise RuntimeError(f"{name}, up to step {end}: {result.stderr[-2000:]}")
    lines = (stage.scratch / "runs" / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _losses(metrics: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """Means of the last steps; NaN where one is not finite."""
    last = metrics[-min(LAST, steps // 2) :]
    return {key: statistics.mean(math.nan if row[key] is None else row[key] for row in last) for key in LOSSES}


def _checks(stage: Stage, trained: Mapping[str, list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    checks = []
    for name in ("TF32", "bf16", "fp16"):
        if name in trained and "fp32" in trained:
            base, own = (_losses(trained[n], steps) for n in ("fp32", name))
            # Of the sum's size: the rewards' loss passes through 0.
            scale = sum(abs(value) for value in base.values())
            apart = {key: (own[key] - base[key]) / scale for key in LOSSES}
            text = ", ".join(f"{key} {value:+.2%}" for key, value in apart.items())
            skipped = sum(row["skipped"] for row in trained[name])
            holds = all(abs(value) <= TOLERANCE for value in apart.values())  # a NaN does not
            text = f"{text} of the losses' sum; {skipped:.0f} steps skipped"
            checks.append({"check": f"{name} against fp32, last steps", "measured": text, "holds": holds})
    for name, other in (("deterministic again", "bits twice"), ("deterministic, resumed", "bits after a resume")):
        if name in trained and "deterministic" in trained:
            first, second = (_without_time(trained[n]) for n in ("deterministic", name))
            unlike = [a["step"] for a, b in zip(first, second, strict=True) if a != b]
            apart = _largest_difference(stage, "deterministic", name, steps)
            text = f"{steps} steps of metrics: {len(unlike)} differ; weights differ by {apart:g}"
            checks.append(
                {"check": f"--deterministic: the same {other}", "measured": text, "holds": not unlike and apart == 0}
            )
    return checks


def _without_time(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics]


def _largest_difference(stage: Stage, first: str, second: str, steps: int) -> float:
    """Between the last checkpoints, over model, EMA and moments."""
    folders = [stage.scratch / "runs" / n.replace(" ", "-").replace(",", "") for n in (first, second)]
    a, b = (load_checkpoint(folder / "checkpoints" / f"{steps:07d}")[0] for folder in folders)
    return max((a[group][key].double() - b[group][key].double()).abs().max().item() for group in a for key in a[group])


def _overflow(stage: Stage) -> dict[str, Any]:
    """Steps under a loss scale of 2^40: left out without a trace, until the scaler has halved it often enough."""
    with example_trainer(stage, "overflow", mixed_precision="fp16", max_train_steps=STEPS) as trainer:
        loader = trainer.batches()
        trainer.advance(loader)
        scaler = trainer.accelerator.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
        kept = [tensor.clone() for tensor in _state(trainer)]
        first = trainer.advance(loader)["skipped"].item()
        same = all(torch.equal(a, b) for a, b in zip(kept, _state(trainer), strict=True))
        skipped = 1
        while skipped < 60 and trainer.advance(loader)["skipped"].item():
            skipped += 1
        moved = any(not torch.equal(a, b) for a, b in zip(kept, _state(trainer), strict=True))
        finite = all(bool(tensor.isfinite().all()) for tensor in _state(trainer))
    changed = "nothing" if same else "something"
    text = (
        f"{skipped} steps skipped, scale 2^40 to 2^{math.log2(scaler.get_scale()):.0f}; {changed} changed in the first"
    )
    holds = first == 1 and same and moved and finite and skipped < 60
    return {"check": "an fp16 overflow is skipped", "measured": text, "holds": holds}


def _state(trainer: Any) -> Any:
    """Weights, EMA and buffers."""
    yield from (p.detach() for p in trainer.model.parameters())
    yield from trainer.ema.parameters()
    yield from trainer.model.buffers()
