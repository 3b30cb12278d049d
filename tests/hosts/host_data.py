"""Small data sets in the layouts that the hosts read. The same bytes each time."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

IMAGES = 16
SIZE = 256
OFFLINE = Path(__file__).parent / "offline"


def repa(folder: Path, root: Path, images: str = "images") -> None:
    """PNG files, and latents as [mean | std] of shape (8, 32, 32)."""
    (folder / "data" / images).mkdir(parents=True)
    features = folder / "data" / "vae-sd"
    features.mkdir()
    labels = []
    for i, (image, moments) in enumerate(zip(_images(), _moments(), strict=True)):
        image.save(folder / "data" / images / f"img{i:08d}.png")
        np.save(features / f"img-mean-std-{i:08d}.npy", moments)
        labels.append([f"img-mean-std-{i:08d}.npy", i % 2])
    (features / "dataset.json").write_text(json.dumps({"labels": labels}))


def reg(folder: Path, root: Path) -> None:
    repa(folder, root, images="imagenet_256_vae")


def captioned(folder: Path, root: Path) -> None:
    """For train_t2i: image, [mean | log-variance] and one caption of 77 embeddings each."""
    train = folder / "data" / "train"
    train.mkdir(parents=True)
    rng = np.random.default_rng(2)
    np.save(folder / "data" / "empty_context.npy", rng.normal(size=(77, 768)).astype(np.float32))
    for i, (image, moments) in enumerate(zip(_images(), _moments(), strict=True)):
        image.save(train / f"{i}.png")
        np.save(train / f"{i}.npy", moments)
        np.save(train / f"{i}_0.npy", rng.normal(size=(77, 768)).astype(np.float32))


def image_folder(folder: Path, root: Path) -> None:
    """Two classes, for torchvision's ImageFolder."""
    for i, image in enumerate(_images()):
        (folder / "data" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        image.save(folder / "data" / f"class{i % 2}" / f"{i}.png")


def fast_dit(folder: Path, root: Path) -> None:
    """One file of (1, 4, 32, 32) latents and one of its label per image, in the script's default folder."""
    for i, moments in enumerate(_moments()):
        for kind, value in (("features", moments[None, :4] * 0.18215), ("labels", np.array([i % 2]))):
            (folder / "features" / f"imagenet256_{kind}").mkdir(parents=True, exist_ok=True)
            np.save(folder / "features" / f"imagenet256_{kind}" / f"{i}.npy", value)
    (folder / "data").mkdir()


def irepa(folder: Path, root: Path) -> None:
    """Two data sets of the ``datasets`` package, and the VAE that the script loads from the folder above."""
    import datasets

    datasets.disable_progress_bars()
    rows = {"image": list(_images()), "label": [i % 2 for i in range(IMAGES)]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "data" / "imagenet-latents-images")
    latents = datasets.Dataset.from_dict({"data": [m.tolist() for m in _moments()]})
    latents.save_to_disk(folder / "data" / "imagenet-latents-sdvae-ft-mse-f8d4")
    _vae(folder.parent / "pretrained_models" / "sdvae-ft-mse-f8d4.pt", root / "ldm")


def repae(folder: Path, root: Path) -> None:
    """HDF5 files of images and of latents, and the VAE."""
    import h5py

    (folder / "data").mkdir(parents=True)
    files = {f"img{i:08d}.png": _bytes_of(image) for i, image in enumerate(_images())}
    latents = {f"img{i:08d}.npy": moments for i, moments in enumerate(_moments())}
    for name, content in (("images", files), ("latents", latents)):
        labels = {"labels": [[file, i % 2] for i, file in enumerate(content)]}
        with h5py.File(folder / "data" / f"{name}.h5", "w") as file:
            file["dataset.json"] = np.frombuffer(json.dumps(labels).encode(), np.uint8)
            for key, value in content.items():
                file[key] = value
        (folder / "data" / f"{name}_h5.json").write_text(json.dumps(list(content)))
    _vae(folder / "pretrained" / "vae.pt", root)


def lightningdit(folder: Path, root: Path) -> None:
    """One safetensors file of (32, 16, 16) latents, and the configuration, which takes no options."""
    (folder / "data").mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(IMAGES, 32, 16, 16, generator=generator)
    tensors = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(IMAGES) % 2}
    save_file(tensors, folder / "data" / "latents.safetensors")
    # The host computes these on a random choice, and whichever rank is late reads what the other has written.
    moments = {"mean": latents.mean((0, 2, 3), keepdim=True), "std": latents.std((0, 2, 3), keepdim=True)}
    torch.save(moments, folder / "data" / "latents_stats.pt")
    config = {
        "data": {"data_path": "data", "image_size": SIZE, "num_classes": 1000, "num_workers": 0, "latent_norm": True}
        | {"latent_multiplier": 1.0},
        "vae": {"downsample_ratio": 16},
        "model": {"model_type": "LightningDiT-T/1", "use_qknorm": False, "use_swiglu": True, "use_rope": True}
        | {"use_rmsnorm": True, "wo_shift": False, "in_chans": 32},
        "train": {"max_steps": 20, "global_batch_size": 4, "output_dir": "out", "exp_name": "run"}
        | {"log_every": 1, "ckpt_every": 10},
        "optimizer": {"lr": 0.0002, "beta2": 0.95, "max_grad_norm": 1.0},
        "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "sample_eps": None}
        | {"train_eps": None, "use_lognorm": True, "use_cosine_loss": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(tile).resize((SIZE, SIZE), Image.Resampling.NEAREST) for tile in tiles]


def _moments() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    means = rng.normal(0, 4, (IMAGES, 4, 32, 32))
    spreads = rng.uniform(0.1, 1, (IMAGES, 4, 32, 32))
    return list(np.concatenate([means, spreads], axis=1).astype(np.float32))


def _bytes_of(image: Image.Image) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _vae(file: Path, root: Path) -> None:
    """Random weights for the host's own VAE class, made small by the stand-in, and its latents' statistics."""
    file.parent.mkdir(parents=True)
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from models.autoencoder import VAE_F8D4; "
        "torch.manual_seed(7); torch.save(VAE_F8D4().state_dict(), sys.argv[2])"
    )
    environment = os.environ | {"PYTHONPATH": str(OFFLINE), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(root), str(file)], env=environment, check=True, timeout=120)
    statistics = {"latents_scale": torch.full((1, 4, 1, 1), 0.18215), "latents_bias": torch.zeros(1, 4, 1, 1)}
    torch.save(statistics, file.with_name(file.stem + "-latents-stats.pt"))
