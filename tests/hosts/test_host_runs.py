"""The harness itself, on a script of ours: what it records, and that its comparison can see a difference."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
from hosts.host_runs import HOSTS, HostRun, checkout, differences, edited_checkout, run_host

pytestmark = pytest.mark.slow  # of slow tests alone: it runs whole processes

SCRIPT = """
import sys
import torch
from accelerate import Accelerator

accelerator = Accelerator(log_with=None)
layer = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
layer, optimizer = accelerator.prepare(layer, optimizer)
for step in range(1, 4):
    loss = layer(torch.ones(3, 2)).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item(), "samples": object()}, step=step)
print("encoder", torch.hub.load("anyone/anything", "any").embed_dim, "arguments", sys.argv[1:3])
if "--fail" in sys.argv:
    raise SystemExit("failed on purpose")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> HostRun:
    return run_host("REPA", tmp_path_factory.mktemp("work"), root=root, processes=2)


def changed(run: HostRun, kind: str, key: str, value: object, rank: int = 0) -> HostRun:
    """A copy in which the first record of that kind holds another value."""
    records = copy.deepcopy(run.records)
    next(r for r in records[rank] if r["kind"] == kind)[key] = value
    return dataclasses.replace(run, records=records)


def test_records_losses_metrics_weights_and_random_states(run: HostRun):
    assert [r["kind"] for r in run.records[0]] == ["loss", "step", "log"] * 3
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert [row["loss"] for row in run.rows] == run.losses
    assert len(set(run.losses)) == 3
    assert [len(hashes) for hashes in run.hashes] == [2, 2, 2] and len({str(h) for h in run.hashes}) == 3
    assert run.of("step")[0]["random"].keys() == {"python", "numpy", "torch"}
    assert run.previews == 3


def test_runs_in_the_work_folder_under_the_stand_ins(run: HostRun, root: Path):
    assert "encoder 32 arguments ['--exp-name', 'run']" in run.stdout
    assert (run.folder / "data" / "images").is_dir()
    assert [p.name for p in root.iterdir()] == ["train.py"]


def test_both_ranks_train_the_same_weights_from_other_random_states(run: HostRun):
    ours, theirs = (run.of("step", rank)[-1] for rank in (0, 1))
    assert ours["parameters"] == theirs["parameters"]
    assert ours["random"] != theirs["random"]


def test_the_same_run_has_no_differences(run: HostRun):
    assert differences(run, copy.deepcopy(run)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_one_bit_of_a_loss_is_a_difference(run: HostRun, rank: int):
    other = math.nextafter(run.of("loss", rank)[0]["value"], 10.0)
    assert differences(changed(run, "loss", "value", other, rank), run) == [f"rank {rank}, event 0 (loss): value"]


def test_weights_random_states_and_metrics_are_compared(run: HostRun):
    step = run.of("step")[0]
    first, second = step["parameters"]
    assert differences(changed(run, "step", "parameters", [second, first]), run)
    assert differences(changed(run, "step", "parameters", [first]), run)
    assert differences(changed(run, "step", "random", step["random"] | {"numpy": "0"}), run)
    assert differences(changed(run, "log", "values", {"loss": 0.0}), run)
    assert differences(changed(run, "log", "values", {}), run)


def test_a_missing_event_or_rank_is_a_difference(run: HostRun):
    assert differences(dataclasses.replace(run, records=[run.records[0][:-1], run.records[1]]), run)
    assert differences(dataclasses.replace(run, records=run.records[:1]), run)


def test_more_scalars_and_more_parameters_at_the_end_are_no_difference(run: HostRun):
    step, log = run.of("step")[0], run.of("log")[0]
    assert differences(changed(run, "step", "parameters", [*step["parameters"], "more"]), run) == []
    assert differences(changed(run, "log", "values", {"vrpo/reward/semantic": 0.1, **log["values"]}), run) == []
    assert differences(run, changed(run, "step", "parameters", [*step["parameters"], "more"]))


WRAPPER = """
import random, runpy, sys
import torch  # the stand-in seeds here
assert sys.argv.pop(1) == "--wrap"
sys.argv = sys.argv[1:]
random.random()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_launcher_stands_before_the_script_and_its_one_draw_is_seen(run: HostRun, root: Path, tmp_path: Path):
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    wrapped = run_host("REPA", tmp_path, root=root, processes=2, launcher=("-m", "wrapper", "--wrap"))
    assert wrapped.losses == run.losses and wrapped.hashes == run.hashes
    ours, theirs = (r.of("step")[0]["random"] for r in (wrapped, run))
    assert [name for name in theirs if ours[name] != theirs[name]] == ["python"]
    steps = [(rank, event) for rank in (0, 1) for event in (1, 4, 7)]
    assert differences(wrapped, run) == [f"rank {rank}, event {event} (step): random" for rank, event in steps]


def test_a_failed_run_fails_the_test_and_shows_its_output(root: Path, tmp_path: Path):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)encoder 32.*failed on purpose"):
        run_host("REPA", tmp_path, "--fail", root=root)
    assert run_host("REPA", tmp_path, "--fail", root=root, check=False).returncode != 0


def test_a_run_that_hangs_is_ended(tmp_path: Path):
    (tmp_path / "train.py").write_text("print('begun', flush=True)\nimport threading\nthreading.Event().wait()\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)took more than 10 seconds.*begun"):
        run_host("REPA", tmp_path / "work", root=tmp_path, timeout=10)


def test_without_checkouts_a_test_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("VRPO_HOSTS_DIR", raising=False)
    with pytest.raises(pytest.skip.Exception, match="VRPO_HOSTS_DIR is not set"):
        checkout("REPA")
    monkeypatch.setenv("VRPO_HOSTS_DIR", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="holds no folder REPA"):
        checkout("REPA")


def test_a_missing_package_is_a_skip_with_its_name(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path):
    monkeypatch.setitem(HOSTS, "REPA", dataclasses.replace(HOSTS["REPA"], needs=("no_such_package",)))
    with pytest.raises(pytest.skip.Exception, match="REPA needs the package no_such_package"):
        run_host("REPA", tmp_path, root=root)


def test_an_edit_changes_one_place_of_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    original = tmp_path / "hosts" / "REPA" / "train.py"
    original.parent.mkdir(parents=True)
    original.write_text("a = 1\nb = 1\n")
    monkeypatch.setenv("VRPO_HOSTS_DIR", str(tmp_path / "hosts"))
    copied = edited_checkout("REPA", tmp_path / "copy", "train.py", "a = 1", "a = 2")
    assert (copied / "train.py").read_text() == "a = 2\nb = 1\n" and original.read_text() == "a = 1\nb = 1\n"
    with pytest.raises(AssertionError, match="2 times"):
        edited_checkout("REPA", tmp_path / "other", "train.py", "= 1", "= 2")
