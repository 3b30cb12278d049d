"""The example of docs/hosts.md for a host of one's own, as it stands there, run."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fakes.host_folders import RecordingTracker, reset_accelerate

from vrpo_plugin import HostSpec, PatchConflictError, apply_vrpo, cli
from vrpo_plugin.errors import ConfigError, HostChangedError
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.patching.handle import active_handles

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hosts.md").read_text("utf-8")
FILES = {name: text for text, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, flags=re.DOTALL)}
MODULES = ("net", "objective", "my_host", "repa_net", "my_repa")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's files, importable."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for handle in active_handles():
        if handle.name in ("mine", "my_repa"):
            handle.remove()
    for name in MODULES:
        sys.modules.pop(name, None)


def load(*names: str) -> list[ModuleType]:
    return [__import__(name) for name in names]


def run_training(folder: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile((folder / "train.py").read_text(), "train.py", "exec"), namespace)
    return namespace


def methods(*classes: type) -> list[Any]:
    return [vars(cls)[name] for cls in classes for name in ("__init__", "forward", "__call__") if name in vars(cls)]


def steps(net: ModuleType, objective: ModuleType, count: int = 3) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """What train.py does, from one seed."""
    torch.manual_seed(0)
    model, flow_loss = net.Net(), objective.FlowLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(count):
        result = flow_loss(model, torch.rand(8, 3, 16, 16), torch.randint(10, (8,)))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in result.items()})
    return model, history


def test_the_page_holds_its_files_and_short_specs() -> None:
    own, theirs = ["net.py", "objective.py", "my_host.py", "train.py"], ["repa_net.py", "my_repa.py"]
    assert [*FILES] == [*own, "fast_dit.py", *theirs]
    lengths = {name: len([line for line in FILES[name].splitlines() if line.strip()]) for name in FILES}
    assert lengths["my_host.py"] <= 32 and lengths["my_repa.py"] <= 45 and lengths["fast_dit.py"] <= 32


def test_it_trains_and_logs_rewards_and_puts_back_what_it_replaced(folder: Path) -> None:
    net, objective = load("net", "objective")
    before = methods(net.Net, objective.FlowLoss)
    ran = run_training(folder)
    history, handle = ran["history"], ran["handle"]
    assert len(history) == 5
    for row in history:
        assert {"loss", "vrpo/reward/semantic", "vrpo/reward/perceptual", "vrpo/reward/fidelity"} <= row.keys()
        assert {"vrpo/align_cos", "vrpo/critic_cos", "vrpo/weight/semantic"} <= row.keys()
        assert all(torch.isfinite(torch.tensor([*row.values()])))
    assert history[0]["vrpo/align_cos"] < history[-1]["vrpo/align_cos"]
    assert isinstance(ran["model"].vrpo, HostAligner)
    assert handle.seams == ("Net.__init__", "Net.forward", "FlowLoss.__call__")
    assert handle.hooks == ("torch.optim step hooks",)
    assert handle.fired["FlowLoss.__call__"] == 5
    assert handle not in active_handles()
    after = methods(net.Net, objective.FlowLoss)
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert not hasattr(net.Net(), "vrpo")


@pytest.mark.slow
def test_every_metric_is_one_of_the_page(folder: Path) -> None:
    row = run_training(folder)["history"][-1]
    named = set(re.findall(r"`(vrpo/[\w/<>]+)`", PAGE))
    families = {re.sub(r"<name>", "", name) for name in named if "<name>" in name}
    assert {name for name in row if name not in named and not name.startswith(tuple(families))} == {"loss"}


def test_the_units_are_converted(folder: Path) -> None:
    """With the exact velocity the clean estimate is the image, so that its fidelity reward is 0, the highest."""
    (host,) = load("my_host")
    images, noise, s = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.rand(4)
    a = s[:, None, None, None]
    fields = host.SPEC.in_forward({}, a * images + (1 - a) * noise, s, images - noise)
    x0_hat = fields["x_t"] - fields["t"][:, None, None, None] * fields["velocity"]
    torch.testing.assert_close(x0_hat, images)


def test_weight_zero_changes_nothing(folder: Path) -> None:
    net, objective, host = load("net", "objective", "my_host")
    plain, expected = steps(net, objective)
    with apply_vrpo(host.SPEC, allow_unverified=True, reward_coeff=0, features="none"):
        model, history = steps(net, objective)
    assert history == expected
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with apply_vrpo(host.SPEC, allow_unverified=True):
        _, history = steps(net, objective)
    assert history[-1]["loss"] != expected[-1]["loss"]


def test_a_spec_without_fingerprints_is_refused_unless_allowed(folder: Path) -> None:
    (host,) = load("my_host")
    with pytest.raises(HostChangedError, match=r"Net\.forward: .*allow_unverified=True"):
        apply_vrpo(host.SPEC)


def test_the_page_s_command_prints_the_fingerprint_that_pins_a_method(folder: Path) -> None:
    (command,) = re.findall(r"^python -c '(.*)'$", PAGE, flags=re.MULTILINE)
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment, check=True)
    with pytest.raises(HostChangedError, match=re.escape(f"(fingerprint {shown.stdout[:12]})")):
        apply_vrpo(load("my_host")[0].SPEC)


def test_a_same_and_another_setting(folder: Path) -> None:
    (host,) = load("my_host")
    handle = apply_vrpo(host.SPEC, allow_unverified=True)
    assert apply_vrpo(host.SPEC, allow_unverified=True) is handle
    with pytest.raises(PatchConflictError, match="reward_coeff"):
        apply_vrpo(host.SPEC, allow_unverified=True, reward_coeff=0.1)


def test_features_host_is_an_error_without_an_alignment_loss(folder: Path) -> None:
    (host,) = load("my_host")
    assert isinstance(host.SPEC, HostSpec)
    with pytest.raises(ConfigError, match="no alignment loss of its own"):
        apply_vrpo(host.SPEC, allow_unverified=True, features="host")
    assert not active_handles()


@pytest.mark.slow
def test_as_a_script(folder: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, env=environment, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "vrpo/reward/semantic" in shown.stdout


# ---- with an alignment loss of its own ----


def aligned_steps(net: ModuleType, count: int = 4) -> tuple[torch.nn.Module, list[tuple[float, float]]]:
    torch.manual_seed(0)
    model, loss, z = net.RepaNet(), net.AlignedLoss(), torch.randn(8, 64, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels, history = torch.rand(8, 3, 16, 16), torch.arange(8), []
    for _ in range(count):
        denoising, alignment = loss(model, images, labels, z)
        assert denoising.shape == alignment.shape == ()
        optimizer.zero_grad()
        (denoising + 0.5 * alignment).backward()
        optimizer.step()
        history.append((denoising.item(), alignment.item()))
    return model, history


def test_a_host_with_an_alignment_loss_has_it_replaced_by_the_same_cosine(folder: Path) -> None:
    net, host = load("repa_net", "my_repa")
    plain, expected = aligned_steps(net)
    assert net.AlignedLoss.compared == 4 * 8
    for settings, compared in (({"reward_coeff": 0.0}, 4), ({"reward_coeff": 0.0, "features": "host"}, 4 * 8)):
        net.AlignedLoss.compared = 0
        with apply_vrpo(host.SPEC, allow_unverified=True, **settings):
            model, history = aligned_steps(net)
        assert net.AlignedLoss.compared == compared
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert history == expected  # nothing was changed
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_its_rewards_train_and_reach_the_tracker(folder: Path) -> None:
    net, host = load("repa_net", "my_repa")
    with apply_vrpo(host.SPEC, allow_unverified=True) as handle:
        assert "accelerate.Accelerator.log" in handle.seams
        model, history = aligned_steps(net)
        tracker = RecordingTracker()
        reset_accelerate()
        accelerator = Accelerator(cpu=True, log_with=tracker)
        accelerator.init_trackers("mine")
        accelerator.log({"alignment": history[-1][1]})
        accelerator.log({"other": 1.0})
        reset_accelerate()
    assert history[-1][1] < history[0][1]
    row, other = tracker.logged
    assert {"alignment", "vrpo/align_cos", "vrpo/reward/semantic"} <= row.keys() and other.keys() == {"other"}
    assert model.projector[0].weight.grad is not None and model.projector[0].weight.grad.any()


def test_its_one_line_applies_it_in_its_script(folder: Path) -> None:
    (folder / "train.py").write_text("from repa_net import RepaNet\nprint(type(RepaNet().vrpo).__name__)\n")
    cli.main(["patch", str(folder), "--host", "my_repa.py:SPEC", "--allow-unverified"])
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "VRPO_ALLOW_UNVERIFIED": "1"}
    script = [sys.executable, str(folder / "train.py")]  # from another folder: its own is on sys.path all the same
    shown = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert shown.stdout == "HostAligner\n", shown.stderr


def test_it_is_named_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.py").write_text("from repa_net import RepaNet\n")
    for host in ("my_repa.py:SPEC", "my_repa:SPEC"):
        capsys.readouterr()
        cli.main(["check", str(folder), "--host", host, "--allow-unverified"])
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("result      my_repa: can be applied with no line: ")
        assert f"vrpo_plugin.launch --vrpo-host {host} {folder}/train.py ..." in first
        cli.main(["patch", str(folder), "--host", host, "--allow-unverified"])
        line = "import vrpo_plugin; vrpo_plugin.apply_vrpo('my_repa:SPEC')  # vrpo-plugin"
        assert (folder / "train.py").read_text().splitlines()[1] == line
        cli.main(["unpatch", str(folder), "--host", host])
        assert (folder / "train.py").read_text() == "from repa_net import RepaNet\n"
