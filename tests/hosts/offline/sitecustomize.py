"""Puts the stand-ins in place: once a module has run, the stand-in listed for its name adjusts it.

Python imports this file by itself at the start of every process that has this folder on PYTHONPATH. Nothing is imported
before the host does so itself.
"""

import importlib
import importlib.machinery
import types

AFTER = {
    "torch": "standin_torch:install",
    "accelerate.accelerator": "standin_record:record_metrics",
    "diffusers.models.autoencoders.autoencoder_kl": "standin_networks:small_diffusers_vae",
    "models": "standin_networks:tiny_sizes",  # SiT and DiT: one file
    "models.sit": "standin_networks:tiny_sizes",
    "models.lightningdit": "standin_networks:tiny_sizes",
    "models.mmdit": "standin_networks:tiny_mmdit",
    "models.autoencoder": "standin_networks:small_host_vae",  # iREPA and REPA-E
    "loss.lpips": "standin_networks:small_perceptual_loss",  # REPA-E
    "loss.discriminator": "standin_networks:small_discriminator",
    "samplers": "standin_loops:short_preview",
    "samplers_t2i": "standin_loops:short_preview",
    "accelerate.data_loader": "standin_loops:no_datasets_package",
    "dataset": "standin_loops:few_captioned_images",
}

_exec_module = importlib.machinery.SourceFileLoader.exec_module


def exec_module(self: importlib.machinery.SourceFileLoader, module: types.ModuleType) -> None:
    _exec_module(self, module)
    if target := AFTER.get(module.__name__):
        file, function = target.split(":")
        getattr(importlib.import_module(file), function)(module)


importlib.machinery.SourceFileLoader.exec_module = exec_module
