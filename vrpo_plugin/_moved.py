"""Old names of modules and keywords, for one release: each does what the new name does, with a warning."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

PACKAGES = {"vrpo_plugin.evaluation", "vrpo_plugin.reference"}
"""Folders that are gone."""

MOVED = {
    "vrpo_plugin.functional.groups": "vrpo_plugin.functional.levels",
    "vrpo_plugin.hosts.session": "vrpo_plugin.hosts.base",
    "vrpo_plugin.modules.inputs": "vrpo_plugin.modules.checks",
    "vrpo_plugin.evaluation.protocol": "vrpo_plugin.standalone.evaluate",
    "vrpo_plugin.pretrain": "vrpo_plugin.standalone.train_critic",
    "vrpo_plugin.targets": "vrpo_plugin.standalone.targets",
} | {
    f"vrpo_plugin.{folder}.{name}": f"vrpo_plugin.standalone.{name}"
    for folder, names in {
        "evaluation": ("features", "frechet", "precision_recall", "small_network", "small_training"),
        "reference": ("checkpoint", "data", "sampler", "sit", "sources"),
    }.items()
    for name in names
}
"""Old name to new name."""


class _Moved(MetaPathFinder, Loader):
    """Asked first: an editable install of another checkout may still have a file of an old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED and fullname not in PACKAGES:
            return None
        return ModuleSpec(fullname, self, is_package=fullname in PACKAGES)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED.get(module.__name__)
        if new is None:
            return  # an old folder; each name in it warns by itself
        warnings.warn(f"{module.__name__} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        # Python takes what stands here: one module under both names, so that no class exists twice.
        sys.modules[module.__name__] = import_module(new)


def alias_moved_modules() -> None:
    """Lets the old names be imported, once per process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())


def renamed_keywords(old_to_new: Mapping[str, str]) -> Callable[[Class], Class]:
    """A class decorator: the constructor takes old keywords too."""

    def decorate(cls: Class) -> Class:
        original = cls.__init__  # type: ignore[misc]

        @wraps(original)
        def init(self: Any, *args: Any, **given: Any) -> None:
            for old in [name for name in given if name in old_to_new]:
                new = old_to_new[old]
                text = f"{cls.__name__}({old}=) is now {new}=; the old name goes in 0.3."
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                if new in given:
                    raise TypeError(f"{cls.__name__}: {old} and {new} are the same argument")
                given[new] = given.pop(old)
            original(self, *args, **given)

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return decorate
