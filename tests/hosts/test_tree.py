"""The line in every script of a checkout, or in none; what keeps a folder from being a host."""

import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.host_trees import contents, of_repository, scripts_of, verify_as_it_is, write_tree
from hosts.host_runs import checkout

from vrpo_plugin.errors import ConfigError, HostChangedError, HostNotFoundError, PatchConflictError, VRPOError
from vrpo_plugin.hosts import tree
from vrpo_plugin.hosts.known import HOSTS, detect_hosts, host_of_script
from vrpo_plugin.hosts.tree import hosts_in, patch_tree, unpatch_tree
from vrpo_plugin.patching.fingerprint import SourcePoint

REPOSITORIES = ("repa", "reg", "irepa", "sit", "dit", "repae", "lightningdit")
CHECKOUTS = dict(zip(REPOSITORIES, ("REPA", "REG", "iREPA", "SiT", "DiT", "REPA-E", "LightningDiT"), strict=True))


@pytest.fixture(params=REPOSITORIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree at a known commit."""
    write_tree(tmp_path / "host", name)
    verify_as_it_is(tmp_path / "host", name, monkeypatch)
    return tmp_path / "host"


def only(*names: str) -> Callable[..., object]:
    return pytest.mark.parametrize("name", names, indirect=True)


def line_of(script: Path) -> str:
    (line,) = {one.line for spec in HOSTS.values() for one in spec.insertions if one.line in script.read_text()}
    return line


def seam_file(root: Path, name: str) -> Path:
    spec = HOSTS[name]
    return root / spec.folder / (spec.loss or spec.model).file


def seam_method(name: str) -> str:
    spec = HOSTS[name]
    return (spec.loss or spec.model).name.rpartition(".")[2]


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_bytes().decode()
    assert old in text
    file.write_bytes(text.replace(old, new).encode())


# Detection


def test_a_tree_is_its_own_host_alone(root: Path, name: str) -> None:
    expected = [spec.name for spec in of_repository(name)]
    assert [spec.name for spec, _ in detect_hosts(root)] == expected
    assert [place.spec.name for place in hosts_in(root)] == expected


@only("irepa")
def test_the_folder_of_the_scripts_counts_like_the_repository(root: Path) -> None:
    assert detect_hosts(root)[0][1] == root / "ldm"
    assert detect_hosts(root / "ldm")[0][1] == root / "ldm"
    assert hosts_in(root / "ldm")[0].folder == root / "ldm"


def test_a_script_tells_its_host(root: Path, name: str) -> None:
    for spec in of_repository(name):
        for one in spec.insertions:
            assert host_of_script(root / spec.folder / one.file).name == spec.name


@only("repa")
def test_a_script_is_not_taken_for_the_other_one_of_its_repository(root: Path) -> None:
    replace_in(root / "models/sit.py", "def forward(", "def call(")
    assert [spec.name for spec, _ in detect_hosts(root)] == ["repa_t2i"]
    with pytest.raises(HostNotFoundError, match=r"SiT\.forward"):
        host_of_script(root / "train.py")
    assert host_of_script(root / "train_t2i.py").name == "repa_t2i"


@only("repa")
def test_two_hosts_for_a_script_of_another_name(root: Path) -> None:
    (root / "mine.py").write_text("from loss import SILoss")
    with pytest.raises(HostNotFoundError, match=r"got repa, repa_t2i\. Name it: --vrpo-host"):
        host_of_script(root / "mine.py")


@only("repa")
@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("from models.sit import SiT_models", "repa"),
        ("import models.sit as sit", "repa"),
        ("def main():\n    from models import sit", "repa"),
        ("from models.mmdit import MMDiT", "repa_t2i"),
    ],
)
def test_a_script_of_another_name_belongs_to_the_model_that_it_imports(
    root: Path, line: str, host: str, renamed: bool
) -> None:
    """A renamed train.py is no reason to take it for train_t2i.py, the only one of its repository that is left."""
    (root / "mine.py").write_text(line)
    if renamed:
        (root / "train.py").unlink()
    assert host_of_script(root / "mine.py").name == host


@only("repa")
@pytest.mark.parametrize("file", ["models/mmdit.py", "train_t2i.py", "samplers.py"])
def test_what_another_script_needs_does_not_count(root: Path, file: str) -> None:
    """17 of REPA's 20 commits have no models/mmdit.py, which SiT's training never imports."""
    (root / file).unlink(missing_ok=True)
    assert host_of_script(root / "train.py").name == "repa"
    assert hosts_in(root)[0].spec.name == "repa"
    assert patch_tree(root)[0].path.name == "train.py"


def test_a_fork_with_other_bodies_is_its_own_host_still(root: Path, name: str) -> None:
    for file in {one.file for spec in of_repository(name) for one in spec.points}:
        path = root / HOSTS[name].folder / file
        path.write_text(path.read_text().replace("return 1", "return 3"))
    assert detect_hosts(root)[0][0].repository == HOSTS[name].repository
    assert hosts_in(root)[0].spec.repository == HOSTS[name].repository


@only("sit")
def test_a_definition_without_parameters_counts_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train.py").write_text((root / "train.py").read_text() + "\n\ndef other():\n    pass\n")
    for name in ("main", "other", "none"):
        points = (*HOSTS["sit"].verified, SourcePoint("train.py", name, (), {}))
        monkeypatch.setitem(HOSTS, "sit", replace(HOSTS["sit"], verified=points))
        assert host_of_script(root / "train.py").name == "sit"


@pytest.mark.parametrize("name", ["train.py", "loss.py"])
def test_a_script_s_name_alone_is_no_host(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("import torch")
    for call in (detect_hosts, hosts_in):
        with pytest.raises(HostNotFoundError, match=r"a checkout of one of .*, got a folder with no model or loss of"):
            call(tmp_path)


def test_a_missing_file_is_named_with_the_nearest_host(root: Path, name: str) -> None:
    spec = HOSTS[name]
    (root / spec.folder / spec.model.file).unlink()
    for other in of_repository(name)[1:]:
        (root / other.folder / other.model.file).unlink()
    for call in (detect_hosts, hosts_in, patch_tree):
        with pytest.raises(HostNotFoundError) as caught:
            call(root)
        nearest = f"{spec.repository}, the nearest host, got " in str(caught.value) and " without " in str(caught.value)
        assert nearest or name == "repae"  # all that is known of it is in its model's file


@only("sit")
def test_what_is_missing_is_listed(root: Path) -> None:
    (root / "transport/transport.py").unlink()
    with pytest.raises(HostNotFoundError) as caught:
        detect_hosts(root)
    assert str(caught.value) == (
        f"{root}: expected models.py, transport/transport.py, wandb_utils.py of willisma/SiT, the nearest host, got "
        "models.py, wandb_utils.py without transport/transport.py. Give the checkout's folder; for a fork, write a "
        "HostSpec (docs/hosts.md)."
    )


@only("repa")
def test_a_renamed_method_is_named_with_the_nearest_name(root: Path) -> None:
    replace_in(root / "loss.py", "def __call__(", "def __call(")
    with pytest.raises(HostNotFoundError) as caught:
        detect_hosts(root)
    assert (
        "expected loss.py: SILoss.__call__(self model images model_kwargs zs) of sihyun-yu/REPA, the nearest host, got "
        "no such definition; the nearest is SILoss.__call." in str(caught.value)
    )


@only("irepa")
def test_of_two_hosts_with_all_their_files_the_one_with_more_seams_is_the_nearest(root: Path) -> None:
    """The files of REG are there too."""
    replace_in(root / "ldm/loss.py", "def __call__(", "def __call(")
    with pytest.raises(HostNotFoundError, match="of End2End-Diffusion/iREPA, the nearest host"):
        detect_hosts(root / "ldm")
    assert [place.spec.name for place in hosts_in(root / "ldm")] == ["irepa"]


@only("dit")
def test_another_signature_is_told_by_both(root: Path) -> None:
    replace_in(root / "diffusion/respace.py", "(self, model, *args, **kwargs)", "(self, model, x_start)")
    with pytest.raises(HostNotFoundError) as caught:
        detect_hosts(root)
    assert "expected diffusion/respace.py: SpacedDiffusion.training_losses(self model *args **kwargs)" in str(
        caught.value
    )
    assert "got parameters (self model x_start)" in str(caught.value)


@pytest.mark.parametrize("kind", ["nothing", "a file", "empty", "other files"])
def test_a_folder_that_is_no_host(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if kind == "a file":
        folder.write_text("text")
    elif kind != "nothing":
        folder.mkdir()
    if kind == "other files":
        (folder / "setup.py").write_text("")
    before = contents(tmp_path)
    for call in (detect_hosts, hosts_in, patch_tree, unpatch_tree):
        with pytest.raises(HostNotFoundError, match=r"folder: expected (a folder, got|a checkout of one of)"):
            call(folder)
    assert contents(tmp_path) == before


@only("sit")
def test_a_host_by_name_that_is_not_there(root: Path) -> None:
    with pytest.raises(HostNotFoundError, match=r"expected facebookresearch/DiT \(dit\), got no diffusion/respace.py"):
        patch_tree(root, host="dit")
    with pytest.raises(ConfigError, match="Did you mean 'dit'"):
        patch_tree(root, host="dti")


# Patching and unpatching


def test_patch_adds_one_line_to_each_script_and_unpatch_takes_it_out(root: Path, name: str) -> None:
    before, lines = contents(root), {path: path.read_text().splitlines() for path in scripts_of(root, name)}
    states = patch_tree(root)
    assert [(s.path, s.status, s.changed) for s in states] == [(p, "patched", True) for p in lines]
    for path, old in lines.items():
        assert path.read_text().splitlines() == [*old[:3], line_of(path), *old[3:]]
    changed = {key for key, value in contents(root).items() if before[key] != value}
    assert changed == {str(path.relative_to(root)) for path in lines}
    again = contents(root)
    assert not any(state.changed for state in patch_tree(root))
    assert contents(root) == again
    assert [state.changed for state in unpatch_tree(root)] == [True] * len(lines)
    assert contents(root) == before
    assert not any(state.changed for state in unpatch_tree(root))
    assert contents(root) == before


def shift(root: Path, name: str) -> None:
    for script in scripts_of(root, name):
        script.write_bytes(b"# one line more\n" + script.read_bytes())


def dirty(root: Path, name: str) -> None:
    for script in scripts_of(root, name):
        replace_in(script, "os.name", "os.curdir")
    seam = seam_file(root, name)
    seam.write_bytes(b"# a comment\n\n" + seam.read_bytes())


def windows(root: Path, name: str) -> None:
    for path in root.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def no_final_newline(root: Path, name: str) -> None:
    for script in scripts_of(root, name):
        script.write_bytes(script.read_bytes().rstrip(b"\n"))


@pytest.mark.parametrize("change", [shift, dirty, windows, no_final_newline])
def test_a_changed_tree_with_its_anchor_is_patched_right(root: Path, name: str, change: Callable) -> None:
    change(root, name)
    before = contents(root)
    for state in patch_tree(root):
        text = state.path.read_bytes()
        lines = text.splitlines()
        at = lines.index(line_of(state.path).encode())
        assert lines[at - 1].decode() in {one.anchor for spec in of_repository(name) for one in spec.insertions}
        assert text.count(b"\r\n") == (len(lines) if change is windows else 0)
        compile(text, str(state.path), "exec")
    unpatch_tree(root)
    assert contents(root) == before


def rename(root: Path, name: str) -> None:
    replace_in(seam_file(root, name), f"def {seam_method(name)}(", "def other(")


def other_signature(root: Path, name: str) -> None:
    replace_in(seam_file(root, name), f"def {seam_method(name)}(self, ", f"def {seam_method(name)}(self, extra, ")


def other_constructor(root: Path, name: str) -> None:
    spec = HOSTS[name]
    replace_in(root / spec.folder / spec.model.file, "def __init__(self, ", "def __init__(self, extra, ")


def other_body(root: Path, name: str) -> None:
    replace_in(seam_file(root, name), "return 1", "return 2")


def broken_seam(root: Path, name: str) -> None:
    seam_file(root, name).write_bytes(b"def (")


def no_anchor(root: Path, name: str) -> None:
    script = scripts_of(root, name)[-1]
    replace_in(script, of_repository(name)[-1].insertions[-1].anchor, "pass")


def two_anchors(root: Path, name: str) -> None:
    anchor = of_repository(name)[-1].insertions[-1].anchor
    replace_in(scripts_of(root, name)[-1], "import sys", f"import sys\n{anchor}")


def broken_script(root: Path, name: str) -> None:
    replace_in(scripts_of(root, name)[-1], "main()", "main(")


def no_script(root: Path, name: str) -> None:
    for script in scripts_of(root, name):
        script.unlink()


def another_line(root: Path, name: str) -> None:
    replace_in(scripts_of(root, name)[-1], "import sys", "import sys\nimport vrpo_plugin")


def read_only(root: Path, name: str) -> None:
    scripts_of(root, name)[-1].chmod(0o444)


def read_only_folder(root: Path, name: str) -> None:
    scripts_of(root, name)[-1].parent.chmod(0o555)


REFUSED = [
    (rename, HostNotFoundError, "got no such definition"),
    (other_signature, HostChangedError, r"expected parameters \(self, .* got \(self, extra, "),
    (other_constructor, HostChangedError, r"__init__: expected parameters \(self, .* got \(self, extra, "),
    (other_body, HostChangedError, "another body .* allow_unverified"),
    (broken_seam, HostChangedError, "expected Python source"),
    (no_anchor, HostChangedError, "expected '.*', got the nearest import"),
    (two_anchors, HostChangedError, r"once, got it at lines \[3, 5\]"),
    (broken_script, HostChangedError, "expected code that compiles"),
    (no_script, HostNotFoundError, "expected a script of the host, got No such file"),
    (another_line, PatchConflictError, "got at line 5 b'import vrpo_plugin'"),
    (read_only, VRPOError, "no write permission on the file"),
    (read_only_folder, VRPOError, "no write permission on the folder"),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_a_refused_tree_stays_as_it_is(root: Path, name: str, change: Callable, error: type, text: str) -> None:
    change(root, name)
    before = contents(root)
    try:
        with pytest.raises(error, match=text) as caught:
            patch_tree(root)
        assert "\n" not in str(caught.value)
        assert contents(root) == before
    finally:
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_unverified_waives_the_body_and_not_the_signature(root: Path, name: str) -> None:
    other_body(root, name)
    assert all(state.changed for state in patch_tree(root, allow_unverified=True))
    unpatch_tree(root)
    other_signature(root, name)
    with pytest.raises(HostChangedError, match="does not waive a changed signature"):
        patch_tree(root, allow_unverified=True)


@only("repa", "repae")
@pytest.mark.parametrize("change", [no_anchor, two_anchors, another_line, read_only], ids=lambda f: f.__name__)
def test_the_first_script_is_put_back_where_the_second_is_refused(
    root: Path, name: str, change: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(root, name)
    before, written = contents(root), []
    original = tree.patch_file

    def patch_file(*args: object) -> object:
        written.append(original(*args))
        return written[-1]

    monkeypatch.setattr(tree, "patch_file", patch_file)
    with pytest.raises(VRPOError):
        patch_tree(root)
    assert [state.changed for state in written] == [True]  # else nothing was put back
    assert contents(root) == before


@only("repa")
def test_unpatch_too_is_all_or_none(root: Path) -> None:
    patch_tree(root)
    (root / "train_t2i.py").chmod(0o444)
    before = contents(root)
    with pytest.raises(VRPOError, match="no write permission"):
        unpatch_tree(root)
    assert contents(root) == before


@only("repa")
def test_a_script_patched_before_keeps_its_line_where_the_other_is_refused(root: Path) -> None:
    patch_tree(root, script="train.py")
    no_anchor(root, "repa")
    before = contents(root)
    with pytest.raises(HostChangedError):
        patch_tree(root)
    assert contents(root) == before


@only("repa")
def test_one_script_or_one_host(root: Path) -> None:
    assert [state.path.name for state in patch_tree(root, script="train.py")] == ["train.py"]
    assert [state.path.name for state in patch_tree(root, host="repa_t2i")] == ["train_t2i.py"]
    assert [state.path.name for state in unpatch_tree(root, script="train_t2i.py")] == ["train_t2i.py"]
    assert "vrpo" in (root / "train.py").read_text()
    assert "vrpo" not in (root / "train_t2i.py").read_text()
    assert [state.changed for state in unpatch_tree(root, host="repa")] == [True]
    with pytest.raises(ConfigError, match=r"expected one of train\.py, train_t2i\.py, got 'train_t3i\.py'"):
        patch_tree(root, script="train_t3i.py")


@only("repa")
def test_a_script_alone_needs_its_own_seams_alone(root: Path) -> None:
    replace_in(root / "models/mmdit.py", "return 1", "return 2")
    with pytest.raises(HostChangedError, match="MMDiT"):
        patch_tree(root)
    assert [state.changed for state in patch_tree(root, script="train.py")] == [True]


@only("repa")
def test_a_checkout_without_the_second_script_has_one_host(root: Path) -> None:
    (root / "train_t2i.py").unlink()
    assert [state.path.name for state in patch_tree(root)] == ["train.py"]


@only("repa")
def test_a_folder_in_the_second_scripts_place_is_no_missing_script(root: Path) -> None:
    (root / "train_t2i.py").unlink()
    (root / "train_t2i.py").mkdir()
    before = contents(root)
    with pytest.raises(HostNotFoundError, match="something else than a file"):
        patch_tree(root)
    assert contents(root) == before


@only("irepa")
def test_a_script_by_its_path_in_the_repository(root: Path) -> None:
    assert [state.changed for state in patch_tree(root, script="ldm/train.py")] == [True]
    assert [state.changed for state in unpatch_tree(root, script="train.py")] == [True]


@pytest.mark.parametrize("change", [rename, other_signature, other_body, broken_seam], ids=lambda f: f.__name__)
def test_unpatch_works_where_the_host_has_changed_since(root: Path, name: str, change: Callable) -> None:
    change(root, name)
    before = contents(root)
    for script in scripts_of(root, name):
        (one,) = [o for s in of_repository(name) for o in s.insertions if Path(o.file).name == script.name]
        replace_in(script, one.anchor, f"{one.anchor}\n{one.line}")
    assert [state.changed for state in unpatch_tree(root)] == [True] * len(scripts_of(root, name))
    assert contents(root) == before


@only("repa")
def test_unpatch_takes_out_a_line_that_was_given_settings(root: Path) -> None:
    """Also where another script of the checkout holds it as it was."""
    before = contents(root)
    patch_tree(root)
    replace_in(root / "train.py", "apply_vrpo_to_repa()", "apply_vrpo_to_repa(reward_coeff=0.5)")
    assert [(state.path.name, state.changed) for state in unpatch_tree(root)] == [
        ("train.py", True),
        ("train_t2i.py", True),
    ]
    assert contents(root) == before


@only("repa")
@pytest.mark.parametrize("edit", ["; handle = vrpo_plugin.", "\nvrpo_plugin."])
def test_unpatch_leaves_no_script_silently(root: Path, edit: str) -> None:
    patch_tree(root)
    replace_in(root / "train.py", "; vrpo_plugin.", edit)
    before = contents(root)
    with pytest.raises(PatchConflictError, match=r"train\.py: .*Remove vrpo_plugin's lines by hand"):
        unpatch_tree(root)
    assert contents(root) == before


@only("sit")
def test_unpatch_does_not_guess(root: Path) -> None:
    patch_tree(root)
    replace_in(root / "train.py", "; vrpo_plugin.", "\nvrpo_plugin.")
    before = contents(root)
    with pytest.raises(PatchConflictError, match="Remove vrpo_plugin's lines by hand"):
        unpatch_tree(root)
    assert contents(root) == before


# A host of one's own


@only("sit")
def test_a_host_of_ones_own_is_patched_by_its_own_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "my_host.py").write_text(
        "from dataclasses import replace\n"
        "from vrpo_plugin.hosts.base import apply_line\n"
        "from vrpo_plugin.hosts.known import HOSTS\n"
        "from vrpo_plugin.patching.source import Insertion\n"
        "LINE = apply_line('my_host:SPEC')\n"
        "INSERTION = Insertion('train.py', 'import wandb_utils', LINE)\n"
        "SPEC = replace(HOSTS['sit'], name='mine', insertions=(INSERTION,))\n"
    )
    before, name = contents(root), f"{tmp_path}/my_host.py:SPEC"
    assert [place.spec.name for place in hosts_in(root, name)] == ["mine"]
    assert [state.changed for state in patch_tree(root, host=name)] == [True]
    line = "import vrpo_plugin; vrpo_plugin.apply_vrpo('my_host:SPEC')  # vrpo-plugin"
    assert line in (root / "train.py").read_text().splitlines()
    assert [state.changed for state in unpatch_tree(root, host=name)] == [True]
    assert contents(root) == before
    (root / "transport/transport.py").unlink()
    with pytest.raises(HostNotFoundError, match=r"willisma/SiT \(.*my_host\.py:SPEC\), got no transport/transport\.py"):
        patch_tree(root, host=name)


# Real checkouts


@pytest.fixture
def real(name: str, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", "*.png", "*.jpg", "*.pdf")
    return Path(shutil.copytree(checkout(CHECKOUTS[name]), tmp_path / "host", ignore=ignored))


@pytest.mark.host
def test_real_patch_and_unpatch(real: Path, name: str) -> None:
    before = contents(real)
    states = patch_tree(real)
    assert [state.path for state in states] == scripts_of(real, name)
    for state in states:
        compile(state.path.read_bytes(), str(state.path), "exec")
    unpatch_tree(real)
    assert contents(real) == before


@pytest.mark.host
@pytest.mark.parametrize("change", [shift, windows], ids=lambda f: f.__name__)
def test_real_changed_and_patched_right(real: Path, name: str, change: Callable) -> None:
    change(real, name)
    before = contents(real)
    for state in patch_tree(real):
        lines = state.path.read_bytes().splitlines()
        assert lines[(state.line_number or 0) - 1].decode() == line_of(state.path)
        compile(state.path.read_bytes(), str(state.path), "exec")
    unpatch_tree(real)
    assert contents(real) == before


@pytest.mark.host
@pytest.mark.parametrize("change", [rename, read_only], ids=lambda f: f.__name__)
def test_real_refused(real: Path, name: str, change: Callable) -> None:
    change(real, name)
    before = contents(real)
    with pytest.raises(VRPOError):
        patch_tree(real)
    assert contents(real) == before


@pytest.mark.host
def test_real_other_signature(real: Path, name: str) -> None:
    file, method = seam_file(real, name), seam_method(name)
    text = file.read_text()
    at = text.index("self", text.rindex(f"def {method}(")) + len("self")
    file.write_text(text[:at] + ", extra" + text[at:])
    before = contents(real)
    with pytest.raises(HostChangedError, match="extra"):
        patch_tree(real)
    assert contents(real) == before
