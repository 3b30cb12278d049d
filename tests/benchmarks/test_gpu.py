"""The command for a machine with a GPU, at toy size on the CPU, and its parts."""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convergence.recipe import read_recipe
from gpu_stages import converge, report
from gpu_stages.data import unpack
from gpu_stages.graphs import GraphedRun, SharedBatch, advance_together
from gpu_stages.stage import Stage
from gpu_stages.step import ratios
from PIL import Image
from train_options import parse_options
from train_parts import TrainingStep, build_model, build_optimizer

from vrpo_plugin.encoders import Targets
from vrpo_plugin.standalone.small_network import load_small_features
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import ImageFolderSource, all_images, open_source
from vrpo_plugin.standalone.training import build_ema, ema_decay, update_ema

REPO = Path(__file__).resolve().parents[2]

STAGES = ("step", "sync", "precision", "kernels", "converge")


def gpu(*options: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def read(output: Path, stage: str) -> dict[str, Any]:
    return json.loads((output / f"gpu_{stage}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_stage_runs_at_toy_size_on_the_cpu(tmp_path: Path) -> None:
    result = gpu("--device", "cpu", "--toy", "--output", tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for stage in STAGES:
        record = read(tmp_path, stage)
        assert record["finished"] and record["toy"] and "errors" not in record
        assert record["card"].startswith("CPU") and record["torch"] == torch.__version__
        assert record["command"].startswith("python benchmarks/gpu.py --device cpu --toy --output ")
        assert str(tmp_path) not in record["command"] and "--run-stage" not in record["command"]
        assert f"## {stage} (CPU" in result.stdout
    rows = read(tmp_path, "step")["groups"][0]["rows"]
    assert [row["variant"] for row in rows] == ["none", "REPA", "VRPO, frozen critic", "REPA"]
    assert all(min(row["seconds"]) > 0 and row["peak_bytes"] > 0 for row in rows)
    assert read(tmp_path, "step")["skipped"].keys() == {"REPA's own code"}
    assert {row["loop"] for row in read(tmp_path, "sync")["rows"]} == {"the example, no", "the example, bf16"}
    assert "needs CUDA" in read(tmp_path, "sync")["skipped"]["example, fp16"]
    checks = read(tmp_path, "precision")["checks"]
    assert len(checks) == 2 and all(check["holds"] for check in checks)
    kernels = {row["variant"]: row["calls"] for row in read(tmp_path, "kernels")["rows"]}
    assert kernels["VRPO, features only"] < kernels["VRPO, frozen critic"] < kernels["VRPO, online critic"]
    runs = read(tmp_path, "converge")["recipes"]["cifar16"]["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [("repa", 0), ("vrpo", 0)]
    assert all([p["step"] for p in run["points"]] == [3, 6, 6] and run["skipped_steps"] == 0 for run in runs)


@pytest.mark.slow
def test_a_toy_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "gpu_sync.json").write_text(json.dumps(dict.fromkeys("abcdefghij") | {"toy": True}), encoding="utf-8")
    result = gpu("--report", tmp_path)
    assert result.returncode != 0 and "a toy's" in result.stderr


def test_a_dry_run_prints_what_would_travel_and_refuses_too_much(tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_bytes(bytes(3 * 2**20))
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "critic.safetensors").write_bytes(bytes(2**20))
    result = gpu("--dry-run", "--inputs", tmp_path)
    assert result.returncode == 0, result.stderr
    for line in ("MiB  this checkout", "3.00 MiB  data.tar", "1.00 MiB  networks", "in all; at most 60 travel"):
        assert line in result.stdout
    (tmp_path / "data.tar").write_bytes(bytes(60 * 2**20))
    assert "Too much" in gpu("--dry-run", "--inputs", tmp_path).stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """``train/`` and ``test/`` with JPEG files of three classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 4)):
        for number in range(count):
            path = tmp_path / "images" / split / "abc"[number % 3] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("packed", [False, True])
def test_unpacked_images_are_those_of_the_folder(images: Path, tmp_path: Path, packed: bool) -> None:
    data = images
    if packed:
        data = tmp_path / "images.tar.xz"
        with tarfile.open(data, "w:xz") as archive:
            archive.add(images, "some/folder")
    unpacked = unpack(data, 8, tmp_path / "arrays")
    for split, count in (("train", 9), ("test", 4)):
        ours, labels = all_images(open_source(unpacked / f"{split}.npz", 8))
        theirs, expected = all_images(ImageFolderSource(images / split, 8))
        assert len(ours) == count and torch.equal(ours, theirs) and torch.equal(labels, expected)
    few = unpack(data, 8, tmp_path / "few", limit=3)
    assert all_images(open_source(few / "train.npz"))[1].tolist() == [0, 1, 2]


def test_nothing_of_an_archive_is_written_to_disk(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name in ("train/a/1.png", "test/a/1.png", "../../train/a/2.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()))
    unpack(tmp_path / "data.tar", 8, tmp_path / "arrays")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["arrays", "data.tar", "test.npz", "train.npz"]


@pytest.fixture(scope="module")
def encoder() -> Targets:
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    network = train_small_features(images, torch.arange(64) % 2, seed=0, width=8, steps=2)
    return Targets((network.token_dim,), network.grid, lambda pixels: (network.tokens(pixels),))


def shared_and_run(encoder: Targets, folder: Path, *options: str, compiled: bool = False) -> tuple[Any, GraphedRun]:
    source = open_source(unpack(None, 16, folder) / "train.npz", 16)
    fixed = "--data-dir x --model SiT-Ti/2 --batch-size 8 --critic-width 16 --max-train-steps 10 --flip-prob 0.5"
    parsed, config = parse_options([*fixed.split(), "--resolution", "16", *options])
    images, labels = all_images(source)
    shared = SharedBatch(images, labels, parsed, 0, encoder.encode)
    targets = None if "none" in options else encoder
    return shared, GraphedRun(parsed, config, source, targets, shared, graph=True, compiled=compiled)


def weights(run: GraphedRun) -> dict[str, torch.Tensor]:
    return {f"{part}|{name}": value.clone() for part, state in run.state().items() for name, value in state.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_is_a_function_of_seed_and_step(encoder: Targets, tmp_path: Path) -> None:
    shared, _ = shared_and_run(encoder, tmp_path)
    seen = {}
    for step in (0, 63, 64, 200, 64, 0):  # 512 images are 64 batches
        shared.fill(step)
        batch = {name: value.clone() for name, value in shared.batch.items()}
        if step in seen:
            assert all(torch.equal(batch[name], seen[step][name]) for name in batch)
        seen[step] = batch
        assert torch.equal(shared.z[0], encoder.encode(batch["image"])[0])
        assert batch["t"].min() >= 0 and batch["t"].max() <= 1
    assert not torch.equal(seen[0]["noise"], seen[63]["noise"])


def test_an_epoch_holds_every_image_once(encoder: Targets, tmp_path: Path) -> None:
    shared, _ = shared_and_run(encoder, tmp_path)
    shared = SharedBatch(shared.images[:20], torch.arange(20), shared.options, 0, encoder.encode)
    drawn = []
    for step in range(5):  # two epochs of 20 in batches of 8
        shared.fill(step)
        drawn += shared.batch["y"].tolist()
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20)) and drawn[:20] != drawn[20:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vrpo", "repa", "none"])
def test_a_run_trains_as_the_example_does(encoder: Targets, tmp_path: Path, method: str) -> None:
    shared, run = shared_and_run(encoder, tmp_path, "--method", method)
    for step in range(4):
        advance_together([shared], [run], step)
    options, config = parse_options(
        "--data-dir x --model SiT-Ti/2 --batch-size 8 --critic-width 16 --max-train-steps 10 --flip-prob 0.5 "
        f"--resolution 16 --method {method}".split()
    )
    source = open_source(tmp_path / "train.npz", 16)
    model = build_model(options, config, source, None if method == "none" else encoder)
    ema, optimizer = build_ema(model), build_optimizer(options, model)
    step_module = TrainingStep(model, config.path_type).train()
    for step in range(4):
        shared.fill(step)
        loss, _ = step_module(shared.batch, () if method == "none" else shared.z, step)
        loss.backward()
        for group in run.clip_groups:
            names = {id(p): n for n, p in run.model.named_parameters()}
            own = dict(model.named_parameters())
            torch.nn.utils.clip_grad_norm_([own[names[id(p)]] for p in group], options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, ema_decay(options.ema_decay, step), torch.zeros(()))
    for expected, got in ((model, run.model), (ema, run.ema)):
        assert_equal(expected.state_dict(), got.state_dict(), 1e-6)
    assert not torch.equal(run.model.state_dict()["final_layer.linear.weight"], torch.zeros(12, 128))
    run.check()


@pytest.mark.slow
def test_compiled_runs_move_the_same_buffers(encoder: Targets, tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        shared, run = shared_and_run(encoder, tmp_path, compiled=compiled)
        addresses = {name: buffer.data_ptr() for name, buffer in run.model.named_buffers()}
        for step in range(3):
            advance_together([shared], [run], step)
        assert addresses == {name: buffer.data_ptr() for name, buffer in run.model.named_buffers()}
        run.check()
        results.append(weights(run))
    assert_equal(*results, 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_from_its_state(encoder: Targets, tmp_path: Path) -> None:
    shared, whole = shared_and_run(encoder, tmp_path)
    for step in range(6):
        advance_together([shared], [whole], step)
    shared, first = shared_and_run(encoder, tmp_path)
    for step in range(3):
        advance_together([shared], [first], step)
    state = {part: {n: v.clone() for n, v in tensors.items()} for part, tensors in first.state().items()}
    shared, second = shared_and_run(encoder, tmp_path)
    second.restore(state, 3)
    for step in range(3, 6):
        advance_together([shared], [second], step)
    assert_equal(weights(whole), weights(second))


def test_a_run_says_if_its_graph_did_not_count(encoder: Targets, tmp_path: Path) -> None:
    shared, run = shared_and_run(encoder, tmp_path)
    advance_together([shared], [run], 0)
    run.step += 1
    with pytest.raises(RuntimeError, match="2 steps, 1 counted"):
        run.check()


@pytest.mark.slow
def test_a_converge_stage_that_is_cut_goes_on_and_one_that_is_done_is_not_repeated(tmp_path: Path) -> None:
    def stage(output: str, scratch: str) -> Stage:
        device = torch.device("cpu")
        return Stage("converge", tmp_path / output, tmp_path / scratch, device, True, 600, {"card": "CPU", "toy": True})

    def points(record: dict[str, Any]) -> list[Any]:
        runs = record["recipes"]["cifar16"]["runs"]
        return [(run["method"], [(p["step"], p["guidance"], p["judges"]) for p in run["points"]]) for run in runs]

    whole = stage("whole", "one")
    converge.run(whole)
    again = stage("again", "other")
    converge.run(again, earlier=tmp_path / "whole" / "gpu_converge.json")
    assert points(again.record) == points(whole.record)
    assert not (tmp_path / "other" / "converge" / "toy" / "states-6").exists()
    cut = stage("cut", "two")
    (tmp_path / "two" / "converge" / "toy").mkdir(parents=True)
    networks = tmp_path / "one" / "converge" / "toy" / "networks"
    networks.rename(tmp_path / "two" / "converge" / "toy" / "networks")
    judge = converge.Judge.judge

    def judge_then_run_out(self: Any, run: Any, step: int, *rest: Any) -> Any:
        if run.method == "vrpo":
            cut.seconds = 0.0  # after the first judged step
        return judge(self, run, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converge.Judge, "judge", judge_then_run_out)
        converge.run(cut)
    assert {p[0] for _, own in points(cut.record) for p in own} == {3}
    rest = stage("rest", "two")
    converge.run(rest)
    assert points(rest.record) == points(whole.record)


def test_a_later_call_replaces_what_it_has_measured_again() -> None:
    stamp = {"card": "A", "torch": "1", "cuda": None, "timm": "1", "commit": "c", "command": "x --run-stage step"}
    first = {**stamp, "toy": False, "groups": [{"title": "one", "rows": [1]}, {"title": "two", "rows": [1]}]}
    second = {**stamp, "card": "B", "toy": False, "groups": [{"title": "two", "rows": [2]}]}
    merged = report.merge("step", [first, second])
    assert [(g["title"], g["rows"], g["measured"]["card"]) for g in merged["groups"]] == [
        ("one", [1], "A"),
        ("two", [2], "B"),
    ]
    assert merged["groups"][0]["measured"]["command"] == "x"


def test_the_stored_networks_are_those_of_the_results() -> None:
    stored = read(REPO / "benchmarks" / "results", "converge")["recipes"]
    plans = {plan.recipe: plan.networks for plan in converge.PLANS}
    for recipe, result in stored.items():
        for name, network in result["protocol"]["networks"].items():
            file = REPO / "benchmarks" / "networks" / plans[recipe] / f"{name}.safetensors"
            assert load_small_features(file).name == network["name"]
    for plan in converge.PLANS:
        recipe = read_recipe(REPO / "benchmarks" / "recipes" / f"{plan.recipe}.yaml").networks
        folder = REPO / "benchmarks" / "networks" / plan.networks
        for name, settings in {"encoder": recipe.encoder, "rotation": recipe.judges, **recipe.critics}.items():
            assert json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["settings"] == dict(settings)


def test_the_page_shows_the_stored_results() -> None:
    page = (REPO / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert shown == report.section(REPO / "benchmarks" / "results")
    for stage in STAGES:
        text = (REPO / "benchmarks" / "results" / f"gpu_{stage}.json").read_text(encoding="utf-8")
        assert json.loads(text)["card"] in shown
        assert "/tmp" not in text and "/home" not in text and "/root" not in text


def test_the_readme_says_what_is_stored() -> None:
    readme = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    stored = {group["title"]: group["rows"] for group in read(REPO / "benchmarks" / "results", "step")["groups"]}
    said = {}
    for title in ("SiT-B/2", "SiT-XL/2"):
        rows = {row["variant"]: row for row in stored[title] if not row["encoder"]}
        for critic in ("frozen", "online"):
            row, base = rows[f"VRPO, {critic} critic"], rows["REPA"]
            said[title, critic] = (
                f"{statistics.median(ratios(row, base)):.2f}",
                f"{row['peak_bytes'] / base['peak_bytes']:.2f}",
            )
    (b, b_memory), (o, o_memory) = said["SiT-B/2", "frozen"], said["SiT-B/2", "online"]
    assert f"takes {b} (frozen critic) and {o} (online) of unpatched REPA's time at SiT-B/2" in readme
    assert f"and {b_memory} and {o_memory} of its memory" in readme
    (b, b_memory), (o, o_memory) = said["SiT-XL/2", "frozen"], said["SiT-XL/2", "online"]
    assert f"{b} and {o}, {b_memory} and {o_memory} at SiT-XL/2" in readme
