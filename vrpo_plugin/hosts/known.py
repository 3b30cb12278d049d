"""The supported hosts, a host of one's own, and which of them a folder is."""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vrpo_plugin.config import check_keys
from vrpo_plugin.errors import ConfigError, HostNotFoundError
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.dit import DIT
from vrpo_plugin.hosts.irepa import IREPA
from vrpo_plugin.hosts.lightningdit import LIGHTNINGDIT
from vrpo_plugin.hosts.reg import REG
from vrpo_plugin.hosts.repa import REPA
from vrpo_plugin.hosts.repa_t2i import REPA_T2I
from vrpo_plugin.hosts.repae import REPAE
from vrpo_plugin.hosts.sit import SIT
from vrpo_plugin.patching.fingerprint import Finding, inspect_point, read_tree

HOSTS: dict[str, HostSpec] = {spec.name: spec for spec in (REPA, REPA_T2I, REG, IREPA, SIT, DIT, REPAE, LIGHTNINGDIT)}
_LIKENESS = {"known": 4, "changed": 3, "signature": 1, "missing": 0}


@dataclass(frozen=True)
class Candidate:
    """A host, and what a folder has of it.

    Attributes:
        spec: the host.
        folder: where its scripts would be.
        findings: its definitions there.
    """

    spec: HostSpec
    folder: Path
    findings: tuple[Finding, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Files with a definition that are not there."""
        return tuple(file for file in self.spec.files if not os.path.isfile(self.folder / file))

    @property
    def misfits(self) -> tuple[Finding, ...]:
        """Definitions that cannot be wrapped: missing, or with other parameters."""
        return tuple(one for one in self.findings if one.status in ("missing", "signature"))

    @property
    def fits(self) -> bool:
        """Model and loss have the host's parameters; the rest may differ, which applying refuses."""
        calls = (self.spec.model, self.spec.loss)
        return not self.missing and not any(one.point in calls for one in self.misfits)

    @property
    def likeness(self) -> tuple[bool, float, int]:
        """For ranking: whether it fits, and how many of its definitions are the host's."""
        score = sum(_LIKENESS[one.status] + _shared_parameters(one) for one in self.findings)
        return self.fits, score / len(self.findings), len(self.findings)


def _shared_parameters(finding: Finding) -> float:
    """Tells two hosts apart whose definitions both have other parameters: the share of names in common."""
    there, expected = {*finding.parameters}, {*finding.point.parameters}
    return len(there & expected) / (len(there | expected) or 1)


def find_spec(name: str, folder: Path | None = None) -> HostSpec:
    """The host of that name, or of one's own.

    Args:
        name: of a supported host; or ``file.py:NAME`` or ``module:NAME``, a :class:`HostSpec` of one's own.
        folder: of the host's scripts, where such a module is looked for too.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if ":" in name:
        return _own_spec(name, folder)
    check_keys([name], HOSTS, subject="host")
    return HOSTS[name]


def _own_spec(name: str, folder: Path | None) -> HostSpec:
    source, _, attribute = name.rpartition(":")
    do = "Give file.py:NAME or module:NAME, where NAME is a HostSpec (docs/hosts.md)."
    path = sys.path
    sys.path = [*path, *([str(folder)] if folder is not None else [])]
    try:
        if source.endswith(".py"):
            if folder is not None and not os.path.isfile(source):
                source = str(folder / source)
            located = importlib.util.spec_from_file_location(Path(source).stem, source)
            if located is None or located.loader is None or not os.path.isfile(source):
                raise ConfigError(f"host {name}", expected="a Python file", got=f"no file {source}", do=do)
            module = importlib.util.module_from_spec(located)
            located.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not (source == error.name or source.startswith(error.name + ".")):
            raise  # what the module itself lacks
        got = f"no module named {error.name!r}"
        raise ConfigError(f"host {name}", expected="a module that can be imported", got=got, do=do) from error
    finally:
        sys.path = path
    found = getattr(module, attribute, None)
    if not isinstance(found, HostSpec):
        specs = [key for key, value in vars(module).items() if isinstance(value, HostSpec)]
        got = f"{type(found).__name__}; it holds {', '.join(specs) or 'no HostSpec'}"
        raise ConfigError(f"host {name}", expected=f"a HostSpec {attribute!r}", got=got, do=do)
    return found


def candidate(root: Path, spec: HostSpec) -> Candidate:
    """One host against a folder. A folder of the repository's scripts (iREPA's ``ldm``) counts like the repository.

    Raises:
        HostChangedError: a file with a definition is no Python source.
    """
    folders = dict.fromkeys((root / spec.folder, root))
    found = [Candidate(spec, one, tuple(inspect_point(one, point) for point in spec.points)) for one in folders]
    return max(found, key=lambda one: one.likeness)


def require_folder(root: Path) -> None:
    """Refuses what is no folder.

    Raises:
        HostNotFoundError: so it is.
    """
    # Not Path's own: it raises where a folder may not be searched or a name is too long.
    if not os.path.isdir(root):
        got = "a file" if os.path.exists(root) else "nothing there"
        raise HostNotFoundError(str(root), expected="a folder", got=got, do="Give a checkout's folder.")


def find_candidates(root: Path) -> list[Candidate]:
    """Every host against a folder, the nearest first: the one with most of its definitions there.

    Raises:
        HostNotFoundError: the folder does not exist.
        HostChangedError: a file with a definition is no Python source.
    """
    require_folder(root)
    return sorted((candidate(root, spec) for spec in HOSTS.values()), key=lambda one: one.likeness, reverse=True)


def detect_hosts(root: Path) -> list[tuple[HostSpec, Path]]:
    """Hosts that a folder holds, by the parameters of their model and loss, with the folder of their scripts.

    Of several repositories that fit, the one with most of its definitions there.

    Raises:
        HostNotFoundError: none; the nearest is named, and what it lacks.
        HostChangedError: a file with a definition is no Python source.
    """
    candidates = find_candidates(root)
    if not candidates[0].fits:
        raise no_host(root, candidates[0])
    repository = candidates[0].spec.repository
    fitting = {
        one.spec.name: (one.spec, one.folder) for one in candidates if one.fits and one.spec.repository == repository
    }
    return [fitting[name] for name in HOSTS if name in fitting]


def host_of_script(script: Path) -> HostSpec:
    """The host that a training script belongs to, by its name or by the model that it imports.

    Raises:
        HostNotFoundError: no host, or several.
        HostChangedError: a file with a definition, or the script, is no Python source.
    """
    folder = script.resolve().parent
    candidates = find_candidates(folder)
    if not candidates[0].fits:
        raise no_host(folder, candidates[0])
    ours = [one for one in candidates if one.spec.repository == candidates[0].spec.repository and not one.missing]
    named = [one for one in ours if any(Path(line.file).name == script.name for line in one.spec.insertions)]
    imported = imported_modules(script)
    chosen = named or [one for one in ours if one.spec.model.module in imported] or [one for one in ours if one.fits]
    if len(chosen) > 1:
        raise HostNotFoundError(
            str(script),
            expected="one host",
            got=", ".join(sorted(one.spec.name for one in chosen)),
            do="Name it: --vrpo-host NAME.",
        )
    if not chosen[0].fits:  # one of the repository's other scripts may fit where this one's own definitions do not
        raise no_host(folder, chosen[0])
    return chosen[0].spec


def imported_modules(script: Path) -> set[str]:
    """Names of the modules that a script imports, anywhere in it.

    Raises:
        HostNotFoundError: it cannot be read.
        HostChangedError: it is no Python source.
    """
    names: set[str] = set()
    for node in ast.walk(read_tree(script)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def no_host(root: Path, nearest: Candidate) -> HostNotFoundError:
    """The error of a folder that is no host: the nearest one, and what keeps the folder from being it."""
    spec, do = nearest.spec, "Give the checkout's folder; for a fork, write a HostSpec (docs/hosts.md)."
    if not any(one.fingerprint for one in nearest.findings):
        repositories: Sequence[str] = sorted({spec.repository for spec in HOSTS.values()})
        expected, got = f"a checkout of one of {', '.join(repositories)}", "a folder with no model or loss of theirs"
    elif nearest.missing:
        there = [file for file in spec.files if file not in nearest.missing]
        expected = f"{', '.join(spec.files)} of {spec.repository}, the nearest host"
        got = f"{', '.join(there)} without {', '.join(nearest.missing)}"
    else:
        misfit = nearest.misfits[0]
        wanted, where = " ".join(misfit.point.parameters), f"{misfit.point.file}: {misfit.point.name}"
        expected = f"{where}({wanted}) of {spec.repository}, the nearest host"
        got = f"parameters ({' '.join(misfit.parameters)})" if misfit.status == "signature" else misfit.reason
    return HostNotFoundError(str(root), expected=expected, got=got, do=do)
