"""Stands for diffusers, which tests do without."""
