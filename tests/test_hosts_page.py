"""docs/hosts.md says of hosts, settings, shims and breakages what the code says, no more and no less."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import vrpo_plugin
from vrpo_plugin.hosts import compat
from vrpo_plugin.hosts.compat import Shim
from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.hosts.libraries import libraries_of
from vrpo_plugin.hosts.options import KEYS, HostOptions

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "hosts.md").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """Rows below the head of the first table under a heading."""
    section = PAGE.split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[0].splitlines()[2:]]


def test_every_host_with_its_commit_and_scripts() -> None:
    rows = [row[:3] for row in table("## Supported hosts")]
    expected = []
    for spec in HOSTS.values():
        (commit,) = {commit for point in spec.points for commit in point.fingerprints}
        scripts = ", ".join(f"`{(Path(spec.folder) / one.file).as_posix()}`" for one in spec.insertions)
        expected.append([f"`{spec.name}`", f"{spec.repository}@{commit}", scripts])
    assert rows == expected


def test_every_function_of_the_one_line() -> None:
    text = PAGE.split("There is one such function per host: ")[1].split(". ")[0]
    names = [name if name.startswith("apply") else f"apply_vrpo_to{name}" for name in re.findall(r"`(\w+)`", text)]
    assert names == [f"apply_vrpo_to_{name}" for name in HOSTS]
    assert all(hasattr(vrpo_plugin, name) for name in names)


def test_every_option_with_its_default() -> None:
    said = {"none": None, "`false`": False}
    rows = {row[0].strip("`"): said.get(row[1], row[1].strip("`")) for row in table("## Settings")}
    assert rows == {
        f.name: str(f.default) if isinstance(f.default, int) and f.default else f.default for f in fields(HostOptions)
    }


def test_every_setting_in_an_example_exists() -> None:
    flags = {name.replace("-", "_") for name in re.findall(r"--vrpo-([\w-]+)", PAGE)}
    variables = {name.lower() for name in re.findall(r"VRPO_([A-Z_]+)=", PAGE)}
    assert flags <= KEYS | {"config", "host", "dry_run"} and flags
    assert variables <= KEYS and variables


def test_every_shim_with_its_hosts_and_no_other() -> None:
    shims = [value for value in vars(compat).values() if isinstance(value, Shim)]
    used = {shim.name: [name for name, spec in HOSTS.items() if shim in spec.shims] for shim in shims}
    expected = [[f"`{s.name}`", ", ".join(used[s.name]), s.issue, s.reason, s.until] for s in shims]
    assert all(used.values())
    assert sorted(table("## Compatibility shims")) == sorted(expected)


def test_every_method_of_a_library_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    found: dict[tuple[str, str], list[str]] = {}
    for name, spec in HOSTS.items():
        for one in libraries_of(spec, spec.shims):
            found.setdefault((f"`{one.label}`", one.why), []).append(name)
    rows = table("### What is replaced for the whole process")
    assert sorted(rows) == sorted([[label, ", ".join(names), why] for (label, why), names in found.items()])


def test_every_breakage_without_a_workaround() -> None:
    found: dict[tuple[str, ...], list[str]] = {}
    for name, spec in HOSTS.items():
        for note in spec.notes:
            found.setdefault((f"`{note.file}`", note.when, note.do, note.issue), []).append(name)
    assert table("## Breakages without a workaround") == [[", ".join(names), *cells] for cells, names in found.items()]


def test_links_lead_somewhere() -> None:
    for page in (REPO / "docs" / "hosts.md", REPO / "patches" / "README.md"):
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")) if "://" not in link]
        assert links
        assert [link for link in links if not (page.parent / link).exists()] == []
