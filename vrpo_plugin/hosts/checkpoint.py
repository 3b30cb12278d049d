"""A host's checkpoints with and without the aligner."""

import argparse
import copy
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vrpo_plugin.errors import CheckpointError
from vrpo_plugin.files import write_file

# The aligner is the attribute ``vrpo`` of the host's model; DDP and torch.compile put their own names before it.
_ALIGNER_KEY = re.compile(r"(?:module\.|_orig_mod\.)*vrpo\.(?P<name>.*)")
# What of the aligner's state is no parameter, and hence not in an optimizer: its step, and RewardStatistics.
_BUFFERS = re.compile(r"step$|generation\.(statistics|watch)\.")
_WEIGHTS = ("model", "ema")
_GIVE = "Give a .pt file that the host's training script saved, whole and from a source that you trust."


def with_fresh_state(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], aligner_parameters: Collection[int]
) -> Mapping[str, Any]:
    """An optimizer's state that lacks the aligner, completed; the same object where it lacks nothing.

    Args:
        optimizer: that is going to load it.
        state_dict: of a checkpoint.
        aligner_parameters: ``id`` of each of the aligner's parameters; in a host's optimizer they come last, for
            the aligner is the last child of its model.
    """
    groups, given = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(given):
        return state_dict
    last = max((index for group in given for index in group["params"]), default=-1)
    completed = []
    for group, old in zip(groups, given, strict=True):
        missing = group["params"][len(old["params"]) :]
        if any(id(parameter) not in aligner_parameters for parameter in missing):
            return state_dict
        fresh = list(range(last + 1, last + 1 + len(missing)))
        last += len(missing)
        completed.append({**old, "params": [*old["params"], *fresh]})
    if [len(group["params"]) for group in completed] == [len(group["params"]) for group in given]:
        return state_dict
    return {**state_dict, "param_groups": completed}


def export_checkpoint(source: Path, out: Path, *, overwrite: bool = False) -> int:
    """Writes a checkpoint of a host's training script without anything of the aligner.

    The file is read without running code from it, and is written all at once or not at all. Tensors keep their bits.

    Args:
        source: the host's file: a mapping with ``model`` and ``ema``, and mostly ``opt`` and ``args``.
        out: ``.pt`` for the same mapping, from which the unpatched host resumes; ``.safetensors`` for the EMA weights
            alone.
        overwrite: replace a file that is there.

    Returns:
        How many tensors of weights were left out; 0 where the checkpoint held no aligner.

    Raises:
        CheckpointError: the file is missing, damaged, no such checkpoint, or would run code; ``out`` exists, is the
            checkpoint itself, has another ending, or cannot be written.
    """
    check_new_file(source, out, (".pt", ".safetensors"), overwrite=overwrite)
    checkpoint = read_checkpoint(source)
    plain, removed = without_aligner(checkpoint, str(source))
    if out.suffix == ".pt":
        _write(out, lambda file: torch.save(plain, file))
    else:
        data = _as_safetensors(plain["ema"], str(source))
        _write(out, data)
    return removed


def without_aligner(checkpoint: Mapping[str, Any], name: str) -> tuple[dict[str, Any], int]:
    """A host's checkpoint without the aligner's weights and their optimizer state.

    Args:
        checkpoint: as the host's script saves it.
        name: of it, for messages.

    Returns:
        A new mapping with the same tensors, and how many tensors of weights were left out.

    Raises:
        CheckpointError: its optimizer is not that of its model.
    """
    shapes = [value.shape for key, value in checkpoint["model"].items() if is_aligner_parameter(key)]
    plain = dict(checkpoint)
    for part in _WEIGHTS:
        plain[part] = _without_keys(checkpoint[part])
    if "opt" in checkpoint:
        plain["opt"] = _without_last(checkpoint["opt"], shapes, name)
        if shapes:
            # Loading would force it on the host's optimizer, which may be of another kind: torch's default is None.
            plain["opt"]["param_groups"] = [
                {**group, "fused": None} if "fused" in group else group for group in plain["opt"]["param_groups"]
            ]
    return plain, sum(len(checkpoint[part]) - len(plain[part]) for part in _WEIGHTS)


def is_aligner_parameter(key: str) -> bool:
    """Whether a key of a model's state is one of the aligner's parameters."""
    found = _ALIGNER_KEY.match(key)
    return found is not None and not _BUFFERS.match(found["name"])


def _without_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = copy.copy(weights)  # of its own class, with the versions of its layers
    for key in [key for key in weights if _ALIGNER_KEY.match(key)]:
        del plain[key]
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        plain._metadata = type(versions)(  # type: ignore[attr-defined]
            (name, version) for name, version in versions.items() if not _ALIGNER_KEY.match(f"{name}.")
        )
    return plain


def _without_last(optimizer: Any, shapes: Sequence[torch.Size], name: str) -> dict[str, Any]:
    """An optimizer's state without its last parameters, which have these shapes."""
    try:
        state, (*groups, last) = optimizer["state"], optimizer["param_groups"]
        kept, ours = last["params"][: -len(shapes) or None], last["params"][len(last["params"]) - len(shapes) :]
        means = [state.get(index, {}).get("exp_avg") for index in ours]  # none where a parameter got no gradient
        fits = len(ours) == len(shapes) and all(
            mean is None or mean.shape == shape for mean, shape in zip(means, shapes, strict=True)
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        fits = False
    if not fits:
        do = "Export a checkpoint that the host's own script saved."
        expected = f"AdamW's state, its last group ending with the aligner's {len(shapes)} parameters"
        raise CheckpointError(f"{name}: opt", expected=expected, got="another", do=do)
    removed = {*ours}
    state = {index: value for index, value in state.items() if index not in removed}
    return {**optimizer, "state": state, "param_groups": [*groups, {**last, "params": kept}]}


def read_weights(source: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any], int | None]:
    """Weights of a host's checkpoint without the aligner, read without running code from it.

    Args:
        source: the host's file: a mapping with ``model``, ``ema`` and mostly ``args``, or the weights alone, as hosts
            publish them.
        ema: the averaged weights, else those of the last step.

    Returns:
        The weights; the arguments of the host's script, empty where the file has none; the step, None likewise.

    Raises:
        CheckpointError: the file is missing, damaged, no such checkpoint, or would run code.
    """
    checkpoint = _unpickle(source)
    if _is_weights(checkpoint):
        if not ema:
            do = "Leave --raw out: published weights are mostly averaged ones."
            raise CheckpointError(str(source), expected="a checkpoint with 'model'", got="weights alone", do=do)
        return _without_keys(checkpoint), {}, None
    checkpoint = _check_parts(checkpoint, source)
    arguments, step = checkpoint.get("args"), checkpoint.get("steps")
    if step is None and source.stem.isdigit():
        step = int(source.stem)  # as SiT names its files
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    named = dict(arguments) if isinstance(arguments, Mapping) else {}
    return _without_keys(checkpoint["ema" if ema else "model"]), named, step if isinstance(step, int) else None


def read_checkpoint(source: Path) -> dict[str, Any]:
    """A host's checkpoint, read without running code from it.

    Raises:
        CheckpointError: it is missing, damaged, no such checkpoint, or would run code.
    """
    return _check_parts(_unpickle(source), source)


def _unpickle(source: Path) -> Any:
    # Hosts save their arguments as they are. The block's end would also take away what was allowed before it.
    allowed = {argparse.Namespace} - {*torch.serialization.get_safe_globals()}
    try:
        with torch.serialization.safe_globals([*allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's odd protocol: what comes of it says enough
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        foreign = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        reason = f"{type(error).__name__}: {str(error).split('. ')[0].strip()}"
        got = f"a pickle that calls {foreign[1]}" if foreign else reason[:200]
        raise CheckpointError(str(source), expected="a checkpoint", got=got, do=_GIVE) from error


def _check_parts(checkpoint: Any, source: Path) -> dict[str, Any]:
    if not isinstance(checkpoint, dict) or not all(_is_weights(checkpoint.get(part)) for part in _WEIGHTS):
        keys = [str(key) for key in checkpoint] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(
            str(source), expected="'model' and 'ema', two mappings of tensors", got=str(keys)[:200], do=_GIVE
        )
    return checkpoint


def _is_weights(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(getattr(value, "_metadata", {}), dict):
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _as_safetensors(weights: dict[str, Tensor], name: str) -> bytes:
    from safetensors.torch import save

    try:
        # Copies of their own: safetensors refuses memory that two tensors share.
        return save({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in weights.items()})
    except Exception as error:  # sparse, quantized or huge: what torch and safetensors raise has no common class
        got, do = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200], "Export to a .pt file."
        raise CheckpointError(f"{name}: ema", expected="tensors that safetensors holds", got=got, do=do) from error


def check_new_file(source: Path, out: Path, endings: tuple[str, ...], *, overwrite: bool) -> None:
    """Refuses a file that is not to be written.

    Raises:
        CheckpointError: it exists, is the checkpoint itself, or has another ending.
    """
    if out.suffix not in endings:
        expected, do = f"a file ending in {' or '.join(endings)}", "Rename it."
        raise CheckpointError(str(out), expected=expected, got=out.suffix or "no ending", do=do)
    if not os.path.exists(out):
        return
    if os.path.exists(source) and out.samefile(source):
        do = "Write to another file."
        raise CheckpointError(str(out), expected="another file than the checkpoint", got="the same", do=do)
    if not overwrite or not out.is_file():
        do = "Give another name, or --overwrite." if out.is_file() else "Give the name of a file."
        raise CheckpointError(str(out), expected="no such file", got="one that exists", do=do)


def _write(out: Path, content: Callable[[IO[bytes]], object] | bytes) -> None:
    try:
        write_file(out, content)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
        do = "Give a folder that exists and has room."
        raise CheckpointError(str(out), expected="a file that can be written", got=error, do=do) from error
