"""The aligner inside a host's model: its checkpoints stay the host's."""

import copy
import logging
from typing import Any

from vrpo_plugin.errors import CheckpointError, explain
from vrpo_plugin.modules.aligner import VRPOAligner

logger = logging.getLogger("vrpo_plugin")


class HostAligner(VRPOAligner):
    """A VRPOAligner that lives in the module tree of a model whose code does not know it.

    In a deep copy of the model, which is what every host calls its EMA, it stays out of the state dict, so that
    the copy's weights load strictly in the host's own sampling scripts. Where a checkpoint holds nothing of it, it
    keeps its own values, so that such weights load strictly here too.

    Args:
        earlier_calls: of a run that was begun without the aligner; its schedules go on there, and end with the run.
        **kwargs: of :class:`VRPOAligner`.

    Raises:
        CheckpointError: on loading, the checkpoint's aligner has other shapes.
    """

    says_collapse = False  # the tracker does, in compiled hosts too

    def __init__(self, *, earlier_calls: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_copy, self.earlier_calls = False, earlier_calls
        self.register_state_dict_post_hook(_hide_in_a_copy)
        self.register_load_state_dict_pre_hook(_keep_own_values)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostAligner":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.is_copy = True
        new._compiled_call_impl = None  # the compiled call is the original's
        return new


def _hide_in_a_copy(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    if module.is_copy:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def _keep_own_values(module: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    if any(key.startswith(prefix) for key in state_dict):
        _compare(module, state_dict, prefix)
        return
    copied, module.is_copy = module.is_copy, False
    module.step.fill_(module.earlier_calls)
    state_dict.update(module.state_dict(prefix=prefix))
    module.is_copy = copied
    if not copied:
        logger.warning("the checkpoint holds no aligner (it was saved without vrpo_plugin): ours starts afresh")


def _compare(module: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Says what to do where torch would list tensors."""
    own, given = module.state_dict(prefix=prefix), {key for key in state_dict if key.startswith(prefix)}
    reshaped = sorted(key for key in given & own.keys() if own[key].shape != state_dict[key].shape)
    do = "Resume with the settings of that run, or let the aligner start afresh from a copy made by 'vrpo export'."
    expected = "the aligner of these settings"
    if reshaped:
        got = f"another: {reshaped[0]} is {tuple(state_dict[reshaped[0]].shape)}, not {tuple(own[reshaped[0]].shape)}"
        raise CheckpointError("the checkpoint", expected=expected, got=got, do=do)
    different = sorted(given ^ own.keys())
    if different and not module.is_copy:  # no error: with strict=False it is none
        got = f"another: {different[0]} is in one of them only"
        logger.warning(explain("the checkpoint", expected=expected, got=got, do=do))
