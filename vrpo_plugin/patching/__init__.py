"""Changes to a host that can be taken back: source fingerprints, seams replaced at run time, one line in a script."""
