"""Measures of generated images: Frechet distance, precision and recall, in any feature network, stamped."""
