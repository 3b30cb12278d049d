"""One application of VRPO to a host: what the wrapped methods share."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, HostChangedError, HostNotFoundError, explain
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.base import Aligned, HostSpec
from vrpo_plugin.hosts.guard import HostGuard, check_skipped
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.modules.collapse import describe_collapse
from vrpo_plugin.patching.handle import PatchHandle

logger = logging.getLogger("vrpo_plugin")


class Session:
    """State of one application; the module tree of the host holds only the aligner.

    Attributes:
        idle: nothing is changed (``reward_coeff=0`` and ``features="host"``): no aligner is made.
        modules: the host's modules by name, as imported from its folder.
    """

    def __init__(
        self,
        spec: HostSpec,
        config: VRPOConfig,
        options: HostOptions,
        handle: PatchHandle,
        modules: Mapping[str, ModuleType],
    ) -> None:
        _check(spec, config)
        _check_encoder(spec, options)
        self.spec, self.config, self.options, self.handle = spec, config, options, handle
        self.modules = modules
        self.idle = config.reward_coeff == 0 and (
            config.features == "host" or (config.features == "none" and not spec.projects)
        )
        self.guard = HostGuard()
        self.tracker = Tracker(options.log_every if spec.log_key is None else 0, self.guard, options.max_skipped_steps)
        self.targets: Any = None  # of hosts whose encoder we make
        self.total_calls: int | None = None  # of the aligner in this run, where the host says it
        self.earlier_calls = 0  # that a resumed run has made, with an aligner or without
        self.cache: dict[str, Any] = {}  # of the host's own conversion: constants on the device
        self.constructor_fixes: list[Callable[[dict[str, Any]], None]] = []  # of the shims
        self.aligner_parameters: set[int] = set()
        self.model_parameters: set[int] = set()
        self._reported: set[str] = set()

    @property
    def replaces_features(self) -> bool:
        """The host's own alignment loss is not run."""
        return self.config.features != "host"

    @property
    def uses_host_projectors(self) -> bool:
        """The features readout takes the host's projected tokens: one early block, a plain projector."""
        return self.spec.projects and self.config.layers == "early" and self.config.projector == "mlp"

    def install(self, model: nn.Module) -> None:
        """Makes the aligner of a model that its constructor has just finished."""
        if self.idle:
            return
        config = replace(self.config, proj_coeff=0.0) if self.spec.projects else self.config
        if self.total_calls is not None:
            config = config.for_run(self.total_calls)
        sizes = self.spec.sizes(model)
        if self.targets is None and self.spec.needs_encoder:
            from vrpo_plugin.hosts.pixels import load_pixel_targets

            self.targets = load_pixel_targets(self.options, sizes["latent_shape"])
        if self.targets is not None and config.critic_checkpoint is not None:
            sizes["critic_purpose"] = self.targets.critic_purpose()
        if self.targets is not None:
            sizes |= {"target_dims": self.targets.dims, "token_grid": self.targets.grid}
        aligner = HostAligner(
            **sizes,
            own_projectors=not self.uses_host_projectors,
            prefix_tokens=self.spec.prefix_tokens,
            config=config,
            earlier_calls=self.earlier_calls,
        )
        aligner.attach(model, getattr(model, self.spec.blocks))
        self.guard.aligner = aligner
        self.model_parameters |= {id(parameter) for parameter in model.parameters()}
        self.aligner_parameters |= {id(parameter) for parameter in aligner.parameters()}
        self.spec.installed(self, model)
        logger.info(
            "vrpo_plugin: %s: aligner with %s parameters, features=%s on blocks %s, rewards %s",
            self.spec.name,
            f"{sum(p.numel() for p in aligner.parameters()):,}",
            config.features,
            aligner.layers,
            config.rewards if config.reward_coeff else "none",
        )

    def align(self, model: Any, inputs: Mapping[str, Any], x: Tensor, t: Tensor, output: Any) -> Aligned:
        """Calls the aligner of a model that has just given ``output``; runs inside the model's forward."""
        fields = self.spec.convert(inputs, x, t, output)
        out = model.vrpo(inputs["z"], x0=inputs["x0"], y=inputs.get("y"), **fields)
        extra, features, metrics = out.loss, None, out.metrics
        if self.spec.projects and self.replaces_features:
            features = out.release * out.features_loss
            if "z_tilde" in fields and not (self.uses_host_projectors and self.config.features == "policy"):
                # The host's projectors stay in the graph: DDP waits for the gradient of every parameter.
                features = features + 0 * sum(z[:1, :1].sum() for z in fields["z_tilde"])
        if "x0_hat" in fields:
            rms = fields["x0_hat"].detach().float().square().mean().sqrt()
            metrics = {**metrics, "vrpo/norm/x0_hat": rms}
        return Aligned(features, extra, metrics)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """The optimizer updates the model that has the aligner."""
        first = (group["params"][0] for group in optimizer.param_groups if group["params"])
        return any(id(parameter) in self.model_parameters for parameter in first)

    def report(self, name: str, message: str) -> None:
        """Says once that a shim was used."""
        if name not in self._reported:
            self._reported.add(name)
            logger.warning("vrpo_plugin compat %s: %s", name, message)


class Tracker:
    """The newest metrics, copied to the host without waiting for the device.

    Args:
        log_every: calls between lines of text; 0 writes none.
        guard: its counts are logged with them.
        max_skipped_steps: in a row; more end the run.
    """

    def __init__(self, log_every: int = 0, guard: HostGuard | None = None, max_skipped_steps: int = 0) -> None:
        self.log_every, self.calls = log_every, 0
        self.guard, self.max_skipped_steps = guard, max_skipped_steps
        self._names: tuple[str, ...] = ()
        self._values: Tensor | None = None
        self._copied: Any = None
        self._kept: Mapping[str, Tensor] | None = None
        self._warned = False

    def keep(self, metrics: Mapping[str, Tensor]) -> None:
        """As :meth:`record`, for compiled code: nothing is done with them before they are asked for."""
        self._kept = metrics

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Keeps the metrics of one call."""
        if not metrics:  # nothing is measured: no features, no reward
            return
        if self.max_skipped_steps and self.guard is not None:
            metrics = {**metrics, **self.guard.counts(next(iter(metrics.values())).device)}
        if self.log_every and self.calls and self.calls % self.log_every == 0 and is_main_process():
            text = ", ".join(f"{name.removeprefix('vrpo/')}: {value:.4f}" for name, value in self.latest().items())
            logger.info("vrpo (call=%07d) %s", self.calls, text)  # the call before this one: it is long done
        self.calls += 1
        self._names = tuple(metrics)
        packed = torch.stack([value.detach().float() for value in metrics.values()])
        if not packed.is_cuda:
            self._values = packed
            return
        if self._values is None or self._values.shape != packed.shape:
            self._values = torch.empty(packed.shape, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._values.copy_(packed, non_blocking=True)
        self._copied.record()

    def latest(self) -> dict[str, float]:
        """Log name to value, of this process; the copy is over where the host has waited for its own loss."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self.record(kept)
        if self._values is None:
            return {}
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self._names, self._values.tolist(), strict=True))
        check_skipped(values, self.max_skipped_steps)
        if values.get("vrpo/fallback") and not self._warned:
            self._warned = True
            logger.warning("vrpo_plugin: %s", describe_collapse(values["vrpo/fallback"]))
        return values


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _check(spec: HostSpec, config: VRPOConfig) -> None:
    for sharding in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{sharding}", "false").lower() in ("1", "true"):
            raise ConfigError(
                explain(
                    f"accelerate launch: {spec.name}",
                    expected="one process or DDP",
                    got=sharding,
                    do="Choose another distributed_type in the accelerate configuration.",
                )
            )
    default = VRPOConfig()
    owned = {"path_type": "the host's own path"}
    if spec.projects:
        owned["proj_coeff"] = "the host's own --proj-coeff"
    for name, owner in owned.items():
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(
                explain(name, expected=f"unset: {owner} is used", got=getattr(config, name), do="Set it there.")
            )
    if config.features == "host" and not spec.projects:
        raise ConfigError(
            explain(
                "features",
                expected=f"'policy' or 'none': {spec.name} has no alignment loss of its own",
                got="'host'",
                do="With reward_coeff=0 and features='none' nothing is changed.",
            )
        )


def _check_encoder(spec: HostSpec, options: HostOptions) -> None:
    default = HostOptions()
    for name in ("encoder", "encoder_checkpoint"):
        given = getattr(options, name)
        if given != getattr(default, name) and not spec.needs_encoder:
            owner = "its own encoder (--enc-type)" if spec.projects else "the tokens of its critic_checkpoint"
            raise ConfigError(
                explain(name, expected=f"unset: {spec.name} trains with {owner}", got=repr(given), do="Set it there.")
            )


def never_fired(spec: HostSpec, what: str) -> HostChangedError:
    """The error of a patch that changes nothing."""
    return HostChangedError(
        explain(
            f"{spec.name}: {what}",
            expected="the patched loss to call the patched model",
            got="a training step that went round the patch",
            do="Run 'vrpo check' on the checkout; 'reward_coeff=0 features=host' trains without VRPO.",
        )
    )


def made_before(spec: HostSpec) -> HostNotFoundError:
    """The error of a model whose constructor ran before it was wrapped."""
    return HostNotFoundError(
        explain(
            f"{spec.name}: {spec.model_class}",
            expected="a model made after VRPO was applied",
            got="one without an aligner",
            do="Apply below the imports of the script, before its model is made.",
        )
    )
