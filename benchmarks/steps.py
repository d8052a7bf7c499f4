"""The step that observers are timed on: a Qwen3-like model of random weights, and the FLOP of what it does.

- *frozen*: no weight is trainable and the embedding's output asks for a gradient (`enable_input_require_grads`), as
  when adapters are trained. Forward, and backward of the activations alone.
- *trainable*: forward, backward of activations and weights, AdamW, `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn_lib.scan.rownorms import choose, cost

MODES = ("frozen", "trainable")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# q, k and v read one X; gate and up another. Their Gram matrix is shared.
SHARING = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}


@dataclass(frozen=True)
class Size:
    """Sizes of the model; the defaults are those of the full benchmark."""

    layers: int = 4
    width: int = 512
    ffn: int = 1536
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 1024


def build(size: Size, device: torch.device | None = None, **config: Any) -> Any:
    """A model with random weights, the same for the same size.

    Args:
        size: its sizes.
        device: where to put it.
        config: further fields of its configuration.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.ffn,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim, max_position_embeddings=4096, tie_word_embeddings=False, **config,
        )
    )  # fmt: skip
    return model.to(device or torch.device("cpu")).train()


class Step:
    """One training step, again and again on the same tokens.

    Args:
        model: of `build`; its weights are frozen or not from now on.
        mode: one of `MODES`.
        tokens: length of the one text.

    Attributes:
        ids: (1, tokens).
    """

    def __init__(self, model: Any, mode: str, tokens: int) -> None:
        self.model, self.trainable = model, mode == "trainable"
        model.requires_grad_(self.trainable)
        model.zero_grad(set_to_none=True)
        self._optimizer: torch.optim.Optimizer | None = None
        if self.trainable:
            model.disable_input_require_grads()
            # Rate 0: the work of a step, and the same weights for the next. Fused is fastest: least to hide behind.
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        else:
            model.enable_input_require_grads()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
        self.ids = ids.to(next(model.parameters()).device)

    def __call__(self) -> None:
        """Forward, backward, and the optimiser's turn."""
        loss_of(self.forward(), self.ids).backward()
        self.finish()

    def forward(self) -> Tensor:
        """Logits, (1, tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits

    def finish(self) -> None:
        """What comes after the backward."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token loss of one text."""
    return nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


def shapes(size: Size) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the linears of one layer."""
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    outputs = (q, kv, kv, size.width, size.ffn, size.ffn, size.width)
    inputs = (size.width, size.width, size.width, q, size.width, size.width, size.ffn)
    return {name: (i, o) for name, i, o in zip(LINEARS, inputs, outputs, strict=True)}


def step_flops(size: Size, tokens: int, mode: str, *, fused: bool = True) -> float:
    """FLOP of the bare step's matrix products; norms, softmax, loss and optimiser are left out.

    Each linear, the head among them: 2 T d_in d_out forward, as much for the gradient of its input, and as much again
    for that of its weight where it is trainable. Attention, per layer, in products of 2 T^2 heads head_dim: two forward
    and four backward. The fused kernel computes the scores once more, and being causal skips half of each product.

    Args:
        size: of the model.
        tokens: T.
        mode: one of `MODES`.
        fused: attention as the fused kernel computes it, else eagerly.
    """
    products = 3 if mode == "trainable" else 2
    weights = size.layers * sum(i * o for i, o in shapes(size).values()) + size.width * size.vocabulary
    attention = 2.0 * tokens * tokens * size.heads * size.head_dim * (7 / 2 if fused else 6)
    return 2.0 * tokens * weights * products + size.layers * attention


def extra_flops(size: Size, tokens: int, mode: str, targets: str) -> tuple[float, Counter[str]]:
    """FLOP that exact norms of these targets add to a step (PEERS §3), and how often each method is taken.

    Trainable: 2 d_in d_out for each weight, read from `.grad`. Frozen: the cheaper of Gram and tiles; norms of rows,
    of columns (down, for neurons) and of the whole tensor cost the same, except that columns share no Gram matrix.

    Args:
        size: of the model.
        tokens: T.
        mode: one of `MODES`.
        targets: `neurons` or `linears`.
    """
    total, methods = 0.0, Counter[str]()
    for name, (d_in, d_out) in shapes(size).items():
        if targets == "neurons" and name not in LINEARS[-3:]:
            continue
        if mode == "trainable":
            method, flops = "grad", 2.0 * d_in * d_out
        elif targets == "neurons" and name == "down_proj":  # input and output gradient change places
            method = choose(tokens, d_out, d_in)
            flops = getattr(cost(tokens, d_out, d_in), method)
        else:
            sharing = SHARING.get(name, 1)
            method = choose(tokens, d_in, d_out, sharing)
            flops = getattr(cost(tokens, d_in, d_out, sharing), method)
        total += size.layers * flops
        methods[method] += size.layers
    return total, methods
