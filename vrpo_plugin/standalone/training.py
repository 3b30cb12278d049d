"""What a training loop needs beside the loss: EMA, parameter groups, and the states that a checkpoint holds."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from vrpo_plugin.modules.aligner import VRPOAligner

Model = TypeVar("Model", bound=nn.Module)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def aligner_of(model: nn.Module) -> VRPOAligner | None:
    """What ``attach`` registered on the model."""
    aligner = getattr(model, "vrpo", None)
    return aligner if isinstance(aligner, VRPOAligner) else None


def build_ema(model: Model) -> Model:
    """A frozen copy of the transformer without its aligner, for sampling."""
    ema = copy.deepcopy(model)
    if (aligner := aligner_of(ema)) is not None:
        aligner.detach(ema)
    return ema.eval().requires_grad_(False)


def ema_decay(decay: float, step: int) -> float:
    """Decay of the average at a step: early steps count more, as they replace the initialisation."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor, skipped: Tensor) -> None:
    """Moves the average towards the model.

    A step that was left out (``skipped`` is 1, a 0-dim tensor) leaves the average as it is.
    """
    source = dict(model.named_parameters())
    names, averages = zip(*ema.named_parameters(), strict=True)
    # Under FSDP2 a parameter is a shard, and its average is kept whole.
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in (source[name] for name in names)]
    # Not _foreach_lerp_: with a tensor as weight it is one kernel per parameter.
    moves = torch._foreach_sub(whole, averages)
    torch._foreach_mul_(moves, (1 - decay) * (1 - skipped))
    torch._foreach_add_(averages, moves)


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of the transformer with its projectors, and of the critic."""
    aligner = aligner_of(model)
    critic = aligner.critic if aligner is not None else None
    of_critic = {id(p) for p in critic.parameters()} if critic is not None else set()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) not in of_critic], [p for p in trainable if id(p) in of_critic]


def whole_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of the two, gathered from all shards: on the first process; the others get parts."""
    state: dict[str, Any] = get_model_state_dict(model, options=FULL)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=FULL).get("state", {})
    named: dict[str, Any] = {f"{name}/{k}": v for name, own in moments.items() for k, v in own.items()}
    return {"model": state, "optimizer": named}


def load_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts back what :func:`whole_states` gave, on every process, whatever the number of processes was."""
    set_model_state_dict(model, dict(tensors["model"]), options=FULL)
    # The settings of the parameter groups come from the options, the moments from the checkpoint. Not by FULL: it
    # gives them to the first process alone.
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    moments: dict[str, Any] = {}
    for key, value in tensors["optimizer"].items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, {})[moment] = value
    set_optimizer_state_dict(model, optimizer, {"state": moments, "param_groups": groups}, options=FULL)
