"""What a training step of each method costs: multiply-accumulates, and time in one run."""

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from critic_flops import count_macs
from torch import Tensor
from torch.utils.data import default_collate
from train_parts import TrainingStep, build_model, build_optimizer

from convergence.parts import ENCODER, Benchmark, Run
from vrpo_plugin.encoders import Targets
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.standalone.data import TrainingSamples
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.targets import cached_targets
from vrpo_plugin.standalone.training import aligner_of

REPEATS, STEPS = 5, 2


class Stepper:
    """Training steps of one method, outside of any run."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.options, config = run.options()
        source, features = run.benchmark.source(), None
        if self.options.features_dir is not None:
            features = cache = FeatureCache(self.options.features_dir)
            targets = cached_targets(cache, source)
            self.encode = lambda batch: cache.decode(batch["features"])
        else:
            encoder = run.benchmark.network(ENCODER).to(device)
            targets = Targets((encoder.token_dim,), encoder.grid, lambda images: (encoder.tokens(images),))
            self.encode = lambda batch: targets.encode(batch["image"])
        self.critic_checkpoint = config.critic_checkpoint
        self.aligned = config.features == "policy" or config.reward_coeff > 0
        self.encoded = self.aligned and config.targets == "encoder"
        self.model = build_model(self.options, config, source, targets if self.aligned else None).to(device)
        self.step_module = TrainingStep(self.model, config.path_type).train()
        self.optimizer = build_optimizer(self.options, self.model)
        samples = TrainingSamples(source, seed=0, features=features)
        batch = default_collate([samples[i] for i in range(self.options.batch_size)])
        self.batch: dict[str, Tensor] = {key: value.to(device) for key, value in batch.items()}
        self.device = device

    def loss(self) -> Tensor:
        """Forward pass with the encoder's."""
        precision = self.options.mixed_precision
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = self.encode(self.batch) if self.encoded else ()
            return self.step_module(self.batch, z, 0)[0]

    def step(self) -> None:
        """One optimizer step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mmacs(self) -> float:
        """Millions of multiply-accumulates per sample, forward and backward, the encoder's included."""
        gmacs = count_macs(lambda: self.loss().backward())
        self.optimizer.zero_grad(set_to_none=True)
        return 1e3 * gmacs / self.options.batch_size

    def critic_mmacs(self) -> float:
        """What of them the generation readout takes: the difference to a step without its rewards."""
        aligner = aligner_of(self.model)
        if aligner is None or aligner.generation is None:
            return 0.0
        whole, readout = self.mmacs(), aligner.generation
        aligner.generation = None
        if not self.encoded:  # the targets still take one look at clean latents
            aligner.target_critic = readout.critic
        rest = self.mmacs()
        aligner.generation, aligner.target_critic = readout, None
        return whole - rest


def measure_costs(benchmark: Benchmark, methods: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """What a step of each method costs.

    Returns:
        Per method ``mmacs`` per sample, the ``critic_share`` of them, ``critic_steps``, the training of its critic
        beforehand in steps of this method, and ``seconds`` per step.

    Blocks of steps of all methods alternate, so that a slow moment of the machine hits them alike.
    """
    steppers = {method: Stepper(Run(benchmark, method, benchmark.recipe.seeds[0]), device) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(REPEATS + 1):
        for method, stepper in steppers.items():
            _wait(device)
            started = time.perf_counter()
            for _ in range(STEPS):
                stepper.step()
            _wait(device)
            seconds[method].append((time.perf_counter() - started) / STEPS)
    costs = {}
    for method, stepper in steppers.items():
        mmacs = stepper.mmacs()
        costs[method] = {
            "mmacs": mmacs,
            "critic_share": stepper.critic_mmacs() / mmacs,
            "critic_steps": _critic_training_mmacs(benchmark, stepper) / (mmacs * stepper.options.batch_size),
            "seconds": statistics.median(seconds[method][1:]),
        }
    return costs


def _critic_training_mmacs(benchmark: Benchmark, stepper: Stepper) -> float:
    """Of the whole training of the critic beforehand, the encoder's passes included; 0 where there is none."""
    aligner = aligner_of(stepper.model)
    if stepper.critic_checkpoint is None or aligner is None or aligner.critic is None:
        return 0.0
    training = benchmark.critic_training(Path(stepper.critic_checkpoint).stem)
    critic, batch = copy.deepcopy(aligner.critic).requires_grad_(True), stepper.batch
    gmacs = count_macs(lambda: semantic_reward(critic(batch["x0"]).tokens, stepper.encode(batch)).sum().backward())
    return 1e3 * gmacs / len(batch["x0"]) * training.batch_size * training.steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
