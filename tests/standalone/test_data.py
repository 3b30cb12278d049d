import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.standalone.data import LATENTS_SCALE, PositionBatchSampler, TrainingSamples
from vrpo_plugin.standalone.sources import (
    ArraySource,
    DigitsSource,
    ImageFolderSource,
    RepaSource,
    all_images,
    center_crop,
    open_source,
    remarks_on,
)


@pytest.fixture(scope="module")
def digits():
    return DigitsSource()


class Tiny:
    """Seven 1x2x2 images whose pixels are their index; optional moments."""

    num_classes, image_shape, latent_shape = 7, (1, 2, 2), (1, 2, 2)

    def __init__(self, moments=None):
        self.moments = moments

    def __len__(self):
        return 7

    def load(self, index):
        return torch.full((1, 2, 2), index, dtype=torch.uint8), self.moments, index

    def fingerprint(self):
        return "0" * 16


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def rng_image(seed, height=8, width=8, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_repa(root, count=6, *, image_suffix=".png", batched=True):
    """REPA's layout as its preprocessing writes it: 5-digit folders, names that differ but sort alike."""
    rng = np.random.default_rng(0)
    labels = []
    for i in range(count):
        folder = f"{i // 4:05d}"
        image = root / "images" / folder / f"img{i:08d}{image_suffix}"
        feature = root / "vae-sd" / folder / f"img-mean-std-{i:08d}.npy"
        for path in (image, feature):
            path.parent.mkdir(parents=True, exist_ok=True)
        if image_suffix == ".npy":
            np.save(image, rng_image(i).transpose(2, 0, 1))
        else:
            write_image(image, rng_image(i))
        mean, std = rng.normal(size=(4, 32, 32)), rng.uniform(0.1, 1, (4, 32, 32))
        moments = np.concatenate([mean, std]).astype(np.float32)
        np.save(feature, moments[None] if batched else moments)
        labels.append([f"{folder}/{feature.name}", (5 * i) % 4])
    (root / "images" / "dataset.json").write_text(json.dumps({"labels": None}))
    # The order in the file must not matter.
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return root


def stack(samples, positions):
    return torch.utils.data.default_collate([samples[p] for p in positions])


def said(source):
    return [remark.text for remark in remarks_on(source)]


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Sources.


@pytest.mark.parametrize("size", [8, 16])
def test_digits(size):
    from sklearn.datasets import load_digits

    source, real = DigitsSource(size), load_digits()
    assert len(source) == 1797
    assert source.image_shape == source.latent_shape == (1, size, size)
    images, labels = all_images(source)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (1797, 1, size, size))
    assert labels.tolist() == real.target.tolist()
    assert source.num_classes == 10
    if size == 8:
        assert (images[:, 0].numpy() == np.round(real.images / 16 * 255)).all()
        assert images.max() == 255
    else:
        # Corners keep their value; pooling back gives nearly the original.
        assert (images[:, 0, ::15, ::15].numpy() == np.round(real.images[:, ::7, ::7] / 16 * 255)).all()
        small = torch.nn.functional.avg_pool2d(images.float(), 2)[:, 0].numpy()
        assert np.corrcoef(small.ravel(), real.images.ravel())[0, 1] > 0.97
    assert source.load(3)[1] is None


def test_digits_too_small():
    with pytest.raises(ConfigError, match="expected at least 8, got 4"):
        DigitsSource(4)


def test_image_folder_reads_as_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for i, name in enumerate(["b/z.png", "b/10.png", "a/sub/q.jpg", "a/2.PNG", "c/x.bmp"]):
        write_image(tmp_path / name, rng_image(i, 8, 8))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source, reference = ImageFolderSource(tmp_path, 8), ImageFolder(str(tmp_path))
    assert (len(source), source.num_classes) == (5, 3)
    assert source.image_shape == source.latent_shape == (3, 8, 8)
    for i, (image, label) in enumerate(reference):
        loaded, moments, loaded_label = source.load(i)
        assert (loaded_label, moments) == (label, None)
        assert (loaded.numpy() == np.array(image).transpose(2, 0, 1)).all()


def test_flat_folder_is_one_class(tmp_path):
    for i in (2, 0, 1):
        write_image(tmp_path / f"{i}.png", rng_image(i, channels=1))
    source = ImageFolderSource(tmp_path, 8, channels=1)
    assert (len(source), source.num_classes, source.image_shape) == (3, 1, (1, 8, 8))
    images, labels = all_images(source)
    assert (images[:, 0].numpy() == np.stack([rng_image(i, channels=1) for i in range(3)])).all()
    assert labels.tolist() == [0, 0, 0]
    assert ImageFolderSource(tmp_path, 8).load(0)[0].shape == (3, 8, 8)


def test_center_crop_halves_by_box_filter():
    pixels = rng_image(0, 64, 64)

    def halve(x):
        # Pillow filters rows first and rounds in between.
        rows = (x[:, ::2] + x[:, 1::2] + 1) // 2
        return (rows[::2] + rows[1::2] + 1) // 2

    result = np.array(center_crop(Image.fromarray(pixels), 16))
    assert (result == halve(halve(pixels.astype(int)))).all()


@pytest.mark.parametrize(("height", "width"), [(16, 31), (31, 16), (16, 16)])
def test_center_crop_takes_the_centre(height, width):
    pixels = rng_image(0, height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    result = np.array(center_crop(Image.fromarray(pixels), 16))
    assert (result == pixels[top : top + 16, left : left + 16]).all()


@pytest.mark.parametrize("size", [(20, 50), (33, 47), (5, 9), (1000, 40)])
def test_center_crop_gives_the_size(size):
    assert center_crop(Image.fromarray(rng_image(0, *size)), 16).size == (16, 16)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("image_suffix", [".png", ".npy"])
def test_repa_source(tmp_path, image_suffix, batched):
    root = write_repa(tmp_path, image_suffix=image_suffix, batched=batched)
    source = RepaSource(root)
    assert (len(source), source.num_classes) == (6, 4)
    assert (source.image_shape, source.latent_shape) == ((3, 8, 8), (4, 32, 32))
    for i in range(6):
        image, moments, label = source.load(i)
        assert (image.numpy() == rng_image(i).transpose(2, 0, 1)).all()
        stored = np.load(root / "vae-sd" / f"{i // 4:05d}" / f"img-mean-std-{i:08d}.npy")
        assert (moments.numpy() == stored.reshape(8, 32, 32)).all()
        assert label == (5 * i) % 4


@pytest.mark.host
@pytest.mark.parametrize("image_suffix", [".png", ".npy"])
def test_repa_source_reads_what_repa_reads(tmp_path, image_suffix):
    path = Path(os.environ["VRPO_HOSTS_DIR"]) / "REPA" / "dataset.py"
    spec = importlib.util.spec_from_file_location("repa_dataset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = write_repa(tmp_path, 11, image_suffix=image_suffix)
    # By whole names this folder comes before 00001, by folders after it.
    (root / "images" / "00000").rename(root / "images" / "00001-x")
    source, reference = RepaSource(root), module.CustomDataset(str(root))
    assert len(source) == len(reference) == 11
    for i in range(11):
        image, moments, label = source.load(i)
        real_image, real_moments, real_label = reference[i]
        assert torch.equal(image, real_image)
        assert torch.equal(moments, real_moments[0])
        assert label == int(real_label)


def test_fingerprint_follows_the_data(tmp_path):
    assert DigitsSource().fingerprint() == DigitsSource().fingerprint() != DigitsSource(16).fingerprint()
    root = write_repa(tmp_path / "a")
    shutil.copytree(root, tmp_path / "b")
    seen = {RepaSource(root).fingerprint()}
    assert {RepaSource(tmp_path / "b").fingerprint()} == seen
    features = tmp_path / "b" / "vae-sd"
    labels = json.loads((features / "dataset.json").read_text())
    labels["labels"][0][1] += 1
    (features / "dataset.json").write_text(json.dumps(labels))
    seen.add(RepaSource(tmp_path / "b").fingerprint())
    image = next((tmp_path / "b" / "images" / "00001").iterdir())
    image = image.rename(image.with_name("img99999999.png"))
    seen.add(RepaSource(tmp_path / "b").fingerprint())
    image.write_bytes(image.read_bytes() + b"\0")
    seen.add(RepaSource(tmp_path / "b").fingerprint())
    images = root / "images" / "00000"
    seen |= {ImageFolderSource(images, size).fingerprint() for size in (8, 16)}
    assert len(seen) == 6
    assert all(len(fingerprint) == 16 for fingerprint in seen)


def test_open_source_chooses(tmp_path):
    assert open_source(None).image_shape == (1, 8, 8)
    assert open_source(None, 16).image_shape == (1, 16, 16)
    root = write_repa(tmp_path)
    assert isinstance(open_source(root), RepaSource)
    assert isinstance(open_source(str(root), 8), RepaSource)
    folder = open_source(root / "images", 8)
    assert isinstance(folder, ImageFolderSource)
    assert folder.num_classes == 2
    with pytest.raises(DataError, match="expected 16x16 pixels, got 8x8"):
        open_source(root, 16)
    with pytest.raises(ConfigError, match="resolution: expected a number, got None"):
        open_source(root / "images")
    with pytest.raises(DataError, match=r"missing: expected a readable folder, got .*\. Check the path"):
        open_source(tmp_path / "missing", 8)


def write_arrays(path, count=6, size=8, **changes):
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8), "labels": np.arange(count) % 3}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return arrays


def test_array_source(tmp_path):
    arrays = write_arrays(tmp_path / "train.npz")
    source = open_source(tmp_path / "train.npz", 8)
    assert isinstance(source, ArraySource)
    assert len(source) == 6 and source.num_classes == 3 and source.image_shape == source.latent_shape == (3, 8, 8)
    image, moments, label = source.load(4)
    assert moments is None and label == 1 and np.array_equal(image.numpy(), arrays["images"][4])
    assert source.fingerprint() == open_source(str(tmp_path / "train.npz")).fingerprint()
    write_arrays(tmp_path / "other.npz", labels=np.arange(6))
    assert source.fingerprint() != open_source(tmp_path / "other.npz").fingerprint()
    sample = TrainingSamples(source, seed=0)[0]
    assert sample["x0"].shape == (3, 8, 8) and -1 <= sample["x0"].min() <= sample["x0"].max() <= 1
    with pytest.raises(DataError, match="expected 16x16 pixels, got 8x8"):
        open_source(tmp_path / "train.npz", 16)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": None}, "images"),
        ({"labels": None}, "labels"),
        ({"images": np.zeros((6, 3, 8, 8))}, "float64"),
        ({"images": np.zeros((6, 8, 8), np.uint8)}, "uint8"),
        ({"images": np.zeros((6, 3, 8, 4), np.uint8)}, r"\(6, 3, 8, 4\)"),
        ({"images": np.zeros((0, 3, 8, 8), np.uint8), "labels": np.zeros(0, int)}, r"\(0, 3, 8, 8\)"),
        ({"labels": np.zeros(5, int)}, r"\(5,\)"),
        ({"labels": np.zeros(6)}, "float64"),
        ({"labels": np.full(6, -1)}, "integers >= 0"),
        ({"labels": np.array(["a"] * 6, object)}, "labels"),
    ],
)
def test_bad_arrays(tmp_path, changes, text):
    write_arrays(tmp_path / "bad.npz", **changes)
    with pytest.raises(DataError, match=text):
        open_source(tmp_path / "bad.npz", 8)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "npy", "text", "folder"])
def test_bad_array_file(tmp_path, damage):
    path = tmp_path / "bad.npz"
    write_arrays(path)
    content = path.read_bytes()
    damaged = {"empty": b"", "cut": content[:300], "text": b"x", "flipped": content[:600] + b"#" + content[601:]}
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"bad\.npz"):
        open_source(path, 8)


@pytest.mark.parametrize(("limit", "expected"), [(None, range(7)), (3, [0, 2, 4]), (100, range(7)), (1, [0])])
def test_all_images(limit, expected):
    images, labels = all_images(Tiny(), limit)
    assert labels.tolist() == images[:, 0, 0, 0].tolist() == list(expected)
    assert (labels.dtype, images.dtype) == (torch.int64, torch.uint8)


def test_all_images_refuses_a_limit_of_zero():
    with pytest.raises(ConfigError, match="limit"):
        all_images(Tiny(), 0)


# Bad data. Each case: what to break, the file that the message names, a part of the message.


def drop_label(root):
    path = root / "vae-sd" / "dataset.json"
    labels = json.loads(path.read_text())["labels"]
    path.write_text(json.dumps({"labels": labels[1:]}))


def write_labels(text):
    return lambda root: (root / "vae-sd" / "dataset.json").write_text(text)


def feature(root):
    return root / "vae-sd" / "00000" / "img-mean-std-00000002.npy"


def image(root):
    return root / "images" / "00000" / "img00000002.png"


def non_finite(root):
    moments = np.load(feature(root))
    moments[0, 3, 1, 2] = np.nan
    np.save(feature(root), moments)


REPA_DAMAGE = [
    (lambda root: shutil.rmtree(root / "images"), "images", "readable folder"),
    (lambda root: [p.unlink() for p in root.glob("vae-sd/*/*.npy")], "vae-sd", "got none"),
    (lambda root: image(root).unlink(), "", "got 5 images and 6 features"),
    (lambda root: (root / "vae-sd" / "dataset.json").unlink(), "dataset.json", "labels"),
    (write_labels("{"), "dataset.json", "labels"),
    (write_labels('{"labels": null}'), "dataset.json", "labels"),
    (drop_label, "dataset.json", "for 00001/img-mean-std-00000005.npy, got None"),
    (write_labels('{"labels": [["00000/img-mean-std-00000000.npy", -1]]}'), "dataset.json", "got -1"),
    (write_labels('{"labels": [["00000/img-mean-std-00000000.npy", 0.5]]}'), "dataset.json", "got 0.5"),
    (non_finite, feature, "finite moments"),
    (lambda root: np.save(feature(root), np.zeros((8, 16, 16), np.float32)), feature, "(8, 32, 32) as in the first"),
    (lambda root: np.save(feature(root), np.zeros((7, 32, 32), np.float32)), feature, "(2C, H, W)"),
    (lambda root: np.save(feature(root), np.zeros((8, 32, 32), np.int64)), feature, "got int64"),
    (lambda root: write_image(image(root), rng_image(0, 16, 16)), image, "(3, 8, 8) as in the first"),
    (lambda root: write_image(image(root), rng_image(0, channels=1)), image, "got (1, 8, 8)"),
    (lambda root: write_image(image(root), np.zeros((8, 8), np.uint16)), image, "got (1, 8, 8)"),
]


@pytest.mark.parametrize(("damage", "file", "text"), REPA_DAMAGE)
def test_bad_repa_data(tmp_path, damage, file, text):
    root = write_repa(tmp_path)
    damage(root)
    with pytest.raises(DataError) as caught:
        all_images(RepaSource(root))
    message = str(caught.value)
    assert text in message
    assert (str(file(root)) if callable(file) else file) in message
    assert "expected " in message
    assert ", got " in message


UNREADABLE = [
    (lambda root: np.save(feature(root), np.array([{}]), allow_pickle=True), feature),
    (lambda root: np.savez(open(feature(root), "wb"), mu=np.ones(1)), feature),  # noqa: SIM115
    (lambda root: os.truncate(feature(root), 200), feature),
    (lambda root: os.truncate(feature(root), 0), feature),
    (lambda root: os.truncate(image(root), 90), image),
    (lambda root: image(root).write_text("text"), image),
    (lambda root: Image.fromarray(np.ones((8, 8), np.float32)).save(image(root), format="tiff"), image),
]


@pytest.mark.parametrize(("damage", "file"), UNREADABLE)
def test_an_unreadable_file_is_skipped_and_named(tmp_path, damage, file):
    """In its place stands the next one; an evaluation's reference leaves it out."""
    root = write_repa(tmp_path)
    damage(root)
    source = RepaSource(root)
    assert source.remarks() == []
    images, labels = all_images(source)
    assert len(images) == 5 and labels.tolist() == [(5 * i) % 4 for i in (0, 1, 3, 4, 5)]
    assert torch.equal(source.load(2)[0], source.load(3)[0]) and source.load(2)[2] == source.load(3)[2]
    assert said(source) == [f"skipped 1 of 6 files that cannot be read: {file(root)}"]


def test_unreadable_files_of_a_folder(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png", rng_image(i))
    for i in (2, 3, 5, 7):
        (tmp_path / f"{i}.png").write_bytes(b"" if i == 2 else b"text")
    source = open_source(tmp_path, 8)
    samples = TrainingSamples(source, seed=0)
    loader = DataLoader(samples, batch_sampler=PositionBatchSampler(batch_size=4, num_batches=4), num_workers=2)
    batches = list(loader)
    assert len(batches) == 4
    # The workers have met them, and this process says so: positions are the same as without workers.
    (line,) = said(source)
    names = ", ".join(str(tmp_path / f"{i}.png") for i in (2, 3, 5))
    assert line == f"skipped 4 of 8 files that cannot be read: {names}, ..."
    assert torch.equal(batches[0]["image"], stack(samples, range(4))["image"])
    wrapped, first = source.load(7)[0], source.load(0)[0]
    assert torch.equal(wrapped, first) and len(all_images(source)[0]) == 4


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("text")
    with pytest.raises(DataError, match=r"got 3 in a row that cannot; .*2\.png: expected a readable image"):
        open_source(tmp_path, 8).load(0)


def test_the_rotation_of_a_camera_is_applied(tmp_path):
    pixels = rng_image(0, 8, 8)
    for orientation, turned in ((6, np.rot90(pixels, -1)), (3, pixels[::-1, ::-1]), (2, pixels[:, ::-1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        loaded = ImageFolderSource(tmp_path, 8).load(0)[0]
        assert (loaded.numpy() == turned.transpose(2, 0, 1)).all(), orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")  # damaged
    assert (ImageFolderSource(tmp_path, 8).load(0)[0].numpy() == pixels.transpose(2, 0, 1)).all()


def test_repa_pairs_keep_the_pixels_that_were_encoded(tmp_path):
    root = write_repa(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng_image(2)).save(image(root), exif=exif)
    assert (RepaSource(root).load(2)[0].numpy() == rng_image(2).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_composed_on_white(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4, 3], pixels[:4, :, 3] = 255, 128
    picture, path = Image.fromarray(pixels), tmp_path / "a.png"
    if mode in ("P", "RGB"):  # one transparent colour
        picture = Image.new("RGB", (8, 8), (255, 0, 0))
        picture.paste((9, 8, 7), (4, 0, 8, 8))
        options = {"transparency": (9, 8, 7)}
        if mode == "P":
            picture = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
            options = {"transparency": int(np.asarray(picture)[0, 7])}
        picture.save(path, **options)
        expected = np.full((8, 8, 3), 255)
        expected[:, :4, 1:] = 0
    else:
        picture.convert(mode).save(path)
        expected = np.repeat(255 - pixels[..., 3:].astype(int), 3, axis=2)
    source = ImageFolderSource(tmp_path, 8)
    assert np.abs(source.load(0)[0].numpy().astype(int) - expected.transpose(2, 0, 1)).max() <= 1
    assert said(source) == [f"composed 1 of 1 files with transparency on white: {path}"]


def test_opaque_alpha_changes_nothing(tmp_path):
    opaque = Image.fromarray(rng_image(0))
    opaque.putalpha(255)
    opaque.save(tmp_path / "a.png")
    source = ImageFolderSource(tmp_path, 8)
    assert (source.load(0)[0].numpy() == rng_image(0).transpose(2, 0, 1)).all()
    assert remarks_on(source) == []


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    pixels[0, :2] = 0, 65535
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    loaded = ImageFolderSource(tmp_path, 8, channels=1).load(0)[0][0].numpy()
    assert (loaded == np.round(pixels / 257)).all() and loaded.max() == 255


def test_bad_npy_image(tmp_path):
    root = write_repa(tmp_path, image_suffix=".npy")
    path = root / "images" / "00000" / "img00000002.npy"
    np.save(path, np.zeros((3, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"img00000002.npy: expected uint8 .* got float32"):
        all_images(RepaSource(root))


def test_bad_image_folders(tmp_path):
    with pytest.raises(DataError, match=r"got none\. Point"):
        ImageFolderSource(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"images in each class folder, got .*empty"):
        ImageFolderSource(tmp_path, 8)
    write_image(tmp_path / "stray.png", rng_image(0))
    with pytest.raises(DataError, match=r"got stray.png beside class folders"):
        ImageFolderSource(tmp_path, 8)
    with pytest.raises(DataError, match="expected a readable folder"):
        ImageFolderSource(tmp_path / "stray.png", 8)
    for resolution, channels in ((0, 3), (8, 2)):
        with pytest.raises(ConfigError, match="1 or 3 channels"):
            ImageFolderSource(tmp_path, resolution, channels)


# Samples.


def test_sample_fields(digits):
    sample = TrainingSamples(digits, seed=0)[5]
    image, _, label = digits.load(TrainingSamples(digits, seed=0).index(5))
    assert torch.equal(sample["image"], image)
    assert int(sample["y"]) == label
    torch.testing.assert_close(sample["x0"], image.float() / 255 * 2 - 1)
    shapes = {"image": (1, 8, 8), "x0": (1, 8, 8), "noise": (1, 8, 8), "t": (), "y": (), "drop": ()}
    dtypes = {"image": torch.uint8, "y": torch.int64, "drop": torch.bool}
    assert {k: tuple(v.shape) for k, v in sample.items()} == shapes
    assert all(v.dtype == dtypes.get(k, torch.float32) for k, v in sample.items())


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 2**40), seed=st.integers(0, 2**63))
def test_sample_is_a_function_of_seed_and_position(position, seed):
    samples = TrainingSamples(Tiny(), seed=seed, flip_prob=0.5)
    torch.manual_seed(0)
    first = samples[position]
    samples[position + 7], samples[0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(first, samples[position])
    assert same(first, TrainingSamples(Tiny(), seed=seed, flip_prob=0.5)[position])
    assert torch.equal(state, torch.get_rng_state())


def test_samples_are_pinned(digits):
    """A change of these numbers breaks the resuming of runs that older versions started."""
    samples = TrainingSamples(digits, seed=3, flip_prob=0.5)
    assert [samples.index(p) for p in (0, 1, 10_000)] == [293, 502, 1184]
    sample = samples[10_000]
    assert sample["t"].item() == pytest.approx(0.01069027)
    assert sample["noise"][0, 0, :3].tolist() == pytest.approx([1.58166, 0.383196, 1.62599], rel=1e-5)


def test_seed_and_position_give_unrelated_draws(digits):
    noise = torch.stack([TrainingSamples(digits, seed=s)[p]["noise"].flatten() for s in range(4) for p in range(40)])
    correlation = torch.corrcoef(noise) - torch.eye(160)
    assert correlation.abs().max() < 0.65
    t = torch.stack([TrainingSamples(digits, seed=s)[p]["t"] for s in range(40) for p in range(40)])
    assert t.unique().numel() == 1600


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_independent_of_workers(digits, workers):
    samples = TrainingSamples(digits, seed=1, flip_prob=0.5)
    sampler = PositionBatchSampler(batch_size=8, num_batches=5, start_batch=1)
    batches = list(DataLoader(samples, batch_sampler=sampler, num_workers=workers))
    assert len(batches) == 4
    for m, batch in enumerate(batches, start=1):
        assert same(batch, stack(samples, range(8 * m, 8 * m + 8)))


def test_independent_of_order_and_of_pickling(digits):
    samples = TrainingSamples(digits, seed=1)
    forward = [samples[p] for p in range(0, 6000, 500)]
    copy = pickle.loads(pickle.dumps(TrainingSamples(DigitsSource(), seed=1)))
    backward = [copy[p] for p in reversed(range(0, 6000, 500))]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_each_index_once_per_epoch(digits):
    samples = TrainingSamples(digits, seed=0)
    n = len(digits)
    epochs = [[samples.index(p) for p in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    # Shuffled, and anew: two random permutations agree in one place on average.
    for a, b in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], range(n))):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert [TrainingSamples(digits, seed=1).index(p) for p in range(n)] != epochs[0]


def test_settings_do_not_move_each_other(digits):
    plain = stack(TrainingSamples(digits, seed=0, label_drop_prob=0), range(50))
    other = stack(
        TrainingSamples(digits, seed=0, flip_prob=1, label_drop_prob=1, time_sampling="lognormal", path_type="cosine"),
        range(50),
    )
    assert torch.equal(plain["noise"], other["noise"])
    assert torch.equal(plain["y"], other["y"])
    assert torch.equal(plain["image"].flip(-1), other["image"])
    assert torch.equal(plain["x0"].flip(-1), other["x0"])
    assert not plain["drop"].any()
    assert other["drop"].all()


def test_distributions(digits):
    from scipy import stats

    count = 4000
    batch = stack(TrainingSamples(digits, seed=0, flip_prob=0.3, label_drop_prob=0.1), range(count))
    still = stack(TrainingSamples(digits, seed=0), range(count))
    flipped = (batch["image"] != still["image"]).flatten(1).any(1)
    # Within 4 standard deviations (a handful of digits are symmetric).
    assert abs(flipped.float().mean() - 0.3) < 4 * (0.21 / count) ** 0.5
    assert abs(batch["drop"].float().mean() - 0.1) < 4 * (0.09 / count) ** 0.5
    assert abs(np.corrcoef(flipped, batch["drop"])[0, 1]) < 0.07
    assert abs(np.corrcoef(batch["t"], batch["drop"])[0, 1]) < 0.07
    assert stats.kstest(batch["t"], "uniform").pvalue > 1e-3
    assert stats.kstest(batch["noise"].flatten()[::7], "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("path_type", "sigma"), [("linear", lambda t: t / (1 - t)), ("cosine", lambda t: np.tan(np.pi / 2 * t))]
)
def test_lognormal_time(path_type, sigma):
    from scipy import stats

    samples = TrainingSamples(Tiny(), seed=0, time_sampling="lognormal", path_type=path_type)
    t = np.array([float(samples[p]["t"]) for p in range(2000)])
    assert ((t > 0) & (t < 1)).all()
    assert stats.kstest(np.log(sigma(t)), "norm").pvalue > 1e-3


def test_latents_are_drawn_from_the_moments(tmp_path):
    source = RepaSource(write_repa(tmp_path))
    samples = TrainingSamples(source, seed=0, flip_prob=1)
    assert same(samples[4], TrainingSamples(source, seed=0, flip_prob=0)[4])
    residuals = []
    for position in range(24):
        sample = samples[position]
        image, moments, label = source.load(samples.index(position))
        assert torch.equal(sample["image"], image)
        assert int(sample["y"]) == label
        mean, std = moments.chunk(2)
        residuals.append((sample["x0"] / LATENTS_SCALE - mean) / std)
        assert abs(np.corrcoef(residuals[-1].flatten(), sample["noise"].flatten())[0, 1]) < 0.07
    residual = torch.stack(residuals)
    assert abs(residual.mean()) < 0.02
    assert abs(residual.std() - 1) < 0.02
    assert LATENTS_SCALE == 0.18215


def test_non_finite_latent_names_the_sample():
    moments = torch.ones(2, 2, 2)
    moments[0, 1, 1] = torch.inf
    samples = TrainingSamples(Tiny(moments), seed=0)
    with pytest.raises(DataError, match=f"sample {samples.index(3)}: expected finite latents, got inf or nan"):
        samples[3]


@pytest.mark.parametrize(
    "setting",
    [{"flip_prob": 1.5}, {"label_drop_prob": -0.1}, {"time_sampling": "cosine"}, {"path_type": "vp"}],
)
def test_bad_settings(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: expected .*, got .*Choose"):
        TrainingSamples(Tiny(), seed=0, **setting)


# Positions.


@settings(deadline=None)
@given(
    share=st.integers(1, 5),
    world_size=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 8]),
    start=st.integers(0, 3),
)
def test_same_positions_on_any_split(share, world_size, accumulation, start):
    """Step s uses positions s G ... (s + 1) G - 1, whatever the processes and the accumulation."""
    micro, steps = share * world_size, 4
    ranks = [
        PositionBatchSampler(
            batch_size=micro,
            num_batches=steps * accumulation,
            rank=rank,
            world_size=world_size,
            start_batch=start * accumulation,
        )
        for rank in range(world_size)
    ]
    assert {len(sampler) for sampler in ranks} == {(steps - start) * accumulation}
    positions = [p for shares in zip(*ranks, strict=True) for batch in shares for p in batch]
    assert positions == list(range(start * accumulation * micro, steps * accumulation * micro))
    assert all(len(batch) == share for sampler in ranks for batch in sampler)


def test_two_ranks_make_one_batch(digits):
    samples = TrainingSamples(digits, seed=0)
    whole = next(iter(DataLoader(samples, batch_sampler=PositionBatchSampler(batch_size=6, num_batches=1))))
    parts = [
        next(
            iter(
                DataLoader(
                    samples,
                    batch_sampler=PositionBatchSampler(batch_size=6, num_batches=1, rank=rank, world_size=2),
                )
            )
        )
        for rank in range(2)
    ]
    assert same(whole, {k: torch.cat([part[k] for part in parts]) for k in whole})


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"batch_size": 6, "world_size": 4}, "multiple of the 4 processes, got 6"),
        ({"batch_size": 0}, "got 0"),
        ({"world_size": 0}, "multiple"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"start_batch": 11}, "start_batch 11 of 10"),
        ({"start_batch": -1}, "start_batch -1"),
    ],
)
def test_bad_sampler_numbers(numbers, text):
    with pytest.raises(ConfigError, match=text):
        PositionBatchSampler(**{"batch_size": 8, "num_batches": 10, **numbers})
