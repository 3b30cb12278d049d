"""Pictures of batches: independent of the number of processes, of the batch and of other images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.gloo import on_two_processes
from fakes.runs import tiny_sit
from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.standalone.drawing import (
    batches_of,
    draw,
    draw_together,
    grid_picture,
    image_generators,
    keep_pixels,
    load_decoder,
)
from vrpo_plugin.standalone.sampler import sample

COUNT, SIZE = 11, 3


def numbered(numbers: range) -> Tensor:
    """An image that says its number."""
    return torch.tensor(numbers).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def together(rank: int, world_size: int) -> Tensor:
    images = draw_together(numbered, COUNT, SIZE)
    assert (images is None) == (rank > 0)
    return torch.zeros(0) if images is None else images


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    first, second = on_two_processes(together, tmp_path)
    assert first[:, 0, 0, 0].tolist() == [*range(COUNT)] and len(second) == 0
    assert torch.equal(draw_together(numbered, COUNT, SIZE), first)


def test_batches_cover_all_images_in_order() -> None:
    assert [list(b) for b in batches_of(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_an_image_depends_on_its_number_alone(solver: str) -> None:
    """With the SDE too, whose noise is drawn at every step."""
    model = tiny_sit(1)

    def images(numbers: range) -> Tensor:
        generators = image_generators(5, numbers)
        noise = torch.stack([torch.randn(1, 8, 8, generator=one) for one in generators])
        y = torch.tensor(numbers) % 10
        return draw(
            model, noise, y, decode=keep_pixels, device="cpu", generators=generators, solver=solver, num_steps=3
        )

    whole = images(range(6))
    parts = torch.cat([images(range(2)), images(range(2, 6))])
    # Another batch rounds otherwise, by one grey level at most.
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert (whole[0].int() - whole[1].int()).abs().max() > 10
    assert torch.equal(images(range(2, 6)), images(range(2, 6)))


def test_one_generator_per_sample_gives_each_its_own_noise() -> None:
    def noisy(generator: object) -> Tensor:
        zeros = torch.zeros(2, 1, 4, 4)
        return sample(lambda x, t, y: 0 * x, zeros, solver="euler_maruyama", num_steps=3, generator=generator)

    pair = noisy(image_generators(0, [3, 4]))
    swapped = noisy(image_generators(0, [4, 3]))
    assert torch.equal(pair, swapped.flip(0)) and not torch.equal(pair[0], pair[1])


@pytest.mark.parametrize(("count", "columns", "tiles"), [(100, 10, (10, 10)), (7, 3, (3, 3)), (1, 1, (1, 1))])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_once(count: int, columns: int, tiles: tuple[int, int], channels: int) -> None:
    images = torch.arange(count).byte().view(-1, 1, 1, 1).expand(-1, channels, 16, 16)
    picture = np.array(grid_picture(images, columns))
    scale = picture.shape[1] // (tiles[1] * 17)
    assert picture.shape[:2] == (tiles[0] * 17 * scale, tiles[1] * 17 * scale)
    centres = picture[8 * scale :: 17 * scale, 8 * scale :: 17 * scale].reshape(tiles[0] * tiles[1], -1)[:, 0]
    assert centres[:count].tolist() == [*range(count)] and set(centres[count:].tolist()) <= {96}


def test_a_vae_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="vae: expected diffusers installed"):
        load_decoder(str(tmp_path), "cpu")
    monkeypatch.undo()
    pytest.importorskip("diffusers")
    with pytest.raises(ConfigError, match=r"vae: expected a diffusers AutoencoderKL, got '.*absent'"):
        load_decoder(str(tmp_path / "absent"), "cpu")


def test_a_vae_decodes_what_it_encodes_at_the_usual_scale(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path)
    latents = torch.randn(17, 4, 4, 4)  # one more than are decoded at once
    pixels = load_decoder(str(tmp_path), "cpu")(latents)
    with torch.no_grad():
        torch.testing.assert_close(pixels, vae.eval().decode(latents / 0.18215).sample, rtol=1e-4, atol=1e-4)
