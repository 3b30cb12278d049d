"""The walls between the layers, read from the imports of every file."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

import vrpo_plugin

PACKAGE = Path(vrpo_plugin.__file__).parent
# What each layer may import beside the standard library and itself.
MAY: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "_moved": set(),
    "files": {"errors"},
    "config": {"errors"},
    "settings": {"config", "errors"},
    "functional": {"errors", "torch", "einops"},
    "modules": {"functional", "config", "files", "errors", "torch", "einops", "safetensors", "numpy"},
    "perceptual": {"functional", "errors", "torch", "einops"},
    "encoders": {"functional", "modules", "errors", "torch", "einops"},
    "standalone": {"functional", "modules", "encoders", "config", "settings", "files", "errors", "_version"}
    | {"torch", "timm", "einops", "numpy", "safetensors", "tqdm"},
    "patching": {"files", "errors"},
    "hosts": {
        "errors",
        "config",
        "settings",
        "functional",
        "modules",
        "encoders",
        "files",
        "patching",
        "torch",
        "_moved",
    },
    "launch": {"errors", "config", "_version", "hosts", "patching"},
    "commands": {"errors"},
    "cli": {"commands", "errors", "_version"},
    "vrpo_plugin": {"errors", "config", "_version", "_moved"},
}
MAY_INSIDE_FUNCTIONS: dict[str, set[str]] = {
    "settings": {"yaml"},
    "perceptual": {"timm", "lpips", "torchvision", "safetensors", "huggingface_hub"},
    "encoders": {"timm", "lpips", "torchvision", "safetensors", "huggingface_hub"},
    "standalone": {
        "accelerate",
        "scipy",
        "torchvision",
        "sklearn",
        "PIL",
        "matplotlib",
        "torch_fidelity",
        "tensorboard",
        "diffusers",
    },
    "hosts": {"safetensors", "yaml"},
    "commands": {"standalone", "hosts", "settings"},
    "vrpo_plugin": {"functional", "hosts", "modules"},
}
# Inside hosts/ a file imports only what stands above its own row.
HOST_FILES = [
    {"options"},
    {"guard", "aligner", "checkpoint", "units"},
    {"metrics", "guide"},
    {"base"},
    {"compat", "libraries", "pixels"},
    {"no_encoder"},
    {"checks", "siloss", "transport"},
    {"repa", "reg", "irepa", "repae", "sit", "dit", "lightningdit"},
    {"repa_t2i"},
    {"known"},
    {"tree", "attach"},
    {"report", "wrap"},
    {"apply"},
]
SLOW = {"timm", "lpips", "accelerate", "scipy", "sklearn", "torchvision", "PIL", "matplotlib", "yaml"}


@dataclass(frozen=True)
class Import:
    """One imported name; ``late`` where importing the file does not run it."""

    name: str
    line: int
    late: bool


def imports_of(node: ast.AST, package: str, *, late: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = resolve_name("." * child.level + (child.module or ""), package)
            yield from (Import(f"{base}.{alias.name}", child.lineno, late) for alias in child.names)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from imports_of(child, package, late=late or is_function or is_typing)


def modules_of(root: Path) -> dict[str, list[Import]]:
    """Every module of a package, with its imports."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("vrpo_plugin", *path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        package = name if is_package else name.rpartition(".")[0]
        found[name] = list(imports_of(ast.parse(path.read_text("utf-8")), package))
    return found


def layer_of(name: str) -> str:
    """The part of this package, or else the package, that a dotted name belongs to."""
    first, *rest = name.split(".")
    return rest[0] if first == "vrpo_plugin" and rest and rest[0] in MAY else first


def wrong_imports(root: Path) -> list[str]:
    wrong = []
    for module, imports in modules_of(root).items():
        layer = layer_of(module)
        if layer not in MAY or (layer == "vrpo_plugin" != module):
            wrong.append(f"{module} belongs to no layer")
            continue
        for one in imports:
            allowed = MAY[layer] | {layer} | (MAY_INSIDE_FUNCTIONS.get(layer, set()) if one.late else set())
            if layer_of(one.name) not in allowed | sys.stdlib_module_names:
                wrong.append(f"{module}:{one.line} imports {one.name}")
    return wrong


def slow_imports(root: Path) -> list[str]:
    """Slow packages at the top of a file that ``import vrpo_plugin`` reads."""
    modules = modules_of(root)
    reached, waiting = set(), ["vrpo_plugin"]
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module in modules and module not in reached:
                reached.add(module)
                waiting += [one.name for one in modules[module] if not one.late]
    return [
        f"{module}:{one.line} imports {one.name}"
        for module in sorted(reached)
        for one in modules[module]
        if not one.late and layer_of(one.name) in SLOW
    ]


def circles(root: Path) -> list[set[str]]:
    """Groups of modules that import each other, in functions and for types too."""
    modules = modules_of(root)
    edges = {
        module: {other for one in imports if (other := module_of(one.name, modules)) and other != module}
        for module, imports in modules.items()
    }
    reach: dict[str, set[str]] = {}
    for module in modules:
        seen, waiting = set(), [*edges[module]]
        while waiting:
            if (other := waiting.pop()) not in seen:
                seen.add(other)
                waiting += edges[other]
        reach[module] = seen
    found = [{other for other in reach[module] if module in reach[other]} for module in modules]
    return [group for number, group in enumerate(found) if group and group not in found[:number]]


def module_of(name: str, modules: dict[str, list[Import]]) -> str | None:
    """The module that an imported name is, or stands in; the package itself imports everything, when it is asked."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 1, -1))
    return next((one for one in candidates if one in modules), None)


def upward_imports(root: Path) -> list[str]:
    """Imports inside hosts/ of a file that stands in the same row or below."""
    row = {name: number for number, names in enumerate(HOST_FILES) for name in names}
    wrong = []
    for module, imports in modules_of(root).items():
        *package, name = module.split(".")
        if package != ["vrpo_plugin", "hosts"]:
            continue
        for one in imports:
            parts = one.name.split(".")
            if parts[:2] == package and len(parts) > 2 and row.get(parts[2], 99) >= row.get(name, -1):
                wrong.append(f"{module}:{one.line} imports {one.name}")
    return wrong


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
    return root


def test_every_import_is_of_a_layer_below() -> None:
    assert wrong_imports(PACKAGE) == []


def test_import_vrpo_plugin_reads_no_slow_package() -> None:
    assert slow_imports(PACKAGE) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(PACKAGE) == []


def test_inside_hosts_imports_go_one_way() -> None:
    assert upward_imports(PACKAGE) == []
    names = {path.stem for path in (PACKAGE / "hosts").glob("*.py")} - {"__init__"}
    assert names == set().union(*HOST_FILES)


def test_a_circle_is_found_in_functions_and_for_types_too(tmp_path: Path) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vrpo_plugin.hosts.metrics import Tracker"
    late = "def f():\n    from vrpo_plugin.hosts import base"
    files = {"__init__.py": "", "hosts/__init__.py": "", "hosts/base.py": types, "hosts/metrics.py": late}
    root = write_package(tmp_path, files)
    assert circles(root) == [{"vrpo_plugin.hosts.base", "vrpo_plugin.hosts.metrics"}]
    assert upward_imports(root) == ["vrpo_plugin.hosts.metrics:2 imports vrpo_plugin.hosts.base"]


def test_the_package_was_read() -> None:
    modules = modules_of(PACKAGE)
    assert {"vrpo_plugin", "vrpo_plugin.config", "vrpo_plugin.functional.advantages"} <= modules.keys()
    read = [one.name for one in modules["vrpo_plugin.functional.advantages"]]
    assert "vrpo_plugin.functional.tensors.promote" in read and "torch.Tensor" in read


@pytest.mark.parametrize(
    ("path", "source", "report"),
    [
        ("errors.py", "import torch", "vrpo_plugin.errors:1 imports torch"),
        ("config.py", "import math\nimport numpy.linalg as la", "vrpo_plugin.config:2 imports numpy.linalg"),
        ("config.py", "from vrpo_plugin.functional import rewards", ".config:1 imports vrpo_plugin.functional.rewards"),
        ("functional/a.py", "from vrpo_plugin.config import VRPOConfig", "imports vrpo_plugin.config.VRPOConfig"),
        ("functional/a.py", "from vrpo_plugin import encoders", "imports vrpo_plugin.encoders"),
        ("functional/a.py", "from vrpo_plugin import VRPOConfig", "imports vrpo_plugin.VRPOConfig"),
        ("functional/a.py", "from ..modules import taps", "imports vrpo_plugin.modules.taps"),
        ("functional/a.py", "def f():\n    import vrpo_plugin.modules", "functional.a:2 imports vrpo_plugin.modules"),
        ("modules/a.py", "class A:\n    def f(self):\n        import timm", "vrpo_plugin.modules.a:3 imports timm"),
        ("modules/__init__.py", "from ..standalone import sit", "imports vrpo_plugin.standalone.sit"),
        ("encoders.py", "import timm", "vrpo_plugin.encoders:1 imports timm"),
        ("perceptual.py", "try:\n    import lpips\nexcept ImportError:\n    pass", "imports lpips"),
        ("standalone/a.py", "async def f():\n    from vrpo_plugin.hosts.base import HostSpec", "HostSpec"),
        ("encoders.py", "from vrpo_plugin.standalone.sampler import sample", "imports vrpo_plugin.standalone.sampler"),
        ("patching/a.py", "import torch", "imports torch"),
        ("hosts/repa.py", "import timm", "imports timm"),
        ("hosts/a.py", "from vrpo_plugin import VRPOAligner", "imports vrpo_plugin.VRPOAligner"),
        ("hosts/a.py", "def f():\n    from vrpo_plugin.standalone import sit", "imports vrpo_plugin.standalone.sit"),
        ("launch.py", "import torch", "imports torch"),
        ("commands/hosts.py", "from vrpo_plugin.hosts import report", "imports vrpo_plugin.hosts.report"),
        ("surprise.py", "", "vrpo_plugin.surprise belongs to no layer"),
    ],
)
def test_a_wrong_import_is_reported(tmp_path: Path, path: str, source: str, report: str) -> None:
    (line,) = wrong_imports(write_package(tmp_path, {"__init__.py": "", path: source}))
    assert line.endswith(report) or f"{report}." in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vrpo_plugin.modules import aligner",
        ),
        ("commands/hosts.py", "def f():\n    from vrpo_plugin.hosts import report"),
        ("hosts/a.py", "from torch import nn\nfrom vrpo_plugin.modules.aligner import VRPOAligner"),
        ("encoders.py", "import json\n\ndef f():\n    import timm.models"),
        ("standalone/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL import Image"),
        ("standalone/a.py", "import timm\nfrom vrpo_plugin.standalone import sit\nfrom . import sampler"),
        ("patching/a.py", "import ast\nfrom vrpo_plugin.errors import explain"),
    ],
)
def test_a_right_import_is_not_reported(tmp_path: Path, path: str, source: str) -> None:
    assert wrong_imports(write_package(tmp_path, {path: source})) == []


def test_a_slow_import_is_reported_where_it_is_reached(tmp_path: Path) -> None:
    root = write_package(
        tmp_path,
        {
            "__init__.py": "from vrpo_plugin.modules.aligner import VRPOAligner",
            "modules/__init__.py": "import scipy.linalg",
            "modules/aligner.py": "from vrpo_plugin import perceptual\n\ndef f():\n    import matplotlib",
            "perceptual.py": "if True:\n    import lpips",
            "encoders.py": "import timm",
        },
    )
    assert slow_imports(root) == [
        "vrpo_plugin.modules:1 imports scipy.linalg",
        "vrpo_plugin.perceptual:2 imports lpips",
    ]
