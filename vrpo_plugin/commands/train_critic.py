"""``vrpo train-critic``."""

import argparse
import os


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, wanted: bool) -> None:
    """Adds the command; ``wanted``: its options are torch's to import, which the other commands do without."""
    command = commands.add_parser(
        "train-critic",
        help="pretrain a critic",
        description="Pretrains a critic from images or REPA's cached latents and a frozen encoder. On several GPUs: "
        "accelerate launch -m vrpo_plugin.cli train-critic ... SIGTERM, SIGINT and SIGUSR1 end it with a checkpoint, "
        "and --resume goes on. Use the critic by critic_checkpoint=, frozen by critic_trainable=False.",
    )
    command.set_defaults(run=_train_critic)
    if not wanted:
        return
    from vrpo_plugin.settings import add_flags
    from vrpo_plugin.standalone.train_critic import CriticTraining

    add_flags(command, CriticTraining)


def _train_critic(**settings: object) -> None:
    from vrpo_plugin.standalone.train_critic import CriticTraining, train_critic

    record = train_critic(CriticTraining(**settings))  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes accelerate launched
        print(f"wrote {record['output']}: mean cosine {record['held_out_cosine']:.4f} on held-out images")
