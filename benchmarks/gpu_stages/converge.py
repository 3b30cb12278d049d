"""The recipes of ``benchmarks/recipes``, many runs side by side on one card, judged as in ``benchmarks/convergence``.

Unlike there, batches are drawn on the device, matrix products are in TF32 and steps are CUDA graphs, so that numbers
are to be compared within one file. Runs that an earlier call has finished are not trained again; what a call leaves
unfinished goes on, on the same machine, from its last judged step.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convergence.cost import measure_costs
from convergence.parts import ENCODER, Benchmark, Run
from convergence.recipe import JUDGES, Recipe, read_recipe
from convergence.report import alarms, last_point, ratio_lines, summarize, table
from convergence.run import Judge
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_stages.data import unpack
from gpu_stages.graphs import GraphedRun, SharedBatch, advance_together, plain_state
from gpu_stages.stage import Stage
from vrpo_plugin.encoders import Targets
from vrpo_plugin.standalone.sources import all_images

BENCHMARKS = Path(__file__).resolve().parents[1]
Key = tuple[str, int]  # method, seed
EMA_BYTES, EMA_FILES = 15 * 2**20, 5  # what comes back from a lent machine is limited
PROBE_STEPS = 60
CHECK_EVERY = 25  # steps between looks at the clock: each waits for the device


@dataclass(frozen=True)
class Plan:
    """One recipe's turn.

    Attributes:
        recipe: file in ``benchmarks/recipes``.
        networks: folder of its networks.
        fit: choose the number of steps so that the rest of the budget is spent.
    """

    recipe: str
    networks: str
    fit: bool = False


PLANS = (
    Plan("cifar16", "cifar16"),
    Plan("cifar16_floor", "cifar16"),
    Plan("cifar16_long", "cifar16"),
    Plan("cifar32_gpu", "cifar32", fit=True),
)
OPTIONS: dict[str, Any] = {"graph": True, "compiled": True}  # of every run


def run(stage: Stage, recipes: Sequence[str] = (), earlier: Path | None = None) -> str:
    """Trains and judges, recipe after recipe.

    Args:
        stage: see there.
        recipes: names of plans; all by default, on the CPU a toy.
        earlier: ``gpu_converge.json`` of an earlier call.
    """
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    if not stage.cuda:
        stage.skip("CUDA graphs and streams", "need CUDA; the runs take turns")
    results = json.loads(earlier.read_text(encoding="utf-8")).get("recipes", {}) if earlier else {}
    stage.keep(recipes=results)
    tables = []
    for plan in PLANS:
        if plan.recipe not in (recipes or [p.recipe for p in PLANS]):
            continue
        result = stage.attempt(plan.recipe, lambda p=plan: _recipe(stage, p, results))
        if result is None and plan.recipe in stage.record.get("errors", {}) and OPTIONS["compiled"]:
            print(f"{plan.recipe}: again, without torch.compile", flush=True)
            OPTIONS["compiled"] = False
            result = stage.attempt(f"{plan.recipe}, eager", lambda p=plan: _recipe(stage, p, results))
        if result is not None:
            tables.append(f"{plan.recipe}:\n\n{result}")
            print(tables[-1], flush=True)
        if stage.toy:
            break
    return "\n\n".join(tables)


def _recipe(stage: Stage, plan: Plan, results: dict[str, Any]) -> str | None:
    recipe = read_recipe(BENCHMARKS / "recipes" / f"{plan.recipe}.yaml")
    if stage.toy:
        recipe = _toy(recipe)
    benchmark = _benchmark(stage, plan, recipe)
    if benchmark is None:
        return None
    if plan.fit and plan.recipe not in results:
        steps = _fitting(stage, benchmark)
        if steps is None:
            stage.skip(plan.recipe, f"{stage.left:.0f} s left")
            return None
        benchmark = replace(benchmark, recipe=_of_length(recipe, steps))
    elif plan.fit:
        benchmark = replace(benchmark, recipe=_of_length(recipe, results[plan.recipe]["steps"]))
    records = {_key(record): record for record in results.get(plan.recipe, {}).get("runs", [])}
    wanted = [Run(benchmark, method, seed) for seed in recipe.seeds for method in recipe.methods]
    missing = [run for run in wanted if not _is_finished(run, records.get((run.method, run.seed)))]
    judge = Judge(benchmark, stage.device)
    floor = judge.floor()
    costs: dict[str, Any] = results.get(plan.recipe, {}).get("costs", {})
    if set(costs) < set(recipe.methods):
        costs = measure_costs(benchmark, list(recipe.methods), stage.device)

    def keep(round_of_steps: dict[str, float] | None = None) -> None:
        listed = [records[run.method, run.seed] for run in wanted if (run.method, run.seed) in records]
        entry = {"steps": benchmark.recipe.evaluation.steps[-1], "protocol": _protocol(benchmark), "costs": costs}
        entry["floor"] = floor
        entry |= {"runs": listed, "summary": _summary(benchmark.recipe, listed, costs)}
        entry |= {
            "measured": stage.stamp,
            **OPTIONS,
            "round": round_of_steps,
        }
        results[plan.recipe] = entry
        stage.keep(recipes=results)

    for wave in _waves(stage, missing):
        _train_wave(stage, wave, judge, records, keep)
    finished = [record for record in results.get(plan.recipe, {}).get("runs", []) if record["points"]]
    if not finished:
        return None
    return _report(benchmark.recipe, finished, costs, floor)


def _report(
    recipe: Recipe, records: Sequence[Mapping[str, Any]], costs: Mapping[str, Any], floor: Mapping[str, Any] | None
) -> str:
    lines = [table(records, JUDGES, costs, floor), ""]
    lines += [f"ALARM: {alarm}" for alarm in alarms(records)]
    return "\n".join([*lines, ratio_lines(_summary(recipe, records, costs))])


def _summary(recipe: Recipe, records: Sequence[Mapping[str, Any]], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the runs that have come as far as the furthest."""
    judged = [record for record in records if record["points"]]
    ends = {_key(record): last_point(record)["step"] for record in judged}
    complete = [record for record in judged if ends[_key(record)] == max(ends.values())]
    if recipe.baseline not in {record["method"] for record in complete}:
        return {"methods": {}, "baseline": recipe.baseline}
    return summarize(complete, recipe.baseline, recipe.candidate, JUDGES, costs)


def _key(record: Mapping[str, Any]) -> Key:
    return record["method"], record["seed"]


def _is_finished(run: Run, record: Mapping[str, Any] | None) -> bool:
    wanted = set(run.benchmark.recipe.evaluation.points())
    return record is not None and wanted <= {(p["step"], p["guidance"]) for p in record["points"]}


def _benchmark(stage: Stage, plan: Plan, recipe: Recipe) -> Benchmark | None:
    """The recipe with its images as arrays and its networks; None where networks are missing."""
    output = stage.scratch / "converge" / recipe.name
    names = [ENCODER, *JUDGES, *recipe.networks.critics]
    folder = stage.networks / plan.networks if stage.networks else None
    if folder is None or not all((folder / f"{name}.safetensors").exists() for name in names):
        if not stage.toy:
            stage.skip(plan.recipe, f"no {', '.join(names)} in --networks {folder}; make them with --prepare")
            return None
        data = unpack(stage.data, recipe.resolution, stage.scratch / f"toy{recipe.resolution}", limit=512)
        benchmark = Benchmark(recipe, data, output)
        benchmark.train_networks(torch.device("cpu"))
        return benchmark
    # Those of an earlier call on this machine may be of another training.
    shutil.copytree(folder, output / "networks", dirs_exist_ok=True)
    limit = 512 if stage.toy else None
    return Benchmark(
        recipe, unpack(stage.data, recipe.resolution, stage.scratch / f"all{recipe.resolution}", limit=limit), output
    )


def _protocol(benchmark: Benchmark) -> dict[str, Any]:
    names = [ENCODER, *JUDGES]
    return {
        "recipe": benchmark.recipe.to_dict(),
        "data": benchmark.source().fingerprint(),
        "networks": {n: {"name": benchmark.network(n).name, "accuracy": benchmark.network(n).accuracy} for n in names},
        "labels": "balanced",
        "batches": "drawn on the device, alike for all methods of a seed",
        "arithmetic": "TF32 matrix products, or what the recipe's mixed_precision says",
    }


def _toy(recipe: Recipe) -> Recipe:
    """Seconds on a CPU."""
    evaluation = replace(
        recipe.evaluation, steps=(3, 6), samples=50, reference=200, solver_steps=2, guidance=(1.5,), held_out=32
    )
    networks = replace(
        recipe.networks,
        encoder={"width": 8, "steps": 5},
        judges={"width": 8, "steps": 5},
        images=200,
        critics={"critic": {"critic_width": 56, "steps": 3, "batch_size": 8}},
    )
    training = {**recipe.training, "batch_size": 8}
    return replace(recipe, name="toy", evaluation=evaluation, networks=networks, training=training, seeds=(0,))


def _of_length(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with its last step moved, and the judged ones with it."""
    last = recipe.evaluation.steps[-1]
    judged = tuple(steps * step // last for step in recipe.evaluation.steps)
    return replace(recipe, evaluation=replace(recipe.evaluation, steps=judged))


def _fitting(stage: Stage, benchmark: Benchmark) -> int | None:
    """As many steps as the rest of the budget allows, measured on the first steps of all runs side by side."""
    recipe = benchmark.recipe
    runs = [Run(benchmark, method, seed) for seed in recipe.seeds for method in recipe.methods]
    batches, graphed = _build(stage, runs)
    for step in range(2 * PROBE_STEPS):
        if step == PROBE_STEPS:
            _synchronize(stage)
            started = time.monotonic()
        advance_together(batches, list(graphed.values()), step)
    _synchronize(stage)
    rate = (time.monotonic() - started) / PROBE_STEPS
    # A sixth for building, and for judging.
    steps = int((stage.left - 20) * 5 / 6 / rate) // 500 * 500
    return steps if steps >= 500 else None


def _waves(stage: Stage, runs: Sequence[Run]) -> Iterator[list[Run]]:
    """As many runs side by side as the memory holds, by what one takes when it steps alone."""
    if not runs:
        return
    if not stage.cuda:
        yield list(runs)
        return
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    batches, graphed = _build(stage, runs[:1])
    for step in range(6):
        advance_together(batches, list(graphed.values()), step)
    torch.cuda.synchronize()
    one = max(before - torch.cuda.mem_get_info()[0], 2**20)
    del batches, graphed
    torch.cuda.empty_cache()
    side_by_side = max(1, int(0.8 * before / one))
    stage.keep(memory={"one_run_bytes": one, "free_bytes": before, "total_bytes": total, "side_by_side": side_by_side})
    waves = -(-len(runs) // side_by_side)
    for number in range(waves):
        yield list(runs[number * len(runs) // waves : (number + 1) * len(runs) // waves])


def _build(stage: Stage, runs: Sequence[Run]) -> tuple[list[SharedBatch], dict[Key, GraphedRun]]:
    """All runs of a wave, with one batch per seed."""
    benchmark = runs[0].benchmark
    source = benchmark.source()
    images, labels = (tensor.to(stage.device) for tensor in all_images(source))
    encoder = benchmark.network(ENCODER).to(stage.device)
    targets = Targets((encoder.token_dim,), encoder.grid, lambda pixels: (encoder.tokens(pixels),))
    batches: dict[int, SharedBatch] = {}
    graphed = {}
    for run in runs:
        options, config = run.options()
        if run.seed not in batches:
            batches[run.seed] = SharedBatch(images, labels, options, run.seed, targets.encode)
        aligned = config.features == "policy" or config.reward_coeff > 0
        graphed[run.method, run.seed] = GraphedRun(
            options, config, source, targets if aligned else None, batches[run.seed], **OPTIONS
        )
    _synchronize(stage)
    return list(batches.values()), graphed


def _train_wave(stage: Stage, runs: Sequence[Run], judge: Judge, records: dict[Key, Any], keep: Any) -> None:
    """Trains the runs together, from judged step to judged step, as far as the time lasts."""
    batches, graphed = _build(stage, runs)
    evaluation = runs[0].benchmark.recipe.evaluation
    folder = runs[0].benchmark.output / f"states-{evaluation.steps[-1]}"
    start = _restore(folder, graphed, records)
    if start:
        keep()
    else:
        for key in graphed:
            records.pop(key, None)  # of a training that was cut on another machine
    judging = 0.0
    for first, last in itertools.pairwise([start, *(step for step in evaluation.steps if step > start)]):
        _synchronize(stage)
        started = time.monotonic()
        launching = 0.0
        for step in range(first, last):
            began = time.monotonic()
            advance_together(batches, list(graphed.values()), step)
            launching += time.monotonic() - began
            if (step - first) % CHECK_EVERY == 0:
                _synchronize(stage)
                if stage.left < 5 + 1.2 * judging:
                    stage.skip(f"{runs[0].benchmark.recipe.name} beyond step {first}", "the time is spent")
                    return
        _synchronize(stage)
        seconds = (time.monotonic() - started) / (last - first)
        host = launching / (last - first)
        print(
            f"step {last}: {seconds * 1e3:.2f} ms a step of {len(runs)} runs ({host * 1e3:.2f} ms launching)",
            flush=True,
        )
        started = time.monotonic()
        for run in runs:
            own = graphed[run.method, run.seed]
            own.check()
            record = records.setdefault(
                (run.method, run.seed), {"method": run.method, "seed": run.seed, "judging": run.judging(), "points": []}
            )
            ema, state = plain_state(own.ema), plain_state(own.model)
            done = {(point["step"], point["guidance"]) for point in record["points"]}
            for step, guidance in evaluation.points():
                if step == last and (step, guidance) not in done:
                    record["points"].append(judge.judge(run, step, guidance, ema, state))
            record["skipped_steps"] = int(own.skipped)
        judging = time.monotonic() - started
        keep({"runs": len(runs), "seconds": seconds, "launching_seconds": host})
        _save(folder, graphed, records, last)
    _export(stage, runs, graphed)


def _save(folder: Path, graphed: Mapping[Key, GraphedRun], records: Mapping[Key, Any], step: int) -> None:
    """All that a call on the same machine needs to go on: weights and moments, and what was judged so far."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, run in graphed.items():
        tensors = {
            f"{part}|{k}": v.contiguous().clone() for part, state in run.state().items() for k, v in state.items()
        }
        metadata = {"step": str(step), "record": json.dumps(records[key])}
        save_file(tensors, _state_file(folder, key).with_suffix(".tmp"), metadata=metadata)
    for key in graphed:
        _state_file(folder, key).with_suffix(".tmp").replace(_state_file(folder, key))


def _restore(folder: Path, graphed: Mapping[Key, GraphedRun], records: dict[Key, Any]) -> int:
    """Goes on from the states of an earlier call, if all runs have one of the same step and settings."""
    found = {}
    for key in graphed:
        if not _state_file(folder, key).exists():
            return 0
        with safe_open(_state_file(folder, key), "pt") as opened:
            found[key] = opened.metadata()
    steps = {int(metadata["step"]) for metadata in found.values()}
    if len(steps) != 1:
        return 0
    step = steps.pop()
    for key, run in graphed.items():
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(_state_file(folder, key)).items():
            part, _, rest = name.partition("|")
            parts.setdefault(part, {})[rest] = value
        run.restore(parts, step)
        records[key] = json.loads(found[key]["record"])
    return step


def _state_file(folder: Path, key: Key) -> Path:
    return folder / f"{key[0]}-seed{key[1]}.safetensors"


def _export(stage: Stage, runs: Sequence[Run], graphed: Mapping[Key, GraphedRun]) -> None:
    """EMA and projectors of finished runs, in half precision, in files small enough to come back."""
    name = runs[0].benchmark.recipe.name
    files: list[dict[str, Tensor]] = [{}]
    left_out = []
    for run in runs:
        own = graphed[run.method, run.seed]
        weights = {
            **plain_state(own.ema),
            **{k: v for k, v in plain_state(own.model).items() if k.startswith("vrpo.projectors")},
        }
        tensors = {f"{run.method}-seed{run.seed}/{k}": v.half().cpu().contiguous() for k, v in weights.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size + sum(tensor.nbytes for tensor in files[-1].values()) > EMA_BYTES and files[-1]:
            files.append({})
        if size > EMA_BYTES or len(files) > EMA_FILES:
            left_out.append(f"{run.method}-seed{run.seed}")
        else:
            files[-1] |= tensors
    for number, tensors in enumerate(files[:EMA_FILES]):
        if tensors:
            save_file(tensors, stage.output / f"ema_{name}_{number}.safetensors")
    if left_out:
        stage.skip(f"EMA of {name}", f"{', '.join(left_out)} over the size that comes back")


def _synchronize(stage: Stage) -> None:
    if stage.cuda:
        torch.cuda.synchronize()
