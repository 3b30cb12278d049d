"""``vrpo cache-features``."""

import argparse
import os
from typing import Any


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command; ``wanted``: its options are torch's to import, which the other commands do without."""
    command = commands.add_parser(
        "cache-features",
        help="store a frozen encoder's tokens of a whole data set",
        description="Stores a frozen encoder's tokens of every image of a data set, and of its mirror image, so that "
        "no encoder runs in the training step (docs/feature-cache.md). On several GPUs: accelerate launch -m "
        "vrpo_plugin.cli cache-features ... The same command again goes on with a run that was cut; another encoder "
        "or data set is refused.",
    )
    command.set_defaults(run=_cache_features)
    if not wanted:
        return
    from vrpo_plugin.standalone.cache_features import CacheSettings, option_texts

    texts = option_texts()
    command.add_argument("data", metavar="DATA", help=texts["data"])
    command.add_argument("--output", "-o", metavar="DIR", required=True, help=texts["output"])
    command.add_argument("--encoder", metavar="NAME", required=True, help=texts["encoder"])
    command.add_argument("--encoder-checkpoint", metavar="FILE", help=texts["encoder_checkpoint"])
    flips = {"action": argparse.BooleanOptionalAction, "default": CacheSettings.flips}
    command.add_argument("--flips", **flips, help=texts["flips"])  # type: ignore[arg-type]
    for name in ("resolution", "pca", "batch_size", "num_workers", "shard_images"):
        flag = "--" + name.replace("_", "-")
        value = getattr(CacheSettings, name)
        command.add_argument(flag, type=int, metavar="N", default=value, help=texts[name])


def _cache_features(**settings: Any) -> None:
    from vrpo_plugin.standalone.cache_features import CacheSettings, cache_features

    result = cache_features(CacheSettings(**settings))
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes accelerate launched
        print(
            f"{settings['output']}: {result['bytes']:,} bytes in {len(result['shards'])} files, {result['new']} of "
            f"them new; mean cosine to the original {result['cosine']:.5f}"
        )
