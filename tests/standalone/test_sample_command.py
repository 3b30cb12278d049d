"""``vrpo sample``: real files in, real files out; it goes on where it was, and never writes over other samples."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.host_folders import reset_accelerate
from fakes.runs import finished_run, tiny_sit
from PIL import Image

from vrpo_plugin.cli import main
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone import sample_images as module
from vrpo_plugin.standalone.sample_folder import FORMATS
from vrpo_plugin.standalone.sample_images import SampleSettings, choose_labels
from vrpo_plugin.standalone.sampler import SOLVERS

QUICK = ("--num", "12", "--steps", "2", "--batch-size", "5")
KEYS = {
    *("format", "model", "checkpoint_sha256", "step", "ema", "solver", "num_steps", "guidance_scale"),
    *("guidance_interval", "guide", "labels", "seed", "num_samples", "resolution", "mixed_precision", "complete"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(autouse=True)
def _one_process_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield
    reset_accelerate()


def sample(source: Path, output: Path, *options: str) -> dict[str, Any]:
    reset_accelerate()
    main(["sample", str(source), "-o", str(output), *QUICK, *options])
    return json.loads((output / "samples.json").read_text())


def refused(source: Path, output: Path, *options: str) -> str:
    before = contents(output)
    with pytest.raises(SystemExit) as stop:
        sample(source, output, *options)
    assert contents(output) == before
    return str(stop.value)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder and the picture beside it, by their names without the folder's."""
    beside = {"grid": folder.with_name(f"{folder.name}.png")}
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")} | beside
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


def test_a_folder_and_a_grid_by_default(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = sample(run, tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {f"{i:06d}.png" for i in range(12)} | {"samples.json"}
    with Image.open(tmp_path / "s" / "000000.png") as first, Image.open(tmp_path / "s.png") as grid:
        assert (first.size, first.mode) == ((8, 8), "L") and grid.width > 3 * 8
    assert record.keys() == KEYS
    assert (record["step"], record["ema"], record["complete"], record["labels"]) == (8, True, True, "balanced")
    shown = capsys.readouterr()
    assert shown.out.startswith("SiT-Ti/2, EMA of step 8") and "wrote 12 images: " in shown.out
    assert "sampling: 12/12 (100%)" in shown.err and "\r" not in shown.err


def test_the_npz_holds_the_images_of_the_folder(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "all", "--format", "npz", "folder", "--labels", "7,0")
    sample(run, tmp_path / "npz", "--format", "npz", "--labels", "7,0")
    assert {path.name for path in (tmp_path / "npz").iterdir()} == {"samples.npz", "samples.json"}
    for name in ("all", "npz"):
        with np.load(tmp_path / name / "samples.npz") as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
        assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 1)
        assert labels.tolist() == [7, 0] * 6
        for i in range(12):
            assert np.array_equal(images[i, :, :, 0], np.array(Image.open(tmp_path / "all" / f"{i:06d}.png")))


def test_the_seed_the_labels_and_the_weights_make_the_images(run: Path, tmp_path: Path) -> None:
    def pixels(name: str, *options: str) -> bytes:
        sample(run, tmp_path / name, "--format", "folder", *options)
        return (tmp_path / name / "000003.png").read_bytes()

    base = pixels("base")
    assert pixels("again") == base
    unlike = [pixels("seed", "--seed", "1"), pixels("label", "--labels", "9"), pixels("raw", "--raw")]
    unlike += [pixels("step", "--step", "4"), pixels("cfg", "--cfg", "4"), pixels("steps", "--steps", "5")]
    unlike += [pixels("low", "--cfg", "4", "--cfg-interval", "0.2", "0.8"), pixels("sde", "--solver", "euler_maruyama")]
    assert len({base, *unlike}) == 9


def test_it_goes_on_where_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(run, tmp_path / "whole", "--format", *FORMATS)
    draw, numbers = module.draw, []

    def stop_at_the_third(*args: Any, **kwargs: Any) -> Any:
        numbers.append(len(args[1]))
        if len(numbers) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(module, "draw", stop_at_the_third)
    with pytest.raises(SystemExit) as stop:
        sample(run, tmp_path / "s", "--format", *FORMATS)
    assert stop.value.code == 130
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["complete"] is False
    assert len([*(tmp_path / "s").glob("*.png")]) == 10 and not (tmp_path / "s" / "samples.npz").exists()
    assert sample(run, tmp_path / "s", "--format", *FORMATS) == whole
    assert numbers == [5, 5, 2, 2]  # the third batch alone is made again
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert sample(run, tmp_path / "s", "--format", *FORMATS) == whole and numbers == [5, 5, 2, 2]
    (tmp_path / "s" / "000007.png").write_bytes(b"")  # after a power failure
    assert sample(run, tmp_path / "s", "--format", *FORMATS) == whole and numbers == [5, 5, 2, 2, 5]
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_another_format_is_added(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "s", "--format", "npz")
    first = (tmp_path / "s" / "samples.npz").read_bytes()
    sample(run, tmp_path / "s", "--format", "folder", "grid", "npz")
    assert (tmp_path / "s" / "samples.npz").read_bytes() == first
    assert len([*(tmp_path / "s").glob("*.png")]) == 12 and (tmp_path / "s.png").exists()
    sample(run, tmp_path / "s", "--format", "npz")  # the images stay
    assert len([*(tmp_path / "s").glob("*.png")]) == 12


def test_other_settings_and_other_files_are_refused(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "s")
    for options, said in (
        (("--seed", "1"), "expected the settings of its samples, got seed: 0 there, 1 now"),
        (("--raw",), "ema: True there, False now"),
        (("--solver", "heun", "--cfg", "2"), "solver: 'euler' there, 'heun' now; guidance_scale: 1.0 there, 2.0 now"),
        (("--num", "13"), "num_samples: 12 there, 13 now"),
    ):
        assert said in refused(run, tmp_path / "s", *options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"mine")
    assert "expected a new or empty folder" in refused(run, tmp_path / "mine")
    (tmp_path / "picture.png").write_bytes(b"mine")
    assert "got picture.png there" in refused(run, tmp_path / "picture")
    assert "expected a folder that can be made" in refused(run, tmp_path / "picture.png" / "s")
    (tmp_path / "s" / "samples.json").write_text("{")
    assert "samples.json: expected the JSON that vrpo sample wrote" in refused(run, tmp_path / "s")


REFUSED = {
    "label": (("--labels", "3,10"), "labels: expected balanced, random, or classes from 0 to 9"),
    "word": (("--labels", "cat"), "got 'cat'"),
    "number": (("--num", "0"), "num: expected 1 to 1000000, got 0"),
    "guidance": (("--cfg", "0.5"), "cfg: expected >= 1"),
    "interval": (("--cfg-interval", "0.8", "0.2"), "cfg-interval: expected 0 <= LOW <= HIGH <= 1"),
    "steps": (("--steps", "0"), "steps: expected >= 1"),
    "batch": (("--batch-size", "0"), "batch-size: expected >= 1"),
    "guide": (("--guide", "absent.safetensors"), "guide: expected a file, got none at absent.safetensors"),
    "no guide": (("--guide-strength", "2"), "guide: expected a file with --guide-strength or --guide-interval"),
    "step": (("--step", "5"), "expected a checkpoint of step 5"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    assert said in refused(run, tmp_path / "s", *options)
    assert not (tmp_path / "s").exists()


def test_guidance_needs_a_null_label_and_classes_to_name(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "a", settings={"cfg_prob": 0.0}, class_dropout_prob=0.0)
    assert "expected a model with a null label for --cfg 2" in refused(run, tmp_path / "s", "--cfg", "2")
    run = finished_run(tmp_path / "b", num_classes=0)
    assert "the model has no classes" in refused(run, tmp_path / "s", "--labels", "3")
    assert sample(run, tmp_path / "s", "--format", "npz")["labels"] == "none"
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]


def test_latents_of_a_hosts_checkpoint_need_a_vae(tmp_path: Path) -> None:
    state = tiny_sit(1, in_channels=4).state_dict()
    arguments = Namespace(model="SiT-Ti/2", resolution=64, path_type="linear")
    torch.save({"model": state, "ema": state, "args": arguments, "steps": 7}, tmp_path / "host.pt")
    assert "vae: expected the VAE of a model of latents" in refused(tmp_path / "host.pt", tmp_path / "s")
    absent = ("--vae", str(tmp_path / "absent"))
    assert "vae: expected" in refused(tmp_path / "host.pt", tmp_path / "s", *absent)
    assert not (tmp_path / "s").exists()
    diffusers = pytest.importorskip("diffusers")
    eightfold = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    diffusers.AutoencoderKL(**eightfold, **kinds).save_pretrained(tmp_path / "vae")
    vae = ("--vae", str(tmp_path / "vae"), "--num", "2", "--mixed-precision", "bf16")
    record = sample(tmp_path / "host.pt", tmp_path / "s", *vae)
    assert (record["step"], record["resolution"], record["mixed_precision"]) == (7, 64, "bf16")
    with Image.open(tmp_path / "s" / "000001.png") as image:
        assert image.size == (64, 64)


def test_labels() -> None:
    assert choose_labels("balanced", 12, 10, 0).tolist() == [*range(10), 0, 1]
    assert choose_labels("207,360", 3, 1000, 0).tolist() == [207, 360, 207]
    drawn = choose_labels("random", 1000, 10, 0)
    assert torch.equal(choose_labels("random", 10, 10, 0), drawn[:10])  # of the image's number, not of how many
    assert not torch.equal(choose_labels("random", 1000, 10, 1), drawn)
    assert drawn.bincount(minlength=10).min() > 70
    with pytest.raises(ConfigError):
        choose_labels("", 3, 10, 0)


def test_the_command_knows_the_samplers_words() -> None:
    from vrpo_plugin.commands import sample as command

    assert command.SOLVERS == SOLVERS and command.FORMATS == FORMATS


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = capsys.readouterr().out
    for name in SampleSettings.__dataclass_fields__:
        shown = {
            "formats": "format",
            "num_steps": "steps",
            "guidance_scale": "cfg",
            "guidance_interval": "cfg-interval",
        }
        assert f"--{shown.get(name, name).replace('_', '-')}" in text, name


@pytest.mark.slow
def test_two_processes_make_the_same_images(run: Path, tmp_path: Path) -> None:
    options = ("--format", *FORMATS, "--solver", "euler_maruyama", "--labels", "random", "--cfg", "2")
    sample(run, tmp_path / "one", *options)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(29500 + os.getpid() % 2000), "-m", "vrpo_plugin.cli", "sample"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*launcher, str(run), "-o", str(tmp_path / "two"), *QUICK, *options],
        env={**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote 12 images") == 1
    one = contents(tmp_path / "one")
    assert len(one) == 15 and contents(tmp_path / "two") == one
