import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vrpo_plugin.errors import DataError
from vrpo_plugin.standalone.image_sets import (
    ArrayImages,
    FolderImages,
    array_names,
    open_images,
    read_array,
    samples_record,
)


def pixels(count=4, side=6, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def write_images(folder, arrays, names=None):
    for number, array in enumerate(arrays):
        path = folder / (names[number] if names else f"{number:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.squeeze()).save(path)


def channels_first(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def test_a_folder_is_read_in_the_order_of_names_with_its_subfolders(tmp_path):
    arrays = pixels()
    write_images(tmp_path, arrays, ["b/2.png", "a/9.png", "c.png", "a/10.PNG"])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = open_images(tmp_path)
    assert isinstance(images, FolderImages) and images.resolution == 6
    read = torch.stack([images[i] for i in range(len(images))])
    assert torch.equal(read, channels_first(arrays)[[3, 1, 0, 2]])


def test_images_of_another_size_are_refused_and_with_a_resolution_cropped(tmp_path):
    write_images(tmp_path, [*pixels(1, 6), *pixels(1, 8)])
    images = open_images(tmp_path)
    with pytest.raises(DataError, match=r"001.png: expected 6x6 pixels.*, got 8x8"):
        images[1]
    assert [open_images(tmp_path, 4)[i].shape for i in range(2)] == [(3, 4, 4)] * 2
    Image.new("RGB", (6, 5)).save(tmp_path / "000.png")
    with pytest.raises(DataError, match=r"square.*, got 6x5"):
        open_images(tmp_path)


def test_grey_images_have_three_equal_channels(tmp_path):
    write_images(tmp_path / "folder", pixels(2, channels=1))
    np.savez(tmp_path / "grey.npz", arr_0=pixels(2, channels=1))
    folder, array = open_images(tmp_path / "folder"), open_images(tmp_path / "grey.npz")
    for i in range(2):
        assert torch.equal(folder[i], array[i]) and torch.equal(folder[i][0], folder[i][2])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_file_gives_the_pixels_of_the_folder(tmp_path, save):
    arrays = pixels()
    save(tmp_path / "adm.npz", arr_0=arrays, arr_1=np.arange(4))
    save(tmp_path / "ours.npz", labels=np.arange(4), images=arrays.transpose(0, 3, 1, 2))
    for name in ("adm.npz", "ours.npz"):
        images = open_images(tmp_path / name)
        assert isinstance(images, ArrayImages) and images.resolution == 6 and len(images) == 4
        assert torch.equal(torch.stack([images[i] for i in range(4)]), channels_first(arrays))
    assert array_names(tmp_path / "adm.npz") == ["arr_0", "arr_1"]
    assert isinstance(read_array(tmp_path / "adm.npz", "arr_0"), np.memmap) == (save is np.savez)
    (tmp_path / "folder").mkdir()
    (tmp_path / "adm.npz").rename(tmp_path / "folder" / "samples.npz")
    assert len(open_images(tmp_path / "folder")) == 4


def test_an_array_file_that_a_worker_reads_is_opened_there_again(tmp_path):
    np.savez(tmp_path / "adm.npz", arr_0=pixels(20, 20))
    images = open_images(tmp_path / "adm.npz")
    sent = pickle.dumps(images)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[2], images[2])


def test_other_arrays_are_refused(tmp_path):
    wrong = {
        "float": {"arr_0": pixels().astype(np.float32)},
        "oblong": {"arr_0": pixels()[:, :4]},
        "alpha": {"arr_0": pixels(channels=4)},
        "empty": {"arr_0": pixels()[:0]},
        "vector": {"arr_0": np.zeros(3, np.uint8)},
        "nothing": {"mu": np.zeros(3)},
    }
    for name, arrays in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=f"{name}.npz: expected"):
            open_images(tmp_path / f"{name}.npz")


def test_damaged_files_and_wrong_paths_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=pixels(50, 20))
    whole = buffer.getvalue()
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "list.npz").write_bytes(b"")
    (tmp_path / "photo.heic").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("cut.npz", "text.npz", "list.npz", "photo.heic", "empty", "missing", "missing.npz"):
        with pytest.raises(DataError, match=rf"{name}: expected"):
            open_images(tmp_path / name)


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"objects.npz"):
        open_images(tmp_path / "objects.npz")


def test_samples_json_is_read_beside_the_images_or_their_file(tmp_path):
    assert samples_record(tmp_path) == {}
    (tmp_path / "samples.json").write_text(json.dumps({"seed": 5}))
    assert samples_record(tmp_path) == samples_record(tmp_path / "samples.npz") == {"seed": 5}
    for text in ("{", "5"):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(DataError, match=r"samples.json: expected the JSON"):
            samples_record(tmp_path)
