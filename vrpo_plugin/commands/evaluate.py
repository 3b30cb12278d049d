"""``vrpo eval``."""

import argparse
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vrpo_plugin.standalone.evaluation import Evaluation

DESCRIPTION = """\
Measures samples against real images: Frechet distance (FID, sFID), Inception Score, kernel distance (KID), precision
and recall. The result is printed and added to evaluations.jsonl in the samples' folder, with everything that moves it:
solver, steps, guidance, EMA, labels, seed, numbers of images, hashes of the network and of the reference. On several
GPUs: accelerate launch -m vrpo_plugin.cli eval ... gives the same numbers. Example: vrpo eval samples/ --reference
VIRTUAL_imagenet256_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "eval", help="measure samples: FID, sFID, IS, KID, precision, recall", description=DESCRIPTION
    )
    command.set_defaults(run=_eval)
    command.add_argument(
        "samples",
        nargs="?",
        metavar="SAMPLES",
        help="the samples: a folder of images, ADM's .npz file (arr_0 uint8 NHWC), or a file that --save-samples "
        "wrote. What samples.json beside them says of the sampler goes into the results. Left out only with "
        "--save-reference",
    )
    command.add_argument(
        "--reference",
        required=True,
        metavar="REF",
        help="the real images: a folder (with class folders or flat), which are center-cropped to the samples' size "
        "as ADM does; ADM's reference .npz (mu, sigma, mu_s, sigma_s, arr_0, or some of them); or a file that "
        "--save-reference wrote; or the folder of a run of the example, for the images that it was trained on",
    )
    _add_networks(command)
    _add_measure(command)
    _add_files(command)


def _add_networks(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("feature networks (default: torch-fidelity's Inception)")
    group.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of torch-fidelity's Inception, weights-inception-2015-12-05-6726825d.pth; without it they come "
        "from torch's cache or are downloaded there. FID, sFID, IS and KID are of this network",
    )
    group.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NET",
        help="another feature network, in place of Inception (add --inception FILE or --network inception for both); "
        "may be given several times: the file of a small network of ours, or a timm model such as dinov2-vit-b, whose "
        "weights are downloaded, or NAME=FILE with local weights",
    )


def _add_measure(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("measurement")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side to which the reference's images are cropped; needed only without SAMPLES (default: as the samples)",
    )
    group.add_argument(
        "--reference-features",
        type=int,
        default=10_000,
        metavar="N",
        help="real images, evenly spaced, for KID, precision and recall; FID uses them all (default: 10000, as ADM's "
        "files hold)",
    )
    group.add_argument(
        "--k", type=int, default=3, help="neighbours that make the balls of precision and recall (default: 3, as ADM)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images per call of a network, on each process (default: 64)",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=4,
        metavar="N",
        help="processes that read images, for each GPU (default: 4; 0 reads in the main process)",
    )


def _add_files(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("files")
    group.add_argument(
        "--results",
        metavar="FILE",
        help="file to which the results are added, one JSON object per line and network (default: evaluations.jsonl "
        "in the samples' folder; NAME.evaluations.jsonl beside a file of samples)",
    )
    group.add_argument(
        "--baseline",
        metavar="FILE",
        help="results of other samples (evaluations.jsonl, or a run's evaluation.json): prints this Frechet distance "
        "divided by theirs, per network, and the geometric mean; other protocols are refused",
    )
    group.add_argument(
        "--save-reference",
        metavar="FILE",
        help="write what the networks say of the reference to this .safetensors file, to be a --reference that needs "
        "no images",
    )
    group.add_argument(
        "--save-samples",
        metavar="FILE",
        help="write the features of the samples to this .safetensors file, to be SAMPLES without images",
    )


def _eval(*, network: list[str], inception: str | None, **settings: object) -> None:
    from vrpo_plugin.standalone.evaluation import run_evaluation
    from vrpo_plugin.standalone.stamp import EvalSettings

    networks = [*([f"inception={inception}"] if inception is not None else []), *network]
    done = run_evaluation(EvalSettings(networks=tuple(networks), **settings), _print)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # however many processes accelerate launched
        _print_results(done)


def _print(line: str) -> None:
    print(line, flush=True)


def _print_results(done: "Evaluation") -> None:
    for result in done.results:
        protocol = result.protocol
        given = Path(result.origin["network"]).name
        print(f"{protocol.feature_network} ({given}): {protocol.name}")
        inception = protocol.feature_network.startswith("inception-")
        for name, value in result.metrics.items():
            if not name.endswith("_std"):
                spread = result.metrics.get(f"{name}_std")
                deviation = "" if spread is None else f" (standard deviation {spread:.4g})"
                print(f"  {_label(name, inception):<18}{value:.6g}{deviation}")
    if done.results and (unknown := done.results[0].protocol.unknown):
        print(f"unknown, for no samples.json says it: {', '.join(unknown)}")
    for name, ratio in done.ratios.items():
        print(f"Frechet distance / baseline's, {name}: {ratio:.4g}")
    if len(done.ratios) > 1:
        print(f"geometric mean of the ratios: {statistics.geometric_mean(done.ratios.values()):.4g}")
    if done.path is not None:
        print(f"added {len(done.results)} result{'s' * (len(done.results) > 1)} to {done.path}")


def _label(name: str, inception: bool) -> str:
    of_inception = {"frechet_distance": "FID", "spatial_frechet_distance": "sFID", "kernel_distance": "KID"}
    return of_inception[name] if inception and name in of_inception else name.replace("_", " ")
