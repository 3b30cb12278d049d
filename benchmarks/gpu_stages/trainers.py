"""Training steps of SiT without alignment, of REPA, and of VRPO, as the step and sync stages time and watch them."""

import copy
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vrpo_plugin import VRPOAligner, VRPOConfig, apply_vrpo_to_repa
from vrpo_plugin.functional.alignment import cosine_alignment
from vrpo_plugin.functional.interpolant import noisy_sample
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.standalone.sit import SIT_MODELS, create_sit

CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """Sizes of a step.

    Attributes:
        model: of ``SIT_MODELS``; of REPA's class too, which has no entry for the small ones.
        batch_size: samples of a step.
        latent: (C, H, W).
        encoder: timm's name of the frozen encoder.
        encoder_side: pixels of its images; its patches are as many as the latent's tokens.
        image_side: pixels of the raw images.
        dim: of the encoder's tokens.
        bf16: autocast.
    """

    model: str
    batch_size: int
    latent: tuple[int, int, int] = (4, 32, 32)
    encoder: str = "vit_base_patch14_dinov2"
    encoder_side: int = 224
    image_side: int = 256
    dim: int = 768
    bf16: bool = True

    @property
    def tokens(self) -> int:
        """N of encoder and transformer."""
        return (self.latent[1] // 2) * (self.latent[2] // 2)


@dataclass(frozen=True)
class Variant:
    """What a step trains with.

    Attributes:
        name: in the tables.
        settings: of VRPO; None without it.
        aligned: False leaves REPA's alignment out.
    """

    name: str
    settings: dict[str, Any] | None = field(default=None, hash=False)
    aligned: bool = True


def variants(critic: Path) -> dict[str, Variant]:
    """All of them; ``critic`` is the file of the frozen one."""
    frozen = {"critic_checkpoint": str(critic), "critic_trainable": False, "reward_release_steps": 400_000}
    listed = (
        Variant("none", aligned=False),
        Variant("REPA"),
        Variant("VRPO, features only", {"reward_coeff": 0.0}),
        Variant("VRPO, frozen critic", frozen),
        Variant("VRPO, targets=critic", {**frozen, "targets": "critic"}),
        Variant("VRPO, online critic", {"reward_release_steps": 400_000}),
    )
    return {variant.name: variant for variant in listed}


def write_critic(path: Path, size: Size) -> Path:
    """A critic of the default width with its first weights: its time is that of a trained one."""
    side = (size.latent[1] // 2, size.latent[2] // 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_critic(LatentCritic(size.latent, (size.dim,), side), path, record={"trained": "never; for timing"})
    return path


class Trainer:
    """A model with its optimizer and EMA. The step is REPA@67f7145's: autocast, its loss, clipping, AdamW, EMA.

    With a checkout the model and the loss are REPA's own, and VRPO is its patch; without one both are ours, and the
    table says so. The VAE is not run, and what REPA reads back for its progress bar is left out.

    Args:
        size: of everything.
        variant: what to train with.
        repa: the checkout, or None.
        device: where.
        compiled: ``torch.compile`` of each block, and of the aligner; on the CPU by its quick backend.
    """

    def __init__(
        self, size: Size, variant: Variant, repa: Path | None, device: torch.device, *, compiled: bool = False
    ) -> None:
        self.size, self.variant, self.repa, self.device = size, variant, repa, device
        if repa is not None:
            sys.path.insert(0, str(repa))
            if variant.settings is not None:
                apply_vrpo_to_repa(VRPOConfig(**variant.settings))  # for good: one variant a process
        torch.manual_seed(0)
        with torch.device(device):
            self.model = self._build()
        self.ema = _without_aligner(copy.deepcopy(self.model)).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0)
        if compiled:
            backend = "inductor" if device.type == "cuda" else "aot_eager"
            for block in self.model.blocks:
                block.compile(backend=backend)
            if hasattr(self.model, "vrpo"):
                self.model.vrpo.compile(backend=backend)
        accelerator = Accelerator(mixed_precision="bf16" if size.bf16 else "no", cpu=device.type == "cpu")
        self.model = accelerator.prepare_model(self.model)
        self.loss = self._host_loss() if repa is not None and variant.aligned else self._own_loss
        self.encoder: nn.Module | None = None
        batch = size.batch_size
        self.x = torch.randn(batch, *size.latent, device=device)
        self.y = torch.randint(0, CLASSES, (batch,), device=device)
        self.z = torch.randn(batch, size.tokens, size.dim, device=device)
        self.images = torch.randint(0, 256, (batch, 3, size.image_side, size.image_side), device=device).byte()
        self.model.train()

    def _build(self) -> nn.Module:
        size, dims = self.size, (self.size.dim,) if self.variant.aligned else ()
        common = {"input_size": size.latent[1], "in_channels": size.latent[0], "num_classes": CLASSES}
        if self.repa is not None:
            if self._of_critic:  # the host asks for its encoders first, and gets their sizes alone
                loaded = importlib.import_module("utils").load_encoders("dinov2-vit-b", self.device)
                dims = tuple(encoder.embed_dim for encoder in loaded[0])
            sizes = {**SIT_MODELS[size.model], "decoder_hidden_size": SIT_MODELS[size.model]["hidden_size"]}
            options = {"z_dims": list(dims), "use_cfg": True, "fused_attn": True, "qk_norm": False}
            return importlib.import_module("models.sit").SiT(**common, **sizes, **options)
        settings = self.variant.settings
        model = create_sit(size.model, **common, z_dims=dims if settings is None else ())
        if settings is not None:
            VRPOAligner.from_model(model, dims, latent_shape=size.latent, **settings).attach(model)
        return model

    @property
    def _of_critic(self) -> bool:
        """The targets are the critic's: no encoder is there to give them."""
        return (self.variant.settings or {}).get("targets") == "critic"

    def _host_loss(self) -> Any:
        loss = importlib.import_module("loss").SILoss()

        def compute(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            denoising, projection = loss(self.model, x, {"y": y}, zs=[] if self._of_critic else [z])
            return denoising.mean() + 0.5 * projection.mean()

        return compute

    def _own_loss(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        t = torch.rand(len(x), device=x.device)
        x_t, target = noisy_sample(x, torch.randn_like(x), t)
        repa = self.repa is None and self.variant.aligned and self.variant.settings is None
        extra = {"return_projections": True} if repa else {}
        output = self.model(x_t, t, y, **extra)
        velocity = output[0] if isinstance(output, tuple) else output
        denoising = (velocity.float() - target).square().mean()
        if repa:
            return denoising - 0.5 * cosine_alignment(output[1][0].float(), z).mean()
        if hasattr(self.model, "vrpo"):
            targets = None if self._of_critic else z
            return denoising + self.model.vrpo(targets, x0=x, x_t=x_t, t=t, velocity=velocity).loss
        return denoising

    def use_encoder(self) -> None:
        """Makes the frozen encoder, with random weights."""
        import timm

        with torch.device(self.device):
            self.encoder = timm.create_model(self.size.encoder, img_size=self.size.encoder_side, num_classes=0).eval()
        self.encoder.requires_grad_(False)

    @torch.no_grad()
    def _encode(self) -> Tensor:
        """As REPA: [0, 255] to normalised pixels, resized to the encoder's side, under autocast."""
        assert self.encoder is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.size.bf16):
            pixels = (self.images / 255 - 0.45) / 0.225
            pixels = F.interpolate(pixels, self.size.encoder_side, mode="bicubic")
            tokens = self.encoder.forward_features(pixels)
        return tokens[:, -self.size.tokens :].float()

    def step(self, *, encode: bool = False) -> None:
        """One optimizer step; with ``encode`` the tokens come from the encoder."""
        self.loss(self.x, self.y, self._encode() if encode else self.z).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema()

    @torch.no_grad()
    def _update_ema(self, decay: float = 0.9999) -> None:
        average = dict(self.ema.named_parameters())
        for name, parameter in self.model.named_parameters():
            if name in average:  # the patched host keeps its aligner out of the average itself
                average[name].lerp_(parameter, 1 - decay)


def _without_aligner(model: nn.Module) -> nn.Module:
    if isinstance(getattr(model, "vrpo", None), VRPOAligner):
        model.vrpo.detach(model)
    return model
