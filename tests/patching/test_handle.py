import copy
import functools
import inspect
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrpo_plugin import HostNotFoundError, PatchConflictError
from vrpo_plugin.patching.handle import MARKER, Hook, PatchHandle, Seam, active_handles, apply_patch


class Base:
    def inherited(self, x: int) -> str:
        return f"base {x}"


class Host(Base):
    constant = 3

    def forward(self, x: int, *, scale: int = 1) -> int:
        """Runs it."""
        return x * scale

    def sibling(self) -> str:
        return "sibling"

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    @classmethod
    def built(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @property
    def width(self) -> int:
        return 8


@dataclass(frozen=True)
class Config:
    weight: float = 0.5
    depth: int = 8


def snapshot(*owners: Any) -> list[dict[str, Any]]:
    # copyreg keeps its own note in a class that was copied or pickled.
    return [{name: value for name, value in vars(owner).items() if name != "__slotnames__"} for owner in owners]


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Whether the owners hold the identical objects, in the same order."""
    return [[(k, id(v)) for k, v in one.items()] for one in first] == [
        [(k, id(v)) for k, v in one.items()] for one in second
    ]


def around(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[str, Any]:
        return "patched", original(*args, **kwargs)

    return wrapped


def seam(owner: Any, name: str, wrap: Callable[[Any], Any] = around, **options: Any) -> Seam:
    return Seam(owner, name, wrap, f"{owner.__name__}.{name}", **options)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = snapshot(Base, Host)
    yield
    left = [handle.name for handle in active_handles()]
    for handle in reversed(active_handles()):
        handle.remove()
    assert left == []
    assert same(snapshot(Base, Host), before)


@pytest.fixture
def module() -> types.ModuleType:
    made = types.ModuleType("loss")
    exec("def loss(x):\n    return x\n\ndef other(x):\n    return -x\n\nclass Attention:\n    pass\n", made.__dict__)
    return made


def test_replaced_in_place_with_the_rest_untouched() -> None:
    host, before = Host(), snapshot(Base, Host)
    handle = apply_patch("repa", Config(), [seam(Host, "forward")])
    after = snapshot(Base, Host)
    assert host.forward(2, scale=3) == ("patched", 6) and Host().forward(1) == ("patched", 1)
    assert after[1].pop("forward") is not before[1].pop("forward")
    assert same(after, before)
    assert (handle.name, handle.config, handle.seams) == ("repa", Config(), ("Host.forward",))
    assert active_handles() == (handle,)
    handle.remove()
    assert host.forward(2) == 2 and active_handles() == ()


def test_replacement_looks_like_the_original() -> None:
    signature, original = inspect.signature(Host.forward), Host.forward
    with apply_patch("repa", None, [seam(Host, "forward")]):
        assert inspect.signature(Host.forward) == signature and Host.forward.__doc__ == "Runs it."
        assert Host.forward.__wrapped__ is original and Host.forward.__qualname__ == "Host.forward"  # type: ignore[attr-defined]
        assert vars(Host.forward)[MARKER] == "repa"
        assert pickle.loads(pickle.dumps(Host.forward)) is Host.forward
        copied = copy.deepcopy(Host())
        assert copied.forward(2) == ("patched", 2)
        assert pickle.loads(pickle.dumps(copied)).forward(2) == ("patched", 2)
    assert copied.forward(2) == 2  # the patch is the class's, so a copy of an instance loses it too


def test_replacement_without_wraps_gets_the_original_signature() -> None:
    signature = inspect.signature(Host.forward)

    def bare(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: original(self, *args, **kwargs)

    def of_another(original: Callable[..., Any]) -> Callable[..., Any]:
        return around(Host.sibling)

    with apply_patch("repa", None, [seam(Host, "forward", bare), seam(Host, "inherited", of_another)]):
        assert inspect.signature(Host.forward) == signature
        assert inspect.signature(Host.inherited) == inspect.signature(Host.sibling)  # what wraps says is kept


def test_own_function_used_as_replacement_keeps_no_trace() -> None:
    def ours(self: Host, x: int) -> int:
        return -x

    for _ in range(2):
        with apply_patch("repa", None, [seam(Host, "forward", lambda _: ours)]):
            assert Host().forward(2) == -2 and vars(ours)[MARKER] == "repa"
        assert vars(ours) == {}


def test_descriptors_arrive_raw_and_return_identical() -> None:
    raw = dict(vars(Host))
    arrived: dict[str, Any] = {}

    def keep(name: str, build: Callable[[Any], Any]) -> Seam:
        def wrap(original: Any) -> Any:
            arrived[name] = original
            return build(original)

        return seam(Host, name, wrap)

    seams = [
        keep("static", lambda old: staticmethod(around(old.__func__))),
        keep("built", lambda old: classmethod(around(old.__func__))),
        keep("width", lambda old: property(around(old.fget))),
        keep("constant", lambda old: old + 1),
    ]
    handle = apply_patch("repa", None, seams)
    assert {name: arrived[name] is raw[name] for name in arrived} == dict.fromkeys(
        ("static", "built", "width", "constant"), True
    )
    assert Host.static(1) == Host().static(1) == ("patched", 2)
    assert vars(Host.static)[MARKER] == vars(Host.built.__func__)[MARKER] == "repa"  # type: ignore[attr-defined]
    assert Host.built(1) == ("patched", ("Host", 1))
    assert Host().width == ("patched", 8) and Host.constant == 4
    handle.remove()
    assert all(vars(Host)[name] is raw[name] for name in arrived)


def test_inherited_attribute_is_set_on_the_class_and_deleted_again() -> None:
    with apply_patch("repa", None, [seam(Host, "inherited")]):
        assert Host().inherited(1) == ("patched", "base 1")
        assert Base().inherited(1) == "base 1"
    assert "inherited" not in vars(Host) and Host().inherited(1) == "base 1"


def test_metaclass_attributes_are_no_attributes_of_the_class() -> None:
    with pytest.raises(HostNotFoundError, match="no attribute '__call__' on Host"):
        apply_patch("repa", None, [seam(Host, "__call__")])


def test_optional_attribute_is_made_from_none_and_deleted_again() -> None:
    arrived = []

    def wrap(original: Any) -> property:
        arrived.append(original)
        return property(lambda self: self)

    with apply_patch("repa", None, [seam(Host, "module", wrap, required=False)]):
        host = Host()
        assert host.module is host  # type: ignore[attr-defined]
    assert arrived == [None] and not hasattr(Host, "module")
    with apply_patch("repa", None, [seam(Host, "forward", required=False)]):
        assert Host().forward(1) == ("patched", 1)


def test_module_functions_and_classes_are_replaced(module: types.ModuleType) -> None:
    before = snapshot(module)
    made = functools.partial(module.Attention)
    seams = [seam(module, "loss"), seam(module, "Attention", lambda _: made)]
    with apply_patch("repa", None, seams):
        assert module.loss(1) == ("patched", 1) and module.other(1) == -1
        assert module.Attention is made and vars(made) == {}
    assert same(snapshot(module), before)


def test_handle_counts_what_fires() -> None:
    def seams(handle: PatchHandle) -> list[Seam]:
        def counted(label: str) -> Callable[[Any], Any]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                @functools.wraps(original)
                def run(*args: Any, **kwargs: Any) -> Any:
                    handle.fire(label)
                    return original(*args, **kwargs)

                return run

            return wrap

        return [Seam(Host, name, counted(name), name) for name in ("forward", "sibling")]

    with apply_patch("repa", None, seams) as handle:
        assert handle.fired == {"forward": 0, "sibling": 0}
        Host().forward(1), Host().forward(1)
        assert handle.fired == {"forward": 2, "sibling": 0}
        with pytest.raises(KeyError, match="backward"):
            handle.fire("backward")
        assert apply_patch("repa", None, seams) is handle
        Host().forward(1)
        assert handle.fired == {"forward": 3, "sibling": 0}


def test_same_patch_again_is_the_same_handle() -> None:
    handle = apply_patch("repa", Config(), [seam(Host, "forward"), seam(Host, "sibling")])
    patched = vars(Host)["forward"]
    again = apply_patch("repa", Config(), [seam(Host, "sibling"), seam(Host, "forward")])
    assert again is handle and vars(Host)["forward"] is patched and active_handles() == (handle,)
    handle.remove()
    third = apply_patch("repa", Config(), [seam(Host, "forward")])
    assert third is not handle
    third.remove()


def test_same_patch_of_another_copy_of_the_host_is_another_handle(module: types.ModuleType) -> None:
    with apply_patch("repa", Config(), [seam(Host, "forward")]) as first:
        with apply_patch("repa", Config(), [seam(module, "loss")]) as second:
            assert active_handles() == (first, second)
        assert active_handles() == (first,) and Host().forward(1) == ("patched", 1)


def test_patches_of_two_names_live_side_by_side() -> None:
    first = apply_patch("repa", Config(), [seam(Host, "forward")])
    with apply_patch("reg", Config(weight=0.0), [seam(Host, "sibling")]) as second:
        assert active_handles() == (first, second)
        first.remove()  # they share no attribute, so the order is free
        assert Host().forward(1) == 1 and Host().sibling() == ("patched", "sibling")


@pytest.mark.parametrize(
    ("config", "difference"),
    [(Config(weight=0.0), "got weight 0.5 -> 0.0. Call remove()"), (None, "got Config(weight=0.5, depth=8) -> None.")],
)
def test_other_configuration_is_refused(config: Any, difference: str, module: types.ModuleType) -> None:
    with apply_patch("repa", Config(), [seam(Host, "forward")]):
        before = snapshot(Host, module)
        for owner, name in ((Host, "forward"), (Host, "sibling"), (module, "loss")):
            with pytest.raises(PatchConflictError) as error:
                apply_patch("repa", config, [seam(owner, name)])
            assert difference in str(error.value)
        assert same(snapshot(Host, module), before) and len(active_handles()) == 1


def test_seam_of_another_patch_is_refused() -> None:
    raw = staticmethod(lambda x: x)
    for replacement in (around(Host.forward), raw, property(lambda self: 1)):
        with apply_patch("repa", None, [seam(Host, "forward", lambda _, new=replacement: new)]):
            before = snapshot(Base, Host)
            for name in ("reg", "repa"):  # the same name with other seams is no other call of the same patch
                with pytest.raises(PatchConflictError, match=r"Host\.forward: .* got the patch 'repa'"):
                    apply_patch(name, None, [seam(Host, "sibling"), seam(Host, "forward")])
            assert same(snapshot(Base, Host), before)


def test_seam_of_another_patch_is_seen_through_a_foreign_wrapper_and_a_base_class() -> None:
    with apply_patch("repa", None, [seam(Base, "inherited"), seam(Host, "forward")]):
        ours = vars(Host)["forward"]
        Host.forward = around(ours)  # type: ignore[method-assign]
        for name in ("forward", "inherited"):
            with pytest.raises(PatchConflictError, match="the patch 'repa'"):
                apply_patch("reg", None, [seam(Host, name)])
        Host.forward = ours  # type: ignore[method-assign]


def test_one_attribute_twice_in_a_list_is_refused() -> None:
    with pytest.raises(PatchConflictError, match="one seam per attribute"):
        apply_patch("repa", None, [seam(Host, "forward"), seam(Host, "forward")])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (seam(Host, "absent"), "Host.absent: expected an attribute to replace, got no attribute 'absent' on Host"),
        (Seam(Host(), "forward", around, "host.forward"), "host.forward: expected a class or a module, got <"),
        (Seam(None, "forward", around, "sit.SiT.forward"), "sit.SiT.forward: expected a class or a module, got None"),
    ],
)
def test_missing_seam_is_refused_before_anything_is_wrapped(bad: Seam, message: str) -> None:
    def wrap(original: Any) -> Any:
        raise AssertionError("a wrap ran before all seams were checked")

    with pytest.raises(HostNotFoundError) as error:
        apply_patch("repa", None, [seam(Host, "forward", wrap), bad])
    assert str(error.value).startswith(message)
    assert active_handles() == ()


@pytest.mark.parametrize("seams", [[], lambda handle: []])
def test_nothing_to_patch_is_an_error(seams: Any) -> None:
    with pytest.raises(HostNotFoundError, match=r"patch 'repa': .* got nothing to patch"):
        apply_patch("repa", None, seams)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_inside_wrap_leaves_everything_as_found(error: type[BaseException]) -> None:
    def fail(original: Any) -> Any:
        raise error("no")

    before = snapshot(Base, Host)
    with pytest.raises(error):
        apply_patch("repa", None, [seam(Host, "forward"), seam(Host, "sibling", fail)])
    assert same(snapshot(Base, Host), before) and active_handles() == ()


@pytest.mark.parametrize(("returned", "got"), [(lambda _: None, "got None"), (lambda old: old, "got the original")])
def test_wrap_that_returns_nothing_new_is_refused(returned: Callable[[Any], Any], got: str) -> None:
    before = snapshot(Base, Host)
    with pytest.raises(PatchConflictError, match=got):
        apply_patch("repa", None, [seam(Host, "sibling"), seam(Host, "forward", returned)])
    assert same(snapshot(Base, Host), before) and MARKER not in vars(Host.forward)


@pytest.mark.parametrize("name", ["bit_length", "__new_attribute__"])
def test_failure_while_setting_rolls_back_what_was_set(name: str) -> None:
    """Classes written in C refuse to be set, and so they refuse the roll-back too."""

    def ours(self: Host) -> str:
        return "ours"

    before = snapshot(Base, Host)
    seams = [
        seam(Host, "forward"),
        seam(Host, "inherited"),
        seam(Host, "sibling", lambda _: ours),
        seam(Host, "made", lambda _: 1, required=False),
        seam(int, name, lambda _: print, required=False),
        seam(Host, "width", lambda _: 1),
    ]
    with pytest.raises(TypeError, match="immutable type"):
        apply_patch("repa", None, seams)
    assert same(snapshot(Base, Host), before) and active_handles() == () and vars(ours) == {}


def test_interrupt_while_setting_rolls_back_what_was_set() -> None:
    class Interrupting(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            raise KeyboardInterrupt

    class Interrupted(metaclass=Interrupting):
        depth = 1

    before = snapshot(Host)
    with pytest.raises(KeyboardInterrupt):
        apply_patch("repa", None, [seam(Host, "forward"), seam(Interrupted, "depth", lambda old: old + 1)])
    assert same(snapshot(Host), before) and active_handles() == ()


def test_removal_is_idempotent() -> None:
    handle = apply_patch("repa", None, [seam(Host, "forward")])
    handle.remove()
    Host.forward, original = around(Host.forward), Host.forward  # type: ignore[method-assign]
    handle.remove()  # says nothing of what others do later
    assert Host().forward(1) == ("patched", 1)
    Host.forward = original  # type: ignore[method-assign]


def test_removal_under_a_later_patch_is_refused_and_changes_nothing() -> None:
    handle = apply_patch("repa", None, [seam(Host, "forward"), seam(Host, "sibling"), seam(Host, "inherited")])
    ours = vars(Host)["sibling"]
    Host.sibling = around(ours)  # type: ignore[method-assign]
    before = snapshot(Base, Host)
    with pytest.raises(PatchConflictError, match=r"Host\.sibling: .* Remove the later one first"):
        handle.remove()
    assert same(snapshot(Base, Host), before) and active_handles() == (handle,)
    Host.sibling = ours  # type: ignore[method-assign]
    handle.remove()
    assert Host().sibling() == "sibling" and active_handles() == ()


def test_removal_of_a_deleted_replacement_is_refused() -> None:
    handle = apply_patch("repa", None, [seam(Host, "inherited")])
    ours = vars(Host)["inherited"]
    del Host.inherited
    with pytest.raises(PatchConflictError, match=r"Host\.inherited"):
        handle.remove()
    Host.inherited = ours  # type: ignore[method-assign]
    handle.remove()


def test_originals_return_last_first(module: types.ModuleType) -> None:
    order: list[str] = []

    class Watch(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            order.append(name)
            super().__setattr__(name, value)

    class Watched(metaclass=Watch):
        first, second, third = 1, 2, 3

    with apply_patch("repa", None, [seam(Watched, name, lambda old: -old) for name in ("first", "second", "third")]):
        assert order == ["first", "second", "third"]
    assert order[3:] == ["third", "second", "first"]


def test_block_removes_the_patch_also_when_it_fails() -> None:
    def fail() -> None:
        with apply_patch("repa", None, [seam(Host, "forward")]):
            assert Host().forward(1) == ("patched", 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Host().forward(1) == 1 and active_handles() == ()


NAMES = ("forward", "sibling", "inherited", "static", "built", "width", "constant", "made")


@given(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.integers(0, 8), st.booleans())
def test_any_set_of_seams_is_replaced_whole_or_not_at_all(names: list[str], fails_at: int, at_setting: bool) -> None:
    before = snapshot(Base, Host)

    def fail(original: Any) -> Any:
        raise ZeroDivisionError

    bad = seam(int, "real", lambda _: 1) if at_setting else seam(Host, "__init__", fail)
    seams = [seam(Host, name, lambda _: object(), required=False) for name in names]
    with pytest.raises((ZeroDivisionError, TypeError)):
        apply_patch("repa", None, [*seams[:fails_at], bad, *seams[fails_at:]])
    assert same(snapshot(Base, Host), before)
    with apply_patch("repa", None, seams):
        now = vars(Host)
        assert {name for name in NAMES if now.get(name) is not before[1].get(name)} == set(names)
    assert same(snapshot(Base, Host), before)


def hook(events: list[str], name: str, fails: bool = False) -> Hook:
    def add() -> Callable[[], object]:
        if fails:
            raise OSError(name)
        events.append(f"+{name}")
        return lambda: events.append(f"-{name}")

    return Hook(name, add)


def test_hooks_are_added_after_the_seams_and_taken_away_last_first() -> None:
    events: list[str] = []
    seam = Seam(Host, "sibling", lambda original: functools.wraps(original)(lambda self: "new"), "Host.sibling")
    with apply_patch("toy", 1, [hook(events, "a"), seam, hook(events, "b")]) as handle:
        assert (handle.seams, handle.hooks) == (("Host.sibling",), ("a", "b"))
        assert apply_patch("toy", 1, [seam]) is handle and events == ["+a", "+b"]
    assert events == ["+a", "+b", "-b", "-a"]
    handle.remove()
    assert len(events) == 4


def test_a_hook_that_fails_leaves_nothing() -> None:
    events: list[str] = []
    original = vars(Host)["sibling"]
    seam = Seam(Host, "sibling", lambda original: functools.wraps(original)(lambda self: "new"), "Host.sibling")
    with pytest.raises(OSError, match="b"):
        apply_patch("toy", 1, [seam, hook(events, "a"), hook(events, "b", fails=True)])
    assert events == ["+a", "-a"] and vars(Host)["sibling"] is original and not active_handles()


def test_a_conflict_names_what_differs_alone() -> None:
    @dataclass(frozen=True)
    class Settings:
        a: int = 0
        b: str = "x"

    seam = Seam(Host, "sibling", lambda original: functools.wraps(original)(lambda self: "new"), "Host.sibling")
    with (
        apply_patch("toy", (Settings(), Settings()), [seam]),
        pytest.raises(PatchConflictError, match=r"got a 0 -> 1, b 'x' -> 'y'\. Call"),
    ):
        apply_patch("toy", (Settings(a=1), Settings(b="y")), [seam])
