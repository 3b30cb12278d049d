"""The global random states that library code must not touch."""

import pickle
import random

import numpy as np
import torch


def global_random_state() -> bytes:
    """The states of random, numpy and torch."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))  # noqa: NPY002
