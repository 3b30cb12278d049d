"""A patched host at work: what is refused when its model is made or trained, and where nothing is aligned."""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import ENCODER, SCRIPTS, FakeHost, fake_host
from torch import Tensor, nn

from vrpo_plugin import VRPOConfig, apply_vrpo
from vrpo_plugin.errors import (
    CheckpointError,
    ConfigError,
    HostChangedError,
    HostNotFoundError,
    WeightsNotFoundError,
)
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.modules.critic import LatentCritic, save_critic

HOSTS = tuple(SCRIPTS)
OTHERS = ("sit", "dit", "lightningdit")
ROUND = r"expected the patched loss to call the patched model, got a training step that bypassed the patch\. Run"


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[FakeHost]:
    with fake_host(request.param) as fake:
        yield fake


def on(*names: str) -> Callable[..., Any]:
    return pytest.mark.parametrize("host", names, indirect=True)


def model_of(host: FakeHost, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {}
    if host.name in ("repa", "reg", "irepa", "repae"):
        sizes = {"decoder_hidden_size": 32, "qk_norm": False}
    return host.model_class(**sizes).train()


def inputs_of(host: FakeHost, align_only: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of the model."""
    x, t, y, tokens = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4), torch.randn(4, 12)
    if host.name == "repae":
        zs, losses = [torch.randn(4, 16, 12)], {"path_type": "linear", "align_only": align_only}
        return (), {"x": x, "y": y, "zs": zs, "loss_kwargs": losses, "time_input": None, "noises": None}
    if host.name == "repa_t2i":
        return (x, t), {"context": torch.randn(4, 5, 10)}
    return (x, t), {"y": y, "cls_token": tokens} if host.name == "reg" else {"y": y}


def loss_of(host: FakeHost, model: Any) -> Any:
    """The host's loss of one batch, from one seed."""
    torch.manual_seed(1)
    if host.spec.encoder == "pixels":
        host.module("diffusers.models").AutoencoderKL().encode(torch.randn(4, 3, 64, 64).clamp(-1, 1))
    x, y, z = torch.randn(4, 4, 8, 8), {"y": torch.arange(4)}, [torch.randn(4, 17 if host.name == "reg" else 16, 12)]
    if host.name == "dit":
        return host.module("diffusion").create_diffusion("").training_losses(model, x, torch.arange(4), y)
    if host.name in OTHERS:
        return host.module("transport").create_transport().training_losses(model, x, y)
    more = {"cls_token": z[0].mean(1)} if host.name == "reg" else {}
    y = {"context": torch.randn(4, 5, 10)} if host.name == "repa_t2i" else y
    return host.module("loss").SILoss()(model, x, y, zs=z, **more)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def same(a: Any, b: Any) -> bool:
    return len(tensors(a)) == len(tensors(b)) > 0 and all(
        torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True)
    )


@on(*OTHERS)
def test_weight_of_the_features_is_ours_where_the_host_has_none(host: FakeHost, tmp_path: Path) -> None:
    with host.apply(tmp_path, proj_coeff=1.0):
        assert model_of(host).vrpo.config.proj_coeff == 1.0


# ---- refused when the model is made, or trained ----


@on("sit", "dit")
def test_an_encoder_that_is_not_there(host: FakeHost) -> None:
    for options, error, text in (
        (
            HostOptions(encoder=ENCODER, encoder_checkpoint="nowhere.pt"),
            WeightsNotFoundError,
            "got no file at nowhere.pt",
        ),
        (HostOptions(encoder="dinov2-vit-z"), ConfigError, "'dinov2-vit-z'"),
        (HostOptions(encoder=f"{ENCODER},{ENCODER}", encoder_checkpoint="one.pt"), ConfigError, "load_encoders: exp"),
    ):
        with apply_vrpo(host.spec, VRPOConfig(), options=options), pytest.raises(error, match=text):
            model_of(host)


@on("repa", "reg", "irepa", "repae", "lightningdit")
@pytest.mark.parametrize(
    "given", [{"encoder": "test_vit"}, {"encoder": "dinov2-vit-b"}, {"encoder_checkpoint": "weights.pt"}]
)
def test_an_encoder_that_the_host_would_not_use(host: FakeHost, given: dict[str, Any]) -> None:
    (name,) = given
    text = rf"{name}: expected unset: {host.spec.name} trains with .* Set it there\."
    with pytest.raises(ConfigError, match=text):
        apply_vrpo(host.spec, VRPOConfig(), options=HostOptions(**given))


@on("lightningdit")
def test_a_critic_of_other_latents(host: FakeHost, tmp_path: Path) -> None:
    save_critic(LatentCritic((8, 8, 8), (12,), (4, 4), width=16), tmp_path / "other.safetensors")
    with (
        host.apply(tmp_path, critic_checkpoint=str(tmp_path / "other.safetensors")),
        pytest.raises(CheckpointError, match=r"other.*expected a critic of sizes .*\[4, 8, 8\].*, got .*\[8, 8, 8\]"),
    ):
        model_of(host)


@on("irepa")
def test_irepas_other_losses_would_be_lost(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = ("v", "linear", "uniform", None, "cosine,size", "1,1")
    monkeypatch.setattr(host.module("loss").SILoss.__init__, "__defaults__", defaults)
    text = r"features: expected 'host'.*got 'policy' with --projection-loss-type size\. Set features=host"
    with host.apply(tmp_path), pytest.raises(ConfigError, match=text):
        loss_of(host, model_of(host))
    with host.apply(tmp_path, features="host"):
        assert loss_of(host, model_of(host))[2].keys() == {"cosine", "size"}


@on("irepa")
def test_irepa_logs_our_cosine_where_its_own_is_not_run(host: FakeHost, tmp_path: Path) -> None:
    with host.apply(tmp_path, features="host", reward_coeff=0.0):
        _, projection, plain = loss_of(host, model_of(host))
    with host.apply(tmp_path, reward_coeff=0.0):
        denoising, ours, logged = loss_of(host, model_of(host))
    assert denoising.shape == (4,) and logged.keys() == plain.keys() | {"cosine_weighted"}
    assert logged["cosine"] == pytest.approx(plain["cosine"], abs=1e-5) and plain["cosine"] != 0
    assert logged["cosine_weighted"] == pytest.approx(ours.item()) == pytest.approx(projection.item(), abs=1e-5)
    assert isinstance(logged["cosine"], float)


@on("irepa")
def test_irepa_without_its_encoders_is_refused_before_anything_is_loaded(host: FakeHost, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repa-loss", action=argparse.BooleanOptionalAction, default=False)
    with host.apply(tmp_path):
        assert parser.parse_args(["--repa-loss"]).repa_loss
        with pytest.raises(ConfigError, match=r"irepa: expected --repa-loss, .* got .* without it\. Add --repa-loss"):
            parser.parse_args([])
    with host.apply(tmp_path, features="host", reward_coeff=0.0):
        parser.parse_args([])  # nothing is changed, so nothing is asked


@on("repa", "repae")
@pytest.mark.parametrize("settings", [{}, {"layers": "middle"}, {"projector": "conv"}, {"features": "none"}], ids=str)
def test_projectors_of_the_host_that_stay_untrained_are_told(
    host: FakeHost, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if host.name == "repae":
        settings = {key: value for key, value in settings.items() if key != "projector"}
    with host.apply(tmp_path, **settings):
        model_of(host)
    told = [record for record in caplog.records if "own projectors get no gradient" in record.getMessage()]
    assert len(told) == bool(settings)


@on("repae")
def test_a_converted_batch_norm_is_still_tapped(host: FakeHost, tmp_path: Path) -> None:
    """SyncBatchNorm's conversion makes a new layer without the hooks of the old one; nothing of torch is replaced."""
    convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    with host.apply(tmp_path):
        assert torch.nn.SyncBatchNorm.convert_sync_batchnorm == convert
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model_of(host))
        assert isinstance(model.bn, torch.nn.SyncBatchNorm)
        hooks = [*model.bn._forward_hooks.values()]
        assert hooks == [model.vrpo.latent_tap.capture]
        model.bn = torch.nn.BatchNorm2d(4, affine=False)
        model.add_module("bn", model.bn)
        model.add_module("bn", model.bn)
        assert [*model.bn._forward_hooks.values()] == hooks
        args, kwargs = inputs_of(host)
        assert model(*args, **kwargs)["proj_loss"].requires_grad


@on("repa")
def test_a_shim_whose_ground_has_changed_is_left_out_and_told(
    host: FakeHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shim,) = (one for one in host.spec.shims if one.name == "num_classes")
    (point,) = shim.verified
    other = replace(shim, verified=(replace(point, parameters=("model", "x")),))
    spec = replace(host.spec, shims=tuple(other if one is shim else one for one in host.spec.shims))
    with host.apply(tmp_path) as handle:
        assert "samplers.euler_sampler" in handle.seams
    with apply_vrpo(spec, VRPOConfig(), options=HostOptions()) as handle:
        assert "samplers.euler_sampler" not in handle.seams
    assert "compat num_classes: left out: samplers.py: euler_sampler: parameters (model, latents" in caplog.text


@on("dit")
def test_dit_that_predicts_something_else(host: FakeHost, tmp_path: Path) -> None:
    diffusion = host.module("diffusion")
    diffusion.ModelMeanType = type("Means", (), {"EPSILON": diffusion.ModelMeanType.PREVIOUS_X})
    text = r"model_mean_type: expected EPSILON or START_X, got PREVIOUS_X\. Use create_diffusion's defaults"
    with host.apply(tmp_path), pytest.raises(ConfigError, match=text):
        loss_of(host, model_of(host))


@on("sit", "dit")
def test_pixels_that_were_not_seen(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = host.module("diffusers.models").AutoencoderKL
    with host.apply(tmp_path):
        model, encode = model_of(host), vae.encode
        monkeypatch.setattr(vae, "encode", lambda self, x: encode(self, x[:3]))
        with pytest.raises(
            HostChangedError, match=rf"{host.name}: pixels: expected .* batch of 4 images .*got 3 images"
        ):
            loss_of(host, model)
        monkeypatch.setattr(vae, "encode", lambda self, x: None)
        with pytest.raises(HostChangedError, match=r"batch of 4 images just before the loss, got none\. Encode each"):
            loss_of(host, model)
        monkeypatch.undo()


ROUND = r"expected the patched loss to call the patched model, got a training step that bypassed the patch\. Run 'vrpo"


@on("repa")
def test_a_loss_that_calls_another_model(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, other = host.module("loss").SILoss, []
    own = loss.__call__

    def __call__(self: Any, model: Any, images: Tensor, model_kwargs: Any = None, zs: Any = None) -> Any:
        return own(self, other[0], images, model_kwargs, zs)

    monkeypatch.setattr(loss, "__call__", __call__)
    with host.apply(tmp_path):
        model = model_of(host)
        other.append(lambda x, t, y: (x, [torch.ones(1, 1, 1)]))
        with pytest.raises(HostChangedError, match=rf"repa: SILoss\.__call__: {ROUND}"):
            loss_of(host, model)
        other[0] = model
        with pytest.raises(HostChangedError, match=rf"repa: SiT\.forward: {ROUND}"):
            loss_of(host, model)
    monkeypatch.undo()


@on(*(name for name in HOSTS if name != "repae"))
def test_a_training_step_without_the_patched_loss(host: FakeHost, tmp_path: Path) -> None:
    with host.apply(tmp_path) as handle:
        model, (args, kwargs) = model_of(host), inputs_of(host)
        with pytest.raises(HostChangedError, match=rf"{host.name}: {host.spec.model.name}: {ROUND}"):
            model(*args, **kwargs)
        assert handle.fired[host.spec.must_run[0]] == 1


@on(*HOSTS)
def test_a_model_made_before(host: FakeHost, tmp_path: Path) -> None:
    model = model_of(host)
    args, kwargs = inputs_of(host)
    with host.apply(tmp_path):
        train = (lambda: model(*args, **kwargs)) if host.name == "repae" else (lambda: loss_of(host, model))
        with pytest.raises(HostNotFoundError, match=r"expected a model made after VRPO was applied, got one without"):
            train()


def test_a_model_of_an_earlier_application_trains_on(tmp_path: Path) -> None:
    with fake_host("repa") as host:
        with host.apply(tmp_path):
            model = model_of(host)
        with host.apply(tmp_path) as handle:
            loss_of(host, model)
            assert handle.fired["SILoss.__call__"] == 1


# ---- where nothing is aligned ----


def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the aligner was called")

    monkeypatch.setattr(HostAligner, "forward", forward)


@on(*HOSTS)
def test_evaluation_is_the_unpatched_models(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> list[Any]:
        model = model_of(host)
        copied, outputs = copy.deepcopy(model), []
        for called, training, gradients, align_only in (
            (
                model,
                False,
                host.name != "repae",
                False,
            ),  # its forward is its loss: in evaluation there are no gradients
            (model, True, False, False),
            (model, False, False, False),
            (model, True, host.name == "repae", True),  # the pass that trains the VAE
            (copied, True, host.name != "repae", False),
            (copied, False, False, False),
        ):
            torch.manual_seed(2)
            args, kwargs = inputs_of(host, align_only)
            with torch.set_grad_enabled(gradients):
                outputs.append([called.train(training)(*args, **kwargs), torch.get_rng_state()])
        with torch.no_grad():
            outputs.append([] if host.name == "repae" else [loss_of(host, model), torch.get_rng_state()])
        return outputs

    plain = evaluate()
    watched(monkeypatch)
    with host.apply(tmp_path):
        patched = evaluate()
    assert same(patched, plain)
    assert not same(plain[1], plain[2]) or host.name == "repa_t2i"  # it drops no labels
