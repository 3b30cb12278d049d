"""The subcommands of ``vrpo``, one file each; ``add`` describes it to argparse."""
