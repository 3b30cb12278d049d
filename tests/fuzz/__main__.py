"""Injects faults into real runs and files, and counts what came of it.

    python tests/fuzz --output exps/reliability                 # all parts
    python tests/fuzz --output exps/reliability --parts kills   # 20 times kill -9
    python tests/fuzz --output exps/reliability --parts calls   # 100,000 random calls

Each part prints one line: what was tried, how often, and how often it failed. Any failure ends it with status 1.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # Python puts this folder on the path, not the one that holds the package
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS / "examples")]

from fuzz.calls import calls
from fuzz.files import mutations
from fuzz.hosts import hosts
from fuzz.part import Part
from fuzz.pickles import pickles
from fuzz.runs import faults, kills

# A part's name: its function of (output, count, seed), and the count that docs/reliability.md reports.
PARTS: dict[str, tuple[Callable[[Path, int, int], Part], int]] = {
    "kills": (kills, 20),
    "faults": (faults, 16),
    "mutations": (mutations, 1000),
    "calls": (calls, 100_000),
    "hosts": (hosts, 1000),
    "pickles": (pickles, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--count", type=int, help="instead of each part's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        sys.exit(f"{arguments.output}: expected a new or empty folder. Name another.")
    done = []
    for name in arguments.parts:
        run, count = PARTS[name]
        done.append(run(arguments.output / name, arguments.count or count, arguments.seed))
        print(done[-1], flush=True)
    sys.exit(any(part.failures for part in done))


if __name__ == "__main__":
    main()
