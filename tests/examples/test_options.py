"""Options, recipes and the run's folder: what users get wrong is refused before anything is written."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "examples"))

from train_options import METHODS, parse_options, to_dict  # noqa: E402
from train_output import RunFolder  # noqa: E402
from train_parts import check_launch  # noqa: E402

from vrpo_plugin import CheckpointError, ConfigError, VRPOConfig  # noqa: E402


def test_default_is_the_digits_recipe() -> None:
    options, config = parse_options([])
    assert (options.model, options.enc_type, options.data_dir) == ("SiT-Ti/2", "small", None)
    assert config.critic_width == 64


def test_command_line_overrides_recipe_overrides_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch-size: 32\nlearning_rate: 1e-3\nreward_coeff: 0.3\nlayers: [2, 4]\n")
    options, config = parse_options(["--config", str(recipe), "--batch-size", "8", "--data-dir", "x"])
    assert (options.batch_size, options.learning_rate) == (8, 1e-3)
    assert (config.reward_coeff, config.layers) == (0.3, (2, 4))
    assert config.proj_coeff == VRPOConfig.proj_coeff


def test_method_beats_recipe_and_yields_to_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("reward_coeff: 0.3\n")
    assert parse_options(["--config", str(recipe), "--method", "repa"])[1].reward_coeff == 0
    assert parse_options(["--method", "repa", "--reward-coeff", "0.1"])[1].reward_coeff == 0.1


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    arguments = ["--reward-weights", "semantic=0.25,perceptual=0.75", "--layers", "1,2", "--seed", "3"]
    resolved = parse_options(arguments)
    recipe = tmp_path / "config.yaml"
    recipe.write_text(json.dumps(to_dict(*resolved)))
    assert parse_options(["--config", str(recipe)]) == resolved


@pytest.mark.parametrize("recipe", sorted((REPO / "examples" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_parses(recipe: Path, method: str) -> None:
    options, _ = parse_options(["--config", str(recipe), "--method", method])
    assert options.method == method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("reward_cof: 1\n", "reward_coeff"),
        ("batch_size: many\n", "batch_size"),
        ("- 1\n", "key: value"),
        ("batch_size: -1\n", "batch_size"),
        ("method: grpo\n", "method"),
        ("a: [", "YAML"),
    ],
)
def test_bad_recipe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_options(["--config", str(recipe)])


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'reward_cof'. Did you mean 'reward_coeff'"):
        parse_options(["--reward-cof", "1"])
    with pytest.raises(SystemExit):
        parse_options(["stray"])


def _folder(tmp_path: Path, *arguments: str, data: str = "digits") -> RunFolder:
    options, config = parse_options(["--output-dir", str(tmp_path), "--exp-name", "run", *arguments])
    return RunFolder(options, config, json.loads(json.dumps(to_dict(options, config))), data)


def test_folder_of_another_run_is_refused_and_untouched(tmp_path: Path) -> None:
    _folder(tmp_path).start()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"expected a new or empty folder.*--resume"):
        _folder(tmp_path)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_encoder_of_a_failed_start_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "encoder-0123.safetensors").write_bytes(b"")
    _folder(tmp_path)


@pytest.mark.parametrize("arguments", [["--group", "image"], ["--features", "host"]])
def test_settings_for_other_loops_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="in this trainer"):
        parse_options(arguments)


def test_foreign_files_are_refused_even_with_resume(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="another run's files"):
        _folder(tmp_path, "--resume")


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    _folder(tmp_path).start()
    with pytest.raises(ConfigError, match=r"learning_rate: 0.001 then, 0.5 now"):
        _folder(tmp_path, "--resume", "--learning-rate", "0.5")
    with pytest.raises(ConfigError, match="data_fingerprint"):
        _folder(tmp_path, "--resume", data="other")
    with pytest.raises(ConfigError, match=r"reward_release_steps: 800 then, 9999 now"):
        _folder(tmp_path, "--resume", "--max-train-steps", "9999")
    longer = ("--resume", "--max-train-steps", "9999", "--reward-release-steps", "800")
    _folder(tmp_path, *longer, "--num-workers", "2")


def test_metrics_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.start()
    folder.append_metrics([{"step": i, "loss": 0.5} for i in range(1, 6)])
    folder.cut_metrics(3)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_only_if_asked_for(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.start()
    for step in (2, 4):
        newest = folder.save(step, {"model": {"weight": torch.full((3,), float(step))}}, {"step": step})
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=rf"{newest.name}.model\.safetensors: expected sha256"):
        _folder(tmp_path, "--resume").latest()
    found = _folder(tmp_path, "--resume", "--resume-step", "2").latest()
    assert found is not None and found[1]["step"] == 2 and found[0]["model"]["weight"].tolist() == [2, 2, 2]
    with pytest.raises(CheckpointError, match=r"0000003.manifest\.json"):
        _folder(tmp_path, "--resume", "--resume-step", "3").latest()


@pytest.mark.parametrize("arguments", [["--resume-step", "4"], ["--resume", "--resume-step", "0"]])
def test_a_step_to_resume_from_needs_resume(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="resume_step: expected >= 1, with --resume"):
        parse_options(arguments)


@pytest.mark.parametrize(
    ("kind", "fsdp2", "refused"),
    [("DEEPSPEED", False, True), ("FSDP", False, True), ("FSDP", True, False), ("MULTI_GPU", False, False)],
)
def test_sharding_that_the_loop_was_not_written_for_is_refused(kind: str, fsdp2: bool, refused: bool) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=fsdp2)
    with pytest.raises(ConfigError, match=f"DDP, or FSDP .*got {kind}") if refused else nullcontext():
        check_launch(accelerator)
