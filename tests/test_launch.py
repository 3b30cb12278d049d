"""The launcher: what it makes of a command line, and a host's script under it as under plain python."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes.host_folders import PACKAGES, ROOT, SMALL, imports_from, process_state, reset_accelerate
from fakes.host_trees import contents

from vrpo_plugin import launch
from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, HostChangedError
from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.hosts.options import KEYS
from vrpo_plugin.launch import Command, parse_command
from vrpo_plugin.patching.handle import active_handles

REPO = Path(__file__).resolve().parents[1]
TRAIN = ("--max-train-steps", "3", "--batch-size", "8")
LAUNCH = ("-m", "vrpo_plugin.launch", "--vrpo-allow-unverified")
SIZES = [f"--vrpo-{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
NOTHING = ("--vrpo-reward-coeff", "0", "--vrpo-features", "host")
PROBE = """
import json, sys
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__}))
"""


# ---- the command line ----


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_needs_no_script(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    launch.main([option])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: ") and "example:" in lines
    assert [line for line in lines if len(line) > 120] == []
    options = [line for line in lines if line.startswith("  --vrpo-")]
    explained = [lines[lines.index(line) + 1].strip() for line in options]
    assert len(options) == len(KEYS) + 3 and all(len(text.split()) > 2 for text in explained)


def test_help_behind_the_script_is_the_scripts() -> None:
    assert parse_command(["train.py", "--help"]).arguments == ["--help"]


def test_our_options_come_first_and_the_scripts_arguments_stay() -> None:
    assert parse_command(["train.py"]) == Command(Path("train.py"), [])
    odd = ["--x=--vrpo-config", "-vrpo-host", "--", "-m", "a b", "", "--vrpo", "--max-train-steps=3", "train.py", "ü"]
    command = parse_command(["--vrpo-reward-coeff", "0.5", "--vrpo-host=repa", "ldm/train.py", *odd])
    assert command == Command(Path("ldm/train.py"), odd, {"reward_coeff": "0.5"}, host="repa")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--vrpo-reward_coeff", "-1"], {"reward_coeff": "-1"}),
        (["--vrpo-critic-checkpoint=a-b=c.pt"], {"critic_checkpoint": "a-b=c.pt"}),
        (["--vrpo-reward-weights", "semantic=1,perceptual=2"], {"reward_weights": "semantic=1,perceptual=2"}),
        (["--vrpo-encoder="], {"encoder": ""}),
        (["--vrpo-allow-unverified"], {"allow_unverified": "true"}),
        (["--vrpo-no-critic-trainable"], {"critic_trainable": "false"}),
        (["--vrpo-critic-trainable=false"], {"critic_trainable": "false"}),
        (["--vrpo-critic-trainable", "false"], {"critic_trainable": "false"}),
        (["--vrpo-critic-width", "4", "--vrpo-critic-width=8"], {"critic_width": "8"}),
    ],
)
def test_ways_to_write_an_option(options: list[str], settings: dict[str, str]) -> None:
    assert parse_command([*options, "train.py"]) == Command(Path("train.py"), [], settings)


def test_options_of_the_launcher_itself() -> None:
    command = parse_command(["--vrpo-config", "a.yaml", "--vrpo-host", "sit", "--vrpo-dry-run", "train.py"])
    assert command == Command(Path("train.py"), [], config="a.yaml", host="sit", dry_run=True)
    for text, value in {"true": True, "True": True, "1": True, "false": False, "0": False}.items():
        assert parse_command([f"--vrpo-dry-run={text}", "train.py"]).dry_run is value
    assert all(f"--vrpo-{key.replace('_', '-')}\n" in launch.help_text() for key in KEYS)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "script: expected train.py, got nothing. usage: "),
        (["--vrpo-dry-run"], "script: expected train.py, got nothing. usage: "),
        (["--exp-name", "train.py"], "script: expected train.py, got --exp-name. usage: "),
        (["--vrpo-reward-coef", "1", "train.py"], "got 'reward_coef'. Did you mean 'reward_coeff'?"),
        (["--vrpo-dryrun", "train.py"], "command line: VRPO setting key: expected one of "),
        (["--vrpo-=1", "train.py"], "got ''. Remove it."),
        (["--vrpo-no-reward-coeff", "train.py"], "got 'no_reward_coeff'. Did you mean 'reward_coeff'?"),
        (["--vrpo-reward-coeff"], "--vrpo-reward_coeff: expected a value, got none. usage: "),
        (["--vrpo-dry-run=maybe", "train.py"], "--vrpo-dry-run: expected true or false, got maybe. usage: "),
        (["train.py", "--a", "--vrpo-host", "repa"], "--vrpo-host: expected our options before the script, got behind"),
        (["train.py", "--vrpo-unknown=1"], "--vrpo-unknown=1: expected our options before the script, got behind it."),
    ],
)
def test_a_wrong_command_line(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command(argv)
    assert text in str(caught.value)
    with pytest.raises(SystemExit) as end:  # one line and a status, no traceback
        launch.main(argv)
    assert end.value.code == f"ConfigError: {caught.value}"


# ---- a script, in this process ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the fake REPA; what a launched script leaves in the process is taken away again."""
    shutil.copytree(ROOT / "repa", tmp_path / "host", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as '-m' puts the current folder first
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    # Whatever the launcher puts on sys.path, the names of the host's modules are free before and after.
    with imports_from(tmp_path / "host", PACKAGES), process_state():
        del sys.path[:2]
        yield tmp_path / "host"
        for handle in active_handles():
            handle.remove()
        sys.path[:0] = ["", ""]


def run_main(*argv: str) -> None:
    launch.main(["--vrpo-allow-unverified", *SIZES, *argv])


def test_a_script_is_run_as_by_python_and_is_told_where_it_never_trained(folder: Path, capsys: Any) -> None:
    (folder / "probe.py").write_text(PROBE)
    odd = ["--x=--vrpo-config", "--", "-m", "a b", "", "train.py", "ü"]
    expected = r"repa: SiT\.__init__, SILoss\.__call__: expected the patched loss to call the patched model"
    with pytest.raises(HostChangedError, match=expected):
        run_main("--vrpo-host", "repa", "host/probe.py", *odd)
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said == {"argv": ["host/probe.py", *odd], "path": str(folder), "name": "__main__", "file": "host/probe.py"}
    assert str(folder.parent) not in sys.path  # the current folder, which '-m' puts there
    assert "sihyun-yu/REPA: SiT.__init__, SiT.forward, SILoss.__call__" in shown.err
    # A model alone is not training.
    (active,) = active_handles()
    active.remove()
    (folder / "probe.py").write_text("from models.sit import SiT; SiT(decoder_hidden_size=32, qk_norm=False)")
    with pytest.raises(HostChangedError, match=r"repa: SILoss\.__call__: "):
        run_main("--vrpo-host", "repa", "host/probe.py")


def test_the_scripts_own_end_passes_through(folder: Path) -> None:
    (folder / "ends.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit) as end:
        run_main("--vrpo-host", "repa", "host/ends.py")
    assert end.value.code == 3
    (folder / "ends.py").write_text("def work():\n    raise KeyError('of the host')\n\n\nwork()\n")
    with pytest.raises(KeyError, match="of the host") as caught:
        run_main("--vrpo-host", "repa", "host/ends.py")
    last = caught.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1, last.name) == ("ends.py", 2, "work")


def test_a_dry_run_says_everything_and_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, modules, path = contents(folder.parent), {*sys.modules}, [*sys.path]
    (folder / "train.py").write_text((folder / "train.py").read_text() + "raise SystemExit('it ran')\n")
    before = contents(folder.parent)
    options = ["--vrpo-dry-run", "--vrpo-allow-unverified", "--vrpo-reward-coeff", "0.5"]
    assert launch.main([*options, "host/train.py", "--output-dir", "out"]) is None
    lines = capsys.readouterr().out.splitlines()
    launch_line = f"accelerate launch -m vrpo_plugin.launch {folder}/train.py ..."
    assert lines[0] == f"result      repa: can be applied with no line: {launch_line}"
    assert f"host        repa (sihyun-yu/REPA) in {folder}" in lines
    assert any(line.startswith("seam        models/sit.py: SiT.forward: CHANGED: ") for line in lines)
    assert f"setting     reward_coeff = 0.5 (default {VRPOConfig().reward_coeff})" in lines
    assert [line for line in lines if line.startswith("compat      sit_s: ")]
    assert active_handles() == ()
    assert (contents(folder.parent), {*sys.modules}, sys.path, sys.argv) == (before, modules, path, ["launch"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "SiT.forward"),  # the fake's bodies are not those of the known commit
        (["--vrpo-allow-unverified", "--vrpo-path-type", "cosine"], "path_type: expected unset"),
        (["--vrpo-allow-unverified", "--vrpo-proj-coeff", "1"], "proj_coeff: expected unset"),
        (["--vrpo-allow-unverified", "--vrpo-encoder", "dinov2-vit-b"], "encoder: expected unset: repa trains with"),
        (["--vrpo-allow-unverified", "--vrpo-compat", "cont_dir"], "compat of repa"),
        (["--vrpo-allow-unverified", "--vrpo-host", "sit"], "no readable file"),
    ],
)
def test_a_dry_run_of_what_applying_refuses_says_so_first_and_ends_with_1(
    options: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        launch.main(["--vrpo-dry-run", *options, "host/train.py"])
    refusal = str(end.value.code)
    first = capsys.readouterr().out.splitlines()[0]
    assert "cannot be applied: " in first and text in first
    with pytest.raises(SystemExit) as end:  # and so it is
        launch.main([*options, "host/train.py"])
    assert end.value.code == refusal or "no readable file" in text


def test_a_dry_run_is_said_by_one_process(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    launch.main(["--vrpo-dry-run", "--vrpo-allow-unverified", "host/train.py"])
    with pytest.raises(SystemExit) as end:
        launch.main(["--vrpo-dry-run", "host/train.py"])
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "")


def test_the_one_line_in_a_launched_script_is_the_launchers_patch(folder: Path) -> None:
    """Its settings come from the launcher; settings of its own are a conflict, said in one line."""
    code = "import vrpo_plugin; handle = vrpo_plugin.apply_vrpo_to_repa({}); print(handle.seams)\nraise SystemExit(5)"
    (folder / "train.py").write_text(code.format(""))
    with pytest.raises(SystemExit) as end:
        run_main("--vrpo-reward-coeff", "0.25", "--vrpo-host", "repa", "host/train.py")
    assert end.value.code == 5
    (active,) = active_handles()
    assert active.config[0].reward_coeff == 0.25
    active.remove()
    (folder / "train.py").write_text(code.format("reward_coeff=0.75, allow_unverified=True"))
    with pytest.raises(SystemExit) as end:
        run_main("--vrpo-reward-coeff", "0.25", "--vrpo-host", "repa", "host/train.py")
    text = str(end.value.code)
    assert text.startswith("PatchConflictError: patch 'repa': ") and text.endswith("take it out by 'vrpo unpatch'.")
    assert "reward_coeff 0.25 -> 0.75" in text and "VRPOConfig(" not in text and "\n" not in text


OWN_HOST = """
from dataclasses import replace
from vrpo_plugin.hosts.repa import REPA
SPEC = replace(REPA, name="mine", repository="me/mine")
"""


OWN_NAMES = ["my_host.py:SPEC", "host/my_host.py:SPEC", "my_host:SPEC", "{folder}/my_host.py:SPEC"]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_host_of_ones_own(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my_host.py").write_text(OWN_HOST)
    (folder / "probe.py").write_text("import sys; sys.exit(4)")
    host = name.format(folder=folder)
    launch.main(["--vrpo-dry-run", "--vrpo-allow-unverified", "--vrpo-host", host, "host/probe.py"])
    assert "host        mine (me/mine) in " in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        run_main("--vrpo-host", host, "host/probe.py")
    assert end.value.code == 4 and [handle.name for handle in active_handles()] == ["mine"]
    sys.modules.pop("my_host", None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.py:SPEC", "host none.py:SPEC: expected a Python file, got no file "),
        ("no_module:SPEC", "host no_module:SPEC: expected a module that can be imported, got no module named"),
        ("my_host.py:SPECS", "host my_host.py:SPECS: expected a HostSpec 'SPECS', got NoneType; it holds REPA, SPEC. "),
        ("my_host.py:replace", "expected a HostSpec 'replace', got function; it holds REPA, SPEC. Give file.py:NAME"),
    ],
)
def test_a_host_of_ones_own_that_is_none(name: str, text: str, folder: Path) -> None:
    (folder / "my_host.py").write_text(OWN_HOST)
    with pytest.raises(SystemExit) as end:
        run_main("--vrpo-host", name, "host/train.py")
    assert text in str(end.value.code) and "\n" not in str(end.value.code)


def test_apply_vrpo_finds_the_host_of_its_script(folder: Path) -> None:
    code = "import vrpo_plugin; handle = vrpo_plugin.apply_vrpo({}allow_unverified=True); handle.remove()"
    for given in ("", "vrpo_plugin.VRPOConfig(reward_coeff=0.125), "):
        script = (folder / "train.py").read_text().replace("from loss import SILoss", code.format(given))
        (folder / "mine.py").write_text(script.partition("def parse_args")[0])
        sys.path.insert(0, str(folder))
        ran = runpy.run_path(str(folder / "mine.py"))
        del sys.path[0]
        assert ran["handle"].name == "repa"
    assert ran["handle"].config[0].reward_coeff == 0.125


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["host/none.py"], "HostNotFoundError: script: expected a training script, got no file host/none.py. Correct"),
        (["host/probe.py"], "expected one host, got repa, repa_t2i. Name it: --vrpo-host NAME."),
        (["--vrpo-host", "rep", "host/train.py"], "ConfigError: host key: expected one of "),
        (["--vrpo-host", "sit", "host/train.py"], "HostNotFoundError: sit: expected module transport.transport of "),
        (["--vrpo-config", "none.yaml", "host/train.py"], "ConfigError: none.yaml: expected a YAML or JSON mapping of"),
        (
            ["--vrpo-path-type", "cosine", "host/train.py"],
            "ConfigError: path_type: expected unset: the host's own path",
        ),
        (["--vrpo-no-allow-unverified", "host/train.py"], "HostChangedError: "),
        (["probe.py"], "HostNotFoundError: "),
    ],
)
def test_what_cannot_be_started_ends_in_one_line(argv: list[str], text: str, folder: Path) -> None:
    for place in (folder, folder.parent):
        (place / "probe.py").write_text("raise AssertionError('it ran')")
    (folder / "train.py").write_text("raise AssertionError('it ran')")
    if "sit" in argv:
        (folder / "models.py").write_text("")
        shutil.rmtree(folder / "models")
    with pytest.raises(SystemExit) as end:
        run_main(*argv)
    assert text in str(end.value.code) and "\n" not in str(end.value.code)
    assert active_handles() == ()


def test_the_host_can_be_named_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "probe.py").write_text("import sys; sys.exit(4)")
    monkeypatch.setenv("VRPO_HOST", "repa_t2i")
    with pytest.raises(SystemExit) as end:
        run_main("host/probe.py")
    assert end.value.code == 4
    assert [handle.name for handle in active_handles()] == ["repa_t2i"]
    assert "repa_t2i" in HOSTS


# ---- training, in processes of its own ----


def spawn(command: Sequence[str], cwd: Path, **environ: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VRPO_")}
    path = os.pathsep.join(map(str, (REPO, REPO / "tests", PACKAGES)))
    kept |= {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=kept | environ, **pipes)


def records_of(out: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the fake host's script prints of itself, and of its three steps and their result."""
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    said, *others = [record for record in records if "argv" in record]
    assert all(other == said for other in others)  # of every process
    steps = [record for record in records if "argv" not in record]
    assert [step.get("step") for step in steps] == [1, 2, 3, None] and steps[3].keys() == {"parameters", "random"}
    return said, steps


def ended(process: subprocess.Popen[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return records_of(out)


def test_launched_is_the_one_line_and_weight_zero_is_plain_python(folder: Path, capsys: Any) -> None:
    def run_here() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        sys.argv, sys.path[:0] = ["host/train.py", *TRAIN], [str(folder)]
        capsys.readouterr()
        runpy.run_path("host/train.py", run_name="__main__")
        reset_accelerate()
        del sys.path[0]
        return records_of(capsys.readouterr().out)

    zero = {"VRPO_REWARD_COEFF": "0", "VRPO_FEATURES": "host"}
    both = [
        spawn([sys.executable, *LAUNCH, *SIZES, "host/train.py", *TRAIN], folder.parent),
        spawn([sys.executable, *LAUNCH, "host/train.py", *TRAIN], folder.parent, **zero),
    ]
    launched, nothing = (ended(process) for process in both)
    plain = run_here()
    assert nothing == plain
    assert plain[0]["argv"] == ["host/train.py", *TRAIN]
    script, anchor = folder / "train.py", "from loss import SILoss\n"
    assert anchor in script.read_text()
    line = f"import vrpo_plugin; vrpo_plugin.apply_vrpo_to_repa(**{ {**SMALL, 'allow_unverified': True} })\n"
    script.write_text(script.read_text().replace(anchor, anchor + line))
    assert launched == run_here()
    assert launched[1][1]["loss"] != plain[1][1]["loss"]


def test_a_process_hands_on_the_scripts_status_and_words(folder: Path) -> None:
    (folder / "ends.py").write_text("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    run = spawn([sys.executable, *LAUNCH, "--vrpo-host", "repa", "host/ends.py"], folder.parent)
    out, error = run.communicate(timeout=300)
    assert (run.returncode, out) == (3, "out\n")
    assert error.endswith("err\n") and "Traceback" not in error


@pytest.mark.slow
def test_two_processes_under_accelerate(folder: Path) -> None:
    results = []
    for options in ((*LAUNCH, *NOTHING), (*LAUNCH, *SIZES), ()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port)
        results.append(
            ended(spawn([sys.executable, "-m", *accelerate, *options, str(folder / "train.py"), *TRAIN], folder.parent))
        )
    nothing, launched, plain = results
    assert nothing == plain
    assert launched[0] == plain[0] and launched[1] != plain[1]
