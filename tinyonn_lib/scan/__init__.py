"""Exact per-neuron statistics of any causal LM: the observer, its statistics, and the store that survives a kill."""
