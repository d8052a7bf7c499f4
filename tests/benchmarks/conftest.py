"""The benchmarks are scripts that import each other by name, as Python finds them when one of them is run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
torch.set_num_threads(1)
