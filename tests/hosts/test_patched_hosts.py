"""The real hosts under VRPO, by the launcher and by the one line, against their unpatched selves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts.host_runs import HOSTS, REPO, HostRun, checkout, differences, edited_checkout, run_host

pytestmark = pytest.mark.host

LAUNCH = ("-m", "vrpo_plugin.launch")
SMALL = ("--vrpo-critic-width", "16")
NOTHING = ("--vrpo-reward-coeff", "0", "--vrpo-features")
PROJECTING = [("REPA", 1), ("REPA", 2), ("REG", 1), ("REG", 2), ("iREPA", 1), ("iREPA", 2)]
PROJECTING += [("REPA-E", 1), ("REPA-E-ldm", 1), ("REPA-E-ldm", 2)]
MADE_ENCODER = [("SiT", 2), ("DiT", 2)]
UPDATES = {"REPA-E": 3}  # VAE, discriminator and SiT
METRICS = ("reward/semantic", "reward/perceptual", "reward/fidelity", "weight/semantic", "critic_cos", "align_cos")
DENOISING = {"REPA": "loss", "REG": "loss_mean"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for a small timm encoder with random weights, for hosts that have none."""
    import timm
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit.r160_in1k", num_classes=0).state_dict(), file)
    return ("--vrpo-encoder", "test_vit.r160_in1k", "--vrpo-encoder-checkpoint", str(file), "--vrpo-log-every", "5")


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for a frozen critic of LightningDiT's latents."""
    from vrpo_plugin.modules.critic import LatentCritic, save_critic

    file = tmp_path_factory.mktemp("critic") / "critic.safetensors"
    torch.manual_seed(0)
    save_critic(LatentCritic((32, 16, 16), (12,), (8, 8), width=16), file)
    return ("--vrpo-critic-checkpoint", str(file), "--vrpo-no-critic-trainable", "--vrpo-critic-width", "16")


def moved(run: HostRun, count: int) -> list[bool]:
    """Which of the last ``count`` parameters differ between the first step and the last."""
    return [a != b for a, b in zip(run.hashes[0][-count:], run.hashes[-1][-count:], strict=True)]


@pytest.mark.parametrize(("name", "processes"), [*PROJECTING, *MADE_ENCODER, ("LightningDiT", 2)])
def test_weight_zero_is_bitwise_the_unpatched_host(name: str, processes: int, tmp_path: Path) -> None:
    plain = run_host(name, tmp_path / "plain", processes=processes)
    features = "host" if (name, processes) in PROJECTING else "none"
    patched = run_host(name, tmp_path / "patched", processes=processes, launcher=(*LAUNCH, *NOTHING, features))
    assert len(plain.losses) == 20 * UPDATES.get(name, 1)
    assert differences(patched, plain) == []


@pytest.mark.parametrize(("name", "processes"), PROJECTING)
def test_the_features_readout_alone_is_the_hosts_loss(name: str, processes: int, tmp_path: Path) -> None:
    plain = run_host(name, tmp_path / "plain", processes=processes)
    # Without the guard, whose fused optimizer rounds otherwise than the host's.
    settings = (*NOTHING, "policy", "--vrpo-max-skipped-steps", "0")
    patched = run_host(name, tmp_path / "patched", processes=processes, launcher=(*LAUNCH, *settings))
    assert len(plain.rows) == len(patched.rows) == 20
    for ours, theirs in zip(patched.rows, plain.rows, strict=True):
        assert "vrpo/align_cos" in ours
        # Another order of summation in the cosine; the loss of a later step feels it through the parameters.
        compared = theirs.keys() - {"cosine", "cosine_weighted"}  # iREPA logs its own, which is not run
        if name == "REPA-E" and theirs["step"] > 5:
            # Its GAN doubles a rounding with every step: nothing in steps 1 and 2, 1e-7 in step 3, 1e-3 in step 15.
            compared = {"denoising_loss", "sit_loss", "grad_norm_sit"}
        for key in compared:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(("name", "processes"), PROJECTING)
def test_defaults_train_and_reach_the_tracker(name: str, processes: int, tmp_path: Path) -> None:
    plain = run_host(name, tmp_path / "plain", processes=processes)
    patched = run_host(name, tmp_path / "patched", processes=processes, launcher=(*LAUNCH, *SMALL))
    assert differences(patched, plain), "nothing differs"
    last = patched.rows[-1]
    for key in METRICS:
        assert f"vrpo/{key}" in last and all(abs(row[f"vrpo/{key}"]) < 100 for row in patched.rows), key
    extra = len(patched.hashes[-1]) - len(plain.hashes[-1])
    assert extra > 0 and all(moved(patched, extra)), "a parameter of the aligner stood still"
    if processes == 2:
        ranks = [[record["parameters"] for record in patched.of("step", rank)] for rank in range(2)]
        assert ranks[0] == ranks[1], "the ranks drift apart"


@pytest.mark.parametrize("name", ["REPA", "REG"])
def test_the_loss_falls_and_the_ema_follows(name: str, tmp_path: Path) -> None:
    arguments = ("--max-train-steps", "80", "--learning-rate", "2e-3", "--checkpointing-steps", "40")
    run = run_host(name, tmp_path, *arguments, launcher=(*LAUNCH, *SMALL))
    for key, sign in ((DENOISING[name], 1), ("proj_loss", 1), ("vrpo/critic_cos", -1), ("vrpo/align_cos", -1)):
        values = [row[key] for row in run.rows]
        assert sign * sum(values[-20:]) < sign * sum(values[:20]), key
    early, late = run.checkpoint(40)["ema"], run.checkpoint(80)["ema"]
    assert early.keys() == late.keys() and not any("vrpo" in key for key in late)
    assert sum(not torch.equal(early[key], late[key]) for key in late) > 0.9 * (len(late) - 1)  # all but pos_embed


@pytest.mark.parametrize(("name", "processes"), MADE_ENCODER)
def test_defaults_train_a_host_without_an_encoder(
    name: str, processes: int, encoder: tuple[str, ...], tmp_path: Path
) -> None:
    plain = run_host(name, tmp_path / "plain", processes=processes)
    patched = run_host(name, tmp_path / "patched", processes=processes, launcher=(*LAUNCH, *SMALL, *encoder))
    assert patched.losses[0] == plain.losses[0] and patched.losses[1:] != plain.losses[1:]
    assert [r["random"] for r in patched.of("step")] == [r["random"] for r in plain.of("step")], "a draw by the plugin"
    extra = len(patched.hashes[-1]) - len(plain.hashes[-1])
    assert extra > 0 and all(moved(patched, extra))
    (log,) = patched.folder.glob("out/*/log.txt")
    lines = [line for line in log.read_text().splitlines() if "vrpo (call=" in line]
    assert len(lines) == 3 and "reward/semantic" in lines[-1] and "critic_cos" in lines[-1]


def test_lightningdit_takes_its_targets_from_a_trained_critic(critic: tuple[str, ...], tmp_path: Path) -> None:
    plain = run_host("LightningDiT", tmp_path / "plain", processes=2)
    features = ("--vrpo-features", "none")  # its reentrant checkpointing hides hidden tokens
    patched = run_host("LightningDiT", tmp_path / "patched", processes=2, launcher=(*LAUNCH, *critic, *features))
    assert patched.losses[0] == plain.losses[0] and patched.losses[1:] != plain.losses[1:]
    refused = run_host("LightningDiT", tmp_path / "refused", processes=2, launcher=LAUNCH, check=False)
    assert refused.returncode != 0 and "critic_checkpoint: expected a pretrained critic" in refused.stderr


@pytest.mark.parametrize("name", ["REPA", "REG"])
def test_the_one_line_does_what_the_launcher_does(name: str, tmp_path: Path) -> None:
    import shutil

    from vrpo_plugin.hosts.known import detect_hosts
    from vrpo_plugin.patching.source import patch_file, unpatch_file

    copy = Path(shutil.copytree(checkout(name), tmp_path / name, ignore=shutil.ignore_patterns(".git")))
    before = (copy / "train.py").read_bytes()
    spec = next(spec for spec, _ in detect_hosts(copy) if spec.insertions[0].file == "train.py")
    patch_file(copy, spec.insertions[0])
    launched = run_host(name, tmp_path / "launched", launcher=(*LAUNCH, *SMALL))
    lined = run_host(name, tmp_path / "lined", root=copy, env={"VRPO_CRITIC_WIDTH": "16"})
    assert differences(lined, launched) == [] == differences(launched, lined)
    unpatch_file(copy, spec.insertions[0])
    assert (copy / "train.py").read_bytes() == before


CHECKPOINTED = ("--checkpointing-steps", "10")


def one_batch(folder: Path) -> None:
    """Four times one image: the host restores no data order, and one epoch is one step."""
    HOSTS["REPA"].make_data(folder, checkout("REPA"))
    pictures, features = ([*sorted((folder / "data" / name).iterdir())] for name in ("images", "vae-sd"))
    features = [file for file in features if file.suffix == ".npy"]
    for files in (pictures, features):
        for number, file in enumerate(files):
            file.write_bytes(files[0].read_bytes()) if number < 4 else file.unlink()
    labels = [[file.name, 0] for file in features[:4]]
    (folder / "data" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_is_uninterrupted(processes: int, tmp_path: Path) -> None:
    one_batch(tmp_path)
    patched = {"launcher": (*LAUNCH, *SMALL), "processes": processes, "env": {"VRPO_TEST_RESEED": "1"}}
    straight = run_host("REPA", tmp_path, *CHECKPOINTED, **patched)
    resumed = run_host("REPA", tmp_path, *CHECKPOINTED, "--resume-step", "10", **patched)
    assert len(straight.hashes) == 20 and len(resumed.hashes) == 10
    assert resumed.losses == straight.losses[10:] and resumed.hashes == straight.hashes[10:]
    assert resumed.rows == [row for row in straight.rows if row["step"] > 10]


def test_bf16_is_finite_and_close_to_fp32(tmp_path: Path) -> None:
    full = run_host("REPA", tmp_path / "full", launcher=(*LAUNCH, *SMALL))
    half = run_host("REPA", tmp_path / "half", "--mixed-precision", "bf16", launcher=(*LAUNCH, *SMALL))
    assert half.rows != full.rows
    for ours, theirs in zip(half.rows, full.rows, strict=True):
        for key in ("loss", "proj_loss", "vrpo/reward/semantic", "vrpo/align_cos"):
            # bf16 keeps 8 bits: cosines of order 0.1 to 1, and a loss of order 1, to a hundredth.
            assert ours[key] == pytest.approx(theirs[key], abs=2e-2), key


def test_accumulation_runs_where_its_one_line_is_inserted(tmp_path: Path) -> None:
    before = (
        "    for epoch in range(args.epochs):\n        model.train()\n        for raw_image, x, y in train_dataloader:"
    )
    line = "    grad_norm = torch.zeros((), device=device)\n"  # the one that vrpo check names
    root = edited_checkout("REPA", tmp_path, "train.py", before, line + before)
    accumulated = ("--gradient-accumulation-steps", "2", "--max-train-steps", "5")
    run = run_host("REPA", tmp_path, *accumulated, root=root, processes=2, launcher=(*LAUNCH, *SMALL))
    assert len(run.hashes) == 5 and len(run.losses) == 10
    assert [r["parameters"] for r in run.of("step", 0)] == [r["parameters"] for r in run.of("step", 1)]


def test_a_run_without_the_plugin_goes_on_with_it(tmp_path: Path) -> None:
    plain = run_host("REPA", tmp_path, *CHECKPOINTED, "--max-train-steps", "10", processes=2)
    run = run_host("REPA", tmp_path, "--resume-step", "10", processes=2, launcher=(*LAUNCH, *SMALL))
    assert "the checkpoint holds no aligner" in run.stderr and "compat fresh_optimizer" in run.stderr
    assert len(run.hashes) == 10 and len(run.hashes[0]) > len(plain.hashes[0])


LOAD_AS_GENERATE_DOES = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from models.sit import SiT_models
model = SiT_models["SiT-T/2"](input_size=32, num_classes=1000, use_cfg=True, z_dims=[32], encoder_depth=2,
                              fused_attn=True, qk_norm=False)
print(model.load_state_dict(torch.load(sys.argv[2], weights_only=False)[sys.argv[3]]))
assert "vrpo_plugin" not in sys.modules
"""


def test_ema_raw_and_exported_loads_strictly_where_the_host_samples(tmp_path: Path) -> None:
    from vrpo_plugin.cli import main

    run = run_host("REPA", tmp_path, "--max-train-steps", "2", "--checkpointing-steps", "2", launcher=(*LAUNCH, *SMALL))
    (raw,) = run.folder.glob("out/*/checkpoints/0000002.pt")
    main(["export", str(raw), str(tmp_path / "exported.pt")])
    stand_ins = {"PYTHONPATH": str(REPO / "tests/hosts/offline"), "VRPO_TEST_LOG": str(tmp_path / "log")}
    for file, key in ((raw, "ema"), (tmp_path / "exported.pt", "ema"), (tmp_path / "exported.pt", "model")):
        command = [sys.executable, "-c", LOAD_AS_GENERATE_DOES, str(checkout("REPA")), str(file), key]
        result = subprocess.run(command, env={**os.environ, **stand_ins}, capture_output=True, text=True)
        assert "All keys matched" in result.stdout, result.stderr
    state = torch.load(raw, weights_only=False)
    assert any(key.startswith("vrpo.") for key in state["model"]), "nothing to resume from"


def test_an_exported_run_goes_on_without_the_plugin(tmp_path: Path) -> None:
    from vrpo_plugin.cli import main

    run = run_host("REPA", tmp_path, *CHECKPOINTED, "--max-train-steps", "10", launcher=(*LAUNCH, *SMALL), processes=2)
    (raw,) = run.folder.glob("out/*/checkpoints/0000010.pt")
    main(["export", str(raw), str(tmp_path / "exported.pt")])
    os.replace(tmp_path / "exported.pt", raw)
    allowed = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # upstream cannot load its own checkpoints since torch 2.6
    plain = run_host("REPA", tmp_path, "--resume-step", "10", processes=2, env=allowed)
    assert len(plain.hashes) == 10 and len(plain.hashes[0]) < len(run.hashes[0])


CURED = {
    "one_process": (("--checkpointing-steps", "2"), "object has no attribute 'module'"),
    "sit_s": (("--model", "SiT-S/2"), "shapes cannot be multiplied"),
    "qk_norm": (("--qk-norm",), "norm_layer"),
    "num_classes": (("--num-classes", "10"), "index out of range"),
    "report_to_none": (("--report-to", "none"), "Unsupported logging capability"),
}


@pytest.mark.parametrize("name", CURED)
def test_upstream_breakages_are_cured_and_can_be_left(name: str, tmp_path: Path) -> None:
    arguments, breakage = CURED[name]
    few = ("--max-train-steps", "2", "--batch-size", "2", *arguments)
    cured = run_host("REPA", tmp_path / "cured", *few, launcher=(*LAUNCH, *SMALL))
    assert f"compat {name}" in cured.stderr or f"compat {name}" in cured.stdout
    left = run_host("REPA", tmp_path / "left", *few, launcher=(*LAUNCH, *SMALL, "--vrpo-compat", "none"), check=False)
    assert left.returncode != 0 and breakage in left.stderr


def test_every_host_of_the_harness_is_tested() -> None:
    tested = {name for name, _ in (*PROJECTING, *MADE_ENCODER)} | {"LightningDiT"}
    assert tested | {"REPA-t2i"} == HOSTS.keys()  # t2i: TestTextToImage


class TestTextToImage:
    """train_t2i, which runs only with one line mended."""

    def run(self, folder: Path, *launcher: str) -> HostRun:
        loop = "for raw_image, x, context, raw_captions in train_dataloader"
        mended = "for raw_image, x, context in train_dataloader"
        root = edited_checkout("REPA", folder, "train_t2i.py", loop, mended)
        return run_host("REPA-t2i", folder, processes=2, root=root, launcher=launcher)

    def test_weight_zero_and_the_features_readout(self, tmp_path: Path) -> None:
        plain = self.run(tmp_path / "plain")
        assert differences(self.run(tmp_path / "nothing", *LAUNCH, *NOTHING, "host"), plain) == []
        policy = self.run(tmp_path / "policy", *LAUNCH, *NOTHING, "policy")
        for ours, theirs in zip(policy.rows, plain.rows, strict=True):
            assert ours["proj_loss"] == pytest.approx(theirs["proj_loss"], abs=1e-6)

    def test_defaults(self, tmp_path: Path) -> None:
        run = self.run(tmp_path, *LAUNCH, *SMALL)
        assert all(f"vrpo/{key}" in run.rows[-1] for key in METRICS)
