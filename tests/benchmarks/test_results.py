"""What README and docs/results.md say of the stored results is what these hold."""

import json
import statistics
from pathlib import Path
from typing import Any

import guide
import pytest
from convergence.recipe import JUDGES, read_recipe
from convergence.report import best_point, last_point, ratio_lines, summarize, table

REPO = Path(__file__).resolve().parents[2]

STORED = sorted((REPO / "benchmarks" / "results").glob("*.json"))
RESULTS = {path.stem: path for path in STORED if not path.stem.startswith("gpu_")}


def stored(name: str) -> dict[str, Any]:
    return json.loads(RESULTS[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_shows_the_stored_table_and_ratios(name: str) -> None:
    result = stored(name)
    recipe, runs, costs = result["protocol"]["recipe"], result["runs"], result["costs"]
    judges = (*JUDGES, *recipe["networks"].get("pretrained", ()))
    summary = summarize(runs, recipe["baseline"], recipe["candidate"], judges, costs)
    assert json.loads(json.dumps(summary)) == result["summary"]
    page = (REPO / "docs" / "results.md").read_text(encoding="utf-8")
    assert table(runs, judges, costs) in page
    lines = ratio_lines(summary).splitlines()
    chosen = [line for line in lines if line.startswith(f"{recipe['candidate']} against")]
    assert len(chosen) == len(judges) + 1 and "\n".join(chosen) in page


@pytest.mark.parametrize("name", RESULTS)
def test_stored_results_are_of_the_shipped_recipe_and_name_no_path(name: str) -> None:
    shipped = read_recipe(REPO / "benchmarks" / "recipes" / f"{name}.yaml").to_dict()
    recipe = stored(name)["protocol"]["recipe"]
    measured = {run["method"] for run in stored(name)["runs"]}
    for key in ("resolution", "training", "networks", "evaluation", "baseline", "candidate"):
        assert recipe[key] == json.loads(json.dumps(shipped[key])), key
    assert {m: recipe["methods"][m] for m in measured} == {m: shipped["methods"][m] for m in measured}
    text = RESULTS[name].read_text(encoding="utf-8")
    assert "/tmp" not in text and "/home" not in text and "/root" not in text


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main_runs() -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Of the main comparison, by method; and its summary."""
    path = REPO / "benchmarks" / "results" / "gpu_converge.json"
    result = json.loads(path.read_text(encoding="utf-8"))["recipes"]["cifar16_floor"]
    methods = dict.fromkeys(run["method"] for run in result["runs"])
    return {m: [run for run in result["runs"] if run["method"] == m] for m in methods}, result["summary"]


def test_the_main_table_of_the_readme_is_the_stored_one() -> None:
    runs, summary = main_runs()
    compared = [runs["repa"], runs["vrpo"]]
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for judge in JUDGES:
        for point_of in (lambda run: last_point(run), lambda run, judge=judge: best_point(run, judge)):
            cells = [spread([point_of(run)["judges"][judge]["fd"] for run in own]) for own in compared]
            assert f"| {' | '.join(cells)} |" in readme
    for name in ("precision", "recall"):
        means = [statistics.mean(last_point(run)["judges"]["classes"][name] for run in own) for own in compared]
        assert f"| {name} | {means[0]:.2f} | {means[1]:.2f} |" in readme
    of_classes = summary["methods"]["vrpo"]["classes"]
    assert "61% below" in readme and round(1 - of_classes["fd_ratio"]["mean"], 2) == 0.61
    assert "a quarter of the steps, and a third of the compute" in readme
    assert all(summary["methods"]["vrpo"][j]["steps_ratio"]["mean"] >= 4 for j in JUDGES)
    assert all(summary["methods"]["vrpo"][j]["compute_ratio"]["mean"] >= 3 for j in JUDGES)


def test_the_main_table_of_the_page_is_the_stored_one() -> None:
    runs, summary = main_runs()
    page = (REPO / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    for own in runs.values():
        ends = [last_point(run) for run in own]
        cells = [spread([end["judges"][judge]["fd"] for end in ends]) for judge in JUDGES]
        cells += [f"{statistics.mean(e['judges']['classes'][n] for e in ends):.3f}" for n in ("precision", "recall")]
        cells.append(f"{statistics.mean(end['denoising_loss'] for end in ends):.4f}")
        assert f"| {' | '.join(cells)} |" in page
    lines = [line for line in ratio_lines(summary).splitlines() if line.startswith("vrpo against repa,")]
    assert len(lines) == len(JUDGES) and "\n".join(lines) in page


@pytest.mark.parametrize("name", ["cifar16", "digits"])
def test_the_guides_table_is_the_stored_one(name: str) -> None:
    stored = json.loads((REPO / "benchmarks" / "results" / "guide" / f"{name}.json").read_text(encoding="utf-8"))
    page = (REPO / "docs" / "guide.md").read_text(encoding="utf-8")
    assert guide.table(stored["points"]) in page and f"{stored['protocol']['samples']} images" in page
