"""A table as `sweep` returns it, with losses that are known sums of what each choice costs."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd

from tinyonn_lib.kv.variants import SHAPES

COSTS = {
    "mlp_ratio": {0.5: 0.05, 1.0: 0.0, 2.0: -0.02},
    "layernorm": {True: 0.01, False: 0.0},
    "activation": {"silu": 0.0, "relu": 0.001, "gelu": 0.0015},
    "init": {"xavier": 0.0, "kaiming": 0.1, "normal": -0.02},
}


def table() -> pd.DataFrame:
    """Held-out loss 0.44 for 1×, no LayerNorm, silu, xavier, and 0.55 for linear; spread over seeds 0.001."""
    rows = []
    for shape in SHAPES:
        for init in shape.inits:
            own = asdict(shape) | {"init": init}
            loss = 0.55 if shape.kind == "linear" else 0.44 + sum(cost[own[name]] for name, cost in COSTS.items())
            size = 8000 if shape.kind == "linear" else round(16000 * shape.mlp_ratio)
            rows.append(
                {"configuration": shape.label(init), **own, "dropout": 0.0, "steps": 150, "batch": 256, "seeds": 3,
                 "parameters": size, "lr": 0.01, "lr_at_edge": False, "initial_loss": 3.0, "validation": loss - 0.01,
                 "heldout": loss, "heldout_spread": 0.001, "steps_to_target": 60.0 if loss < 0.5 else float("nan"),
                 "dead_units": 0.0, "nll": 4 + loss, "nll_spread": 0.002, "seconds_per_step": 1e-3, "slower": 1.0,
                 "memory": 4000}
            )  # fmt: skip
    return pd.DataFrame(rows)
