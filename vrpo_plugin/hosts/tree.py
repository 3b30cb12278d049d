"""The one line in every script of a checkout: put into all of them or none, and taken out again."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vrpo_plugin.config import check_keys
from vrpo_plugin.errors import HostNotFoundError, VRPOError
from vrpo_plugin.files import replace_bytes
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.known import HOSTS, candidate, find_candidates, find_spec, no_host, require_folder
from vrpo_plugin.patching.fingerprint import verify_points
from vrpo_plugin.patching.source import Insertion, SourceState, our_lines, patch_file, unpatch_file


@dataclass(frozen=True)
class Place:
    """A host in a checkout.

    Attributes:
        spec: the host.
        folder: of its scripts.
        scripts: those that are meant.
    """

    spec: HostSpec
    folder: Path
    scripts: tuple[Insertion, ...]


def hosts_in(root: Path, name: str | None = None) -> list[Place]:
    """Hosts whose files a checkout holds, whether or not they can be patched.

    Args:
        root: the checkout, or the folder of its scripts.
        name: of one host, or of one's own as in ``find_spec``; by default those of the repository that the folder
            resembles most.

    Raises:
        ConfigError: no host has that name.
        HostNotFoundError: files are missing; the nearest host is named, and what it lacks.
        HostChangedError: a file with a seam is no Python source.
    """
    if name is not None:
        spec = find_spec(name, root)
        require_folder(root)
        chosen = candidate(root, spec)
        if chosen.missing:
            got, do = f"no {', '.join(chosen.missing)}", "Give the folder of a checkout of it, or another --host."
            raise HostNotFoundError(str(root), expected=f"{spec.repository} ({name})", got=got, do=do)
        return [Place(spec, chosen.folder, spec.insertions)]
    candidates = find_candidates(root)
    complete = [one for one in candidates if not one.missing]
    if not complete:
        raise no_host(root, candidates[0])
    folders = {one.spec.name: one.folder for one in complete if one.spec.repository == complete[0].spec.repository}
    return [Place(spec, folders[name], spec.insertions) for name, spec in HOSTS.items() if name in folders]


def patch_tree(
    root: Path, *, host: str | None = None, script: str | None = None, allow_unverified: bool = False
) -> list[SourceState]:
    """Verifies the seams of a checkout's hosts, then puts the one line into each of their scripts, or into none.

    Args:
        root: the checkout.
        host: one host by name; by default all of its repository.
        script: one script, by name or by its path in the repository; by default all.
        allow_unverified: accept changed bodies of seams, not changed parameters.

    Returns:
        The state of each script; ``changed`` where the line was put in now.

    Raises:
        ConfigError: no host or script has that name.
        HostNotFoundError: the folder is no such host, or lacks a seam or a script.
        HostChangedError: a seam is of no verified version, or the line has no safe place.
        PatchConflictError: a script holds another line of ours.
        VRPOError: a script cannot be written, or a link leads out of the checkout to it. In every case all scripts
            are as they were.
    """
    places = _with_script(hosts_in(root, host), script)
    there = [place for place in places if any(os.path.lexists(place.folder / one.file) for one in place.scripts)]
    places = there or places  # a checkout may lack one of its repository's scripts
    _refuse_outside(root, places)
    for place in places:
        verify_points(place.folder, place.spec.points, allow_unverified=allow_unverified)
    return _all_or_none(patch_file, places)


def unpatch_tree(root: Path, *, host: str | None = None, script: str | None = None) -> list[SourceState]:
    """Takes our line out of a checkout's scripts, also where the host has changed so that nobody could patch it.

    Args:
        root: the checkout.
        host: one host by name; by default each whose line is there.
        script: as in :func:`patch_tree`.

    Returns:
        The state of each script that was looked at; ``changed`` where the line was taken out now.

    Raises:
        ConfigError: no host or script has that name.
        HostNotFoundError: the folder is no such host.
        HostChangedError: a script is no Python source any more.
        PatchConflictError: a script holds another line of ours than a call with any settings, or ours twice.
        VRPOError: as in :func:`patch_tree`. In every case all scripts are as they were.
    """
    specs = [find_spec(host, root)] if host is not None else HOSTS.values()
    everywhere = [
        Place(spec, folder, spec.insertions) for spec in specs for folder in dict.fromkeys((root / spec.folder, root))
    ]
    chosen: dict[Path, Place] = {}
    for place in _with_script(everywhere, script):
        for one in place.scripts:
            path = place.folder / one.file
            # Several hosts have a train.py: the one whose line it is, else any, which says what is there instead.
            if b"vrpo_plugin" in _bytes_of(path) and (path not in chosen or our_lines(path, one)):
                chosen[path] = replace(place, scripts=(one,))
    _refuse_outside(root, [*chosen.values()])
    if chosen:
        return _all_or_none(unpatch_file, [*chosen.values()])
    return _all_or_none(unpatch_file, _with_script(hosts_in(root, host), script))


def _with_script(places: Sequence[Place], script: str | None) -> list[Place]:
    """The places that have the script, with it alone."""
    if script is None:
        return list(places)
    names = {name for place in places for one in place.scripts for name in _names(place, one)}
    check_keys([script], names, subject="script")
    chosen = [replace(p, scripts=tuple(one for one in p.scripts if script in _names(p, one))) for p in places]
    return [place for place in chosen if place.scripts]


def _names(place: Place, one: Insertion) -> tuple[str, ...]:
    return one.file, (Path(place.spec.folder) / one.file).as_posix()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes() if os.path.isfile(path) else b""  # a pipe would be read for ever
    except OSError:
        return b""


def outside(root: Path, path: Path) -> str:
    """Where a script of a checkout really lies if a link leads out of the checkout, else an empty text."""
    real, folder = os.path.realpath(path), os.path.realpath(root)
    return "" if Path(real).is_relative_to(folder) else real


def _refuse_outside(root: Path, places: Sequence[Place]) -> None:
    """Who names a checkout does not expect changes in another folder."""
    for path in (place.folder / one.file for place in places for one in place.scripts):
        if os.path.isfile(path) and (real := outside(root, path)):
            do = "Give the folder that it leads to, or put a copy of the file in the link's place."
            raise VRPOError(str(path), expected=f"a file inside {root}", got=f"a link to {real}", do=do)


def _all_or_none(work: Callable[[Path, Insertion], SourceState], places: Sequence[Place]) -> list[SourceState]:
    states, done = [], []
    try:
        for place in places:
            for one in place.scripts:
                path = place.folder / one.file
                before = _bytes_of(path)
                states.append(work(place.folder, one))
                if states[-1].changed:
                    done.append((path, before, path.read_bytes()))
    except BaseException:
        for path, before, after in reversed(done):
            replace_bytes(path, after, before)
        raise
    return states
