"""As in diffusers, the class is imported from here."""

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

__all__ = ["AutoencoderKL"]
