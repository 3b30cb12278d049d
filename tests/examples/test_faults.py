"""A step that is not finite changes nothing: the run ends where one ends that left that step out."""

import json
from pathlib import Path

import harness
import pytest
import torch

pytestmark = pytest.mark.slow

STEP = 5  # neither the first one nor a checkpoint's


@pytest.fixture(scope="module", params=[1, 2])
def skipped(request: pytest.FixtureRequest, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = f"processes{request.param}"
    return harness.run(
        tmp_path_factory.mktemp("skip"), name, processes=request.param, encoder=encoder, fault=f"skip:{STEP}:0"
    )


@pytest.mark.parametrize("fault", ["latent", "target", "reward", "gradient"])
def test_a_nan_leaves_its_step_out_on_every_process(fault: str, skipped: Path, encoder: Path, tmp_path: Path) -> None:
    processes = int(skipped.name.removeprefix("processes"))
    where = f"{fault}:{STEP}:{processes - 1}"
    faulty = harness.run(tmp_path, "faulty", processes=processes, encoder=encoder, fault=where)
    assert [row["skipped"] for row in harness.metrics(faulty)] == [float(i == STEP) for i in range(12)]
    ours, theirs = harness.weights(faulty, 12), harness.weights(skipped, 12)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)
    moved = [name for name in ours if name.startswith("model/blocks") and "adaLN" not in name]
    assert moved and all(torch.isfinite(ours[name]).all() for name in ours)


def test_too_many_in_a_row_end_the_run_and_say_where_it_began(encoder: Path, tmp_path: Path) -> None:
    options = ("--max-skipped-steps", "3", "--learning-rate", "1e30")
    result = harness.launch(tmp_path, "run", *options, encoder=encoder)
    assert result.returncode != 0
    said = "expected at most 3 steps in a row that are not finite, got 4, beginning with"
    assert said in result.stderr and "NonFiniteError" in result.stderr, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["skipped"])
    assert f"step {first['step']}:" in result.stderr
