"""Settings of an application that are not the objective's, and where all settings come from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vrpo_plugin.config import VRPOConfig, check_keys
from vrpo_plugin.errors import ConfigError
from vrpo_plugin.settings import read_mapping

PREFIX = "VRPO_"
DEFAULT_ENCODER = "dinov2-vit-b"
NOT_SETTINGS = {"VRPO_CONFIG", "VRPO_HOST", "VRPO_HOSTS_DIR"}


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """How VRPO is applied to a host.

    Attributes:
        encoder: timm's or REPA's name of the frozen encoder, for hosts that have none (SiT, DiT); several are joined
            by commas; None is ``dinov2-vit-b``.
        encoder_checkpoint: its local weights, as many as names; None takes timm's, from the local cache or by download.
        compat: workarounds for upstream breakages: ``all``, ``none``, or their names.
        log_every: training calls between lines of text, where the host has no tracker to log to.
        max_skipped_steps: optimizer steps whose gradients are not finite are left out; more than so many in a row end
            the run. 0 leaves the optimizer alone.
        fused_optimizer: make the optimizer fused: a step that is not finite is then left out without waiting for the
            device, and its numbers are rounded otherwise. False leaves it as the host made it.
        compile: ``torch.compile`` the aligner: a quarter to a third of its kernels, after compiling in the first steps.
            Where launching kernels is what a step waits for.
        allow_unverified: accept a host whose code differs from the verified commits, and parameters with defaults that
            it has added; not another signature.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    encoder: str | None = None
    encoder_checkpoint: str | None = None
    compat: str | tuple[str, ...] = "all"
    log_every: int = 100
    max_skipped_steps: int = 100
    fused_optimizer: bool = False
    compile: bool = False
    allow_unverified: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.compat, str) and self.compat not in ("all", "none"):
            object.__setattr__(self, "compat", (self.compat,))
        if isinstance(self.compat, list):
            object.__setattr__(self, "compat", tuple(self.compat))
        self._check_encoder()
        for name in ("allow_unverified", "fused_optimizer", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, expected="True or False", got=repr(getattr(self, name)), do="Correct it.")
        for name in ("log_every", "max_skipped_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(name, expected="an int >= 0", got=repr(value), do="Correct it.")

    def _check_encoder(self) -> None:
        for name in ("encoder", "encoder_checkpoint"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, os.PathLike)):
                several = value if isinstance(value, (list, tuple)) else [value]
                object.__setattr__(self, name, ",".join(map(str, several)))
            elif not isinstance(value, str) and value is not None:
                expected, do = "a name, or several joined by commas", "Correct it."
                raise ConfigError(name, expected=expected, got=repr(value), do=do)


OPTION_KEYS = frozenset(f.name for f in fields(HostOptions))
CONFIG_KEYS = frozenset(f.name for f in fields(VRPOConfig))
KEYS = OPTION_KEYS | CONFIG_KEYS
FLAGS = frozenset(f.name for f in (*fields(VRPOConfig), *fields(HostOptions)) if isinstance(f.default, bool))
TEXTS = {"encoder", "encoder_checkpoint", "critic_checkpoint"}


def resolve_settings(
    given: Mapping[str, Any] | None = None,
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[VRPOConfig, HostOptions]:
    """One configuration from all sources: what is given goes before the environment, that before the file.

    Args:
        given: keys of :class:`VRPOConfig` and :class:`HostOptions`; text is parsed as in the environment.
        file: YAML or JSON mapping; by default the file that ``VRPO_CONFIG`` names. Text in it is parsed too, for YAML
            reads ``1e-8`` as text.
        environ: ``VRPO_<KEY>`` variables; by default the process's.

    Raises:
        ConfigError: an unknown key (the nearest and the source are named), a bad value, a file that is not such a
            mapping.
    """
    environ = os.environ if environ is None else environ
    file = file or environ.get("VRPO_CONFIG")
    variables = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(PREFIX) and key not in NOT_SETTINGS and not key.startswith("VRPO_TEST_")
    }
    settings: dict[str, Any] = {}
    for source, values in (
        (file, read_mapping(file, "a YAML or JSON mapping of VRPO settings") if file else {}),
        ("environment", variables),
        ("given", given or {}),
    ):
        check_keys(values, KEYS, subject=f"{source}: VRPO setting")
        settings |= {key: parse_setting(key, value) for key, value in values.items()}
    if isinstance(settings.get("rewards"), str):
        settings["rewards"] = (settings["rewards"],)
    if isinstance(settings.get("layers"), int):
        settings["layers"] = (settings["layers"],)
    config = VRPOConfig.from_dict({key: value for key, value in settings.items() if key in CONFIG_KEYS})
    return config, HostOptions(**{key: value for key, value in settings.items() if key in OPTION_KEYS})


def parse_setting(key: str, value: Any) -> Any:
    """A value from any source. Names and paths stay as they are written: they may hold commas and equals signs."""
    if not isinstance(value, str):
        return value
    if key in TEXTS:
        return None if value.strip().lower() in ("", "none", "null") else value.strip()
    value = parse_value(value)
    return bool(value) if key in FLAGS and value in (0, 1) else value


def parse_value(text: str) -> Any:
    """A setting written as text: ``0.8``, ``true``, ``none``, ``a,b``, ``a=0.5,b=0.5``, JSON, or a plain word."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    words = {"true": True, "false": False, "none": "none", "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    if "=" in text:
        pairs = [part.partition("=") for part in text.split(",")]
        return {name.strip(): parse_value(value) for name, _, value in pairs}
    if "," in text:
        return [parse_value(part.strip()) for part in text.split(",") if part.strip()]
    return text.strip()
