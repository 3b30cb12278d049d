"""Ratios, table and alarms from a small stored result."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from convergence.report import (
    alarms,
    best_point,
    compare_runs,
    distance_at,
    plot,
    ratio_lines,
    steps_to,
    summarize,
    table,
)

STORED = json.loads((Path(__file__).parent / "convergence_small.json").read_text(encoding="utf-8"))
RUNS, COSTS = STORED["runs"], STORED["costs"]
JUDGES = ("classes", "rotation")


def test_the_floor_is_the_last_row() -> None:
    floor = {judge: {"fd": 0.04, "precision": 0.9, "recall": 0.8} for judge in JUDGES}
    plain, lines = table(RUNS, JUDGES, COSTS).splitlines(), table(RUNS, JUDGES, COSTS, floor).splitlines()
    assert lines[:-1] == plain and {line.count("|") for line in lines} == {plain[0].count("|")}
    cells = dict(zip(lines[0].split(" | "), lines[-1].split(" | "), strict=True))
    assert cells["FD classes"] == cells["FD rotation"] == "0.04"
    assert (cells["precision"], cells["recall"]) == ("0.900", "0.800") and "real images" in lines[-1]


def test_steps_to_a_distance() -> None:
    points = [(100, 16.0), (200, 4.0), (300, 1.0)]
    assert steps_to(points, 20.0) == 100
    assert steps_to(points, 8.0) == pytest.approx(150)  # half way from 16 to 4 in log distance
    assert steps_to(points, 1.0) == pytest.approx(300)
    assert steps_to(points, 0.9) is None
    assert steps_to([(1, 4.0), (2, 5.0), (3, 2.0)], 4.0) == 1
    assert distance_at(points, 150) == pytest.approx(8.0)
    assert distance_at(points, 300) == pytest.approx(1.0)
    assert distance_at(points, 301) is None and distance_at(points, 99) is None


def test_ratios_of_the_stored_runs() -> None:
    # VRPO passes 4.0, the baseline's end at step 400, half way from 8 (100) to 2 (200): at step 150.
    ratios = compare_runs(RUNS, "vrpo", "repa", "classes", COSTS)
    assert ratios["steps_ratio"]["values"] == pytest.approx([400 / 150, 400 / 200])
    # A step costs 1.25 of the baseline's, and the critic's own training cost ten steps.
    assert ratios["compute_ratio"]["values"] == pytest.approx([400 / 160 / 1.25, 400 / 210 / 1.25])
    assert ratios["fd_ratio"]["values"] == pytest.approx([1 / 4, 2 / 4])
    assert ratios["fd_ratio"]["mean"] == pytest.approx(0.375)
    assert ratios["fd_ratio"]["spread"] == pytest.approx(0.25 / math.sqrt(2))
    assert ratios["fd_difference"]["values"] == pytest.approx([-3, -2])
    # At equal compute VRPO has made 310 steps: 0.55 of the way from 200 to 400.
    assert ratios["fd_ratio_equal_compute"]["values"] == pytest.approx([2**0.45 / 4, 4**0.45 * 2**0.55 / 4])
    # The baseline's best is at guidance 2 (3.0), VRPO's without (1.0) and at guidance 2 (1.5).
    assert ratios["fd_ratio_best_guidance"]["values"] == pytest.approx([1 / 3, 1.5 / 3])


def test_a_distance_that_is_never_reached_is_no_number() -> None:
    ratios = compare_runs(RUNS, "none", "repa", "classes", COSTS)
    assert ratios["steps_ratio"] == {"mean": None, "spread": None, "values": [None]}
    assert "not reached" in ratio_lines(summarize(RUNS, "repa", "vrpo", JUDGES, COSTS))


def test_summary_is_the_candidates_and_comes_last() -> None:
    summary = summarize(RUNS, "repa", "vrpo", JUDGES, COSTS)
    assert summary["steps_ratio"] == summary["methods"]["vrpo"]["classes"]["steps_ratio"]
    last = ratio_lines(summary).splitlines()[-1]
    assert last.startswith(
        "vrpo against repa (classes): steps_ratio 2.33 ± 0.47, compute_ratio 1.76 ± 0.34, fd_ratio 0.38"
    )
    assert json.loads(json.dumps(summary)) == summary


def test_table_of_the_stored_runs() -> None:
    assert table(RUNS, JUDGES, COSTS) + "\n" == (Path(__file__).parent / "convergence_small.md").read_text(
        encoding="utf-8"
    )


def test_best_guidance_is_each_judges_own() -> None:
    (run,) = (run for run in RUNS if run["method"] == "repa" and run["seed"] == 0)
    assert best_point(run, "classes")["guidance"] == 2.0
    assert best_point(run, "rotation")["guidance"] == 1.0


def test_an_alarm_where_the_trained_reward_rises_alone() -> None:
    assert alarms(RUNS) == []
    run: dict[str, Any] = json.loads(json.dumps(next(run for run in RUNS if run["method"] == "vrpo")))
    run["points"][2]["held_out_reward"]["rotation"] = 0.1
    (alarm,) = alarms([run])
    assert "vrpo seed 0" in alarm and "judge rotation fell by 0.300" in alarm
    run["points"][2]["held_out_reward"]["rotation"] = run["points"][0]["held_out_reward"]["rotation"] - 0.005
    assert alarms([run]) == []


def test_plots_are_drawn(tmp_path: Path) -> None:
    plot(RUNS, JUDGES, COSTS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [tmp_path / "curves.png"]
