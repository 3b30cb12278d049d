"""Attributes of a host's classes and modules, replaced together and put back together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType, ModuleType, TracebackType
from typing import Any

from vrpo_plugin.errors import HostNotFoundError, PatchConflictError

MARKER = "__vrpo_patch__"
_ABSENT = object()
_active: list["PatchHandle"] = []


@dataclass(frozen=True)
class Seam:
    """One attribute of a class or module, and what takes its place.

    Attributes:
        owner: a class or a module; not an instance, whose dunder methods Python ignores.
        name: of the attribute.
        wrap: builds the replacement from the attribute as it stands in the owner's or a base's ``__dict__``
            (a staticmethod, classmethod or property arrives as that object), or from None where there is none.
            A function that replaces a function uses ``functools.wraps``.
        label: name for messages and counters: ``loss.SILoss.__call__``.
        required: False sets the attribute where there is none; removal deletes it again.
    """

    owner: Any
    name: str
    wrap: Callable[[Any], Any]
    label: str
    required: bool = True


@dataclass(frozen=True)
class Hook:
    """Something that a library lets one add, and take away again; nothing is replaced.

    Attributes:
        label: name for messages.
        add: adds it, and returns what takes it away.
    """

    label: str
    add: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class _Replacement:
    seam: Seam
    own: Any  # the raw object of the owner's own __dict__, or _ABSENT
    new: Any
    link: Mapping[str, Any]  # what was added to the new function's attributes

    def is_on_top(self) -> bool:
        return vars(self.seam.owner).get(self.seam.name, _ABSENT) is self.new

    def put(self) -> None:
        setattr(self.seam.owner, self.seam.name, self.new)
        if self.link:
            vars(_function_of(self.new)).update(self.link)

    def take_back(self) -> None:
        if self.is_on_top():  # else it never got there, and an owner that refused it would refuse the original too
            if self.own is _ABSENT:
                delattr(self.seam.owner, self.seam.name)
            else:
                setattr(self.seam.owner, self.seam.name, self.own)
        for key in self.link:
            vars(_function_of(self.new)).pop(key, None)


class PatchHandle:
    """A set of replaced attributes; ``remove()`` or the end of a ``with`` block puts the originals back.

    Attributes:
        name: of the host: ``repa``.
        config: what the patch was made with, compared by ``==``.
        seams: labels of the replaced attributes, in order.
        hooks: labels of what was added.
        fired: how often each replacement ran, by label.
        launched: the launcher made it, for a script that may hold the one line too.
    """

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config
        self.seams: tuple[str, ...] = ()
        self.hooks: tuple[str, ...] = ()
        self.fired: dict[str, int] = {}
        self.launched = False
        self._replacements: tuple[_Replacement, ...] = ()
        self._take_away: list[Callable[[], object]] = []

    def fire(self, label: str) -> None:
        """Counts one run of a replacement, which calls this itself."""
        self.fired[label] += 1

    def remove(self) -> None:
        """Puts every original back, the last first; a second call does nothing.

        Raises:
            PatchConflictError: somebody has replaced one of the attributes since; then none is put back.
        """
        if self not in _active:
            return
        for replacement in self._replacements:
            if not replacement.is_on_top():
                raise PatchConflictError(
                    f"remove {self.name!r}: {replacement.seam.label}",
                    expected="the replacement of this patch",
                    got="one that was put there later",
                    do="Remove the later one first.",
                )
        self._undo()
        _active.remove(self)

    def _undo(self) -> None:
        while self._take_away:
            self._take_away.pop()()
        for replacement in reversed(self._replacements):
            replacement.take_back()

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def active_handles() -> tuple[PatchHandle, ...]:
    """Handles that are not removed, the oldest first."""
    return tuple(_active)


def apply_patch(
    name: str,
    config: Any,
    seams: Callable[[PatchHandle], Sequence[Seam | Hook]] | Sequence[Seam | Hook],
) -> PatchHandle:
    """Replaces every seam and adds every hook, or none where anything fails on the way.

    Args:
        name: of the host.
        config: what tells this patch from another of the same name, by ``==``.
        seams: the attributes to replace and the hooks to add, or a function from the new handle to them, for wrappers
            that call ``handle.fire``.

    Returns:
        The new handle; the live one where the same seams are patched under an equal name and configuration.

    Raises:
        HostNotFoundError: no seams, an owner that is no class or module, or a required attribute that is absent.
        PatchConflictError: the name is live with another configuration, a seam belongs to another patch, stands
            twice in the list, or its ``wrap`` returned nothing new.
    """
    handle = PatchHandle(name, config)
    both = tuple(seams(handle) if callable(seams) else seams)
    replaced, hooks = [one for one in both if isinstance(one, Seam)], [one for one in both if isinstance(one, Hook)]
    live = _live_handle(name, config, replaced)
    if live is not None:
        return live
    _verify(name, replaced)
    handle._replacements = tuple(_replacement(name, seam) for seam in replaced)
    try:
        for replacement in handle._replacements:
            replacement.put()
        for hook in hooks:
            handle._take_away.append(hook.add())
    except BaseException:
        handle._undo()
        raise
    handle.seams, handle.hooks = tuple(one.label for one in replaced), tuple(one.label for one in hooks)
    handle.fired = dict.fromkeys(handle.seams, 0)
    _active.append(handle)
    return handle


def _live_handle(name: str, config: Any, seams: Sequence[Seam]) -> PatchHandle | None:
    for live in _active:
        if live.name != name:
            continue
        if live.config != config:
            raise PatchConflictError(
                f"patch {name!r}",
                expected="the configuration in force, or no live patch of that name",
                got=_difference(live.config, config),
                do="Call remove() on the handle that the first call returned (active_handles() lists it), "
                "then apply again.",
            )
        if {_place(one.seam) for one in live._replacements} == {_place(seam) for seam in seams}:
            return live
    return None


def _verify(name: str, seams: Sequence[Seam]) -> None:
    if not seams:
        do = "Import the host's classes first, and give at least one seam."
        raise HostNotFoundError(f"patch {name!r}", expected="something to replace", got="nothing to patch", do=do)
    places = set()
    for seam in seams:
        if not isinstance(seam.owner, (type, ModuleType)):
            do = "Give the class itself, or the module."
            raise HostNotFoundError(seam.label, expected="a class or a module", got=repr(seam.owner), do=do)
        current = _current(seam)
        if current is _ABSENT and seam.required:
            got = f"no attribute {seam.name!r} on {seam.owner.__name__}"
            do = "Use a supported version of the host."
            raise HostNotFoundError(seam.label, expected="an attribute to replace", got=got, do=do)
        holder = _holder(current)
        if holder is not None:
            do = "Call remove() on that patch's handle first (active_handles() lists it)."
            raise PatchConflictError(
                seam.label, expected="an attribute not yet patched", got=f"the patch {holder!r}", do=do
            )
        if _place(seam) in places:
            do = "Do both in one wrap."
            raise PatchConflictError(seam.label, expected="one seam per attribute", got="two", do=do)
        places.add(_place(seam))


def _replacement(name: str, seam: Seam) -> _Replacement:
    current = _current(seam)
    original = None if current is _ABSENT else current
    new = seam.wrap(original)
    if new is None or new is original:
        got = "None" if new is None else "the original"
        do = "Return the new attribute from wrap."
        raise PatchConflictError(seam.label, expected="a replacement", got=got, do=do)
    link: dict[str, Any] = {}
    function = _function_of(new)
    if function is not None:
        link[MARKER] = name
        if original is not None and not hasattr(function, "__wrapped__"):
            link["__wrapped__"] = _function_of(original) or original
    return _Replacement(seam, vars(seam.owner).get(seam.name, _ABSENT), new, link)


def _place(seam: Seam) -> tuple[int, str]:
    return id(seam.owner), seam.name


def _current(seam: Seam) -> Any:
    """The raw attribute. Not by ``getattr``, which binds it, and finds ``type.__call__`` on any class."""
    owners = seam.owner.__mro__ if isinstance(seam.owner, type) else (seam.owner,)
    return next((vars(owner)[seam.name] for owner in owners if seam.name in vars(owner)), _ABSENT)


def _function_of(attribute: Any) -> FunctionType | None:
    """The plain function in an attribute: the only kind that is marked, for others cannot or may be shared."""
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    return attribute if isinstance(attribute, FunctionType) else None


def _holder(attribute: Any) -> str | None:
    """Name of the patch that an attribute belongs to: by identity, or by the mark that ``wraps`` hands on."""
    for handle in _active:
        if any(one.new is attribute for one in handle._replacements):
            return handle.name
    function = _function_of(attribute)
    return None if function is None else vars(function).get(MARKER)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return ", ".join(_difference(a, b) for a, b in zip(old, new, strict=True) if a != b)
    if is_dataclass(old) and type(old) is type(new):
        names = [field.name for field in fields(old) if getattr(old, field.name) != getattr(new, field.name)]
        return ", ".join(f"{name} {getattr(old, name)!r} -> {getattr(new, name)!r}" for name in names)
    return f"{old!r} -> {new!r}"
