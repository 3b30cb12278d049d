"""Small networks in place of large or downloaded ones. Classes and methods that the plugin patches stay the host's."""

import functools
import inspect
import itertools
from types import ModuleType

REGISTRIES = {"SiT_models": "SiT", "DiT_models": "DiT", "LightningDiT_models": "LightningDiT"}
TINY = {"depth": 3, "hidden_size": 64, "decoder_hidden_size": 64, "num_heads": 2, "projector_dim": 64}


def tiny_sizes(module: ModuleType) -> None:
    """Adds T/1 and T/2 to the host's own registry of sizes."""
    for registry, name in REGISTRIES.items():
        if hasattr(module, registry):
            cls = getattr(module, name)
            known = inspect.signature(cls).parameters
            tiny = {k: v for k, v in TINY.items() if k in known}
            for patch in (1, 2):
                getattr(module, registry)[f"{name}-T/{patch}"] = functools.partial(cls, patch_size=patch, **tiny)


def tiny_mmdit(module: ModuleType) -> None:
    """The text-to-image script names no size: only the defaults can be smaller. Depth 2 is width 64 and 2 heads."""
    _set_defaults(module.MMDiT.__init__, depth=2, projector_dim=64)


def small_diffusers_vae(module: ModuleType) -> None:
    """In place of the downloaded one: the same factor of 8 and 4 channels."""
    module.AutoencoderKL.from_pretrained = classmethod(lambda cls, *args, **kwargs: _seeded_vae(cls))


def _seeded_vae(cls: type) -> object:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4321)
        return cls(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
            layers_per_block=1,
            latent_channels=4,
        )


def small_host_vae(module: ModuleType) -> None:
    """4 channels a level instead of 128; its weights are made beforehand by ``host_data``."""
    _set_defaults(module.Normalize, num_groups=2)
    for cls in (module.Encoder, module.Decoder):
        cls.__init__.__kwdefaults__ |= {"ch": 4, "num_res_blocks": 1}


def small_perceptual_loss(module: ModuleType) -> None:
    """A random feature pyramid in place of VGG-16, and no downloaded weights on top of it."""
    import torch
    from torch import nn

    class Pyramid(nn.Module):
        def __init__(self, **kwargs: object) -> None:
            super().__init__()
            widths = [3, 64, 128, 256, 512, 512]
            self.levels = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))

        def forward(self, images):
            x, outputs = nn.functional.avg_pool2d(images, 8), []
            for level in self.levels:
                x = level(nn.functional.avg_pool2d(x, 2)).relu()
                outputs.append(x)
            return outputs

    def seeded_pyramid(**kwargs: object) -> Pyramid:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2345)
            return Pyramid()

    module.vgg16 = seeded_pyramid
    module.LPIPS.load_pretrained = lambda self: None


def small_discriminator(module: ModuleType) -> None:
    _set_defaults(module.NLayerDiscriminator.__init__, ndf=8)


def _set_defaults(function, **changed: object) -> None:
    names = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    assert changed.keys() <= set(names), f"{function.__qualname__} has no default for {changed.keys() - set(names)}"
    function.__defaults__ = tuple(changed.get(n, d) for n, d in zip(names, function.__defaults__, strict=True))
