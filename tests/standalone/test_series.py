"""Reading metrics.jsonl: whole, damaged, resumed, long."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fakes.run_folders import row

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.series import POINTS, Series, collect, final_rows, read_metrics


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_row_is_a_point_of_a_short_run(tmp_path: Path) -> None:
    found = read_metrics(write(tmp_path / "m.jsonl", *(row(step) for step in range(1, 6))))
    assert (found.rows, found.last_step, found.notes) == (5, 5, ())
    assert found.series["loss"].steps.tolist() == [1, 2, 3, 4, 5]
    assert found.series["loss"].mean.tolist() == [row(step)["loss"] for step in range(1, 6)]
    assert found.seconds.tolist() == [0.5] * 5
    assert "seconds" not in found.series and "step" not in found.series


def test_null_nan_and_infinity_are_gaps(tmp_path: Path) -> None:
    values = [1.0, None, float("nan"), float("inf"), 5.0]
    found = read_metrics(write(tmp_path / "m.jsonl", *({"step": i, "loss": v} for i, v in enumerate(values, 1))))
    series = found.series["loss"]
    np.testing.assert_array_equal(series.mean, [1, np.nan, np.nan, np.nan, 5])
    np.testing.assert_array_equal(series.smoothed(1), [1, np.nan, np.nan, np.nan, 5])
    assert series.total == 6 and series.last == 5


def test_a_metric_that_never_has_a_number_is_none(tmp_path: Path) -> None:
    found = read_metrics(write(tmp_path / "m.jsonl", *({"step": i, "a": None, "b": "text", "c": 1} for i in (1, 2))))
    assert set(found.series) == {"c"}


def test_a_metric_may_begin_late_or_be_of_mixed_kinds(tmp_path: Path) -> None:
    lines = [{"step": 1, "a": 1}, {"step": 2, "a": [3], "b": 10**400}, {"step": 3, "a": True, "b": 2}]
    series = read_metrics(write(tmp_path / "m.jsonl", *lines)).series
    np.testing.assert_array_equal(series["a"].mean, [1, np.nan, 1])
    np.testing.assert_array_equal(series["b"].mean, [np.nan, np.nan, 2])


def test_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    lines = [row(1), '{"step": 2, "loss": 0.', "", row(3), "nonsense", '{"step": 4, "loss": }', row(5)]
    found = read_metrics(write(tmp_path / "m.jsonl", *lines))
    assert found.series["loss"].steps[np.isfinite(found.series["loss"].mean)].tolist() == [1, 3, 5]
    assert found.notes == (f"{tmp_path / 'm.jsonl'}: no row of metrics in line 2, 5, 6: skipped",)


def test_steps_that_were_trained_again_count_once(tmp_path: Path) -> None:
    lines = [row(step, loss=1) for step in range(1, 9)] + [row(step, loss=2) for step in range(5, 7)]
    found = read_metrics(write(tmp_path / "m.jsonl", *lines))
    assert found.series["loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.series["loss"].mean.tolist() == [1, 1, 1, 1, 2, 2]
    assert found.last_step == 6 and len(found.seconds) == 6
    assert "4 rows are of steps that were trained again" in found.notes[0]


def test_final_rows() -> None:
    assert final_rows(np.array([1, 2, 3, 2, 3, 4])).tolist() == [True, False, False, True, True, True]
    assert final_rows(np.array([7])).tolist() == [True] and final_rows(np.array([], np.int64)).size == 0


def test_a_long_run_is_thinned_but_keeps_sums_and_extremes() -> None:
    number = 7 * POINTS + 3
    values = np.random.default_rng(0).normal(size=number)
    values[1234] = 1000.0
    series = collect(({"step": i + 1, "x": v} for i, v in enumerate(values)), number)["x"]
    assert len(series) <= POINTS
    assert series.total == pytest.approx(values.sum(), rel=1e-9)
    assert series.high.max() == 1000 and series.low.min() == values.min()
    assert series.count.sum() == number
    assert series.steps[0] == pytest.approx((1 + series.count[0]) / 2)


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row(step)) + "\n" for step in range(1, 60_001))
    tracemalloc.start()
    found = read_metrics(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.rows == 60_000 and len(found.series["loss"]) <= POINTS
    assert peak < 12e6  # all rows as Python objects take 60 MB


def test_smoothing_is_the_mean_over_the_window() -> None:
    values = np.random.default_rng(1).normal(size=50)
    series = collect(({"step": i, "x": v} for i, v in enumerate(values)), 50)["x"]
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(50)]
    np.testing.assert_allclose(series.smoothed(10), expected)
    np.testing.assert_allclose(series.smoothed(1), values)


def test_an_empty_series_has_no_last_value() -> None:
    nothing = np.array([np.nan])
    assert np.isnan(Series(np.array([1.0]), nothing, nothing, nothing, np.array([0.0])).last)


def test_an_empty_file_has_no_series(tmp_path: Path) -> None:
    found = read_metrics(write(tmp_path / "m.jsonl"))
    assert found.series == {} and found.last_step == 0


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file of metrics"):
        read_metrics(tmp_path / "m.jsonl")
