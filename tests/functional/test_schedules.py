import pytest
import torch

from vrpo_plugin.functional.schedules import schedule_left

LEFT = {"none": [1, 1, 1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25, 0, 0], "stop": [1, 1, 1, 1, 0, 0]}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("schedule", LEFT)
def test_what_is_left(schedule: str, floor: float, on_device: bool) -> None:
    for step, left in enumerate(LEFT[schedule]):
        found = schedule_left(schedule, 4, torch.tensor(step) if on_device else step, floor=floor)
        assert float(found) == pytest.approx(floor + (1 - floor) * left)


def test_without_a_length_nothing_is_let_go_of() -> None:
    assert schedule_left("linear", 0, 10**9) == schedule_left("linear", 0, torch.tensor(5)) == 1
