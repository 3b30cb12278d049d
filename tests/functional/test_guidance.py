"""The step of guided sampling: its length, whatever the reward's scale."""

import numpy as np
import pytest
import torch

from vrpo_plugin.functional.guidance import estimate_error, guided_change


def test_the_error_is_that_of_the_wiener_filter() -> None:
    """Of Gaussian data the best estimate is linear in x_t: its error by sampling, against the formula."""
    rng, std = np.random.default_rng(0), 0.5
    x0, noise = std * rng.standard_normal(400_000), rng.standard_normal(400_000)
    for t in (0.05, 0.4, 0.9):
        x_t = (1 - t) * x0 + t * noise
        best = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * x_t
        expected = np.sqrt(np.mean((best - x0) ** 2))
        assert estimate_error(torch.tensor([t]), std).item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_the_error_goes_from_0_to_the_data_s_own_deviation(std: float) -> None:
    error = estimate_error(torch.linspace(0, 1, 101), std)
    assert error[0] == 0 and error[-1] == pytest.approx(std)
    assert (error.diff() > 0).all() if std <= 1 else error.max() <= 3.2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_step_is_a_share_of_the_error_and_goes_uphill(scale: float) -> None:
    gradient = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    level = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    change = guided_change(gradient, level, strength=0.2, data_std=0.5)
    size = change.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(size, 0.2 * estimate_error(level, 0.5))
    cosine = torch.nn.functional.cosine_similarity(change[1:].flatten(1), gradient[1:].flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))


def test_no_gradient_no_step() -> None:
    gradient = torch.zeros(2, 1, 2, 2)
    gradient[1] = 1
    change = guided_change(gradient, torch.ones(2), strength=1.0, data_std=1.0)
    assert change[0].abs().max() == 0 and change[1].abs().max() == 1
