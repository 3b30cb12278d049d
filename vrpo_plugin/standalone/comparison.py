"""Runs side by side: settings that differ, times, and the evaluations that were measured alike."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrpo_plugin.standalone.runs import Evaluation, Run

MISSING = "-"
# Settings that name a run, and change none of its numbers.
NAMES_OF_A_RUN = {"exp_name", "output_dir", "resume", "resume_step"}

Table = tuple[list[str], list[list[Any]]]  # head, rows


@dataclass(frozen=True)
class Group:
    """Evaluations of one protocol.

    Attributes:
        protocol: of the first of them.
        conditions: what of it they share.
        runs: names of the runs that have one.
        values: step and metric, to run name and number; of two evaluations of one step the last.
    """

    protocol: Mapping[str, Any]
    conditions: Mapping[str, Any]
    runs: tuple[str, ...]
    values: Mapping[tuple[int | None, str], Mapping[str, float]]

    def table(self) -> Table:
        """A row per step and metric, a column per run; of two runs their difference too."""
        head = ["step", "metric", *self.runs]
        two = len(self.runs) == 2
        rows = []
        for (step, metric), by_run in self.values.items():
            values = [by_run.get(name) for name in self.runs]
            known = [value for value in values if value is not None]
            difference = [known[1] - known[0] if len(known) == 2 else None] if two else []
            rows.append(["unknown" if step is None else step, metric, *values, *difference])
        return head + ["second - first"] * two, rows


@dataclass(frozen=True)
class Refusal:
    """Two evaluations that are not compared.

    Attributes:
        first, second: names of the runs.
        unlike: field of the protocol, to the value of each.
    """

    first: str
    second: str
    unlike: Mapping[str, tuple[Any, Any]]

    def __str__(self) -> str:
        fields = ", ".join(f"{name} ({a} and {b})" for name, (a, b) in self.unlike.items())
        return f"{self.first} and {self.second}: different {fields}"


@dataclass(frozen=True)
class Comparison:
    """What ``vrpo compare`` shows.

    Attributes:
        runs: names, in order.
        facts: what, to a value per run: steps, seconds, ...
        settings: those that differ, likewise.
        groups: evaluations of protocols that at least two runs share.
        refusals: evaluations that have no like one in another run, against the nearest one there.
        not_evaluated: names of runs without evaluations.
        notes: in words, what was left out.
    """

    runs: tuple[str, ...]
    facts: Mapping[str, list[Any]]
    settings: Mapping[str, list[Any]]
    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    not_evaluated: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nothing_alike(self) -> bool:
        """At least two runs were evaluated, but no two of them alike."""
        return bool(self.refusals) and not self.groups

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; NaN becomes None."""
        groups = [
            {
                "protocol": dict(group.protocol),
                "runs": list(group.runs),
                "rows": [
                    {"step": step, "metric": metric, "values": {k: _finite(v) for k, v in by_run.items()}}
                    for (step, metric), by_run in group.values.items()
                ],
            }
            for group in self.groups
        ]
        refusals = [
            {"runs": [one.first, one.second], "unlike": {k: list(v) for k, v in one.unlike.items()}}
            for one in self.refusals
        ]
        return {
            "runs": list(self.runs),
            "facts": {name: [_finite(v) for v in values] for name, values in self.facts.items()},
            "settings": {name: [_finite(v) for v in values] for name, values in self.settings.items()},
            "evaluations": groups,
            "not_compared": refusals,
            "not_evaluated": list(self.not_evaluated),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """Tables for a terminal or a page."""
        parts = [markdown(["", *self.runs], [[name, *values] for name, values in self.facts.items()])]
        parts.append("## Settings that differ")
        rows = setting_rows(self.settings)
        parts.append(markdown(["setting", *self.runs], rows) if rows else "None.")
        parts.append("## Evaluations")
        for group in self.groups:
            parts += [describe(group.protocol), markdown(*group.table())]
        if not self.groups:
            parts.append("None that at least two runs share.")
        if self.not_evaluated:
            parts.append(f"Not evaluated: {', '.join(self.not_evaluated)}.")
        if self.refusals:
            parts.append("Not compared, as they were measured differently:")
            parts.append("\n".join(f"- {refusal}" for refusal in self.refusals))
        return "\n\n".join(parts)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Puts runs side by side."""
    groups = group_evaluations(runs)
    return Comparison(
        tuple(run.name for run in runs),
        facts(runs),
        unlike_settings(runs),
        tuple(group for group in groups if len(group.runs) > 1),
        tuple(_refusals(runs, groups)),
        tuple(run.name for run in runs if not run.evaluations),
        tuple(note for run in runs for note in run.notes),
    )


def facts(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Steps and times: what, to a value per run; a row that no run has is left out."""
    rows: dict[str, list[Any]] = {
        "steps": [run.metrics.last_step or None for run in runs],
        "seconds a step (median)": [run.seconds_a_step for run in runs],
        "seconds, all steps": [run.seconds for run in runs],
        "steps left out (not finite)": [_total(run, "skipped") for run in runs],
        "rewards lost their weight (vrpo/fallback)": [_last(run, "vrpo/fallback") for run in runs],
        "reward hacking (held_out/alarm)": [_last(run, "held_out/alarm") for run in runs],
    }
    for package in dict.fromkeys(name for run in runs for name in run.versions):
        rows[f"version of {package}"] = [run.versions.get(package) for run in runs]
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def unlike_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs that have settings; MISSING where a run has none of that name."""
    known = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in known for name in run.settings if name not in NAMES_OF_A_RUN)
    unlike = [name for name in names if any(_setting(run, name) != _setting(known[0], name) for run in known)]
    return {name: [_setting(run, name) for run in runs] for name in unlike}


def setting_rows(settings: Mapping[str, list[Any]]) -> list[list[Any]]:
    """Rows of a table; there a setting that is None is told from one that is not there."""
    return [[name, *("None" if value is None else value for value in values)] for name, values in settings.items()]


def group_evaluations(runs: Sequence[Run]) -> list[Group]:
    """Evaluations by protocol, those of one run alone too."""
    by_key: dict[str, list[tuple[str, Evaluation]]] = {}
    for run in runs:
        for one in run.evaluations:
            key = json.dumps(one.conditions, sort_keys=True, default=str)
            by_key.setdefault(key, []).append((run.name, one))
    groups = []
    for members in by_key.values():
        values: dict[tuple[int | None, str], dict[str, float]] = {}
        for name, one in members:
            for metric, value in one.metrics.items():
                values.setdefault((one.step, metric), {})[name] = value
        ordered = dict(sorted(values.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0)))
        first = members[0][1]
        groups.append(Group(first.protocol, first.conditions, tuple(dict.fromkeys(n for n, _ in members)), ordered))
    return groups


def _refusals(runs: Sequence[Run], groups: Sequence[Group]) -> list[Refusal]:
    found: dict[frozenset[tuple[str, str]], Refusal] = {}
    for group in groups:
        for run in runs:
            if run.name in group.runs or not run.evaluations:
                continue
            differences = [_unlike(group.conditions, one.conditions) for one in run.evaluations]
            nearest, unlike = min(zip(run.evaluations, differences, strict=True), key=lambda pair: len(pair[1]))
            pair = frozenset({(group.runs[0], repr(group.conditions)), (run.name, repr(nearest.conditions))})
            found.setdefault(pair, Refusal(group.runs[0], run.name, unlike))
    return list(found.values())


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*a, *b))
    return {n: (a.get(n, MISSING), b.get(n, MISSING)) for n in names if a.get(n, MISSING) != b.get(n, MISSING)}


def describe(protocol: Mapping[str, Any]) -> str:
    """A protocol on one line."""
    return ", ".join(f"{name} {cell(value)}" for name, value in protocol.items())


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose columns are aligned for a terminal."""
    texts = [[cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in texts]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}" if not value.is_integer() or abs(value) >= 1e15 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return str(value)


def _setting(run: Run, name: str) -> Any:
    return run.settings.get(name, MISSING)


def _total(run: Run, name: str) -> float | None:
    return run.metrics.series[name].total if name in run.metrics.series else None


def _last(run: Run, name: str) -> float | None:
    return run.metrics.series[name].last if name in run.metrics.series else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
