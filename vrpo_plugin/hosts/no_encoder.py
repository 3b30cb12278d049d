"""``targets="critic"`` in a host: its own encoder is neither loaded nor run."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.encoders import Targets
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.hosts.base import HostSpec, Session
from vrpo_plugin.hosts.pixels import read_critic_targets
from vrpo_plugin.patching.handle import Seam

logger = logging.getLogger("vrpo_plugin")


@dataclass(frozen=True)
class NoEncoder:
    """What a host's script touches of an encoder that is not there.

    Attributes:
        embed_dim: D of its tokens.
    """

    embed_dim: int


def no_encoders(dims: Sequence[int]) -> tuple[list[NoEncoder], list[str], list[str]]:
    """What stands for the result of REPA's ``load_encoders``: sizes, and no types for its loop to run over."""
    return [NoEncoder(dim) for dim in dims], [], []


def settle(spec: HostSpec, config: VRPOConfig) -> tuple[HostSpec, VRPOConfig, Targets | None]:
    """Host, objective and targets where a critic's tokens are the targets; elsewhere as they are, and None.

    Raises:
        ConfigError: a host without images lacks a pretrained, frozen critic.
        CheckpointError: its file is missing or damaged.
    """
    if "critic" not in (spec.encoder, config.targets):
        return spec, config, None
    targets = read_critic_targets(config, spec.name)
    if spec.encoder_loader is not None:
        spec = replace(spec, verified=(*spec.verified, spec.encoder_loader))
    return spec, replace(config, targets="critic"), targets


def loader_seams(session: Session) -> list[Seam]:
    """The host's function that loads encoders, in its module and in a script that has imported it already."""
    loader = session.spec.encoder_loader
    if loader is None or session.idle or session.config.targets != "critic":
        return []
    module = session.modules[loader.file]
    script = sys.modules["__main__"]
    owners = [module, *([script] if vars(script).get(loader.name) is getattr(module, loader.name) else [])]
    return [Seam(owner, loader.name, _wrap(session, loader.name), loader.name) for owner in owners]


def check_not_loaded(session: Session) -> None:
    """Refuses a script that has loaded its encoders all the same; to be called when its model is made.

    Raises:
        ConfigError: so it has.
    """
    loader = session.spec.encoder_loader
    if session.config.targets == "critic" and loader is not None and not session.handle.fired[loader.name]:
        raise ConfigError(
            "targets",
            expected=f"{loader.name} of {loader.file} to be called after VRPO was applied, with targets='critic'",
            got="a model that was made without it",
            do="Apply above the script's import of it, or set targets='encoder'.",
        )


def _wrap(session: Session, name: str) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        @wraps(original)
        def load_encoders(*args: Any, **kwargs: Any) -> Any:
            session.handle.fire(name)
            assert session.targets is not None  # read when VRPO was applied
            wanted = args[0] if args else next(iter(kwargs.values()), "")
            logger.info(
                "vrpo_plugin: %s: targets=critic: the encoder %s is neither loaded nor run; tokens of %s channels come "
                "from %s, which was trained for %s",
                *(session.spec.name, wanted, session.targets.dims, session.config.critic_checkpoint),
                session.targets.taught or "an encoder that its file does not name",
            )
            return no_encoders(session.targets.dims)

        return load_encoders

    return wrap
