"""The mathematics: tensors in, tensors out; no module, no host, no random draw. docs/equations.md is its index."""
