"""Options of the example: dataclass defaults < YAML recipe < what the method means < command line."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vrpo_plugin import ConfigError, VRPOConfig
from vrpo_plugin.config import check_keys
from vrpo_plugin.settings import add_flags, check_kinds, convert, read_mapping
from vrpo_plugin.standalone.evaluate import EvalProtocol
from vrpo_plugin.standalone.targets import SMALL

DIGITS_RECIPE = Path(__file__).parent / "recipes" / "digits.yaml"

EVAL_SEED = 1  # of the evaluated samples' noise; the grids have another

# What makes a run this method; everything else of the objective stays adjustable.
METHODS: dict[str, dict[str, Any]] = {
    "vrpo": {},
    "repa": {"features": "policy", "reward_coeff": 0.0},
    "irepa": {"features": "policy", "reward_coeff": 0.0, "projector": "conv", "target_norm": "spatial"},
    "none": {"features": "none", "reward_coeff": 0.0},
}

# What a method's own recipe sets, where nothing else is said. Source: End2End-Diffusion/iREPA@99ad4ac:ldm/configs.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"irepa": {"proj_coeff": 1.0}}


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class TrainOptions:
    """Everything but the objective. Names are REPA's where REPA has them."""

    method: Literal["vrpo", "repa", "irepa", "none"] = _option("vrpo", "what aligns the transformer")
    output_dir: str = _option("exps", "folder of all runs")
    exp_name: str | None = _option(None, "folder of this run; by default DATA-METHOD-SEED")
    resume: bool = _option(False, "go on from the newest complete checkpoint of this run, or start")
    resume_step: int | None = _option(
        None, "with --resume: from this step's checkpoint, for instance as the newest is damaged"
    )
    report_to: str = _option("none", "none, wandb, tensorboard, ... (through accelerate)")

    model: str = _option("SiT-B/2", "SiT-XL/2 ... SiT-S/8, SiT-Ti/1, SiT-Ti/2")
    qk_norm: bool = _option(False, "normalise queries and keys")
    gradient_checkpointing: bool = _option(False, "recompute blocks in the backward pass")

    data_dir: str | None = _option(
        None, "image folder, npz file of images and labels, or REPA's layout; None: scikit-learn's digits"
    )
    resolution: int = _option(256, "side in pixels of the images")
    flip_prob: float = _option(0.0, "chance of a horizontal flip (stored latents are never flipped)")
    vae: str | None = _option(None, "diffusers folder or name of the SD-VAE, to decode REPA's latents")
    num_workers: int = _option(4, "data loader processes per rank")

    enc_type: str = _option("dinov2-vit-b", "encoder(s), comma-separated: REPA's or timm's names, or small")
    enc_checkpoint: str | None = _option(None, "local weights file(s) of the encoder(s), comma-separated")
    features_dir: str | None = _option(
        None, "folder that 'vrpo cache-features' wrote for this data: its tokens are the targets, and no encoder runs"
    )
    encoder_depth: int | None = _option(None, "aligned block, 1-based; None: the model's own")

    batch_size: int = _option(256, "samples per micro step over all processes, as in REPA")
    max_train_steps: int = _option(400_000, "optimizer steps")
    gradient_accumulation_steps: int = _option(1, "micro steps per optimizer step")
    learning_rate: float = _option(1e-4, "of AdamW, constant")
    critic_learning_rate: float | None = _option(None, "of the critic; None: learning_rate")
    adam_beta1: float = _option(0.9, "")
    adam_beta2: float = _option(0.999, "")
    adam_weight_decay: float = _option(0.0, "")
    adam_epsilon: float = _option(1e-8, "")
    max_grad_norm: float = _option(1.0, "gradient-norm clipping; the critic is clipped by itself")
    max_skipped_steps: int = _option(100, "steps in a row that may be left out as their gradients are not finite")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "None: what accelerate launch says, else no")
    allow_tf32: bool = _option(False, "TF32 matrix products on Ampere and later")
    ema_decay: float = _option(0.9999, "with a warm-up, min(decay, (1 + step) / (10 + step))")
    seed: int = _option(0, "of everything random")
    deterministic: bool = _option(False, "GPU kernels that give the same bits twice")
    cfg_prob: float = _option(0.1, "share of samples without label")
    weighting: Literal["uniform", "lognormal"] = _option("uniform", "distribution of t")

    checkpointing_steps: int = _option(50_000, "steps between checkpoints")
    keep_last: int | None = _option(None, "how many checkpoints to keep; None: all")
    sampling_steps: int = _option(10_000, "steps between sample grids; 0: none")
    flush_steps: int = _option(50, "at most so many steps (and about 5 s) between writes of metrics.jsonl")

    eval_samples: int = _option(0, "samples of the Frechet distance at the end; 0: none")
    eval_network: str = _option("small", "its network: small (trained on the images), or a timm name")
    eval_checkpoint: str | None = _option(None, "local weights file of that network")
    solver: Literal["euler", "heun", "euler_maruyama"] = _option("euler", "sampler")
    solver_steps: int = _option(50, "its steps")
    cfg_scale: float = _option(1.0, "guidance scale of grids and evaluation")
    guidance_low: float = _option(0.0, "guidance from this t")
    guidance_high: float = _option(1.0, "guidance up to this t")

    def __post_init__(self) -> None:
        check_kinds(self)
        counts = ("batch_size", "max_train_steps", "gradient_accumulation_steps", "resolution", "encoder_depth")
        counts_of_output = ("checkpointing_steps", "keep_last", "flush_steps", "solver_steps")
        rates = ("learning_rate", "critic_learning_rate", "max_grad_norm", "adam_epsilon")
        for name in (*counts, *counts_of_output, *rates):
            self._check(name, lambda value: value > 0, "> 0")
        for name in ("sampling_steps", "num_workers", "max_skipped_steps", "adam_weight_decay", "seed"):
            self._check(name, lambda value: value >= 0, ">= 0")
        for name in ("flip_prob", "cfg_prob", "ema_decay"):
            self._check(name, lambda value: 0 <= value <= 1, "in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            self._check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        self._check("cfg_scale", lambda value: value >= 1, ">= 1, which is no guidance")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            got = f"{self.guidance_low} and {self.guidance_high}"
            expected = "0 <= guidance_low <= guidance_high <= 1"
            raise ConfigError("guidance_low, guidance_high", expected=expected, got=got, do="Correct them.")
        if self.cfg_scale > 1 and self.cfg_prob == 0:
            do = "Take --cfg-scale 1, or train some samples without label."
            raise ConfigError("cfg_prob", expected=f"> 0 with cfg_scale={self.cfg_scale}", got=0, do=do)
        neighbours = EvalProtocol.k
        self._check("eval_samples", lambda value: value == 0 or value > neighbours, f"0, or more than {neighbours}")
        if self.eval_checkpoint is not None and self.eval_network == SMALL:
            do = "Name the network that the file belongs to as --eval-network."
            raise ConfigError("eval_checkpoint", expected=f"None with {SMALL}", got=self.eval_checkpoint, do=do)
        if self.resume_step is not None and (self.resume_step < 1 or not self.resume):
            got = f"{self.resume_step} {'with' if self.resume else 'without'} --resume"
            raise ConfigError("resume_step", expected=">= 1, with --resume", got=got, do="Correct it.")

    def _check(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ConfigError(name, expected=expected, got=value, do="Correct it.")

    def protocol(self, feature_network: str, num_reference: int, reference: str = "") -> EvalProtocol:
        """What the evaluation at the end of the run will have done."""
        return EvalProtocol(
            solver=self.solver,
            num_steps=self.solver_steps,
            num_samples=self.eval_samples,
            feature_network=feature_network,
            reference=reference,
            num_reference=num_reference,
            guidance_scale=self.cfg_scale,
            guidance_interval=(self.guidance_low, self.guidance_high),
            ema=self.ema_decay,
            seed=EVAL_SEED,
        )

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        data = Path(self.data_dir).name if self.data_dir else "digits"
        return self.exp_name or f"{data}-{self.method}-seed{self.seed}"


# What may differ between a run and its resumption: none of it changes a number that is trained. (The length of the
# schedules, which is the run's where it is not given, is no such thing: give it to go on beyond the run's first end.)
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "resume_step",
        "output_dir",
        "exp_name",
        "report_to",
        "num_workers",
        "data_dir",
        "enc_checkpoint",
        "features_dir",
        "vae",
    }
    | {"features_dir"}  # what it holds is compared by itself
    | {"max_train_steps", "max_skipped_steps", "checkpointing_steps", "keep_last", "sampling_steps", "flush_steps"}
    | {"eval_samples", "eval_network", "eval_checkpoint", "fallback", "deterministic"}
    | {"solver", "solver_steps", "cfg_scale", "guidance_low", "guidance_high"}
)


def parse_options(argv: Sequence[str] | None = None) -> tuple[TrainOptions, VRPOConfig]:
    """Reads the command line and the recipe.

    Without ``--config`` and ``--data-dir`` the digits recipe is used.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    parser = argparse.ArgumentParser(
        description="Trains SiT with VRPO, REPA, iREPA or no alignment.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML recipe; keys are the options below, with _ or -")
    for group_name, owner in (("training", TrainOptions), ("objective", VRPOConfig)):
        add_flags(parser.add_argument_group(group_name), owner)
    known, unknown = parser.parse_known_args(argv)
    own = {f.name for f in fields(TrainOptions)}
    flags = [text.split("=")[0].lstrip("-").replace("-", "_") for text in unknown if text.startswith("--")]
    check_keys(flags, own | {f.name for f in fields(VRPOConfig)}, subject="command line")
    if unknown:
        parser.error(f"unexpected: {' '.join(unknown)}")
    given = vars(known)
    recipe = given.pop("config", None)
    if recipe is None and "data_dir" not in given:
        recipe = str(DIGITS_RECIPE)
    values = read_recipe(recipe) if recipe else {}
    method = given.get("method", values.get("method", TrainOptions.method))
    if method not in METHODS:
        raise ConfigError("method", expected=f"one of {tuple(METHODS)}", got=method, do="Choose one.")
    # A method on the command line is what a recipe of another one becomes; beside it, nothing may contradict it.
    _check_method(method, given if "method" in given else {**values, **given})
    values = {**METHOD_DEFAULTS.get(method, {}), **values, **METHODS[method], **given}
    values["mixed_precision"] = _mixed_precision(values.get("mixed_precision"))
    options = TrainOptions(**{k: v for k, v in values.items() if k in own})
    config = VRPOConfig(**{k: v for k, v in values.items() if k not in own}).for_run(options.max_train_steps)
    if method == "vrpo" and config.reward_coeff == 0:
        do = "Take --method repa, irepa or none for a run without rewards."
        raise ConfigError("reward_coeff", expected="> 0 with method vrpo", got=config.reward_coeff, do=do)
    if options.features_dir is not None and config.targets == "critic":
        do = "Take one of the two: --targets critic needs no encoder's tokens."
        raise ConfigError("features_dir", expected="None with targets='critic'", got=options.features_dir, do=do)
    if options.encoder_depth is not None and config.layers != "early":
        do = "Leave one of the two out."
        raise ConfigError("layers", expected="early with encoder_depth", got=repr(config.layers), do=do)
    if config.features == "host":
        do = "That setting is for loops that bring a loss of their own."
        raise ConfigError("features", expected="not 'host' in this trainer", got="'host'", do=do)
    return options, config


def _check_method(method: str, given: Mapping[str, Any]) -> None:
    for name, value in METHODS[method].items():
        if given.get(name, value) != value:
            do = "Leave it out, or take --method vrpo."
            raise ConfigError(name, expected=f"{value!r} with method {method}", got=repr(given[name]), do=do)


def _mixed_precision(option: Any) -> Any:
    """The option, or what ``accelerate launch`` was told: it says "no" where it was told nothing."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if option is None or launched in ("no", option):
        return launched if option is None else option
    do = "Say it in one of the two places."
    expected = f"{launched}, as accelerate launch says"
    raise ConfigError("mixed_precision", expected=expected, got=repr(option), do=do)


def read_recipe(path: str) -> dict[str, Any]:
    """A YAML recipe, with ``-`` in keys read as ``_``.

    Raises:
        ConfigError: the file is missing, no mapping, or holds an unknown key or a value of another type.
    """
    values = {key.replace("-", "_"): value for key, value in read_mapping(path, "a YAML recipe").items()}
    hints = get_type_hints(TrainOptions) | get_type_hints(VRPOConfig)
    check_keys(values, hints, subject=path)
    return {key: convert(value, hints[key], f"{path}: {key}") for key, value in values.items()}


def to_dict(options: TrainOptions, config: VRPOConfig) -> dict[str, Any]:
    """The resolved configuration, as config.json holds it and ``--config`` reads it."""
    return asdict(options) | config.to_dict()
