"""Seams of sihyun-yu/REPA, utils.py."""

from fakes.hosts import accelerate_loop


def load_encoders(enc_type, device, resolution=256):
    return accelerate_loop.load_encoders(enc_type, device, resolution)
