"""torch: the hub gives a small encoder; losses, weights and random state are recorded; CUDA is pretended on request."""

import functools
import os
from types import ModuleType

import standin_record


def install(torch: ModuleType) -> None:
    torch.hub.load = _small_encoder
    _load_to_numbered_cpus(torch)
    # DDP refuses it off CUDA: REPA-E's batch norm stays local to its process.
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(lambda cls, module, process_group=None: module)
    standin_record.seed_everything(torch)
    standin_record.record_losses(torch)
    standin_record.record_steps(torch)
    if os.environ.get("VRPO_TEST_RESEED") == "1":
        _seed_epochs_by_step(torch)
    if os.environ.get("VRPO_TEST_FAKE_CUDA") == "1":
        import standin_cuda

        standin_cuda.install(torch)


def _small_encoder(repo: str, model: str, *args: object, **kwargs: object) -> object:
    import standin_encoder

    return standin_encoder.small_encoder()


def _load_to_numbered_cpus(torch: ModuleType) -> None:
    """On several CPU processes accelerate's device is "cpu:0", "cpu:1", where ``torch.load`` knows "cpu" alone."""
    original = torch.load

    @functools.wraps(original)
    def load(file, map_location=None, **kwargs):
        numbered = isinstance(map_location, torch.device) and map_location.type == "cpu"
        return original(file, map_location="cpu" if numbered else map_location, **kwargs)

    torch.load = load


def _seed_epochs_by_step(torch: ModuleType) -> None:
    """No host restores its random state. An epoch's draws depend on the optimizer's step alone, which is restored."""
    from torch.utils.data import DataLoader

    optimizers: list[object] = []
    make, iterate = torch.optim.AdamW.__init__, DataLoader.__iter__

    @functools.wraps(make)
    def __init__(self, *args, **kwargs):
        make(self, *args, **kwargs)
        optimizers.append(self)

    @functools.wraps(iterate)
    def __iter__(self):
        steps = [int(state["step"]) for optimizer in optimizers for state in optimizer.state.values()]
        torch.manual_seed(1000 * max(steps, default=0) + int(os.environ.get("RANK", "0")))
        return iterate(self)

    torch.optim.AdamW.__init__, DataLoader.__iter__ = __init__, __iter__
