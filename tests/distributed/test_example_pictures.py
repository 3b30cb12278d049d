"""The example's grids and its evaluation on two gloo processes: what one process gives."""

from pathlib import Path

import pytest
import torch
from fakes.gloo import on_two_processes
from fakes.runs import tiny_sit
from torch import Tensor, nn
from train_options import TrainOptions
from train_parts import Painter

from vrpo_plugin import VRPOConfig
from vrpo_plugin.standalone.drawing import keep_pixels
from vrpo_plugin.standalone.sources import DigitsSource


class Pixels:
    """A feature network without weights."""

    name, encoder = "pixels", nn.Identity()

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=2).flatten(1)


def draw(folder: Path) -> dict[str, Tensor]:
    options = TrainOptions(
        eval_samples=280, eval_network="pixels", solver="euler_maruyama", solver_steps=2, cfg_scale=1.5
    )
    painter = Painter(options, VRPOConfig(), DigitsSource(), keep_pixels, torch.device("cpu"))
    painter._network = Pixels()
    painter.grid(tiny_sit(1), folder / "grid.png")
    result = painter.evaluate(tiny_sit(1), folder)
    if result is None:
        return {}
    picture = torch.frombuffer(bytearray((folder / "grid.png").read_bytes()), dtype=torch.uint8)
    numbers = torch.tensor([result.frechet_distance, result.precision, result.recall], dtype=torch.float64)
    return {"picture": picture, "numbers": numbers}


def draw_in_turn(rank: int, world_size: int) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return draw(Path.cwd())


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = on_two_processes(draw_in_turn, tmp_path)
    alone = draw(tmp_path)
    assert second == {} and alone["numbers"].isfinite().all()
    assert torch.equal(first["picture"], alone["picture"]) and torch.equal(first["numbers"], alone["numbers"])
