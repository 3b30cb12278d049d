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
    if spec.encoder != "pixels":
        owner = "its own encoder (--enc-type)" if spec.encoder == "host" else "the tokens of its critic_checkpoint"
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
    selected(spec, options)
