"""LPIPS as a reward: against the lpips package, gradients, sub-batches, and where its weights come from."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
import torch.nn.functional as F
from fakes.broken import Bomb
from torch import Tensor, nn
from torchvision import models

from vrpo_plugin.errors import CheckpointError, ConfigError, DataError, ShapeError, WeightsNotFoundError
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.perceptual import LPIPSReward

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def alexnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.alexnet(weights=None)


@pytest.fixture(scope="module")
def alexnet_file(alexnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(alexnet.features.state_dict(prefix="features."), path)
    return path


@pytest.fixture(scope="module")
def built(alexnet_file: Path) -> LPIPSReward:
    return LPIPSReward("alex", backbone_checkpoint=alexnet_file)


@pytest.fixture
def reward(built: LPIPSReward) -> LPIPSReward:
    return copy.copy(built)


def state_of(x0_hat: Tensor, x0: Tensor, step: int | None = None) -> RewardState:
    return RewardState(x0_hat=x0_hat, x0=x0, x_t=x0, t=torch.zeros(len(x0)), z=(), step=step)


def images(batch: int, size: int = 64, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, size, size, generator=generator) * 2 - 1


def reference(alexnet: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """-LPIPS by the package's own forward, on the given backbone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = alexnet.features.state_dict()
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
        part.load_state_dict({key: weights[key] for key in part.state_dict()})
    with torch.no_grad():
        return -model(x, y).flatten()


def refuse_to_run(*_: object) -> None:
    raise AssertionError("a network ran on a step that is left out")


def test_values_are_the_lpips_packages(alexnet: nn.Module, reward: LPIPSReward) -> None:
    x0_hat, x0 = images(3, 96)[..., :80, :], images(3, 96, seed=1)[..., :80, :]
    values, scored = reward(state_of(x0_hat, x0))
    torch.testing.assert_close(values, reference(alexnet, x0_hat, x0), rtol=1e-4, atol=1e-7)
    assert scored.tolist() == [True] * 3


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_more_noise_lowers_the_reward(net: Any) -> None:
    reward = LPIPSReward(net, pretrained=False)
    x0 = F.interpolate(images(1, 8), 64, mode="bilinear")
    noise = images(1, seed=1)
    strengths = torch.tensor([0.0, 0.05, 0.2, 0.8]).view(-1, 1, 1, 1)
    values, _ = reward(state_of(x0 + strengths * noise, x0.expand(4, -1, -1, -1)))
    assert values[0] == 0
    assert (values.diff() < 0).all()


def test_gradient_reaches_x0_hat_only(reward: LPIPSReward) -> None:
    x0_hat, x0 = images(2).requires_grad_(), images(2, seed=1).requires_grad_()
    values, _ = reward(state_of(x0_hat, x0))
    values.sum().backward()
    assert x0_hat.grad is not None
    assert (x0_hat.grad.flatten(1).norm(dim=1) > 0).all()
    assert x0.grad is None
    assert not any(parameter.requires_grad for parameter in reward._lpips.parameters())
    with torch.no_grad():
        better, _ = reward(state_of(x0_hat + 1e-2 * x0_hat.grad / x0_hat.grad.norm(), x0))
    assert better.sum() > values.sum()


def test_dead_features_give_a_zero_gradient_and_no_nan(alexnet: nn.Module, tmp_path: Path) -> None:
    dead = copy.deepcopy(alexnet)
    nn.init.constant_(dead.features[0].bias, -1e3)
    path = tmp_path / "dead.pth"
    torch.save(dead.state_dict(), path)
    x0_hat = images(1).requires_grad_()
    values, _ = LPIPSReward("alex", backbone_checkpoint=path)(state_of(x0_hat, images(1, seed=1)))
    values.sum().backward()
    assert x0_hat.grad is not None
    assert torch.equal(x0_hat.grad, torch.zeros_like(x0_hat))


def test_decoder_is_used_and_differentiable(reward: LPIPSReward, alexnet: nn.Module) -> None:
    decoder = nn.Conv2d(4, 3, 1).requires_grad_(False)
    latents, clean = images(2, channels=4).requires_grad_(), images(2, channels=4, seed=1)
    reward.decode = decoder
    values, _ = reward(state_of(latents, clean))
    expected = reference(alexnet, decoder(latents), decoder(clean))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(values.sum(), latents)
    assert gradient.abs().sum() > 0


def test_sub_batch_is_spread_evenly(reward: LPIPSReward) -> None:
    x0_hat, x0 = images(7).requires_grad_(), images(7, seed=1)
    everything, _ = reward(state_of(x0_hat, x0))
    batches = []

    def decode(x: Tensor) -> Tensor:
        batches.append(len(x))
        return x

    reward.decode, reward.max_samples = decode, 3
    values, scored = reward(state_of(x0_hat, x0))
    assert batches == [3, 3]
    assert scored.tolist() == [True, False, True, False, True, False, False]
    torch.testing.assert_close(values[scored], everything[scored], rtol=1e-4, atol=1e-7)
    assert (values[~scored] == 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), x0_hat)
    assert torch.equal(gradient.flatten(1).norm(dim=1) > 0, scored)


def test_sub_batch_larger_than_the_batch(reward: LPIPSReward) -> None:
    state, batches = state_of(images(2), images(2, seed=1)), []

    def decode(x: Tensor) -> Tensor:
        batches.append(len(x))
        return x

    expected, _ = reward(state)
    reward.decode, reward.max_samples = decode, 8
    values, scored = reward(state)
    assert torch.equal(values, expected)
    assert scored.all()
    assert batches == [2, 2]


def test_every_k_steps(reward: LPIPSReward) -> None:
    x0_hat, x0 = images(2).requires_grad_(), images(2, seed=1)
    reward.every = 3
    _, scored = reward(state_of(x0_hat, x0, step=6))
    assert scored.all()
    reward.decode, reward._lpips = refuse_to_run, None
    for step in (1, 2, 7):
        values, scored = reward(state_of(x0_hat, x0, step=step))
        assert torch.equal(values, torch.zeros(2))
        assert not scored.any()
        # A caller that backpropagates through every reward must not trip over the steps between.
        (gradient,) = torch.autograd.grad(values.sum(), x0_hat)
        assert torch.equal(gradient, torch.zeros_like(x0_hat))
    with pytest.raises(ConfigError, match="step"):
        reward(state_of(x0_hat, x0))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24)])
def test_small_images_are_enlarged(net: Any, height: int, width: int) -> None:
    reward = LPIPSReward(net, pretrained=False)
    x0_hat, x0 = images(2, 24)[..., :height, :width], images(2, 24, seed=1)[..., :height, :width]
    size = [64, 64 * width // height]
    values, _ = reward(state_of(x0_hat, x0))
    large = [F.interpolate(x, size, mode="bilinear") for x in (x0_hat, x0)]
    expected, _ = reward(state_of(*large))
    torch.testing.assert_close(values, expected)
    assert (values < 0).all()


def test_one_channel_is_repeated(reward: LPIPSReward) -> None:
    x0_hat, x0 = images(2, channels=1), images(2, channels=1, seed=1)
    values, _ = reward(state_of(x0_hat, x0))
    expected, _ = reward(state_of(x0_hat.repeat(1, 3, 1, 1), x0.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(values, expected)


def test_float32_inside_autocast(reward: LPIPSReward) -> None:
    x0_hat, x0 = images(2).bfloat16(), images(2, seed=1).bfloat16()
    expected, _ = reward(state_of(x0_hat.float(), x0.float()))
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = reward(state_of(x0_hat, x0))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected)


def test_plain_object_shared_by_copies(reward: LPIPSReward) -> None:
    owner = nn.Linear(2, 2)
    owner.reward = reward
    assert set(owner.state_dict()) == {"weight", "bias"}
    assert copy.deepcopy(owner).reward is reward
    assert reward.to("cpu") is reward
    assert not reward._lpips.training


def test_building_is_silent_and_draws_nothing(
    alexnet_file: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    before = torch.random.get_rng_state()
    for reward in (LPIPSReward(pretrained=False), LPIPSReward(backbone_checkpoint=alexnet_file)):
        reward(state_of(images(1), images(1, seed=1)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr().out == ""
    assert not recwarn.list


def test_weights_in_the_hub_cache_are_used(
    alexnet_file: Path, reward: LPIPSReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILES["alex"]).write_bytes(alexnet_file.read_bytes())
    state = state_of(images(2), images(2, seed=1))
    assert torch.equal(LPIPSReward("alex")(state)[0], reward(state)[0])


@pytest.mark.parametrize("net", list(FILES))
def test_missing_weights_name_the_file_and_the_ways_out(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lpips, "LPIPS", refuse_to_run)
    with pytest.raises(WeightsNotFoundError) as error:
        LPIPSReward(net)
    for part in (str(tmp_path / "checkpoints" / FILES[net]), "backbone_checkpoint=", "pretrained=False"):
        assert part in str(error.value)


def test_missing_backbone_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"absent\.pth"):
        LPIPSReward("alex", backbone_checkpoint=tmp_path / "absent.pth")


@pytest.mark.parametrize("content", ["another network", "damaged"])
def test_unfit_backbone_checkpoint(tmp_path: Path, content: str) -> None:
    path = tmp_path / "unfit.pth"
    if content == "damaged":
        path.write_bytes(b"not a checkpoint")
    else:
        torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    with pytest.raises(CheckpointError, match="alex"):
        LPIPSReward("alex", backbone_checkpoint=path)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Bomb()}, "bomb.pth")
    with pytest.raises(CheckpointError):
        LPIPSReward("alex", backbone_checkpoint="bomb.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("kwargs", [{"net": "resnet"}, {"every": 0}, {"max_samples": 0}])
def test_arguments_out_of_range(kwargs: dict) -> None:
    with pytest.raises(ConfigError, match="LPIPSReward: expected"):
        LPIPSReward(pretrained=False, **kwargs)


def test_latents_without_a_decoder(reward: LPIPSReward) -> None:
    latents = images(1, channels=4)
    with pytest.raises(ShapeError, match="decode="):
        reward(state_of(latents, latents))


def test_a_position_without_length_does_not_outweigh_the_others(reward: LPIPSReward) -> None:
    channels = [lin.model[-1].in_channels for lin in reward._lpips.lins]
    signs = [torch.ones(c, 1, 1).index_fill(0, torch.arange(0, c, 2), -1.0) for c in channels]
    reward._features = lambda x: tuple(x[:, :1] * sign + x[:, 1:2] for sign in signs)  # type: ignore[method-assign]
    x0, x0_hat = images(2), images(2, seed=1)
    x0_hat[0, :, 3, 3] *= 1e-9
    x0_hat.requires_grad_()
    reward(state_of(x0_hat, x0))[0].sum().backward()
    assert x0_hat.grad is not None and x0_hat.grad[0, :, 3, 3].norm() < 0.5 * x0_hat.grad.norm()


WRONG = {
    "0 to 255": lambda x: (x + 1) * 127.5,
    "normalised twice": lambda x: 2 * x - 1,
    "normalised by mean and deviation, twice": lambda x: 5 * x,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("decoded", [False, True])
def test_pixels_of_another_range_are_refused(
    reward: LPIPSReward, change: Any, calls_before: int, decoded: bool
) -> None:
    for _ in range(calls_before):
        reward(state_of(images(2), images(2, seed=1)))
    x0 = images(2, seed=1)
    if decoded:
        reward.decode = change
    else:
        x0 = change(x0)
    with pytest.raises(DataError, match=r"LPIPSReward: expected floats in \[-1, 1\], got values from"):
        reward(state_of(images(2), x0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_whole_numbers_are_refused(reward: LPIPSReward, dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="expected floating pixels"):
        reward(state_of(images(2), images(2).to(dtype)))


def test_an_estimate_may_leave_the_range(reward: LPIPSReward) -> None:
    values, _ = reward(state_of(images(2) * 10, images(2, seed=1)))
    assert values.isfinite().all()


def test_pixels_from_0_to_1_are_warned_of_once(reward: LPIPSReward, recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        reward(state_of(images(2).abs(), images(2, seed=1).abs()))
    assert len([w for w in recwarn if "If these are pixels in [0, 1]" in str(w.message)]) == 1
