"""How notebooks run: phases, params, runs, reports. Knows no science."""

from tinyonn_lib.workbench.notebook import start
from tinyonn_lib.workbench.results import published

__all__ = ["published", "start"]
