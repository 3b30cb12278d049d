"""vrpo compare, by its command line."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.run_folders import PROTOCOL, make_run, row

from vrpo_plugin.cli import main
from vrpo_plugin.standalone.evaluate import EvalResult


def finished(path: Path, fd: float, seconds: float = 0.5, **settings: Any) -> Path:
    result = EvalResult(PROTOCOL, fd, 0.5, 0.75)
    rows = (row(step, seconds=seconds) for step in range(1, 11))
    return make_run(path, rows, {"max_train_steps": 10, **settings}, result)


def compared(*arguments: Path, status: int = 0) -> Any:
    """The JSON that the command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        ended = 0
        try:
            main(["compare", "--json", *map(str, arguments)])
        except SystemExit as end:
            ended = end.code
    assert ended == status, out.getvalue()
    return json.loads(out.getvalue())


def test_settings_times_and_numbers_side_by_side(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", 2.0, method="repa", data_dir=None)
    b = finished(tmp_path / "b", 1.5, seconds=0.25, data_dir="x", exp_name="b")
    found = compared(a, b)
    assert found["runs"] == ["a", "b"]
    assert found["settings"] == {"method": ["repa", "vrpo"], "data_dir": [None, "x"]}
    assert found["facts"]["steps"] == [10, 10]
    assert found["facts"]["seconds a step (median)"] == [0.5, 0.25]
    assert found["facts"]["seconds, all steps"] == [5, 2.5]
    (group,) = found["evaluations"]
    assert group["rows"][0] == {"step": 10, "metric": "frechet_distance", "values": {"a": 2.0, "b": 1.5}}
    assert found["not_compared"] == []


def test_the_table_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(finished(tmp_path / "a", 2.0, x=None)), str(finished(tmp_path / "b", 1.5))])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| step | metric | a | b | second - first |" in lines
    assert "| 10 | frechet_distance | 2 | 1.5 | -0.5 |" in lines
    assert "| x | None | - |" in lines  # None is told from a setting that the other does not have


def test_unlike_protocols_are_refused_and_the_rest_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = finished(tmp_path / "a", 2.0), make_run(tmp_path / "b", map(row, range(1, 11)), {"seed": 1})
    other = EvalResult(replace(PROTOCOL, num_steps=25, guidance_scale=1.5), 0.5, 0.5, 0.5)
    (b / "evaluation.json").write_text(other.to_json())
    found = compared(a, b, status=1)
    assert found["evaluations"] == []
    assert found["not_compared"] == [
        {"runs": ["a", "b"], "unlike": {"num_steps": [50, 25], "guidance_scale": [1.0, 1.5]}}
    ]
    assert found["settings"]["seed"] == [0, 1]
    with pytest.raises(SystemExit):
        main(["compare", str(a), str(b)])
    shown = capsys.readouterr().out
    assert "- a and b: different num_steps (50 and 25), guidance_scale (1.0 and 1.5)" in shown
    assert "0.5 " not in shown.split("## Evaluations")[1]


def test_one_like_protocol_among_several_is_enough(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 2.0), finished(tmp_path / "b", 1.0)
    other = EvalResult(replace(PROTOCOL, seed=7), 0.5, 0.5, 0.5)
    (b / "evaluation-seed7.json").write_text(other.to_json())
    found = compared(a, b)
    assert len(found["evaluations"]) == 1
    assert found["not_compared"] == [{"runs": ["b", "a"], "unlike": {"seed": [7, 0]}}]


def test_evaluations_of_vrpo_eval_by_step(tmp_path: Path) -> None:
    protocol = {"solver": "heun", "num_samples": 10}
    runs = []
    for name, offset in (("a", 0.0), ("b", 1.0)):
        runs.append(make_run(tmp_path / name, map(row, range(1, 3))))
        for step in (100, 200):
            folder = runs[-1] / f"samples-{step}"
            folder.mkdir()
            lines = [
                {"protocol": protocol, "origin": {"step": step}, "fid": 9.0, "sfid": 1.0, "precision": None},
                {"protocol": protocol, "origin": {"step": step}, "fid": step / 100 + offset, "is": 5.0, "note": "x"},
            ]
            (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "half {")
    found = compared(*runs)
    (group,) = found["evaluations"]
    values = {(one["step"], one["metric"]): one["values"] for one in group["rows"]}
    assert values[200, "fid"] == {"a": 2.0, "b": 3.0}  # the later line of the same step
    assert values[100, "sfid"] == {"a": 1.0, "b": 1.0} and values[100, "is"] == {"a": 5.0, "b": 5.0}
    assert any("samples-100/evaluations.jsonl: line 3: no JSON" in note for note in found["notes"])


def test_what_is_unknown_or_only_a_name_does_not_tell_protocols_apart(tmp_path: Path) -> None:
    first = {"solver": "heun", "reference": "/a/test", "reference_hash": "12", "seed": None}  # of a newer version
    second = {"solver": "heun", "reference": "/b/test", "reference_hash": "12", "guide": "none", "labels": "unknown"}
    for name, protocol in (("a", first), ("b", second), ("c", {**second, "guide": "self"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.evaluations.jsonl").write_text(json.dumps({"protocol": protocol, "fid": 1.0}) + "\n")
    assert len(compared(tmp_path / "a", tmp_path / "b")["evaluations"]) == 1
    (refusal,) = compared(tmp_path / "a", tmp_path / "c", status=1)["not_compared"]
    assert refusal["unlike"] == {"guide": ["-", "self"]}


def test_two_files_of_one_step_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", map(row, range(1, 3)))
    for name, fid in (("s1", 1.0), ("s2", 2.0)):
        (run / name).mkdir()
        line = {"protocol": {"solver": "heun"}, "fid": fid}
        (run / name / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    (note,) = compared(run, finished(tmp_path / "b", 1.0), status=1)["notes"]
    assert "s1/evaluations.jsonl: an evaluation of an unknown step is in" in note


def test_checkpoints_tell_the_step(tmp_path: Path) -> None:
    line = {"protocol": {"solver": "heun", "checkpoint": "exps/a/checkpoints/0000800/ema.safetensors"}, "fid": 1.0}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    (group,) = compared(tmp_path / "a", tmp_path / "b")["evaluations"]
    assert group["rows"] == [{"step": 800, "metric": "fid", "values": {"a": 1.0, "b": 1.0}}]


def test_the_step_of_an_extended_run_is_not_guessed(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 2.0), finished(tmp_path / "b", 1.0)
    config = json.loads((b / "config.json").read_text())
    config["settings"]["max_train_steps"] = 20
    (b / "config.json").write_text(json.dumps(config))
    (group,) = compared(a, b)["evaluations"]
    assert {one["step"] for one in group["rows"]} == {10, None}


def test_points_of_the_convergence_benchmark(tmp_path: Path) -> None:
    for name, fd in (("a", 2.0), ("b", 1.0)):
        run = make_run(tmp_path / name, map(row, range(1, 3)))
        point = {"step": 2, "guidance": 1.0, "judges": {"classes": {"fd": fd, "recall": 0.5}}}
        (run / "convergence.json").write_text(json.dumps({"judging": {"samples": 10}, "points": [point]}))
    (group,) = compared(tmp_path / "a", tmp_path / "b")["evaluations"]
    assert group["protocol"] == {"samples": 10, "network": "classes", "guidance_scale": 1.0}
    assert group["rows"][0] == {"step": 2, "metric": "frechet_distance", "values": {"a": 2.0, "b": 1.0}}


def test_runs_without_evaluations_or_config(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 2.0), make_run(tmp_path / "b", map(row, range(1, 3)))
    (b / "config.json").unlink()
    found = compared(a, b)
    assert found["not_evaluated"] == ["b"] and found["settings"] == {} and found["facts"]["steps"] == [10, 2]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "x" / "run", 2.0), finished(tmp_path / "y" / "run", 1.0)
    assert compared(a, b)["runs"] == ["x/run", "y/run"]


def test_one_run_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", 2.0)
    for arguments in ([a], [a, a]):
        with pytest.raises(SystemExit, match=r"at least two runs|the same folder twice"):
            main(["compare", *map(str, arguments)])


def test_files_of_another_shape_are_no_traceback(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 2.0), finished(tmp_path / "b", 1.0)
    (b / "config.json").write_text('{"settings": 3, "versions": []}')
    (b / "convergence.json").write_text('{"points": [1, {"judges": {"classes": 2}}], "judging": null}')
    (b / "evaluation-2.json").write_text(f'{{"protocol": {{}}, "fid": 1{"0" * 400}, "kid": true}}')
    (b / "evaluation-3.json").mkdir()
    (b / "evaluation-4.json").write_text('{"fid": 1}')
    found = compared(a, b)
    assert [group["protocol"]["num_steps"] for group in found["evaluations"]] == [50]
    assert any("evaluation-3.json" in note and "directory" in note for note in found["notes"])
    assert any("evaluation-4.json: an evaluation without its protocol" in note for note in found["notes"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", 2.0), finished(tmp_path / "b", 1.0)
    (b / "evaluation.json").write_text("{")
    (b / "config.json").write_text("[1]")
    notes = compared(a, b)["notes"]
    assert any("evaluation.json: no JSON" in note for note in notes)
    assert any("config.json: no JSON object" in note for note in notes)
