"""What the aligner receives from each host, in this package's units, against formulas of the paths in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.host_folders import ENCODER, FakeHost, encoder_file, fake_host
from torch import Tensor

from vrpo_plugin.encoders import load_encoders
from vrpo_plugin.hosts.aligner import HostAligner

BATCH = 16
SILOSS = ("repa", "repa_t2i", "reg", "irepa")


@dataclass(frozen=True)
class Case:
    """A host, its path and what its model predicts."""

    name: str
    path: str
    prediction: str = "velocity"
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, self.path, self.prediction, *(f"{k}={v}" for k, v in self.options)])


CASES = [
    *(Case(name, path) for name in (*SILOSS, "repae") for path in ("linear", "cosine")),
    *(
        Case(name, path, prediction)
        for name in ("sit", "lightningdit")
        for path in ("Linear", "GVP", "VP")
        for prediction in ("velocity", "noise", "score")
    ),
    *(
        Case("dit", "DDPM", prediction, (("learn_sigma", learn_sigma), ("timestep_respacing", spacing)))
        for prediction, learn_sigma, spacing in (
            ("noise", True, ""),
            ("noise", False, ""),
            ("noise", True, "10"),
            ("x0", True, ""),
            ("x0", False, ""),
        )
    ),
]


def coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of data and of noise at the host's time, in float64. DiT's and VP's betas run from 0.1 to 20 a unit."""
    if path == "linear":
        return 1 - t, t
    if path == "cosine":
        return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
    if path == "Linear":
        return t, 1 - t
    if path == "GVP":
        return (math.pi / 2 * t).sin(), (math.pi / 2 * t).cos()
    if path == "VP":  # log alpha is minus half the integral of beta, from the data's end
        left = 1 - t
        alpha = (-(0.1 * left + 19.9 * left**2 / 2) / 2).exp()
        return alpha, (1 - alpha**2).sqrt()
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t.long()]
    return kept.sqrt(), (1 - kept).sqrt()


@dataclass
class Paths:
    """The path at the times of one batch, in the host's own time: (B, 1, 1, 1) each, float64."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor = field(default_factory=lambda: torch.zeros(()))
    sigma_dot: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def at(cls, path: str, time: Tensor) -> "Paths":
        t = time.double().reshape(-1, 1, 1, 1).requires_grad_()
        both = coefficients(path, t)
        if path == "DDPM":
            return cls(*both)
        slopes = [torch.autograd.grad(one.sum(), t, retain_graph=True)[0] for one in both]
        return cls(both[0].detach(), both[1].detach(), *slopes)

    def target(self, prediction: str, x0: Tensor, noise: Tensor) -> Tensor:
        if prediction == "velocity":
            return self.alpha_dot * x0 + self.sigma_dot * noise
        return {"noise": noise, "score": -noise / self.sigma, "x0": x0}[prediction]

    def response(self, prediction: str) -> Tensor:
        """d x0_hat / d prediction of the exact solution for x0: (B, 1, 1, 1)."""
        if prediction == "velocity":  # the two equations for x_t and v, solved for (x0, noise)
            rows = torch.stack([self.alpha, self.sigma, self.alpha_dot, self.sigma_dot], -1).unflatten(-1, (2, 2))
            return torch.linalg.inv(rows)[..., 0, 1]
        return {
            "noise": -self.sigma / self.alpha,
            "score": self.sigma**2 / self.alpha,
            "x0": torch.ones_like(self.alpha),
        }[prediction]

    def gradient(self, prediction: str) -> Tensor:
        """What docs/equations.md, 2 and 2b, promises in place of it: bounded by 1."""
        bounded = {"noise": -self.sigma, "score": self.sigma**2}  # noise = -sigma score
        return bounded[prediction] if prediction in bounded else self.response(prediction).clamp(-1, 1)


@dataclass
class Seen:
    """One loss call of a host whose model predicts the exact target in the even samples, and errs in the odd ones."""

    case: Case
    x0: Tensor
    y: Tensor
    z: tuple[Tensor, ...] = ()
    noise: list[Tensor] = field(default_factory=list)
    time: Tensor = field(default_factory=lambda: torch.zeros(0))
    output: Tensor = field(default_factory=lambda: torch.zeros(0))
    received: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> Paths:
        return Paths.at(self.case.path, self.time)

    @property
    def error(self) -> Tensor:
        """How far the prediction is from the target, another way at each place."""
        error = torch.linspace(-0.5, 0.5, self.x0.numel(), dtype=torch.float64).reshape(self.x0.shape)
        error[::2] = 0
        return error

    def replace(self, own: Any, time: Tensor) -> Any:
        """The model's own output with a leaf in the place of its prediction."""
        self.time = time.flatten()
        wanted = self.paths.target(self.case.prediction, self.x0.double(), self.noise[0].double()) + self.error
        whole = own["model_output"] if isinstance(own, dict) else own[0] if isinstance(own, tuple) else own
        leaf = whole.detach().clone()
        leaf[:, : self.x0.shape[1]] = wanted
        self.output = leaf.requires_grad_()
        if isinstance(own, dict):
            return {**own, "model_output": leaf}
        return (leaf, *own[1:]) if isinstance(own, tuple) else leaf


def exact(original: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = original(self, *args, **kwargs)
        return seen.replace(own, own["time_input"] if isinstance(own, dict) else args[1])

    return forward


@cache
def observe(case: Case, folder: Path) -> Seen:
    """Runs the host's own loss once on a patched model."""
    torch.manual_seed(0)
    seen = Seen(case, torch.randn(BATCH, 4, 8, 8), torch.randint(10, (BATCH,)))
    with fake_host(case.name) as host, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.model_class, "forward", exact(host.model_class.forward, seen))
        receive, draw = HostAligner.forward, torch.randn_like

        def forward(self: Any, z: Any, **fields: Any) -> Any:
            seen.received = {"z": z, **fields}
            return receive(self, z, **fields)

        def randn_like(x: Tensor, **kwargs: Any) -> Tensor:
            seen.noise.append(draw(x, **kwargs))
            return seen.noise[-1]

        patch.setattr(HostAligner, "forward", forward)
        with host.apply(folder):
            model = prepare(host, seen, folder)
            patch.setattr(torch, "randn_like", randn_like)
            call(host, seen, model)
    return seen


def prepare(host: FakeHost, seen: Seen, folder: Path) -> Any:
    """The model; ``seen.z`` becomes what the encoder says of this batch."""
    case = seen.case
    if case.name in ("sit", "dit"):
        images = torch.rand(BATCH, 3, 64, 64) * 2 - 1
        vae = host.module("diffusers.models").AutoencoderKL()
        vae.encode(images.flip(0))  # of an earlier batch
        seen.x0 = vae.encode(images).latent_dist.mean.detach()
        frozen = load_encoders(ENCODER, resolution=64, token_grid=(4, 4), checkpoints=[encoder_file(folder)])
        seen.z = frozen(images)
    elif case.name != "lightningdit":  # which has no encoder
        seen.z = (torch.randn(BATCH, 17 if case.name == "reg" else 16, 12),)
    settings: dict[str, Any] = {}
    if case.name in ("repa", "reg", "irepa", "repae"):
        settings = {"decoder_hidden_size": 32, "qk_norm": False}
    elif case.name == "dit":
        settings = {"learn_sigma": dict(case.options)["learn_sigma"]}
    return host.model_class(**settings).train()


def call(host: FakeHost, seen: Seen, model: Any) -> None:
    case, x0, labels = seen.case, seen.x0, {"y": seen.y}
    if case.name == "repae":
        # The latent that is denoised is the batch norm's output; its input is another.
        raw = 3 * x0 + 2
        variance, mean = torch.var_mean(raw.double(), (0, 2, 3), unbiased=False, keepdim=True)
        seen.x0 = ((raw.double() - mean) / (variance + 1e-4).sqrt()).float()
        losses = {"path_type": case.path, "align_only": False}
        model(x=raw, y=seen.y, zs=[*seen.z], loss_kwargs=losses, time_input=None, noises=None)
    elif case.name in SILOSS:
        more = {"cls_token": torch.randn(BATCH, 12)} if case.name == "reg" else {}
        labels = {"context": torch.randn(BATCH, 5, 10)} if case.name == "repa_t2i" else labels
        host.module("loss").SILoss(path_type=case.path)(model, x0, labels, zs=[*seen.z], **more)
    elif case.name == "dit":
        create = host.module("diffusion").create_diffusion
        diffusion = create(predict_xstart=case.prediction == "x0", **dict(case.options))
        steps = torch.linspace(0, diffusion.num_timesteps - 1, BATCH).long()
        diffusion.training_losses(model, x0, steps, labels)
    else:
        transport = host.module("transport").create_transport(case.path, case.prediction)
        transport.training_losses(model, x0, labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, folder: Path) -> Seen:
    return observe(request.param, folder)


def test_the_aligner_gets_the_hosts_batch_in_our_units(seen: Seen) -> None:
    got, paths, path, x0 = seen.received, seen.paths, seen.case.path, seen.x0.double()
    # REPA's paths are ours, with our time. Of others t is the linear path's time of the same share of noise.
    expected_t = seen.time.double() if path in ("linear", "cosine") else paths.sigma / (paths.alpha + paths.sigma)
    torch.testing.assert_close(got["t"].double(), expected_t.flatten(), rtol=1e-5, atol=1e-6)
    closeness = torch.cosine_similarity(got["x_t"].flatten(1), got["x0"].flatten(1))
    assert torch.corrcoef(torch.stack([closeness, got["t"]]))[0, 1] < -0.5  # from data to noise
    torch.testing.assert_close(got["x0"].double(), x0, rtol=1e-5, atol=1e-5)
    x_t = paths.alpha * x0 + paths.sigma * seen.noise[0].double()
    torch.testing.assert_close(got["x_t"].double(), x_t, rtol=1e-5, atol=1e-5)
    assert (got["y"] is None) if seen.case.name == "repa_t2i" else torch.equal(got["y"], seen.y)
    assert not got["x0"].requires_grad
    if seen.case.name == "lightningdit":  # the aligner asks its critic itself
        assert got["z"] is None
        return
    assert len(got["z"]) == len(seen.z) == 1 and not got["z"][0].requires_grad
    torch.testing.assert_close(got["z"][0], seen.z[0], rtol=1e-5, atol=1e-6)


def test_an_exact_prediction_gives_the_clean_latent_and_an_error_its_response(seen: Seen) -> None:
    paths, prediction = seen.paths, seen.case.prediction
    expected = seen.x0.double() + paths.response(prediction) * seen.error
    assert torch.equal(expected[::2], seen.x0[::2].double())
    error = (seen.received["x0_hat"].double() - expected).abs()
    # Where noise is predicted, the rounding of x_t is divided by alpha.
    tolerance = 1e-5 / paths.alpha if prediction in ("noise", "score") else torch.full_like(paths.alpha, 1e-5)
    assert (error <= tolerance * expected.abs().clamp(min=1)).all()
    assert (tolerance <= 1e-4).sum() >= 5


def test_the_gradient_is_the_response_and_bounded(seen: Seen) -> None:
    x0_hat, channels = seen.received["x0_hat"], seen.x0.shape[1]
    upstream = torch.randn_like(x0_hat)
    (gradient,) = torch.autograd.grad(x0_hat, seen.output, upstream, retain_graph=True)
    expected = seen.paths.gradient(seen.case.prediction) * upstream.double()
    torch.testing.assert_close(gradient[:, :channels].double(), expected, rtol=1e-5, atol=1e-6)
    assert not gradient[:, channels:].any()  # DiT's variance is the host's own matter
    assert (gradient.shape[1] == 2 * channels) == (dict(seen.case.options).get("learn_sigma") is True)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_dits_first_and_last_step(learn_sigma: bool, folder: Path) -> None:
    seen = observe(Case("dit", "DDPM", "noise", (("learn_sigma", learn_sigma), ("timestep_respacing", ""))), folder)
    assert seen.time[[0, -1]].tolist() == [0, 999]
    assert seen.paths.response("noise")[-1].item() == pytest.approx(-157, abs=0.5)  # as docs/equations.md says
    (gradient,) = torch.autograd.grad(seen.received["x0_hat"].sum(), seen.output, retain_graph=True)
    assert gradient[-1, :4].unique().item() == pytest.approx(-1, abs=1e-4)
    assert gradient.abs().max() <= 1
    assert 0 < seen.received["t"][0] < 0.011 and 0.993 < seen.received["t"][-1] < 1


@pytest.mark.parametrize("name", ["repa", "repae"])
def test_half_precision_is_brought_to_float32(name: str, folder: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        seen = observe.__wrapped__(Case(name, "linear"), folder)
    assert seen.output.dtype == torch.bfloat16
    assert seen.received["x0_hat"].dtype == seen.received["t"].dtype == torch.float32
