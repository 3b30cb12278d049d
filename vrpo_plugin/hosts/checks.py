"""What an application refuses before it replaces anything: settings that a host cannot serve."""

import os

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.compat import selected
from vrpo_plugin.hosts.options import HostOptions


def changes_nothing(spec: HostSpec, config: VRPOConfig) -> bool:
    """No aligner is made: the host's own code computes every number."""
    return config.reward_coeff == 0 and (
        config.features == "host" or (config.features == "none" and not spec.has_alignment_loss)
    )


def check_settings(spec: HostSpec, config: VRPOConfig, options: HostOptions) -> None:
    """Compares settings with a host.

    Raises:
        ConfigError: the host has such a setting itself, or cannot serve it.
    """
    for sharding in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{sharding}", "false").lower() in ("1", "true"):
            raise ConfigError(
                f"accelerate launch: {spec.name}",
                expected="one process or DDP",
                got=sharding,
                do="Choose another distributed_type in the accelerate configuration.",
            )
    owned = {"path_type": "the host's own path is used"}
    if spec.has_alignment_loss:
        owned["proj_coeff"] = "the host's own --proj-coeff is used"
    default = VRPOConfig()
    found = [(name, getattr(config, name), why) for name, why in owned.items()]
    found = [(name, given, why) for name, given, why in found if given != getattr(default, name)]
    of_critic = "critic" in (spec.encoder, config.targets)
    if spec.encoder != "pixels" or of_critic:
        owner = "the tokens of its critic_checkpoint" if of_critic else "its own encoder (--enc-type)"
        why = f"{spec.name} trains with {owner}"
        given = {"encoder": options.encoder, "encoder_checkpoint": options.encoder_checkpoint}
        found += [(name, repr(value), why) for name, value in given.items() if value is not None]
    for name, value, why in found:
        raise ConfigError(name, expected=f"unset: {why}", got=value, do="Set it there.")
    if config.features == "host" and not spec.has_alignment_loss:
        raise ConfigError(
            "features",
            expected=f"'policy' or 'none': {spec.name} has no alignment loss of its own",
            got="'host'",
            do="With reward_coeff=0 and features='none' nothing is changed.",
        )
    if config.targets == "critic" and spec.encoder == "host":
        _check_without_encoder(spec, config)
    selected(spec, options)


def _check_without_encoder(spec: HostSpec, config: VRPOConfig) -> None:
    why = "" if spec.encoder_loader is not None else spec.needs_encoder
    if config.features == "host":
        why = "with features='host' its own alignment loss needs the encoder's tokens"
    if why:
        do = "Set targets=encoder (VRPO_TARGETS=encoder), which is the default."
        raise ConfigError("targets", expected=f"'encoder': {spec.name}: {why}", got="'critic'", do=do)
