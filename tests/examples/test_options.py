"""Options, recipes and the run's folder: what users get wrong is refused before anything is written."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from train_options import FREE_ON_RESUME, METHODS, parse_options, to_dict
from train_parts import check_data, check_launch, check_tools

from vrpo_plugin import CheckpointError, ConfigError, VRPOAligner, VRPOConfig
from vrpo_plugin.standalone.evaluate import EvalResult
from vrpo_plugin.standalone.run_folder import RunFolder

REPO = Path(__file__).resolve().parents[2]


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


def test_a_method_on_the_command_line_beats_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: vrpo\nreward_coeff: 0.3\n")
    assert parse_options(["--config", str(recipe), "--method", "repa"])[1].reward_coeff == 0


def test_irepa_has_its_own_weight_unless_another_is_given(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("proj_coeff: 0.7\n")
    assert parse_options(["--data-dir", "x", "--method", "irepa"])[1].proj_coeff == 1.0
    assert parse_options(["--data-dir", "x", "--method", "repa"])[1].proj_coeff == 0.5
    assert parse_options(["--config", str(recipe), "--method", "irepa"])[1].proj_coeff == 0.7
    assert parse_options(["--data-dir", "x", "--method", "irepa", "--proj-coeff", "0.2"])[1].proj_coeff == 0.2


CONTRADICTIONS = [
    ("repa", "reward_coeff", "2"),
    ("repa", "features", "none"),
    ("irepa", "projector", "mlp"),
    ("irepa", "target_norm", "none"),
    ("none", "features", "policy"),
    ("none", "reward_coeff", "0.4"),
    ("vrpo", "reward_coeff", "0"),
]


@pytest.mark.parametrize(("method", "name", "value"), CONTRADICTIONS)
@pytest.mark.parametrize("where", ["command line", "recipe", "both"])
def test_a_setting_that_contradicts_the_method_is_refused(
    method: str, name: str, value: str, where: str, tmp_path: Path
) -> None:
    recipe, flag = tmp_path / "recipe.yaml", f"--{name.replace('_', '-')}"
    recipe.write_text(f"method: {method}\n" + (f"{name}: {value}\n" if where == "recipe" else ""))
    arguments = [] if where == "command line" else ["--config", str(recipe)]
    arguments += ["--method", method] if where == "command line" else []
    arguments += [] if where == "recipe" else [flag, value]
    with pytest.raises(ConfigError, match=rf"{name}: expected .*method {method}"):
        parse_options(arguments)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_means_may_be_said(method: str) -> None:
    said = [part for k, v in METHODS[method].items() for part in (f"--{k.replace('_', '-')}", str(v))]
    assert parse_options(["--method", method, *said]) == parse_options(["--method", method])


BAD_OPTIONS = {
    "critic_learning_rate": ["0", "-1", "nan"],
    "encoder_depth": ["0", "-2"],
    "keep_last": ["0"],
    "learning_rate": ["0", "nan", "inf"],
    "max_grad_norm": ["nan"],
    "adam_beta1": ["1", "-0.1"],
    "adam_beta2": ["1.5"],
    "adam_epsilon": ["0"],
    "adam_weight_decay": ["-1"],
    "ema_decay": ["2", "-0.5", "nan"],
    "flip_prob": ["1.5", "-0.1"],
    "cfg_prob": ["2", "nan"],
}
BAD_SAMPLING = {
    "cfg_scale": [["--cfg-scale", "0.5"], ["--cfg-scale", "nan"], ["--cfg-scale", "inf"]],
    "guidance_low, guidance_high": [["--guidance-low", "0.8", "--guidance-high", "0.2"], ["--guidance-high", "1000"]],
    "eval_samples": [["--eval-samples", "2"], ["--eval-samples", "-1"]],
    "eval_checkpoint": [["--eval-checkpoint", "weights.pt"]],
    "cfg_prob": [["--cfg-prob", "0", "--cfg-scale", "2"]],
    "layers": [["--encoder-depth", "2", "--layers", "all"]],
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(n, [f"--{n.replace('_', '-')}", v]) for n, values in BAD_OPTIONS.items() for v in values]
    + [(n, arguments) for n, cases in BAD_SAMPLING.items() for arguments in cases],
)
def test_what_would_fail_later_is_refused_first(name: str, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected "):
        parse_options(arguments)


@pytest.mark.parametrize(
    "content",
    ["solver: dopri5", "weighting: cosine", "mixed_precision: fp8", "batch_size: null", "batch_size: [8]",
     "resume: 1", "seed: true", "learning_rate: .nan", "model: null", "method: null"],
)  # fmt: skip
def test_a_recipe_is_checked_as_the_command_line_is(content: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content + "\n")
    with pytest.raises(ConfigError, match=content.split(":")[0]):
        parse_options(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("launched", "option", "resolved"),
    [("no", None, "no"), ("bf16", None, "bf16"), ("fp16", None, "fp16"), ("no", "bf16", "bf16"),
     ("bf16", "bf16", "bf16"), (None, None, "no"), ("bf16", "no", None), ("fp16", "bf16", None), ("fp8", None, None)],
)  # fmt: skip
def test_mixed_precision_is_what_accelerate_launch_says(
    launched: str | None, option: str | None, resolved: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    arguments = [] if option is None else ["--mixed-precision", option]
    if resolved is None:
        with pytest.raises(ConfigError, match="mixed_precision: expected"):
            parse_options(arguments)
    else:
        assert parse_options(arguments)[0].mixed_precision == resolved


def test_a_depth_of_0_is_no_depth_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="block numbers from 1 to 12, got"):
        VRPOAligner(hidden_dim=8, depth=12, target_dims=(4,), encoder_depth=0, reward_coeff=0.0)


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
    settings = {**json.loads(json.dumps(to_dict(options, config))), "data_fingerprint": data}
    return RunFolder(
        Path(options.output_dir) / options.run_name,
        settings,
        free=FREE_ON_RESUME,
        resume=options.resume,
        resume_step=options.resume_step,
    )


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


@pytest.mark.parametrize("arguments", [["--features", "host"], ["--features=host", "--scale", "group"]])
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
    with pytest.raises(ConfigError, match=r"reward_release_steps: 200 then, 2499 now"):
        _folder(tmp_path, "--resume", "--max-train-steps", "9999")
    longer = ("--resume", "--max-train-steps", "9999", "--reward-release-steps", "200")
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


def test_accumulation_by_accelerate_launch_is_refused() -> None:
    accelerator = SimpleNamespace(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: expected 1, got 4. Give --gradient"):
        check_launch(accelerator)


@pytest.mark.parametrize(("tracker", "do"), [("tensorboard", "pip install tensorboard"), ("wandbb", "Correct it")])
def test_a_tracker_that_is_not_there_is_refused(tracker: str, do: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    check_tools(parse_options(["--report-to", "wandb"])[0])
    with pytest.raises(ConfigError, match=rf"report_to: expected none, or .*\(wandb\), got '{tracker}'. {do}"):
        check_tools(parse_options(["--report-to", tracker])[0])


@pytest.mark.parametrize("package", ["matplotlib", "PIL", "scipy"])
def test_packages_of_the_output_are_looked_for_first(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=rf"expected their packages, got no \['{package}'\]"):
        check_tools(parse_options([])[0])
    check_tools(parse_options(["--sampling-steps", "0", "--eval-samples", "0"])[0])


PIXELS = {"image_shape": (3, 32, 32), "latent_shape": (3, 32, 32)}
LATENTS = {"image_shape": (3, 256, 256), "latent_shape": (4, 32, 32)}
OBLONG = {"image_shape": (3, 256, 512), "latent_shape": (4, 32, 64)}


@pytest.mark.parametrize(
    ("shapes", "count", "arguments", "message"),
    [
        (LATENTS, 100, ["--flip-prob", "0.5"], "flip_prob: expected 0 with cached latents, got 0.5"),
        (OBLONG, 100, [], "data: expected square images"),
        (PIXELS, 3, ["--eval-samples", "100"], "data: expected more than 3 images, got 3"),
        (PIXELS, 100, ["--batch-size", "15"], "batch_size: expected a positive multiple of the 2 processes"),
        (PIXELS, 100, ["--flip-prob", "0.5"], None),
        (LATENTS, 100, [], None),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(
    shapes: dict[str, Any], count: int, arguments: list[str], message: str | None
) -> None:
    class Images:
        image_shape, latent_shape = shapes["image_shape"], shapes["latent_shape"]
        num_classes = 10

        def __len__(self) -> int:
            return count

    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_data(*parse_options(arguments), Images(), 2)  # type: ignore[arg-type]


def test_an_evaluation_never_replaces_another_protocols(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.start()
    written = {}
    for steps, distance in ((4, 1.0), (8, 2.0), (8, 3.0), (4, 4.0)):
        options, _ = parse_options(["--eval-samples", "64", "--solver-steps", str(steps)])
        path = folder.write_evaluation(EvalResult(options.protocol("net", 100, "images"), distance, 0.5, 0.5))
        written[path] = steps, distance
    assert len(written) == 2 and (tmp_path / "run/evaluation.json") in written
    for path, (steps, distance) in written.items():
        result = EvalResult.from_json(path.read_text())
        assert (result.protocol.num_steps, result.frechet_distance) == (steps, distance)
    (tmp_path / "run/evaluation.json").write_text("{}")  # of some other version
    assert folder.write_evaluation(result).name != "evaluation.json"
