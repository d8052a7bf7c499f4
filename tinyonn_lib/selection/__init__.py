"""Choosing training data by the routers of a mixture of experts: scores, selections, what they are worth."""
