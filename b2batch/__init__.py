"""b2batch: distributed batch inference for Baichuan 2 and other causal LMs, every input row exactly once."""
