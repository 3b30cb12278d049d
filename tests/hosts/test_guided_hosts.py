"""The guide in the hosts' own samplers, with their own models: REPA's, SiT's and DiT's, from their checkouts."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrpo_plugin import RewardGuide
from vrpo_plugin.modules.critic import LatentCritic
from vrpo_plugin.modules.guide_parts import GuideParts
from vrpo_plugin.modules.projector import build_projector
from vrpo_plugin.standalone.sampler import sample

pytestmark = pytest.mark.host
SIZE: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4}
ATTENTION = {"fused_attn": True, "qk_norm": False}
NULL, STEPS = 1000, 6


@contextmanager
def imported(host: str, *names: str) -> Iterator[list[Any]]:
    """Modules of a checkout; several hosts have a ``models``, so none stays."""
    root, before = str(Path(os.environ["VRPO_HOSTS_DIR"]) / host), set(sys.modules)
    hidden = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("models", "diffusion")
    }
    sys.path.insert(0, root)
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(root)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(root):
                del sys.modules[name]
        sys.modules.update(hidden)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module) -> nn.Module:
    """With weights everywhere: a new model predicts 0."""
    for parameter in model.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=seeded())
    return model.eval()


def critic() -> LatentCritic:
    torch.manual_seed(0)
    return LatentCritic((4, 8, 8), (12,), (4, 4), width=16)


def guide_of(model: nn.Module, **settings: Any) -> RewardGuide:
    """For a model without projectors."""
    torch.manual_seed(1)
    parts = GuideParts(critic(), (build_projector("mlp", 32, 12, projector_dim=16),), (1,))
    return RewardGuide(model, parts, **{"interval": (0.0, 1.0), **settings})


NOISE = torch.randn(3, 4, 8, 8, generator=seeded(3))
LABELS = torch.tensor([0, 500, 999])
BOTH = torch.cat([LABELS, torch.full_like(LABELS, NULL)])


def check(run: Callable[[float], Tensor]) -> Tensor:
    """Strength 0 is the host's own, bitwise; another is neither that nor far from finite. Returns the guided one."""
    plain, without, guided = run(-1), run(0.0), run(0.3)
    assert torch.equal(plain, without)
    assert guided.isfinite().all() and (guided - plain).flatten(1).abs().amax(1).min() > 1e-3
    return guided


@pytest.mark.parametrize("scale", [1.0, 1.8])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama"])
def test_repa_s_samplers_with_one_line(solver: str, path_type: str, scale: float) -> None:
    with imported("REPA", "models.sit", "samplers") as (models, samplers):
        model = models.SiT(
            path_type, z_dims=[12], projector_dim=16, encoder_depth=1, decoder_hidden_size=32, **SIZE, **ATTENTION
        )
        model = filled(model)
        settings: dict[str, Any] = {"cfg_scale": scale, "path_type": path_type, "guidance_high": 0.9}
        host = samplers.euler_maruyama_sampler if solver == "euler_maruyama" else samplers.euler_sampler

        def run(strength: float) -> Tensor:
            called = model
            if strength >= 0:
                guide = RewardGuide(model, critic=critic(), strength=strength, interval=(0.0, 0.8))
                called = guide.wrap(model, path_type=path_type, cfg_scale=scale)
            torch.manual_seed(7)
            return host(called, NOISE, LABELS, num_steps=STEPS, heun=solver == "heun", **settings)

        guided = check(run)
        if solver != "euler":
            return  # noise is drawn otherwise, or the interval is asked of each call rather than of a step
        ours = sample(
            model,
            NOISE,
            LABELS,
            num_steps=STEPS,
            path_type=path_type,  # type: ignore[arg-type]
            guidance_scale=scale,
            guidance_interval=(0.0, 0.9),
            null_label=NULL,
            guide=RewardGuide(model, critic=critic(), strength=0.3, interval=(0.0, 0.8)),
        )
        torch.testing.assert_close(guided.float(), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["ODE-euler", "ODE-dopri5", "SDE-Euler"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
def test_sit_s_transport_sampler(path_type: str, combined: bool, kind: str) -> None:
    with imported("SiT", "models", "transport") as (models, transport):
        model = filled(models.SiT(**SIZE))
        sampler = transport.Sampler(transport.create_transport(path_type, "velocity"))
        mode, method = kind.split("-")
        if mode == "ODE":
            sample_fn = sampler.sample_ode(sampling_method=method, num_steps=STEPS)
        else:
            sample_fn = sampler.sample_sde(sampling_method=method, diffusion_form="sigma", num_steps=STEPS)

        def run(strength: float) -> Tensor:
            called: Any = model
            if strength >= 0:
                called = guide_of(model, strength=strength).wrap(model, host="sit", path_type=path_type)
            torch.manual_seed(7)
            with torch.no_grad():
                if combined:
                    both = torch.cat([NOISE, NOISE])
                    return sample_fn(both, called.forward_with_cfg, y=BOTH, cfg_scale=1.8)[-1][:3]
                return sample_fn(NOISE, called.forward, y=LABELS)[-1]

        check(run)


@pytest.mark.parametrize("combined", [False, True])
def test_dit_s_p_sample_loop(combined: bool) -> None:
    with imported("DiT", "models", "diffusion") as (models, diffusion_package):
        model = filled(models.DiT(**SIZE))
        diffusion = diffusion_package.create_diffusion("8")

        def run(strength: float) -> Tensor:
            called: Any = model
            if strength >= 0:
                called = guide_of(model, strength=strength).wrap(model, host="dit", diffusion=diffusion)
            torch.manual_seed(7)
            y, noise = (BOTH, torch.cat([NOISE, NOISE])) if combined else (LABELS, NOISE)
            kwargs = {"y": y, "cfg_scale": 1.8} if combined else {"y": y}
            method = called.forward_with_cfg if combined else called.forward
            out = diffusion.p_sample_loop(
                method, noise.shape, noise, clip_denoised=False, model_kwargs=kwargs, device="cpu"
            )
            return out[:3]

        check(run)


def test_dit_s_estimate_moves_by_a_share_of_its_error() -> None:
    """By DiT's own arithmetic, not ours."""
    from vrpo_plugin.functional.guidance import estimate_error

    with imported("DiT", "models", "diffusion") as (models, diffusion_package):
        model = filled(models.DiT(**SIZE))
        diffusion = diffusion_package.create_diffusion("10")
        wrapped = guide_of(model, strength=0.3, data_std=0.8).wrap(host="dit", diffusion=diffusion)
        x, t = NOISE, torch.tensor([1, 4, 8])
        with torch.no_grad():
            plain, guided = (
                diffusion.p_mean_variance(m, x, t, clip_denoised=False, model_kwargs={"y": LABELS})
                for m in (model, wrapped)
            )
    assert torch.equal(plain["variance"], guided["variance"])
    change = guided["pred_xstart"] - plain["pred_xstart"]
    share = torch.from_numpy(diffusion.alphas_cumprod)[t]
    level = (1 - share).sqrt() / (share.sqrt() + (1 - share).sqrt())
    expected = 0.3 * estimate_error(level, 0.8)
    torch.testing.assert_close(change.square().mean((1, 2, 3)).sqrt(), expected.float(), rtol=5e-3, atol=1e-4)
