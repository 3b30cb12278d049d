"""The monitor against reward hacking: fires on a run that hacks, not on a healthy one, and changes nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vrpo_plugin import VRPOAligner, VRPOConfig
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.standalone.held_out import FILE, HeldOutWatch, Look, find_hacking, watch_rewards
from vrpo_plugin.standalone.sit import SiT, create_sit
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import DigitsSource, all_images


def looks(*points: tuple[float, float], spread: float = 0.0) -> list[Look]:
    """Looks of (trained reward, unseen agreement) at steps 100, 200, ..., with noise of that size per sample."""
    draws = torch.Generator().manual_seed(0)
    return [
        Look(100 * i, {"semantic": trained}, (unseen + spread * torch.randn(128, generator=draws)).tolist())
        for i, (trained, unseen) in enumerate(points, start=1)
    ]


HACKED = ((0.2, 0.5), (0.3, 0.6), (0.4, 0.55), (0.5, 0.53), (0.6, 0.5))


def test_the_alarm_names_steps_and_numbers() -> None:
    text = find_hacking(looks(*HACKED))
    assert text is not None
    assert "since step 200 (semantic 0.300 to 0.600)" in text and "(0.600 to 0.500 at step 500)" in text


@pytest.mark.parametrize(
    "points",
    [
        ((0.2, 0.5), (0.3, 0.6), (0.4, 0.61), (0.5, 0.62), (0.6, 0.63)),
        ((0.2, 0.5), (0.5, 0.6), (0.4, 0.55), (0.3, 0.53), (0.2, 0.5)),
        ((0.2, 0.5), (0.3, 0.6), (0.4, 0.595), (0.5, 0.595), (0.6, 0.595)),
        ((0.2, 0.5), (0.3, 0.6), (0.4, 0.55), (0.5, 0.61), (0.6, 0.5)),
        HACKED[:4],
        HACKED[:1],
        (),
    ],
    ids=["both rise", "both fall", "a small fall", "not three in a row", "too early", "one look", "no look"],
)
def test_no_alarm(points: tuple[tuple[float, float], ...]) -> None:
    assert find_hacking(looks(*points)) is None


def test_a_fall_within_the_noise_of_the_samples_is_no_alarm() -> None:
    points = ((0.2, 0.5), (0.3, 0.52), (0.4, 0.5), (0.5, 0.5), (0.6, 0.5))
    assert find_hacking(looks(*points)) is not None
    assert find_hacking(looks(*points, spread=0.2)) is None


@pytest.fixture(scope="module")
def encoder() -> SmallFeatureNetwork:
    return train_small_features(*all_images(DigitsSource()), seed=0, steps=60)


@pytest.fixture(scope="module")
def unseen() -> SmallFeatureNetwork:
    return train_small_features(*all_images(DigitsSource()), seed=1, architecture="plain", width=24, steps=100)


@pytest.fixture(autouse=True)
def trained_once(unseen: SmallFeatureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vrpo_plugin.standalone.held_out.train_small_features", lambda *_, **__: unseen)


@pytest.fixture
def model(encoder: SmallFeatureNetwork) -> SiT:
    """A SiT whose critic has learned a little of the encoder."""
    torch.manual_seed(0)
    model = create_sit("SiT-Ti/2", input_size=8, in_channels=1, num_classes=10)
    config = VRPOConfig(projector_dim=16, critic_width=16)
    aligner = VRPOAligner.from_model(model, encoder, config=config).attach(model)
    assert aligner.critic is not None
    images, _ = all_images(DigitsSource())
    x, z = images / 127.5 - 1, encoder.tokens(images)
    optimizer = torch.optim.AdamW(aligner.critic.parameters(), 3e-3)
    for start in range(0, 1600, 64):
        loss = -semantic_reward(aligner.critic(x[start : start + 64]).tokens, (z[start : start + 64],)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def watch(folder: Path, model: SiT, encoder: SmallFeatureNetwork) -> HeldOutWatch:
    found = watch_rewards(folder, model, lambda images: (encoder.tokens(images),), DigitsSource(), lambda x: x)
    assert found is not None
    return found


class Estimates(nn.Module):
    """A model of the linear path whose clean estimate is what a function makes of x_t and t."""

    def __init__(self, estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.estimate, self.device_holder = estimate, nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x_t - self.estimate(x_t, t)) / t[:, None, None, None]


def exploiting(model: SiT, z: Tensor, x0: Tensor, steps: int) -> Estimates:
    """Estimates that climb the critic's reward from noisy images, wherever it leads."""

    def climb(x_t: Tensor, t: Tensor) -> Tensor:
        x = x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        with torch.enable_grad():
            for _ in range(steps):
                x = x.detach().requires_grad_()
                reward = semantic_reward(model.vrpo.critic(x).tokens, (z,)).sum()
                x = x + 0.1 * torch.autograd.grad(reward, x)[0].sign()
        return x.detach()

    return Estimates(climb)


def test_a_run_that_hacks_its_critic_is_named_once(
    tmp_path: Path, model: SiT, encoder: SmallFeatureNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = watch(tmp_path, model, encoder)
    monitor._prepare(torch.device("cpu"))
    (z,), x0 = monitor._targets, monitor._batch[0]
    caplog.set_level(logging.WARNING, logger="vrpo_plugin")
    found = [monitor.look(exploiting(model, z, x0, steps), 100 * i) for i, steps in enumerate((0, 1, 3, 6, 9, 12), 1)]
    semantic = [numbers["held_out/reward/semantic"] for numbers in found]
    unseen = [numbers["held_out/reward/unseen_network"] for numbers in found]
    assert semantic[-1] > semantic[0] and unseen[-1] < max(unseen) - 0.1
    assert found[0]["held_out/alarm"] == 0 and found[-1]["held_out/alarm"] == 1
    assert [record.message.count("rewards have risen") for record in caplog.records] == [1]


def test_a_healthy_run_has_no_alarm(
    tmp_path: Path, model: SiT, encoder: SmallFeatureNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = watch(tmp_path, model, encoder)
    monitor._prepare(torch.device("cpu"))
    x0 = monitor._batch[0]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found = [
        monitor.look(Estimates(lambda x_t, t, size=size: x0 + size * noise), 100 * i)
        for i, size in enumerate((0.8, 0.5, 0.4, 0.35, 0.32, 0.31), 1)
    ]
    assert found[-1]["held_out/reward/semantic"] > found[0]["held_out/reward/semantic"]
    assert [numbers["held_out/alarm"] for numbers in found] == [0] * 6 and not caplog.records


def test_looking_changes_nothing(tmp_path: Path, model: SiT, encoder: SmallFeatureNetwork) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, gradients = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    watch(tmp_path, model, encoder).look(Estimates(lambda x_t, t: x_t), 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert gradients == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_resumed_run_goes_on_from_its_step(
    tmp_path: Path, model: SiT, encoder: SmallFeatureNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    for monitor, steps in (
        (watch(tmp_path, model, encoder), (10, 20, 30)),
        (watch(tmp_path, model, encoder), (20, 25)),
    ):
        numbers = [monitor.look(Estimates(lambda x_t, t: x_t), step) for step in steps]
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert {name: rows[-1][name] for name in numbers[-1]} == numbers[-1] and len(rows[-1]["unseen_of_each"]) == 128
    (tmp_path / FILE).write_text('{"step": 1}\n')
    monitor.look(Estimates(lambda x_t, t: x_t), 40)
    assert "holds no looks of the monitor" in caplog.records[-1].message
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [40]


def test_only_where_it_is_cheap_and_there_are_rewards(tmp_path: Path, model: SiT) -> None:
    source, encode = DigitsSource(), lambda images: ()
    assert watch_rewards(tmp_path, model, encode, source, None) is None  # no decoder
    assert (
        watch_rewards(tmp_path, create_sit("SiT-Ti/2", input_size=8), encode, source, lambda x: x) is None
    )  # no aligner
    assert watch_rewards(tmp_path, model, encode, DigitsSource(128), lambda x: x) is None  # large images
    plain = create_sit("SiT-Ti/2", input_size=8, in_channels=1, num_classes=10)
    config = VRPOConfig(reward_coeff=0.0, projector_dim=16)
    VRPOAligner.from_model(plain, (8,), config=config).attach(plain)
    assert watch_rewards(tmp_path, plain, encode, source, lambda x: x) is None  # no reward
