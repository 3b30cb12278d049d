"""Random calls of the package: each is computed as documented, or refused with one of its own errors."""

import faulthandler
import gc
import logging
import math
import time
import warnings
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from fuzz.aligner import ALIGNER
from fuzz.draws import Property
from fuzz.functional import FUNCTIONAL
from fuzz.part import Part
from fuzz.refusals import REFUSALS

PROPERTIES: dict[str, Property] = {**FUNCTIONAL, **REFUSALS, **ALIGNER}
CHUNK = 500  # calls between two counts of the tensors that are alive
SECONDS = 30.0  # that no call may take
HANGS = 1800.0  # seconds after which a chunk is a hang: the process then says where, and ends


def calls(output: Path, count: int, seed: int) -> Part:
    """Calls the package with what hypothesis draws, and checks a property of each call, not only that it returns.

    A property that fails once is not called any more; its smallest failing case is the failure's text. Nothing may be
    left alive by the calls.

    Args:
        output: nothing is written there.
        count: calls in all, shared out among the properties.
        seed: of the draws.
    """
    part, shares = Part("random calls"), sum(prop.share for prop in PROPERTIES.values())
    logging.disable(logging.WARNING)  # what is odd would be said ten thousand times
    warnings.filterwarnings("ignore", "vrpo_plugin: a batch of one sample")
    for number, (name, prop) in enumerate(PROPERTIES.items()):
        began = time.perf_counter()
        budget = math.ceil(count * prop.share / shares)
        try:
            _call(part, prop, budget, 1000 * seed + number)
        except Exception as error:
            part.fail("\n".join([f"{name}: {type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        print(f"{part.name}: {name}: {budget} in {time.perf_counter() - began:.0f} s", flush=True)
    logging.disable(logging.NOTSET)
    return part


def _call(part: Part, prop: Property, budget: int, first_seed: int) -> None:
    """Calls one property ``budget`` times, in chunks: hypothesis remembers every case of a run."""
    made, alive = 0, None
    while made < budget:

        @seed(first_seed + 1000 * made)
        @settings(
            max_examples=min(CHUNK, budget - made),
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(prop.cases)
        def call(case: object) -> None:
            nonlocal made
            began = time.perf_counter()
            outcome = prop.check(case)
            made += 1
            assert time.perf_counter() - began < SECONDS, f"took more than {SECONDS} s"
            part.add(outcome)

        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            call()
        finally:
            faulthandler.cancel_dump_traceback_later()
        before, alive = alive, _tensors_alive()
        assert before is None or alive <= before, f"{alive - before} tensors more are alive than {CHUNK} calls before"


def _tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())
