"""What every test shares: a fixed seed, the fakes, and a guard of the global random state."""

import random
import socket
from collections.abc import Generator

import numpy as np
import pytest
import torch
from fakes.random_state import global_random_state

from vrpo_plugin.patching.handle import active_handles

# The tensors are small: a second thread gains nothing, and where cores are shared its spinning costs minutes.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "keeps_random_state: the test's body may not draw from a global generator")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what a library might draw from
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    # Around the body alone: fixtures may draw, and an error in a fixture's teardown would not name the test.
    before = global_random_state()
    result = yield
    if item.get_closest_marker("keeps_random_state") and global_random_state() != before:
        pytest.fail("the test changed a global random state")
    return result


@pytest.fixture(autouse=True)
def _no_patch_is_left() -> Generator[None, None, None]:
    yield
    left = active_handles()
    for handle in reversed(left):
        handle.remove()  # the tests that follow are not to blame
    assert not left, f"the test left patches behind: {[handle.name for handle in left]}"
