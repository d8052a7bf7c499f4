"""How notebooks run: phases, params, runs, reports. Knows no science."""

from tinyonn_lib.workbench.notebook import start

__all__ = ["start"]
