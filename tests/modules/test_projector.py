"""vrpo_plugin.modules.projector: REPA's and iREPA's heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.modules.projector import build_projector


def test_mlp_has_the_names_and_shapes_of_repas() -> None:
    repa = nn.Sequential(nn.Linear(8, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, 12))
    shapes = {name: p.shape for name, p in build_projector("mlp", 8, 12, projector_dim=20).state_dict().items()}
    assert shapes == {name: p.shape for name, p in repa.state_dict().items()}
    assert list(shapes) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


def test_mlp_computes_what_repas_does_from_the_same_weights() -> None:
    ours = build_projector("mlp", 8, 12, projector_dim=20)
    repa = nn.Sequential(nn.Linear(8, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, 12))
    repa.load_state_dict(ours.state_dict(), strict=True)
    hidden = torch.randn(2, 9, 8)
    assert torch.equal(ours(hidden), repa(hidden))


def test_default_width_is_repas() -> None:
    assert build_projector("mlp", 8, 12).state_dict()["2.weight"].shape == (2048, 2048)


def test_mlp_starts_xavier_uniform_with_zero_biases() -> None:
    projector = build_projector("mlp", 64, 96, projector_dim=128)
    for layer in (layer for layer in projector.modules() if isinstance(layer, nn.Linear)):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        # A uniform draw fills its range and has a deviation of bound / sqrt(3); torch's own initialisation of a
        # linear layer is uniform too, but with another bound.
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_conv_has_irepas_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in build_projector("conv", 8, 12).state_dict().items()}
    assert shapes == {"projection_layer.weight": (12, 8, 3, 3), "projection_layer.bias": (12,)}


def test_conv_sees_the_tokens_row_by_row() -> None:
    projector = build_projector("conv", 3, 5)
    hidden = torch.randn(2, 16, 3)
    weights = projector.state_dict()
    maps = torch.stack([hidden[:, 4 * row : 4 * row + 4] for row in range(4)], dim=1)  # (B, h, w, D)
    seen = F.conv2d(
        maps.permute(0, 3, 1, 2), weights["projection_layer.weight"], weights["projection_layer.bias"], padding=1
    )
    torch.testing.assert_close(projector(hidden), seen.flatten(2).mT)


def test_conv_refuses_tokens_that_form_no_square() -> None:
    with pytest.raises(ShapeError, match=r"expected a square number .* got 15\."):
        build_projector("conv", 3, 5)(torch.randn(2, 15, 3))


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"projector: expected mlp or conv, got 'attention'\. Choose"):
        build_projector("attention", 8, 12)


@pytest.mark.parametrize(("grid", "sides"), [((8, 32), (16, 64)), ((32, 8), (64, 16)), ((2, 8), (4, 16))])
def test_conv_mixes_neighbours_of_the_images_own_grid(grid: tuple[int, int], sides: tuple[int, int]) -> None:
    (height, width), row, column = grid, grid[0] // 2, grid[1] // 2
    projector = build_projector("conv", 3, 5, sides=sides)
    tokens = torch.zeros(1, height * width, 3)
    tokens[0, row * width + column] = 1
    change = (projector(tokens) - projector(torch.zeros_like(tokens))).abs().sum(-1)[0].gt(1e-6).nonzero().flatten()
    touched = {divmod(int(i), width) for i in change}
    rows = [r for r in (row - 1, row, row + 1) if 0 <= r < height]
    columns = [c for c in (column - 1, column, column + 1) if 0 <= c < width]
    assert touched == {(r, c) for r in rows for c in columns}


def test_conv_refuses_tokens_of_another_aspect() -> None:
    with pytest.raises(ShapeError, match=r"as high to wide as 16 to 32 .* got 64\."):
        build_projector("conv", 3, 5, sides=(16, 32))(torch.randn(2, 64, 3))
