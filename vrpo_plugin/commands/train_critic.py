"""``vrpo train-critic``."""

import argparse
import os
from dataclasses import MISSING, fields


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command; ``wanted``: its options are torch's to import, which the other commands do without."""
    command = commands.add_parser(
        "train-critic",
        help="pretrain a critic",
        description="Pretrains a critic from images or REPA's cached latents and a frozen encoder. On several GPUs: "
        "accelerate launch -m vrpo_plugin.cli train-critic ... Use it by critic_checkpoint=, frozen by "
        "critic_trainable=False.",
    )
    command.set_defaults(run=_train_critic)
    if not wanted:
        return
    from vrpo_plugin.standalone.train_critic import CriticTraining

    for f in fields(CriticTraining):
        kind = {int: int, float: float}.get(f.type, str)  # type: ignore[arg-type]
        required = f.default is MISSING
        text = "file to write" if required else f"default: {f.default}"
        command.add_argument(
            "--" + f.name.replace("_", "-"),
            type=kind,
            required=required,
            default=None if required else f.default,
            help=text,
        )


def _train_critic(**settings: object) -> None:
    from vrpo_plugin.standalone.train_critic import CriticTraining, train_critic

    record = train_critic(CriticTraining(**settings))  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes accelerate launched
        print(f"wrote {record['output']}: mean cosine {record['held_out_cosine']:.4f} on held-out images")
