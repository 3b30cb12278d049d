"""How long a host's run is, for the schedules."""

import argparse
from collections.abc import Sequence
from functools import wraps
from typing import Any

from vrpo_plugin.hosts.session import Session
from vrpo_plugin.patching.handle import Seam


def parsed_length(session: Session) -> Sequence[Seam]:
    """``--max-train-steps`` of REPA and its relatives, as their parser reads it.

    The aligner counts its calls there: as many per step as gradients are accumulated.
    """

    def wrap(original: Any) -> Any:
        @wraps(original)
        def parse_args(self: Any, *args: Any, **kwargs: Any) -> Any:
            parsed = original(self, *args, **kwargs)
            steps = getattr(parsed, "max_train_steps", None)
            if steps:
                calls = getattr(parsed, "gradient_accumulation_steps", 1)
                session.total_calls = steps * calls
                session.earlier_calls = (getattr(parsed, "resume_step", None) or 0) * calls
            return parsed

        return parse_args

    return [Seam(argparse.ArgumentParser, "parse_args", wrap, "argparse.ArgumentParser.parse_args")]
