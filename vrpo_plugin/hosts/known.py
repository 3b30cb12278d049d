"""The supported hosts, and which of them a folder is."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vrpo_plugin.config import check_keys
from vrpo_plugin.errors import HostNotFoundError, explain
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.dit import DIT
from vrpo_plugin.hosts.repa import IREPA, REG, REPA, REPA_T2I
from vrpo_plugin.hosts.repae import REPAE
from vrpo_plugin.hosts.transport import LIGHTNINGDIT, SIT
from vrpo_plugin.patching.fingerprint import Finding, inspect_point

HOSTS: dict[str, HostSpec] = {spec.name: spec for spec in (REPA, REPA_T2I, REG, IREPA, SIT, DIT, REPAE, LIGHTNINGDIT)}


@dataclass(frozen=True)
class Candidate:
    """A host, and what keeps a folder from being it.

    Attributes:
        spec: the host.
        folder: where its scripts would be.
        missing: files of the host that are not there.
        misfits: seams that cannot be wrapped: a missing definition, or other parameters; read where no file is
            missing.
    """

    spec: HostSpec
    folder: Path
    missing: tuple[str, ...]
    misfits: tuple[Finding, ...]

    @property
    def fits(self) -> bool:
        """Files and parameters are the host's; its constructor may still be another, which applying refuses."""
        calls = (self.spec.model, self.spec.loss)
        return not self.missing and not any(one.point in calls for one in self.misfits)


def find_spec(name: str) -> HostSpec:
    """The host of that name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    check_keys([name], HOSTS, subject="host")
    return HOSTS[name]


def find_candidates(root: Path) -> list[Candidate]:
    """Every host against a folder, the nearest first.

    A folder of the repository's scripts (iREPA's ``ldm``) counts like the repository.

    Raises:
        HostNotFoundError: the folder does not exist.
        HostChangedError: a file with a seam is no Python source.
    """
    # Not Path's own: it raises where a folder may not be searched or a name is too long.
    if not os.path.isdir(root):
        got = "a file" if os.path.exists(root) else "nothing there"
        raise HostNotFoundError(explain(str(root), expected="a folder", got=got, do="Give a checkout's folder."))
    found = []
    for spec in HOSTS.values():
        folders = dict.fromkeys((root / spec.folder, root))
        missing, folder = min(
            ((tuple(f for f in spec.files if not os.path.isfile(folder / f)), folder) for folder in folders),
            key=lambda pair: len(pair[0]),
        )
        findings = [] if missing else [inspect_point(folder, point) for point in spec.all_points]
        misfits = tuple(one for one in findings if one.status in ("missing", "signature"))
        found.append(Candidate(spec, folder, missing, misfits))
    return sorted(
        found, key=lambda one: (len(one.missing) / len(one.spec.files), len(one.misfits), -len(one.spec.files))
    )


def detect_hosts(root: Path) -> list[tuple[HostSpec, Path]]:
    """Hosts that a folder holds, by its files and the parameters of their seams, with the folder of their scripts.

    Raises:
        HostNotFoundError: none; the nearest is named, and what it lacks.
        HostChangedError: a file with a seam is no Python source.
    """
    candidates = find_candidates(root)
    fitting = {one.spec.name: (one.spec, one.folder) for one in candidates if one.fits}
    if not fitting:
        raise _no_host(root, candidates[0])
    return [fitting[name] for name in HOSTS if name in fitting]


def host_of_script(script: Path) -> HostSpec:
    """The host that a training script belongs to; a script of another name stands for the host's first.

    Raises:
        HostNotFoundError: no host, or several.
        HostChangedError: a file with a seam is no Python source.
    """
    folder = script.resolve().parent
    found = [spec for spec, _ in detect_hosts(folder)]
    named = [spec for spec in found if _has_script(spec, script)]
    if not named:
        # One of the repository's other scripts may fit where this one's own seams do not.
        for one in find_candidates(folder):
            if _has_script(one.spec, script) and not one.missing and one.spec.repository == found[0].repository:
                raise _no_host(folder, one)
    candidates = named or found
    if len(candidates) > 1:
        raise HostNotFoundError(
            explain(
                str(script),
                expected="one host",
                got=", ".join(spec.name for spec in candidates),
                do="Name it: --vrpo-host NAME.",
            )
        )
    return candidates[0]


def _has_script(spec: HostSpec, script: Path) -> bool:
    return any(Path(one.file).name == script.name for one in spec.insertions)


def _no_host(root: Path, nearest: Candidate) -> HostNotFoundError:
    spec, do = nearest.spec, "Give the checkout's folder; for a fork, write a HostSpec (docs/hosts.md)."
    if len(nearest.missing) == len(spec.files):
        repositories: Sequence[str] = sorted({spec.repository for spec in HOSTS.values()})
        expected, got = f"a checkout of one of {', '.join(repositories)}", "a folder without any of their files"
    elif nearest.missing:
        there = [file for file in spec.files if file not in nearest.missing]
        expected = f"{', '.join(spec.files)} of {spec.repository}, the nearest host"
        got = f"{', '.join(there)} without {', '.join(nearest.missing)}"
    else:
        misfit = nearest.misfits[0]
        wanted, where = " ".join(misfit.point.parameters), f"{misfit.point.file}: {misfit.point.name}"
        expected = f"{where}({wanted}) of {spec.repository}, the nearest host"
        got = f"parameters ({' '.join(misfit.parameters)})" if misfit.status == "signature" else misfit.reason
    return HostNotFoundError(explain(str(root), expected=expected, got=got, do=do))
