"""What the random calls draw: descriptions of tensors, which print in one line and are made anew in every call."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from vrpo_plugin import VRPOError

HOLES = (math.nan, math.inf, -math.inf)
FLOATS = ("float32", "float64", "bfloat16", "float16")
# Spreads between what float32 can square: 1e-30 underflows to 0, and that must be taken; 1e25 would overflow.
SCALES = {"normal": 1.0, "tiny": 1e-30, "small": 1e-6, "large": 1e15}
FILLS = (*SCALES, "whole", "constant", "zero", "close")


class Property(NamedTuple):
    """What holds for every case: ``check`` returns what came of a call, and raises where it does not hold."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], str]
    share: int


@dataclass(frozen=True)
class Values:
    """A tensor: ``fill`` says what it holds; a third of it is ``hole``, where one is given."""

    shape: tuple[int, ...]
    fill: str = "normal"
    dtype: str = "float32"
    hole: float | None = None
    seed: int = 0

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.fill in SCALES:
            x = x * SCALES[self.fill]
        elif self.fill == "close":
            x = 1 + 1e-7 * x
        else:
            x = {"whole": (3 * x).round(), "constant": torch.full_like(x, 0.1), "zero": 0 * x}[self.fill]
        if self.dtype == "float16":
            x = x.clamp(-1e4, 1e4)
        if self.hole is not None:
            x = torch.where(torch.rand(self.shape, generator=generator) < 1 / 3, self.hole, x)
        return x.to(getattr(torch, self.dtype))


seeds = st.integers(0, 2**16)
sides = st.integers(1, 6)
holes = st.sampled_from((None, *HOLES))


def values(
    shapes: st.SearchStrategy[tuple[int, ...]],
    *,
    fills: Sequence[str] = FILLS,
    dtypes: Sequence[str] = FLOATS,
    hole: st.SearchStrategy[float | None] = holes,
) -> st.SearchStrategy[Values]:
    return st.builds(
        Values, shape=shapes, fill=st.sampled_from(fills), dtype=st.sampled_from(dtypes), hole=hole, seed=seeds
    )


def refused(call: Callable[[], object], why: str) -> str:
    """A call that must raise one of the package's errors, with its three parts."""
    try:
        call()
    except VRPOError as error:
        if ": expected " in str(error) and ", got " in str(error):
            return f"refused with {type(error).__name__}"
        raise AssertionError(f"not in three parts: {error}") from error
    raise AssertionError(f"not refused: {why}")


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
