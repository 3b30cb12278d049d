"""What a user gets from ``pip install .``."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vrpo_plugin

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPO / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"vrpo_plugin-{vrpo_plugin.__version__}-py3")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vrpo_plugin", f"vrpo_plugin-{vrpo_plugin.__version__}.dist-info"}
    package = [name for name in names if name.startswith("vrpo_plugin/")]
    assert all(name.endswith((".py", "py.typed")) for name in package)
    expected = {str(p.relative_to(REPO)) for p in (REPO / "vrpo_plugin").rglob("*.py")}
    assert expected <= set(package)
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "from vrpo_plugin import VRPOAligner, VRPOConfig; import vrpo_plugin; print(vrpo_plugin.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(str(unpacked))
