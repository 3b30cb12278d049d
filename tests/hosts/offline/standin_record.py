"""What happened, one JSON object a line, in the file that $VRPO_TEST_LOG names plus the process's rank.

JSON writes a float's repr: it reads back bit for bit.
"""

import functools
import hashlib
import json
import numbers
import os
import random
from types import ModuleType


def record(kind: str, **values: object) -> None:
    rank = os.environ.get("RANK", "0")
    with open(f"{os.environ['VRPO_TEST_LOG']}.{rank}", "a") as file:
        file.write(json.dumps({"kind": kind, **values}) + "\n")


def seed_everything(torch: ModuleType) -> None:
    """LightningDiT seeds nothing, SiT and DiT torch alone. Seeded, a draw by anyone shows in the record."""
    import numpy as np

    seed = int(os.environ.get("RANK", "0"))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that a host or a library might draw from
    torch.manual_seed(seed)


def record_losses(torch: ModuleType) -> None:
    """Every scalar that ``backward`` is called on."""
    original = torch.Tensor.backward

    @functools.wraps(original)
    def backward(self, *args, **kwargs):
        if self.numel() == 1:
            record("loss", value=self.item())
        return original(self, *args, **kwargs)

    torch.Tensor.backward = backward


def record_steps(torch: ModuleType) -> None:
    """After every optimizer step: a hash of each parameter, in the optimizer's order, and of the random states."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    optimizers: list[object] = []

    def after_step(optimizer, args, kwargs) -> None:
        if optimizer not in optimizers:
            optimizers.append(optimizer)
        parameters = [_digest(torch, p) for group in optimizer.param_groups for p in group["params"]]
        record("step", optimizer=optimizers.index(optimizer), parameters=parameters, random=_random_states(torch))

    register_optimizer_step_post_hook(after_step)


def record_metrics(module: ModuleType) -> None:
    """What reaches ``Accelerator.log``, on every rank and below any later wrapper of it."""
    original = module.Accelerator.log

    @functools.wraps(original)
    def log(self, values, step=None, **kwargs):
        scalars = {k: float(v) for k, v in values.items() if _is_scalar(v)}
        record("log", step=step, values=scalars, others=sorted(values.keys() - scalars.keys()))
        return original(self, values, step=step, **kwargs)

    module.Accelerator.log = log


def _is_scalar(value: object) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()


def _digest(torch: ModuleType, tensor) -> str:
    return _short(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())


def _random_states(torch: ModuleType) -> dict[str, str]:
    import numpy as np

    return {
        "python": _short(repr(random.getstate()).encode()),
        "numpy": _short(b"".join(bytes(str(part), "ascii") for part in _numpy_state(np))),
        "torch": _short(torch.get_rng_state().numpy().tobytes()),
    }


def _numpy_state(np: ModuleType) -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
