import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.functional.groups import Groups, image_groups, noise_strata

examples = settings(deadline=None, derandomize=True, max_examples=50)
times = st.lists(st.sampled_from([0, 0.25, 0.5, 1]) | st.floats(0, 1, width=32), min_size=1, max_size=40)
distinct_times = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40, unique=True)
sizes = st.integers(1, 12)


def members(groups: Groups) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(groups.index, groups.mask, strict=True)]


@examples
@given(times, sizes)
def test_strata_are_the_sorted_batch_cut_into_pieces(t: list[float], group_size: int) -> None:
    order = sorted(range(len(t)), key=lambda i: t[i])
    strata = []
    while len(order) >= 2 * group_size:
        strata.append(order[:group_size])
        order = order[group_size:]
    assert members(noise_strata(torch.tensor(t), group_size)) == [*strata, order]


@examples
@given(times, sizes)
def test_strata_are_a_partition(t: list[float], group_size: int) -> None:
    groups = noise_strata(torch.tensor(t), group_size)
    rows = members(groups)
    assert sorted(i for row in rows for i in row) == list(range(len(t)))
    assert len(rows) == max(len(t) // group_size, 1)
    assert len(t) < group_size or all(group_size <= len(row) < 2 * group_size for row in rows)
    assert groups.index[~groups.mask].eq(0).all() and groups.mask.any(0).all()
    assert groups.index.flatten()[groups.slot].tolist() == list(range(len(t)))
    assert groups.mask.flatten()[groups.slot].all()


@examples
@given(times, sizes)
def test_join_undoes_split(t: list[float], group_size: int) -> None:
    groups = noise_strata(torch.tensor(t), group_size)
    for shape in ((len(t),), (3, len(t)), (2, 3, len(t))):
        values = torch.arange(math.prod(shape)).reshape(shape)
        assert groups.join(groups.split(values)).equal(values)


@examples
@given(times, sizes)
def test_split_is_the_loop_over_slots(t: list[float], group_size: int) -> None:
    groups = noise_strata(torch.tensor(t), group_size)
    values = torch.arange(2 * len(t)).reshape(2, -1)
    for k, s, g in np.ndindex(2, *groups.index.shape):
        if groups.mask[s, g]:
            assert groups.split(values)[k, s, g] == values[k, groups.index[s, g]]


@examples
@given(distinct_times, sizes, st.randoms(use_true_random=False))
def test_permuting_the_batch_leaves_the_strata(t: list[float], group_size: int, random) -> None:  # type: ignore[no-untyped-def]
    permutation = random.sample(range(len(t)), len(t))
    permuted = noise_strata(torch.tensor([t[i] for i in permutation]), group_size)
    named = [[permutation[i] for i in row] for row in members(permuted)]
    assert named == members(noise_strata(torch.tensor(t), group_size))


def test_join_of_a_value_per_group() -> None:
    groups = noise_strata(torch.tensor([0.9, 0.1, 0.2, 0.8, 0.7]), 2)
    per_group = torch.tensor([[10.0], [20.0]])
    assert groups.join(per_group.expand_as(groups.index)).tolist() == [20, 10, 10, 20, 20]


def test_gradient_passes_through_split_and_join() -> None:
    groups = noise_strata(torch.rand(7, generator=torch.Generator().manual_seed(0)), 3)
    values = torch.zeros(2, 7, requires_grad=True)
    groups.join(groups.split(values)).sum().backward()
    assert values.grad is not None and values.grad.eq(1).all()


@given(st.integers(1, 6), st.integers(1, 6))
def test_image_groups_are_consecutive(images: int, draws: int) -> None:
    groups = image_groups(images * draws, draws)
    assert members(groups) == [list(range(i * draws, (i + 1) * draws)) for i in range(images)]
    values = torch.arange(2 * images * draws).reshape(2, -1)
    assert groups.join(groups.split(values)).equal(values)


@pytest.mark.parametrize(("batch", "group_size"), [(7, 2), (3, 4), (0, 4), (-4, 2)])
def test_image_groups_of_an_uneven_batch_are_an_error(batch: int, group_size: int) -> None:
    with pytest.raises(ShapeError, match=f"expected a multiple of group_size={group_size}, got {batch}"):
        image_groups(batch, group_size)


@pytest.mark.parametrize("shape", [(), (0,), (4, 1)])
def test_times_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"t: expected \(B,\)"):
        noise_strata(torch.zeros(shape), 2)


@pytest.mark.parametrize("group_size", [0, -1])
def test_groups_of_no_size_are_an_error(group_size: int) -> None:
    with pytest.raises(ConfigError, match="group_size"):
        noise_strata(torch.rand(4), group_size)
    with pytest.raises(ConfigError, match="group_size"):
        image_groups(4, group_size)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        for groups in (noise_strata(torch.rand(11), 4), image_groups(12, 4)):
            assert groups.join(groups.split(torch.rand(3, len(groups.slot)))).shape == (3, len(groups.slot))
