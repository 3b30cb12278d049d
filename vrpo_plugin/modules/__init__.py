"""The trainable parts: projectors, the critic, taps on a host's blocks, and the aligner that ties them together."""
