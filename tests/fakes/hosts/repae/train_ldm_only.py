"""Seams of End2End-Diffusion/REPA-E, train_ldm_only.py."""

from models.sit import SiT_models

assert SiT_models
