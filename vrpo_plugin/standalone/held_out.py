"""A monitor against reward hacking: a network that the training never uses looks at what the rewards are given for."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate
from tqdm import tqdm

from vrpo_plugin.files import write_file
from vrpo_plugin.functional.interpolant import PathType, clean_estimate, noisy_sample
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.modules.aligner import VRPOAligner
from vrpo_plugin.modules.generation import GenerationReadout
from vrpo_plugin.standalone.data import TrainingSamples
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork
from vrpo_plugin.standalone.small_training import train_small_features
from vrpo_plugin.standalone.sources import Source, all_images
from vrpo_plugin.standalone.training import aligner_of

logger = logging.getLogger("vrpo_plugin")

FILE = "held_out.jsonl"
PREFIX = "held_out/reward/"
UNSEEN, ALARM, EACH = f"{PREFIX}unseen_network", "held_out/alarm", "unseen_of_each"
SAMPLES = 128  # of the fixed batch
SEED = 1  # of batch and network; not the small encoder's
LARGEST_SIDE = 64  # pixels; a network of larger images is not trained in seconds
NETWORK_IMAGES = 20_000
PATIENCE = 3  # looks in a row
SMALLEST_FALL = 0.01  # of a mean cosine; less is not called a fall
ERRORS = 3  # standard errors that a fall must exceed


@dataclass(frozen=True)
class Look:
    """What is seen at one step.

    Attributes:
        step: of the weights.
        trained: optimised reward to its mean over the fixed batch.
        unseen: per sample, how like the clean image its estimate is to the network that the training never uses.
    """

    step: int
    trained: Mapping[str, float]
    unseen: Sequence[float]


def find_hacking(looks: Sequence[Look]) -> str | None:
    """Whether the rewards and the unseen network part: the first have risen while the second has fallen.

    The last three looks are compared with the earlier look that the unseen network liked best. In all three its
    agreement must be lower by more than 0.01 and by more than three standard errors (the samples are the same), and
    one of the trained rewards, the same in all three, higher.

    Args:
        looks: in order.

    Returns:
        What has happened, in words; None where nothing has.
    """
    earlier, recent = looks[:-PATIENCE], looks[-PATIENCE:]
    if not earlier:
        return None
    best = max(earlier, key=lambda look: float(np.mean(look.unseen)))
    for look in recent:
        fall = np.asarray(best.unseen) - np.asarray(look.unseen)
        error = fall.std(ddof=1) / len(fall) ** 0.5
        if fall.mean() <= max(SMALLEST_FALL, ERRORS * error):
            return None
    risen = [name for name, value in best.trained.items() if all(look.trained[name] > value for look in recent)]
    if not risen:
        return None
    last = recent[-1]
    changes = ", ".join(f"{name} {best.trained[name]:.3f} to {last.trained[name]:.3f}" for name in risen)
    return (
        f"rewards have risen since step {best.step} ({changes}), but to a network that the training never uses the "
        f"same estimates look less like their images ({np.mean(best.unseen):.3f} to {np.mean(last.unseen):.3f} at step "
        f"{last.step}): the model may exploit the critic. Lower reward_coeff, or pretrain the critic longer; "
        "docs/healthy-run.md says more."
    )


def watch_rewards(
    folder: Path,
    model: nn.Module,
    encode: Callable[[Tensor], tuple[Tensor, ...]],
    source: Source,
    decode: Callable[[Tensor], Tensor] | None,
    path_type: PathType = "linear",
) -> "HeldOutWatch | None":
    """The monitor of a run, where it is cheap; else None.

    It is cheap for images of at most 64 pixels a side with at least two classes, for which a network is trained in
    seconds, and where the model is not sharded.

    Args:
        folder: of the run; looks are kept there in ``held_out.jsonl``.
        model: the transformer with its aligner, which gives the trained rewards.
        encode: images uint8 (B, C, H, W) -> encoder tokens, as in training.
        source: of the images.
        decode: latents to pixels in [-1, 1]; None where there is no decoder.
        path_type: of the run.
    """
    aligner = aligner_of(model)
    if aligner is None or aligner.generation is None or aligner.critic is None or decode is None:
        return None
    sharded = any(isinstance(parameter, DTensor) for parameter in aligner.parameters())
    if sharded or max(source.image_shape[1:]) > LARGEST_SIDE or source.num_classes < 2:
        return None
    return HeldOutWatch(folder / FILE, aligner, encode, source, decode, path_type)


class HeldOutWatch:
    """Looks at a run's estimates with a network that the training never uses, beside the rewards it is trained by.

    The images are the training's: it is the network that is held out. Looking changes nothing of the run: no weight,
    no statistic, no random number.

    Args:
        path: the file of looks.
        aligner: whose rewards are meant.
        encode, source, decode, path_type: as :func:`watch_rewards`.
    """

    def __init__(
        self,
        path: Path,
        aligner: VRPOAligner,
        encode: Callable[[Tensor], tuple[Tensor, ...]],
        source: Source,
        decode: Callable[[Tensor], Tensor],
        path_type: PathType,
    ) -> None:
        self.path, self.aligner, self.encode, self.source = path, aligner, encode, source
        self.decode, self.path_type = decode, path_type
        self._network: SmallFeatureNetwork | None = None

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """Looks once, on the main process, and writes down what is seen; an alarm is a warning, once per run.

        Args:
            model: the averaged weights, without aligner; called as ``model(x_t, t, y)``.
            step: of the weights; later looks in the file are dropped, for they are of a run that was cut off.

        Returns:
            ``held_out/reward/NAME`` for each trained reward, ``held_out/reward/unseen_network``, and
            ``held_out/alarm``, 0 or 1.
        """
        if self._network is None:
            self._prepare(next(model.parameters()).device)
        x0, x_t, t, y = self._batch
        estimate = clean_estimate(x_t, model(x_t, t, y).float(), t, self.path_type)
        generation = self.aligner.generation
        assert generation is not None
        rewards = _rewards(generation, RewardState(estimate, x0, x_t, t, self._targets, y, step))
        unseen = self._agreement(estimate)
        rows = [row for row in self._rows() if row["step"] < step]
        now = Look(step, {name: rewards[name] for name in generation.table.names}, [round(v, 5) for v in unseen])
        alarm = find_hacking([*map(_look, rows), now])
        if alarm and not any(row[ALARM] for row in rows):
            logger.warning("vrpo_plugin: %s", alarm)
        numbers = {f"{PREFIX}{name}": value for name, value in now.trained.items()}
        numbers |= {UNSEEN: float(np.mean(unseen)), ALARM: float(alarm is not None)}
        written = [*rows, {"step": step, **numbers, EACH: list(now.unseen)}]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in written))
        return numbers

    def _prepare(self, device: torch.device) -> None:
        images, labels = all_images(self.source, NETWORK_IMAGES)
        text = f"monitor: training a small network on {len(images)} images, to look at the rewards' estimates (once)"
        tqdm.write(text, file=sys.stderr)
        with torch.enable_grad():
            network = train_small_features(images, labels, seed=SEED, architecture="plain", width=24, device=device)
        samples = TrainingSamples(self.source, seed=SEED, label_drop_prob=0.0, path_type=self.path_type)
        batch = {k: v.to(device) for k, v in default_collate([samples[i] for i in range(SAMPLES)]).items()}
        t = (torch.arange(SAMPLES, device=device) + 0.5) / SAMPLES
        x_t, _ = noisy_sample(batch["x0"], batch["noise"], t, self.path_type)
        self._batch = batch["x0"], x_t, t, batch["y"]
        targets = self.encode(batch["image"])
        spatial = self.aligner.config.target_norm == "spatial"
        self._targets = tuple(self.aligner.grids.normalised(z) if spatial else z for z in targets)
        self._clean = network.tokens(batch["image"])
        self._network = network

    def _agreement(self, estimate: Tensor) -> list[float]:
        """Mean cosine per sample of the tokens of estimate and image around their mean over the batch."""
        assert self._network is not None
        pixels = self.decode(estimate).add(1).mul(127.5).round().clamp(0, 255).byte()
        centre = reduce(self._clean, "b n d -> d", "mean")
        cosine = F.cosine_similarity(self._network.tokens(pixels) - centre, self._clean - centre, dim=-1)
        return reduce(cosine, "b n -> b", "mean").tolist()

    def _rows(self) -> list[dict[str, Any]]:
        """The looks of the file; a damaged one is no reason to end a run."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        try:
            rows = [json.loads(line) for line in text.splitlines()]
            return [row for row in rows if _look(row) and ALARM in row]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("vrpo_plugin: %s holds no looks of the monitor (%r): it begins again", self.path, error)
            return []


def _rewards(generation: GenerationReadout, state: RewardState) -> dict[str, float]:
    """Mean of each reward, as training gives it; in evaluation mode nothing is remembered."""
    training = generation.training
    generation.eval()
    try:
        values = generation(state).rewards
    finally:
        generation.train(training)
    return {name: value.nanmean().item() for name, value in values.items()}


def _look(row: Mapping[str, Any]) -> Look:
    names = (name for name in row if name.startswith(PREFIX) and name != UNSEEN)
    return Look(row["step"], {name.removeprefix(PREFIX): row[name] for name in names}, row[EACH])
