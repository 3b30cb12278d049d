"""The spec of docs/hosts.md for chuanyangjin/fast-DiT, as it stands there, on the real repository."""

from pathlib import Path

import pytest
from hosts.host_runs import checkout, run_host
from hosts.test_no_encoder_host import critic  # noqa: F401
from hosts.test_outsider import FILES
from hosts.test_patched_hosts import LAUNCH

from vrpo_plugin import cli

pytestmark = pytest.mark.host


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "fast_dit.py").write_text(FILES["fast_dit.py"])
    return f"{tmp_path / 'fast_dit.py'}:SPEC"


def test_check_says_that_it_can_be_used(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", str(checkout("fast-DiT")), "--host", spec])  # no SystemExit
    assert capsys.readouterr().out.startswith("result      fast_dit: can be applied with no line")


def test_it_trains_on_two_processes(spec: str, critic: tuple[str, ...], tmp_path: Path) -> None:  # noqa: F811
    options = ("--vrpo-host", spec, *critic[2:], "--vrpo-log-every", "5")
    plain = run_host("fast-DiT", tmp_path / "plain", processes=2)
    launcher = (*LAUNCH, *options, "--vrpo-features", "none")
    patched = run_host("fast-DiT", tmp_path / "patched", processes=2, launcher=launcher)
    assert patched.losses[0] == plain.losses[0] and patched.losses[1:] != plain.losses[1:]
    assert [r["random"] for r in patched.of("step")] == [r["random"] for r in plain.of("step")], "a draw by the plugin"
    assert [r["parameters"] for r in patched.of("step", 0)] == [r["parameters"] for r in patched.of("step", 1)]
    (log,) = patched.folder.glob("out/*/log.txt")
    assert "reward/semantic" in log.read_text()

    off = (*LAUNCH, "--vrpo-host", spec, "--vrpo-features", "none", "--vrpo-reward-coeff", "0")
    untouched = run_host("fast-DiT", tmp_path / "off", processes=2, launcher=off)
    assert untouched.hashes == plain.hashes and untouched.losses == plain.losses

    hidden = run_host("fast-DiT", tmp_path / "hidden", processes=2, launcher=(*LAUNCH, *options), check=False)
    assert hidden.returncode != 0 and "use_reentrant=False" in hidden.stderr
