"""Reference parts: a compact SiT, its sampler and small data sets, for examples, tests and benchmarks."""
