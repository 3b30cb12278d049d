"""Ratios, table and plots of a convergence benchmark, from its records alone."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vrpo_plugin.files import write_file

Record = Mapping[str, Any]

ALARM = 0.01  # a cosine; runs of one method differ by a third of it between seeds


def curve(run: Record, judge: str) -> list[tuple[int, float]]:
    """(step, distance) of a run without guidance, by step."""
    points = [p for p in run["points"] if p["guidance"] == 1]
    return sorted((p["step"], p["judges"][judge]["fd"]) for p in points)


def last_point(run: Record) -> Record:
    """The end of a run, without guidance."""
    return max((p for p in run["points"] if p["guidance"] == 1), key=lambda p: p["step"])


def best_point(run: Record, judge: str) -> Record:
    """The end of a run at the guidance that serves it best in this judge."""
    end = last_point(run)["step"]
    return min((p for p in run["points"] if p["step"] == end), key=lambda p: p["judges"][judge]["fd"])


def is_guided(runs: Iterable[Record]) -> bool:
    """Whether any of the runs was judged with guidance."""
    return any(point["guidance"] != 1 for run in runs for point in run["points"])


def steps_to(points: Sequence[tuple[int, float]], distance: float) -> float | None:
    """Steps until a curve is at a distance for the first time, linear in log distance between its points.

    None where it never is; the first point's step where it is there from the start.
    """
    if points[0][1] <= distance:
        return float(points[0][0])
    for (step, before), (next_step, after) in itertools.pairwise(points):
        if after <= distance:
            share = math.log(before / distance) / math.log(before / after)
            return step + share * (next_step - step)
    return None


def distance_at(points: Sequence[tuple[int, float]], step: float) -> float | None:
    """Distance of a curve at a step between its points, linear in log distance; None outside of them."""
    for (before_step, before), (after_step, after) in itertools.pairwise(points):
        if before_step <= step <= after_step:
            share = (step - before_step) / (after_step - before_step)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return None


def spread_of(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; ``mean`` is None where a value is missing."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    complete = bool(known) and len(known) == len(listed)
    return {
        "mean": statistics.mean(known) if complete else None,
        "spread": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": listed,
    }


def compare_runs(runs: Sequence[Record], method: str, baseline: str, judge: str, costs: Mapping[str, Any]) -> Record:
    """Ratios of a method to the baseline in one judge, over the seeds that both have.

    Returns:
        ``steps_ratio`` and ``compute_ratio``, the baseline's cost to its own final distance over the method's cost to
        the same distance (above 1 is a win; in compute with the training of a critic beforehand); ``fd_ratio``,
        ``fd_ratio_best_guidance`` and ``fd_ratio_equal_compute``, the method's distance over the baseline's (below 1
        is a win); ``fd_difference``, paired. A value is None where the method never gets there, its curve does
        not reach so far, or a single point is no curve and no guidance was tried.
    """
    of_method, of_baseline = _by_seed(runs, method), _by_seed(runs, baseline)
    price, before = costs[method]["mmacs"] / costs[baseline]["mmacs"], costs[method]["critic_steps"]
    rows: dict[str, list[float | None]] = {
        name: []
        for name in (
            "steps_ratio",
            "compute_ratio",
            "fd_ratio",
            "fd_ratio_best_guidance",
            "fd_ratio_equal_compute",
            "fd_difference",
        )
    }
    for seed in sorted(of_method.keys() & of_baseline.keys()):
        ours, theirs = of_method[seed], of_baseline[seed]
        points = curve(ours, judge)
        end, final = curve(theirs, judge)[-1]
        reached, last = steps_to(points, final) if len(points) > 1 else None, points[-1][1]
        affordable = distance_at(points, end / price - before)
        rows["steps_ratio"].append(None if reached is None else end / reached)
        rows["compute_ratio"].append(None if reached is None else end / ((reached + before) * price))
        rows["fd_ratio"].append(last / final)
        best = best_point(ours, judge)["judges"][judge]["fd"] / best_point(theirs, judge)["judges"][judge]["fd"]
        rows["fd_ratio_best_guidance"].append(best if is_guided([ours, theirs]) else None)
        rows["fd_ratio_equal_compute"].append(None if affordable is None else affordable / final)
        rows["fd_difference"].append(last - final)
    return {name: spread_of(values) for name, values in rows.items()}


def summarize(
    runs: Sequence[Record], baseline: str, candidate: str, judges: Sequence[str], costs: Mapping[str, Any]
) -> dict[str, Any]:
    """The candidate's ratios in the first judge, and those of every method in every judge under ``methods``."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    compared = {
        method: {judge: compare_runs(runs, method, baseline, judge, costs) for judge in judges} for method in methods
    }
    chosen = compared[candidate][judges[0]] if candidate in compared else {}
    return {**chosen, "baseline": baseline, "candidate": candidate, "judge": judges[0], "methods": compared}


def table(
    runs: Sequence[Record], judges: Sequence[str], costs: Mapping[str, Any], floor: Mapping[str, Any] | None = None
) -> str:
    """Markdown: one row per method, means over its seeds, distances with their standard deviation.

    ``floor``: what real images get that are not of the reference, in each judge; the last row.
    """
    head = ["method", "seeds", "MMAC", "critic", "its training", *(f"FD {judge}" for judge in judges)]
    guided = is_guided(runs)
    head += [f"best guidance, {judge}" for judge in judges if guided]
    head += ["precision", "recall", *(["precision, guided", "recall, guided"] if guided else []), "validation loss"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        ends = [last_point(run) for run in own]
        cells = [method, str(len(own)), f"{costs[method]['mmacs']:.0f}", f"{costs[method]['critic_share']:.1%}"]
        cells.append(f"{costs[method]['critic_steps']:.0f}")
        cells += [_plus_minus(end["judges"][judge]["fd"] for end in ends) for judge in judges]
        for judge in judges if guided else ():
            best = [best_point(run, judge) for run in own]
            scales = sorted({point["guidance"] for point in best})
            distances = _plus_minus(point["judges"][judge]["fd"] for point in best)
            cells.append(f"{distances} ({', '.join(f'{scale:g}' for scale in scales)})")
        for points in (ends, [best_point(run, judges[0]) for run in own])[: 1 + guided]:
            for name in ("precision", "recall"):
                cells.append(f"{statistics.mean(point['judges'][judges[0]][name] for point in points):.3f}")
        cells.append(f"{statistics.mean(end['denoising_loss'] for end in ends):.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    if floor:
        cells = ["real images, held out", *[""] * 4, *(f"{floor[judge]['fd']:.2f}" for judge in judges)]
        cells += [""] * (len(judges) if guided else 0)
        cells += [f"{floor[judges[0]][name]:.3f}" for name in ("precision", "recall")]
        lines.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join(lines)


def ratio_lines(summary: Mapping[str, Any]) -> str:
    """The ratios of every method, judge by judge, and last those of the candidate in the first judge."""
    compared = [ratios for by_judge in summary["methods"].values() for ratios in by_judge.values()]
    names = [name for name in compared[0] if any(ratios[name]["mean"] is not None for ratios in compared)]
    lines = []
    for method, by_judge in summary["methods"].items():
        if method == summary["baseline"]:
            continue
        for judge, ratios in by_judge.items():
            shown = ", ".join(f"{name} {_spread_text(ratios[name])}" for name in names)
            lines.append(f"{method} against {summary['baseline']}, {judge}: {shown}")
    chosen = [f"{name} {_spread_text(summary[name])}" for name in names if name in summary]
    if chosen:
        lines.append(f"{summary['candidate']} against {summary['baseline']} ({summary['judge']}): {', '.join(chosen)}")
    return "\n".join(lines)


def alarms(runs: Sequence[Record]) -> list[str]:
    """Reward hacking: the trained reward has risen since the first point, and the encoder's own view has fallen.

    The encoder sees the pixels of the same estimates that the critic scores; the judges see them too.
    """
    found = []
    for run in runs:
        points = sorted((p for p in run["points"] if "trained_reward" in p), key=lambda p: p["step"])
        if len(points) < 2:
            continue
        first, last = points[0], points[-1]
        trained = last["trained_reward"] - first["trained_reward"]
        views = {"the encoder": last["encoder_reward"] - first["encoder_reward"]}
        views |= {
            f"judge {name}": value - first["held_out_reward"][name] for name, value in last["held_out_reward"].items()
        }
        for name, change in views.items():
            if trained > 0 and change < -ALARM:
                where = f"{run['method']} seed {run['seed']}"
                found.append(f"{where}: the trained reward rose by {trained:.3f}, {name} fell by {-change:.3f}")
    return found


def plot(runs: Sequence[Record], judges: Sequence[str], costs: Mapping[str, Any], path: Path) -> None:
    """Distance against steps and against compute, per judge; the band is the spread over seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(judges), figsize=(4.4 * len(judges), 6.6), squeeze=False)
    for column, judge in enumerate(judges):
        for row, unit in enumerate(("steps", "TMAC per sample")):
            axis = axes[row][column]
            for method in dict.fromkeys(run["method"] for run in runs):
                curves = [curve(run, judge) for run in runs if run["method"] == method]
                steps = [step for step, _ in curves[0]]
                scale, before = (1, 0) if row == 0 else (costs[method]["mmacs"] / 1e6, costs[method]["critic_steps"])
                by_step = [[dict(points)[step] for points in curves if step in dict(points)] for step in steps]
                mean = [statistics.mean(values) for values in by_step]
                spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_step]
                x = [(step + before) * scale for step in steps]
                (line,) = axis.plot(x, mean, marker="o", markersize=3, label=method)
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axis.set(yscale="log", xlabel=unit, ylabel="Frechet distance", title=f"judge: {judge}")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    write_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def _by_seed(runs: Sequence[Record], method: str) -> dict[int, Record]:
    return {run["seed"]: run for run in runs if run["method"] == method}


def _plus_minus(values: Iterable[float]) -> str:
    listed = list(values)
    spread = f" ± {statistics.stdev(listed):.2f}" if len(listed) > 1 else ""
    return f"{statistics.mean(listed):.2f}{spread}"


def _spread_text(ratio: Mapping[str, Any]) -> str:
    if ratio["mean"] is None:
        return "not reached"
    return f"{ratio['mean']:.2f}" + (f" ± {ratio['spread']:.2f}" if ratio["spread"] is not None else "")
