"""Old module names: the same objects under both names, and one warning."""

import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module

import pytest

from vrpo_plugin._moved import MOVED


@pytest.fixture
def never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in MOVED:
        monkeypatch.delitem(sys.modules, old, raising=False)


@pytest.mark.parametrize("old", MOVED)
@pytest.mark.usefixtures("never_imported")
def test_an_old_name_is_the_new_module_and_warns_once(old: str) -> None:
    new = import_module(MOVED[old])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert import_module(old) is new and import_module(old) is new
    (warning,) = (one for one in caught if issubclass(one.category, DeprecationWarning))
    assert str(warning.message).startswith(f"{old} is now {MOVED[old]};")
    assert new.__name__ == new.__spec__.name == MOVED[old]


@pytest.mark.usefixtures("never_imported")
def test_names_are_imported_as_before_and_the_warning_points_at_the_import() -> None:
    from vrpo_plugin.standalone import evaluate, sit

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from vrpo_plugin.evaluation.protocol import EvalProtocol
        from vrpo_plugin.reference import sit as old_sit
        from vrpo_plugin.reference.sit import create_sit
    assert EvalProtocol is evaluate.EvalProtocol and old_sit is sit and create_sit is sit.create_sit
    assert [warning.filename for warning in caught] == [__file__] * 2


def test_a_fresh_process_finds_an_old_name_first() -> None:
    code = "from vrpo_plugin.evaluation.frechet import frechet_distance as f; print(f.__module__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "vrpo_plugin.standalone.frechet"
    # Python itself shows a deprecation that __main__ causes.
    assert "<string>:1: DeprecationWarning: vrpo_plugin.evaluation.frechet is now" in shown.stderr


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("vrpo_plugin.reference.nothing")


def test_old_keywords_of_a_host_spec_are_the_new_ones_and_warn() -> None:
    from vrpo_plugin import HostSpec
    from vrpo_plugin.hosts.base import point

    model, loss = point("net.py", "Net.forward", "self x"), point("net.py", "Loss.__call__", "self model")
    functions = [partial(max, i) for i in range(5)]
    old = ("convert", "read", "hide", "write", "installed")
    new = ("in_forward", "before_loss", "show_to_loss", "after_loss", "after_init")
    common = {"name": "mine", "repository": "me/mine", "model": model, "loss": loss}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {**dict(zip(old, functions, strict=True)), "points": (model,), "projects": True}
        spec = HostSpec(**common, **given)
    wanted = {**dict(zip(new, functions, strict=True)), "verified": (model,), "has_alignment_loss": True}
    assert spec == HostSpec(**common, **wanted)
    assert len(caught) == len(given) and {warning.filename for warning in caught} == {__file__}
    with pytest.raises(TypeError, match="convert and in_forward are the same argument"):
        HostSpec(**common, convert=functions[0], in_forward=functions[1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        HostSpec(**common, in_forward=functions[0], nothing=1)
