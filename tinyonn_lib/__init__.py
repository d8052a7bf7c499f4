"""Take a dense language model apart, neuron by neuron, and put it together again as small experts."""

__version__ = "0.1.0"
