"""Training runs side by side on one device: the example's step as a CUDA graph, one stream a run.

A step of a small model is many small kernels, so a GPU waits for the host and is never full. A graph takes the host out
of it, and streams fill the GPU. All runs of a seed share one batch, drawn on the device.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from train_options import TrainOptions
from train_parts import TrainingStep, build_model, build_optimizer

from vrpo_plugin import ConfigError, NonFiniteGuard, VRPOConfig
from vrpo_plugin.encoders import Targets
from vrpo_plugin.standalone.sources import Source
from vrpo_plugin.standalone.training import aligner_of, build_ema, ema_decay, parameter_groups, update_ema

EAGER_STEPS = 3  # before the capture: they choose algorithms and make the optimizer's state
Encode = Callable[[Tensor], tuple[Tensor, ...]]


class SharedBatch:
    """The batches of one seed, one after another in the same memory; a function of the seed and the step.

    Not the draws of ``vrpo_plugin.standalone.data``, which are made on the CPU, image by image.

    Args:
        images: uint8 (N, C, S, S), on the device.
        labels: (N,), on the device.
        options: batch size, flips, dropped labels.
        seed: of the run.
        encode: the frozen encoder.
    """

    def __init__(self, images: Tensor, labels: Tensor, options: TrainOptions, seed: int, encode: Encode) -> None:
        if options.weighting != "uniform" or options.gradient_accumulation_steps != 1:
            got = f"weighting={options.weighting}, accumulation {options.gradient_accumulation_steps}"
            expected = "uniform times and no accumulation"
            raise ConfigError("recipe", expected=expected, got=got, do="Use benchmarks/convergence.")
        self.images, self.labels, self.options, self.seed, self.encode = images, labels, options, seed, encode
        self.device = images.device
        self.generator = torch.Generator(self.device)
        self.stream = new_stream(self.device)
        self.permutations: dict[int, Tensor] = {}
        self.batch, self.z = self._draw(0)

    def fill(self, step: int) -> None:
        """Draws the batch of a step."""
        batch, z = self._draw(step)
        for old, new in zip([*self.batch.values(), *self.z], [*batch.values(), *z], strict=True):
            old.copy_(new)

    def _draw(self, step: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        size = self.options.batch_size
        index = torch.cat([self._indices(epoch, rows) for epoch, rows in _epochs(step * size, size, len(self.labels))])
        self._reseed("batch", step)
        uniform = torch.rand(3, size, device=self.device, generator=self.generator)
        image = self.images[index]
        image = torch.where((uniform[0] < self.options.flip_prob)[:, None, None, None], image.flip(-1), image)
        x0 = image / 127.5 - 1
        batch = {
            "image": image,
            "x0": x0,
            "noise": torch.randn(x0.shape, device=self.device, generator=self.generator),
            "t": uniform[1],
            "y": self.labels[index],
            "drop": uniform[2] < self.options.cfg_prob,
        }
        with torch.no_grad():
            return batch, self.encode(image)

    def _indices(self, epoch: int, rows: slice) -> Tensor:
        if epoch not in self.permutations:
            self._reseed("epoch", epoch)
            self.permutations = {e: p for e, p in self.permutations.items() if e >= epoch - 1}
            self.permutations[epoch] = torch.randperm(len(self.labels), device=self.device, generator=self.generator)
        return self.permutations[epoch][rows]

    def _reseed(self, purpose: str, number: int) -> None:
        digest = hashlib.blake2b(f"{purpose}/{self.seed}/{number}".encode(), digest_size=7).digest()
        self.generator.manual_seed(int.from_bytes(digest, "little"))


def _epochs(first: int, count: int, length: int) -> Iterator[tuple[int, slice]]:
    while count > 0:
        epoch, offset = divmod(first, length)
        taken = min(count, length - offset)
        yield epoch, slice(offset, offset + taken)
        first, count = first + taken, count - taken


class GraphedRun:
    """One run: the example's model, step, guard, optimizer and EMA.

    Args:
        options: of the example.
        config: the objective.
        source: for the sizes.
        targets: for the sizes; None where the method aligns nothing.
        shared: whose batches it trains on.
        graph: capture the step as a CUDA graph; False runs it eagerly.
        compiled: ``torch.compile`` of the blocks and of the aligner.
    """

    def __init__(
        self,
        options: TrainOptions,
        config: VRPOConfig,
        source: Source,
        targets: Targets | None,
        shared: SharedBatch,
        *,
        graph: bool,
        compiled: bool,
    ) -> None:
        self.options, self.shared, self.device = options, shared, shared.device
        self.encoded = config.targets == "encoder"  # else the aligner makes its targets itself
        self.stream = new_stream(self.device)
        with on(self.stream):
            self.model = build_model(options, config, source, targets).to(self.device)
            self.ema = build_ema(self.model)
            if compiled:
                backend = "inductor" if self.device.type == "cuda" else "aot_eager"
                for block in self.model.blocks:
                    block._transform = torch.compile(block._transform, backend=backend, dynamic=False)
                if (aligner := aligner_of(self.model)) is not None:
                    aligner.compile(backend=backend, dynamic=False)
            self.step_module = TrainingStep(self.model, config.path_type).train()
            self.optimizer = build_optimizer(options, self.model)
            for group in self.optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"
            self.clip_groups = [group for group in parameter_groups(self.model) if group]
            self.guard = NonFiniteGuard(self.optimizer, self.model)
            self.decay = torch.zeros((), device=self.device)
            self.skipped = torch.zeros((), device=self.device)
        self.wants_graph = graph and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.step = self.eager_steps = 0

    def advance(self) -> None:
        """One step on the shared batch, on this run's stream; nothing waits for it."""
        self.decay.fill_(ema_decay(self.options.ema_decay, self.step))
        if self.graph is None and self.wants_graph and self.eager_steps >= EAGER_STEPS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._train_step()
            self.graph = graph
        if self.graph is not None:
            self.graph.replay()
        else:
            self._train_step()
            self.eager_steps += 1
        self.step += 1

    def _train_step(self) -> None:
        """As the example's, on one device."""
        # Before, not after: in a graph the gradients of a replay then lie where those of the capture lay.
        self.optimizer.zero_grad(set_to_none=True)
        buffers = dict(self.model.named_buffers())
        self.guard.keep()
        bf16 = self.options.mixed_precision == "bf16"
        z = self.shared.z if self.encoded and aligner_of(self.model) is not None else ()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            # No step: the aligner counts on the device.
            loss, metrics = self.step_module(self.shared.batch, z, None)
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(group, self.options.max_grad_norm) for group in self.clip_groups]
        counts = [value for name, value in metrics.items() if "nonfinite" in name]
        skipped = self.guard.check(norms, counts)
        self.optimizer.step()
        update_ema(self.ema, self.model, self.decay, skipped)
        self.skipped += skipped
        _keep_addresses(self.model, buffers)

    def check(self) -> None:
        """Whether the graph has moved what it was to move: the aligner counts its steps on the device.

        Raises:
            RuntimeError: it has counted otherwise.
        """
        aligner = aligner_of(self.model)
        if aligner is not None and int(aligner.step) + int(self.skipped) != self.step:
            raise RuntimeError(
                f"{self.step} steps, {int(aligner.step)} counted by the aligner, {int(self.skipped)} skipped"
            )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that the next step depends on, by part; what was drawn depends on the step alone."""
        return {
            "model": plain_state(self.model),
            "ema": plain_state(self.ema),
            "optimizer": {
                f"{i}/{key}": value
                for i, parameter in enumerate(self._trained())
                for key, value in self.optimizer.state[parameter].items()
            },
            "run": {"skipped": self.skipped},
        }

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Goes on from a state."""
        with on(self.stream):
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            trained = self._trained()
            for name, value in state["optimizer"].items():
                number, _, key = name.partition("/")
                self.optimizer.state[trained[int(number)]][key] = value.to(self.device, copy=True)
            self.skipped.copy_(state["run"]["skipped"])
        self.step = step

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _keep_addresses(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Puts new values into the old buffers: compiled code gives a module new ones, and a graph reads the old."""
    for name, new in list(module.named_buffers()):
        if new is not (old := buffers[name]):
            old.copy_(new)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, old)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without gradient."""
    return {name: value.detach() for name, value in module.state_dict().items()}


def advance_together(batches: Sequence[SharedBatch], runs: Sequence[GraphedRun], step: int) -> None:
    """One step of all runs, every run on its own stream and every seed's batch on its own."""
    for shared in batches:
        own = [run for run in runs if run.shared is shared]
        with on(shared.stream):
            wait(shared.stream, [run.stream for run in own])  # the last step has read the batch
            shared.fill(step)
        for run in own:
            with on(run.stream):
                wait(run.stream, [shared.stream])
                run.advance()


def new_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on(stream: "torch.cuda.Stream | None") -> AbstractContextManager[Any]:
    """Makes a stream the current one for a while."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def wait(stream: "torch.cuda.Stream | None", others: Sequence["torch.cuda.Stream | None"]) -> None:
    """What is enqueued from now on waits for what the others have been given so far."""
    for other in others:
        if stream is not None and other is not None:
            stream.wait_stream(other)
