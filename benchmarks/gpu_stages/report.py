"""From the JSON files of one or more calls to ``benchmarks/results/gpu_*.json`` and the section of docs/results.md."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_stages import kernels, precision, step, sync
from gpu_stages.stage import markdown
from vrpo_plugin.files import write_file

BENCHMARKS = Path(__file__).resolve().parents[1]

BEGIN, END = "<!-- gpu.py: begin -->", "<!-- gpu.py: end -->"
STAMP = ("card", "torch", "cuda", "timm", "commit", "command", "toy")
# What a later call measures replaces the same part of an earlier one; a stage without parts is replaced whole.
PARTS = {"step": ("groups", "title"), "kernels": ("rows", "variant")}
NAMES = ("step", "sync", "precision", "kernels", "converge")


def write_report(outputs: Sequence[Path], root: Path) -> None:
    """Stores the results and writes the section.

    Args:
        outputs: folders of calls, in order.
        root: of the checkout.
    """
    results = root / "benchmarks" / "results"
    for name in NAMES:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in _files(outputs, name)]
        if any(record["toy"] for record in records):
            sys.exit(f"gpu_{name}.json: expected results; got a toy's, whose numbers mean nothing.")
        if records:
            write_file(results / f"gpu_{name}.json", json.dumps(merge(name, records), indent=1) + "\n")
    page = root / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        sys.exit(f"{page}: expected the lines {BEGIN} and {END}, between which the section goes; got neither.")
    write_file(page, f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}")


def _files(outputs: Sequence[Path], name: str) -> list[Path]:
    """Those that hold more than what a stage writes before it measures."""
    empty = {"stage", "stage_seconds", "skipped", "errors", "finished", *STAMP}
    paths = [folder / f"gpu_{name}.json" for folder in outputs]
    return [path for path in paths if path.exists() and json.loads(path.read_text(encoding="utf-8")).keys() - empty]


def merge(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last record, with the parts of the earlier ones that it has not measured again."""
    records = [_with_stamps(name, record) for record in records]
    merged = dict(records[-1])
    if name in PARTS:
        key, label = PARTS[name]
        parts: dict[str, Any] = {}
        for record in records:
            parts |= {part[label]: part for part in record.get(key, [])}
        merged[key] = list(parts.values())
    if name == "converge":
        merged["recipes"] = {}
        for record in records:
            merged["recipes"] |= record.get("recipes", {})
    return merged


def _with_stamps(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Each part says by itself where it was measured."""
    stamp = {key: record.get(key) for key in STAMP}
    stamp["command"] = str(stamp["command"]).partition(" --run-stage")[0]
    record = {**record, "command": stamp["command"]}
    if name in PARTS:
        key, _ = PARTS[name]
        record[key] = [{**part, "measured": _clean(part.get("measured", stamp))} for part in record.get(key, [])]
    if name == "converge":
        listed = record.get("recipes", {}).items()
        record["recipes"] = {n: {**r, "measured": _clean(r.get("measured", stamp))} for n, r in listed}
    return record


def _clean(stamp: Mapping[str, Any]) -> dict[str, Any]:
    return {**stamp, "command": str(stamp["command"]).partition(" --run-stage")[0]}


def section(results: Path) -> str:
    """Markdown of all that is stored."""
    texts = []
    for name in NAMES:
        path = results / f"gpu_{name}.json"
        if path.exists():
            texts.append(RENDERERS[name](json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(texts)


def _origin(stamp: Mapping[str, Any]) -> str:
    return f"{stamp['card']}, torch {stamp['torch']}, commit {stamp['commit'][:7]}: `{stamp['command']}`"


def _step(record: Mapping[str, Any]) -> str:
    texts = ["### Step time and memory"]
    for group in record["groups"]:
        size = (
            f"batch {group['batch_size']}, {(group['latent'][1] // 2) * (group['latent'][2] // 2)} tokens x "
            f"{group['dim']}, {'bf16' if group['bf16'] else 'fp32'}"
        )
        texts.append(f"{group['title']}, {size} ({_origin(group['measured'])}):")
        texts.append(step.table(group["rows"]))
    return "\n\n".join(texts)


def _sync(record: Mapping[str, Any]) -> str:
    return f"### Waits for the device\n\n{_origin(record)}\n\n{sync.table(record['rows'])}"


def _precision(record: Mapping[str, Any]) -> str:
    return f"### Precision, determinism, resume\n\n{_origin(record)}\n\n{precision.table(record['checks'])}"


def _kernels(record: Mapping[str, Any]) -> str:
    rows = record["rows"]
    where = dict.fromkeys(_origin(row["measured"]) for row in rows)
    size = f"Shapes of {record['model']}, batch {record['batch_size']}, bf16; the longest by name: the stored file."
    return "\n\n".join(["### Kernels of the plugin's share", *where, size, kernels.counts(rows)])


def _converge(record: Mapping[str, Any]) -> str:
    texts = ["### Convergence"]
    for name, result in record["recipes"].items():
        runs = [run for run in result["runs"] if run["points"]]
        judged = max(point["step"] for run in runs for point in run["points"])
        text = f"`{name}`, {result['steps']:,} steps"
        text += f", **judged up to step {judged:,}**" if judged < result["steps"] else ""
        texts += [f"{text} ({_origin(result['measured'])}):", curves(runs)]
    return "\n\n".join(texts)


def curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """FD by step without guidance, and at the end by guidance scale: mean and standard deviation over seeds."""
    judges = list(runs[0]["points"][0]["judges"])
    head = ["step", "guidance", "method", "seeds", *(f"FD {judge}" for judge in judges), "precision", "recall"]
    rows = []
    points = dict.fromkeys((p["guidance"], p["step"]) for run in runs for p in run["points"])
    for guidance, at in sorted(points):
        for method in dict.fromkeys(run["method"] for run in runs):
            own = [
                point["judges"]
                for run in runs
                if run["method"] == method
                for point in run["points"]
                if (point["guidance"], point["step"]) == (guidance, at)
            ]
            if not own:
                continue
            cells = [f"{at:,}", f"{guidance:g}", method, str(len(own))]
            for judge in judges:
                values = [point[judge]["fd"] for point in own]
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}")
            for key in ("precision", "recall"):
                cells.append(f"{statistics.mean(point[judges[0]][key] for point in own):.2f}")
            rows.append(cells)
    return markdown(head, rows)


RENDERERS = {"step": _step, "sync": _sync, "precision": _precision, "kernels": _kernels, "converge": _converge}
