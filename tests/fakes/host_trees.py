"""Trees of a few lines that look like a supported host to the plugin: its files, its seams, its scripts."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.known import HOSTS
from vrpo_plugin.patching.fingerprint import SourcePoint, find_definition, fingerprint, read_tree

COMMIT = "0123456"
SCRIPT = """\
\"\"\"A training script.\"\"\"
import os
{anchor}
import sys


def main():
    print(
        os.name,
        sys.argv,
    )


main()
"""


def of_repository(name: str) -> list[HostSpec]:
    """The specs of one repository, by the name of one of them."""
    return [spec for spec in HOSTS.values() if spec.repository == HOSTS[name].repository]


def write_tree(root: Path, name: str) -> Path:
    """Writes the repository of a host, as small as its specs allow; nothing of it can be run."""
    for spec in of_repository(name):
        sources: dict[str, str] = {}
        for file in spec.files:
            sources[file] = _definitions([point for point in spec.points if point.file == file])
        for one in spec.insertions:
            sources[one.file] = SCRIPT.format(anchor=one.anchor)
        for file, source in sources.items():
            path = root / spec.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or source:
                path.write_bytes(source.encode())
    return root


def verify_as_it_is(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tree's seams and scripts those of a known commit, until the test ends."""
    for spec in of_repository(name):
        folder = root / spec.folder
        monkeypatch.setitem(
            HOSTS,
            spec.name,
            replace(
                spec,
                model=_known(folder, spec.model),
                loss=_known(folder, spec.loss) if spec.loss else None,
                verified=tuple(_known(folder, point) for point in spec.verified),
            ),
        )


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Each file's mode and sha256, and each folder's mode, by path."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def scripts_of(root: Path, name: str) -> list[Path]:
    return [root / spec.folder / one.file for spec in of_repository(name) for one in spec.insertions]


def _definitions(points: Iterable[SourcePoint]) -> str:
    methods: dict[str, list[str]] = {}
    for point in points:
        owner, _, method = point.name.rpartition(".")
        space = "    " if owner else ""
        text = f"{space}def {method}({', '.join(point.parameters)}):\n{space}    return 1\n"
        methods.setdefault(owner, []).append(text)
    return "\n\n".join((f"class {owner}:\n" if owner else "") + "\n".join(ones) for owner, ones in methods.items())


def _known(folder: Path, point: SourcePoint) -> SourcePoint:
    node = find_definition(read_tree(folder / point.file), point.name)
    assert node is not None
    return replace(point, fingerprints={COMMIT: fingerprint(node)})
