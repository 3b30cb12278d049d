"""Methods compared on one stream of data; ``python benchmarks/convergence`` runs it."""

import sys
from pathlib import Path

# The example trainer trains the runs; its modules are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
