"""What README and docs/results.md say of the stored results is what these hold."""

import json
import statistics
from pathlib import Path
from typing import Any

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
    summary = summarize(runs, recipe["baseline"], recipe["candidate"], JUDGES, costs)
    assert json.loads(json.dumps(summary)) == result["summary"]
    page = (REPO / "docs" / "results.md").read_text(encoding="utf-8")
    assert table(runs, JUDGES, costs) in page
    lines = ratio_lines(summary).splitlines()
    chosen = [line for line in lines if line.startswith(f"{recipe['candidate']} against")]
    assert len(chosen) == len(JUDGES) + 1 and "\n".join(chosen) in page


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


def test_the_main_table_of_the_readme_is_the_stored_one() -> None:
    runs = stored("cifar16")["runs"]
    by_method = {method: [run for run in runs if run["method"] == method] for method in ("repa", "vrpo")}
    assert {len(own) for own in by_method.values()} == {3}
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for judge in JUDGES:
        for point_of in (lambda run: last_point(run), lambda run, judge=judge: best_point(run, judge)):
            cells = []
            for own in by_method.values():
                values = [point_of(run)["judges"][judge]["fd"] for run in own]
                cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
            assert f"| {' | '.join(cells)} |" in readme
    for name in ("precision", "recall"):
        means = [statistics.mean(last_point(r)["judges"]["classes"][name] for r in own) for own in by_method.values()]
        assert f"| {name} | {means[0]:.2f} | {means[1]:.2f} |" in readme
    for name in ("steps_ratio", "compute_ratio"):
        ratio = stored("cifar16")["summary"][name]
        assert f"{ratio['mean']:.2f} ± {ratio['spread']:.2f}" in readme
