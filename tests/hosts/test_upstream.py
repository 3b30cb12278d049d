"""The hosts as their authors left them, under the stand-ins: each trains, and two runs with one seed are one run.

Every comparison of a patched run with an unpatched one rests on this.
"""

from pathlib import Path

import pytest
from hosts.host_runs import HOSTS, HostRun, checkout, differences, edited_checkout, run_host

pytestmark = pytest.mark.host

RUNS = [("REPA", 1), ("REPA", 2), ("REG", 1), ("REG", 2), ("iREPA", 1), ("iREPA", 2), ("SiT", 2), ("DiT", 2)]
RUNS += [("REPA-E", 1), ("REPA-E-ldm", 1), ("REPA-E-ldm", 2), ("LightningDiT", 2)]
METRICS = {
    "REPA": {"loss", "proj_loss", "grad_norm"},
    "REG": {"loss_final", "loss_mean", "proj_loss", "loss_mean_cls", "grad_norm"},
    "iREPA": {"denoising_loss", "proj_loss", "grad_norm", "cosine", "cosine_weighted"},
    "REPA-E": {"sit_loss", "denoising_loss", "proj_loss", "grad_norm_sit", "vae_loss", "vae_align_loss", "d_loss"},
    "REPA-E-ldm": {"sit_loss", "denoising_loss", "proj_loss", "grad_norm_sit"},
}
UPDATES = {"REPA-E": 3}  # VAE, discriminator and SiT


def files(root: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*") if ".git" not in p.parts}


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_trains_unmodified_and_repeats_bit_by_bit(name: str, processes: int, tmp_path: Path):
    before = files(checkout(HOSTS[name].checkout))
    one, two = (run_host(name, tmp_path / folder, processes=processes) for folder in ("one", "two"))
    assert len(one.losses) == len(one.hashes) == 20 * UPDATES.get(name, 1)
    assert len({str(hashes) for hashes in one.hashes}) == len(one.hashes), "a step that moved no weight"
    assert len(one.records) == processes and all(one.records)
    if name in METRICS:
        assert [row["step"] for row in one.rows] == list(range(1, 21))
        assert METRICS[name] <= one.rows[-1].keys()
    assert differences(two, one) == []
    assert files(checkout(HOSTS[name].checkout)) == before, "the run changed the checkout"


def test_another_seed_is_seen(tmp_path: Path):
    few = ("--max-train-steps", "2")
    one = run_host("REPA", tmp_path / "one", *few)
    found = differences(run_host("REPA", tmp_path / "two", *few, "--seed", "1"), one)
    assert {line.split("(")[1] for line in found} == {
        "loss): value",
        "step): parameters",
        "step): random",
        "log): values",
    }


def test_the_full_preview_runs_and_draws_more_than_the_short_one(tmp_path: Path):
    """50 steps of REPA's sampler on 128 latents, in train mode: label dropout moves the random state."""
    few = ("--max-train-steps", "2")
    full = run_host("REPA", tmp_path / "full", *few, env={"VRPO_TEST_PREVIEW_STEPS": ""})
    short = run_host("REPA", tmp_path / "short", *few)
    assert full.previews == short.previews == 1
    ours, theirs = (run.of("step") for run in (full, short))
    assert ours[0] == theirs[0]
    assert ours[1]["random"]["torch"] != theirs[1]["random"]["torch"]


def test_repa_on_one_process_fails_at_its_first_checkpoint(tmp_path: Path):
    """https://github.com/sihyun-yu/REPA/issues/48"""
    every = ("--max-train-steps", "2", "--checkpointing-steps", "2")
    run = run_host("REPA", tmp_path / "one", *every, check=False)
    assert run.returncode != 0 and "object has no attribute 'module'" in run.stderr
    assert len(run.hashes) == 2, "it had trained until then"


def test_checkpoints_of_two_processes_hold_what_resuming_needs(tmp_path: Path):
    run = run_host("REPA", tmp_path, "--max-train-steps", "2", "--checkpointing-steps", "2", processes=2)
    saved = run.checkpoint(2)
    assert saved.keys() == {"model", "ema", "opt", "args", "steps"} and saved["steps"] == 2
    assert saved["model"].keys() == saved["ema"].keys()


@pytest.mark.parametrize("name", ["SiT", "DiT"])
def test_ddp_hosts_save_checkpoints(name: str, tmp_path: Path):
    run = run_host(name, tmp_path, "--epochs", "1", "--ckpt-every", "4", processes=2)
    assert run.checkpoint(4).keys() == {"model", "ema", "opt", "args"}


class TestTextToImage:
    """train_t2i.py unpacks four things where its data set yields three: it cannot run without an edit."""

    LOOP = "for raw_image, x, context, raw_captions in train_dataloader"

    def run(self, folder: Path) -> HostRun:
        root = edited_checkout(
            "REPA", folder, "train_t2i.py", self.LOOP, "for raw_image, x, context in train_dataloader"
        )
        return run_host("REPA-t2i", folder, processes=2, root=root)

    def test_unmodified_it_stops_before_the_first_step(self, tmp_path: Path):
        run = run_host("REPA-t2i", tmp_path, check=False)
        assert run.returncode != 0 and "not enough values to unpack (expected 4, got 3)" in run.stderr
        assert run.records == [[]]

    def test_with_that_line_edited_it_repeats_bit_by_bit(self, tmp_path: Path):
        one, two = (self.run(tmp_path / folder) for folder in ("one", "two"))
        assert [row["step"] for row in one.rows] == [1, 2, 3]
        assert differences(two, one) == []
