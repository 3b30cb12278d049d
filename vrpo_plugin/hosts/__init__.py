"""Host codebases: where the aligner attaches, and the conversion of their units."""
