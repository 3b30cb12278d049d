"""All that is needed without a host: a SiT, data, sampling, evaluation, and the training of a critic."""
