"""Small stand-ins for the models and batches that this package meets."""
