"""Random and damaged input, faults and kills; ``python tests/fuzz`` runs them all."""
