"""``vrpo sample``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

SOLVERS = ("euler", "heun", "euler_maruyama")
FORMATS = ("folder", "grid", "npz")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "sample",
        help="make images with a trained model",
        description="Makes images with a trained model: a run of examples/train_repa_vrpo.py, a checkpoint of REPA's "
        "or SiT's training script, or a file of weights. On several GPUs: accelerate launch -m vrpo_plugin.cli sample "
        "...; the images are the same on any number of processes. After an interruption the same command goes on.",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CKPT",
        help="a run's folder; one of its checkpoints; a .pt file of REPA's or SiT's training script (read without "
        "running code from it); or a .safetensors file of weights",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write: new, empty, or with samples of the same settings, which are kept",
    )
    _add_what(command.add_argument_group("which weights"))
    _add_images(command.add_argument_group("which images"))
    _add_how(command.add_argument_group("how they are sampled"))
    command.set_defaults(run=_sample)


def _add_what(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="how the model was built, where the weights do not say it: a run's config.json, or a YAML or JSON file "
        "with model (such as SiT-XL/2) and resolution (in pixels), and cfg_prob and path_type where they are not 0.1 "
        "and linear",
    )
    group.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of a run's folder; by default the newest complete one"
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--ema", dest="ema", action="store_true", default=True, help="the averaged weights (the default)"
    )
    weights.add_argument("--raw", dest="ema", action="store_false", help="the weights of the last step, not averaged")
    group.add_argument(
        "--vae",
        metavar="FILE",
        help="for models of latents: folder of a diffusers AutoencoderKL (the SD-VAE), or its name where diffusers "
        "has it or can download it",
    )


def _add_images(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--num", type=int, default=100, metavar="N", help="how many images, over all processes (default: 100)"
    )
    group.add_argument(
        "--format",
        nargs="+",
        default=["folder", "grid"],
        choices=FORMATS,
        metavar="FORMAT",
        help="what to write, one or several of: folder (DIR/000000.png, ...), grid (DIR.png beside the folder, a "
        "picture of the first 100), npz (DIR/samples.npz, which ADM's evaluation reads: arr_0 uint8 NHWC, arr_1 "
        "labels). By default folder and grid",
    )
    group.add_argument(
        "--labels",
        default="balanced",
        metavar="WHICH",
        help="balanced (all classes in turn, the default), random (drawn with the seed), or class numbers such as "
        "207,360, in turn",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the noise and of random labels (default: 0)"
    )


def _add_how(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--solver",
        default="euler",
        choices=SOLVERS,
        help="euler (the default) or heun for the ODE; euler_maruyama for the SDE",
    )
    group.add_argument("--steps", type=int, default=50, metavar="N", help="solver steps (default: 50)")
    group.add_argument(
        "--cfg",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="classifier-free guidance, at two model calls a step; 1 is none (the default)",
    )
    _add_interval(group, "--cfg-interval", "times at which it acts")
    group.add_argument(
        "--guide",
        type=Path,
        metavar="FILE",
        help="guide.safetensors: the critic guides the sampling, at one model call a step. A run with a critic writes "
        "the file at its end; for a run without one, such as plain REPA's, give the file of 'vrpo train-critic'",
    )
    group.add_argument(
        "--guide-strength",
        type=float,
        metavar="S",
        help="of the guide; 0 is none. By default the guide's own",
    )
    _add_interval(group, "--guide-interval", "times at which the guide acts", default=None)
    group.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images per process and model call (default: 64); more is faster until memory ends",
    )
    group.add_argument(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="precision of the model's matrix products; by default what accelerate launch says, else no",
    )


def _add_interval(
    group: "argparse._ArgumentGroup", name: str, text: str, default: tuple[float, float] | None = (0.0, 1.0)
) -> None:
    end = "By default 0 1, always" if default else "By default the guide's own"
    help = f"{text}, from 0 (data) to 1 (noise). {end}"
    group.add_argument(name, type=float, nargs=2, default=default, metavar=("LOW", "HIGH"), help=help)


def _sample(source: Path, config: Path | None, step: int | None, ema: bool, **options: Any) -> None:
    from vrpo_plugin.standalone.sample_images import SampleSettings, sample_images

    names = {"format": "formats", "steps": "num_steps", "cfg": "guidance_scale", "cfg_interval": "guidance_interval"}
    settings: dict[str, Any] = {
        names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
    checked = SampleSettings(**settings)  # before weights of gigabytes are read
    trained = _open(source, config, step, ema)
    first = os.environ.get("RANK", "0") == "0"  # one line, however many processes accelerate launched
    if first:
        print(trained.describe(), flush=True)
    try:
        written = sample_images(trained, checked)
    except KeyboardInterrupt:
        if first:
            print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    if first:
        print(f"wrote {checked.num} images: {', '.join(map(str, written))}")


def _open(source: Path, config: Path | None, step: int | None, ema: bool) -> Any:
    from vrpo_plugin.standalone.trained import build_trained, open_trained, read_config

    if source.suffix not in (".pt", ".pth", ".ckpt") or step is not None:
        return open_trained(source, config=config, ema=ema, step=step)
    from vrpo_plugin.hosts.checkpoint import read_weights
    from vrpo_plugin.standalone.checkpoint import file_sha256

    weights, arguments, found = read_weights(source, ema=ema)
    settings = {**arguments, **(read_config(config) if config else {})}
    return build_trained(weights, settings, source, ema=ema, step=found, sha256=file_sha256(source))
