"""vrpo_plugin.modules.critic: shapes, cost, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.tiny_sit import TinySiT, align, make_batch, tiny_aligner
from torch.utils.flop_counter import FlopCounterMode

from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError
from vrpo_plugin.modules.critic import CriticPurpose, LatentCritic, check_purpose, load_critic_weights, save_critic

# One step of a backbone is a forward and a backward pass: three times its forward cost, here in GMAC.
SIT_XL_2, SIT_B_2 = 3 * 118.6, 3 * 23.0


def small_critic(**overrides: object) -> LatentCritic:
    sizes = {"latent_shape": (4, 8, 8), "target_dims": (12,), "token_grid": (4, 4), "width": 16, **overrides}
    return LatentCritic(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("latent_shape", "token_grid", "features"),
    [
        ((4, 32, 32), (16, 16), [(16, 32, 32), (64, 16, 16)]),
        ((4, 64, 64), (16, 16), [(16, 64, 64), (32, 32, 32), (64, 16, 16)]),
        ((3, 256, 256), (16, 16), [(16, 64, 64), (32, 32, 32), (64, 16, 16)]),
        ((1, 8, 8), (4, 4), [(16, 8, 8), (64, 4, 4)]),
        ((4, 32, 32), (14, 14), [(16, 32, 32), (64, 16, 16)]),
        ((4, 32, 32), (37, 37), [(64, 32, 32)]),
        ((4, 32, 16), (16, 8), [(16, 32, 16), (64, 16, 8)]),
        ((3, 15, 9), (5, 3), [(16, 15, 9), (64, 8, 5)]),
    ],
)
def test_shapes(latent_shape: tuple[int, int, int], token_grid: tuple[int, int], features: list[object]) -> None:
    seen = LatentCritic(latent_shape, (768,), token_grid, width=64)(torch.randn(2, *latent_shape))
    assert [tuple(tokens.shape) for tokens in seen.tokens] == [(2, token_grid[0] * token_grid[1], 768)]
    assert [tuple(maps.shape[1:]) for maps in seen.features] == features


def test_several_encoders_share_the_trunk() -> None:
    critic = small_critic(target_dims=(12, 7))
    seen = critic(torch.randn(3, 4, 8, 8))
    assert [tuple(tokens.shape) for tokens in seen.tokens] == [(3, 16, 12), (3, 16, 7)]
    extra = sum(p.numel() for p in critic.parameters()) - sum(p.numel() for p in small_critic().parameters())
    assert extra == 7 * 16 + 7


def test_tokens_change_most_where_the_latent_does() -> None:
    critic = small_critic(latent_shape=(4, 16, 8), token_grid=(8, 4))
    latent = torch.randn(1, 4, 16, 8)
    changed = latent.clone()
    changed[..., 0, 7] += 10
    difference = (critic(latent).tokens[0] - critic(changed).tokens[0]).norm(dim=-1).unflatten(1, (8, 4))[0]
    assert difference[:2, 2:].mean() > 3 * difference[2:].mean()


@pytest.mark.parametrize("width", [16, 24, 64, 256])
def test_the_context_reaches_the_tokens(width: int) -> None:
    critic = small_critic(width=width)
    critic(torch.randn(2, 4, 8, 8)).tokens[0].square().sum().backward()
    weights = [p for p in critic.context.parameters() if p.ndim == 2]
    assert len(weights) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 1e-3 for p in weights)


def test_samples_do_not_see_each_other() -> None:
    critic = small_critic()
    latent = torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(critic(latent).tokens[0][2:3], critic(latent[2:3]).tokens[0])


def test_cost_is_small_beside_the_backbones() -> None:
    critic = LatentCritic((4, 32, 32), (768,), (16, 16))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        critic(torch.randn(1, 4, 32, 32))
    assert 0.3e9 < forward.get_total_flops() / 2 < 0.6e9

    with FlopCounterMode(display=False) as step:
        x0, x0_hat = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 32, 32, requires_grad=True)
        critic(x0).tokens[0].sum().backward()
        critic.requires_grad_(False)
        critic(x0_hat).tokens[0].sum().backward()
    gmac = step.get_total_flops() / 2e9
    assert gmac <= 5.05 * forward.get_total_flops() / 2e9
    assert gmac <= 0.02 * SIT_XL_2
    assert gmac <= 0.08 * SIT_B_2


def test_a_step_of_the_aligner_uses_the_critic_no_more_than_that() -> None:
    model, batch = TinySiT(), make_batch(2)
    aligner = tiny_aligner(features="none").attach(model)
    critic = aligner.critic
    assert critic is not None
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        critic(batch.x0)
    with FlopCounterMode(display=False) as bare:
        model(batch.x_t, batch.t, batch.y).sum().backward()
    with FlopCounterMode(display=False) as step:
        align(model, aligner, batch).loss.backward()
    used = step.get_total_flops() - bare.get_total_flops()
    assert 4 * forward.get_total_flops() < used <= 5.05 * forward.get_total_flops()


def test_wrong_latent_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"latent: expected \(B, 4, 8, 8\), got \(2, 4, 16, 16\)\. Build"):
        small_critic()(torch.randn(2, 4, 16, 16))


@pytest.mark.parametrize(
    "sizes", [{"width": 3}, {"target_dims": ()}, {"token_grid": (0, 4)}, {"latent_shape": (0, 8, 8)}]
)
def test_sizes_below_one_are_an_error(sizes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"critic sizes: expected .*, got .*\. Correct"):
        small_critic(**sizes)


def test_saved_and_loaded_critic_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "critic.safetensors"
    critic, other = small_critic(), small_critic()
    latent = torch.randn(2, 4, 8, 8)
    assert not torch.equal(critic(latent).tokens[0], other(latent).tokens[0])
    save_critic(critic, path, record={"steps": 7, "encoder": "fake"})
    assert load_critic_weights(other, path) == {"steps": 7, "encoder": "fake"}
    assert torch.equal(critic(latent).tokens[0], other(latent).tokens[0])
    assert list(tmp_path.iterdir()) == [path]


def test_a_critic_without_a_record_loads(tmp_path: Path) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(small_critic(), path)
    assert load_critic_weights(small_critic(), path) == {}


@pytest.mark.parametrize(
    "sizes", [{"width": 32}, {"target_dims": (13,)}, {"token_grid": (2, 2)}, {"latent_shape": (3, 8, 8)}]
)
def test_a_critic_of_other_sizes_is_refused(tmp_path: Path, sizes: dict[str, object]) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(small_critic(), path)
    other = small_critic(**sizes)
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"expected a critic of sizes .*, got .*\. Train a critic"):
        load_critic_weights(other, path)
    assert all(torch.equal(before[name], p) for name, p in other.state_dict().items())


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(small_critic(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"critic\.safetensors: expected a critic file, got .*\. Write one"):
        load_critic_weights(small_critic(), path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a critic file"):
        load_critic_weights(small_critic(), tmp_path / "none.safetensors")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a critic file"):
        load_critic_weights(small_critic(), tmp_path)


@pytest.mark.parametrize("metadata", [None, {"vrpo_critic": "{"}, {"record": "{}"}])
def test_a_file_that_is_no_critics_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="expected a critic"):
        load_critic_weights(small_critic(), path)


def test_weights_that_do_not_fit_the_sizes_are_refused(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    critic = small_critic()
    metadata = {"vrpo_critic": json.dumps(critic.sizes()), "record": "{}"}
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="expected a critic"):
        load_critic_weights(critic, path)


MADE_FOR = {"encoder": "vit (12345678)", "target_norm": "none", "latent_scale": 0.18215, "resolution": 256}


@pytest.mark.parametrize(
    ("wanted", "unlike"),
    [
        ({}, ()),
        (MADE_FOR, ()),
        ({"encoder": "vit (87654321)"}, ("encoder vit (87654321)", "vit (12345678)")),
        ({"target_norm": "spatial"}, ("target_norm spatial", "none")),
        ({"latent_scale": 1.0}, ("latent_scale 1.0", "0.18215")),
        ({"resolution": 512}, ("resolution 512", "256")),
        ({"resolution": 512, "encoder": "x"}, ("resolution 512", "encoder x")),
    ],
)
def test_a_critic_of_another_purpose_is_refused(
    tmp_path: Path, wanted: dict[str, Any], unlike: tuple[str, ...]
) -> None:
    path = tmp_path / "critic.safetensors"
    save_critic(small_critic(), path, record={"made_for": MADE_FOR})
    record = load_critic_weights(small_critic(), path)
    if not unlike:
        check_purpose(path, record, CriticPurpose(**wanted))
        return
    with pytest.raises(CheckpointError, match="train-critic") as error:
        check_purpose(path, record, CriticPurpose(**wanted))
    assert all(text in str(error.value) for text in (*unlike, str(path)))


@pytest.mark.parametrize("record", [{}, {"made_for": {}}, {"made_for": dict.fromkeys(MADE_FOR)}])
def test_a_file_that_does_not_say_its_purpose_is_taken(tmp_path: Path, record: dict[str, Any]) -> None:
    check_purpose(tmp_path / "old.safetensors", record, CriticPurpose(**MADE_FOR))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def kept_bytes(critic: LatentCritic, latent: torch.Tensor) -> int:
    """Of what a call keeps for its backward pass, weights left out."""
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.numel() >= latent.numel():
            kept[x.data_ptr()] = x.numel() * x.itemsize
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        seen = critic(latent)
    assert seen.tokens[0].requires_grad
    return sum(kept.values())


def test_under_autocast_everything_is_in_half_precision_and_takes_half_the_memory() -> None:
    torch.manual_seed(0)
    critic = LatentCritic((4, 16, 16), (24,), (8, 8), width=64).requires_grad_(False)
    latent = torch.randn(8, 4, 16, 16).requires_grad_()
    whole = kept_bytes(critic, latent)
    exact = critic(latent)
    with autocast():
        half, seen = kept_bytes(critic, latent), critic(latent)
    assert half <= 0.55 * whole
    assert {x.dtype for x in (*seen.tokens, *seen.features)} == {torch.bfloat16}
    gradients = [torch.autograd.grad(out.tokens[0].float().square().sum(), latent)[0] for out in (seen, exact)]
    assert F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.999


@pytest.mark.parametrize("change", ["load", "in place", "data", "fused step"])
def test_changed_weights_are_seen_under_autocast(change: str) -> None:
    critic, other, latent = small_critic(), small_critic(), torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.1, fused=True)
    with autocast():
        detached = {name: p.detach() for name, p in critic.named_parameters()}
        first = torch.func.functional_call(critic, detached, (latent,)).tokens[0]
        if change == "load":
            critic.load_state_dict(other.state_dict())
        elif change == "data":
            critic.heads[0].bias.data.add_(1)
        elif change == "in place":
            with torch.no_grad():
                critic.heads[0].bias.add_(1)
        else:
            critic(latent).tokens[0].float().sum().backward()
            optimizer.step()
        again = torch.func.functional_call(critic, detached, (latent,)).tokens[0]
        other.load_state_dict(critic.state_dict())
        assert not torch.equal(again, first) and torch.equal(again, other(latent).tokens[0])


def test_a_critic_that_learns_gets_gradients_under_autocast() -> None:
    critic = small_critic()
    with autocast():
        critic(torch.randn(2, 4, 8, 8)).tokens[0].float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in critic.parameters())
