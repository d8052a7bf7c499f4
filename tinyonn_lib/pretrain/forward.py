"""One forward pass for training: logits, last hidden states and the load-balance loss of any architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.pretrain.layout import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Output(NamedTuple):
    """What `forward` gives back."""

    logits: Tensor  # (B, T, V)
    hidden: Tensor  # (B, T, d), after the final norm
    balance: Tensor  # scalar, float32: 0 for a dense model, 1 for routers that use all experts alike


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None) -> Output:
    """Run a causal language model on rows of tokens; as cheap as the bare model, and safe from several threads at once.

    Args:
        model: any causal language model; routers are known of the architectures in `architectures.py`.
        ids: (B, T) token ids.
        positions: (B, T), from 0 again at each document inside a row: transformers' own masks then keep the documents
            apart. None: one document a row.

    Returns:
        Logits and hidden states; `balance` is the mean over the layers of `switch_balance` (Qwen) or
        `sequence_balance` (DeepSeek), to be weighted and added to the loss (0.001 to 0.01 are usual).
    """
    parts, config = cast("Any", model), cast("Any", model.config)
    measure = _BALANCE.get(config.model_type)
    # transformers captures the router logits per thread (a ContextVar).
    more = {} if measure is None else {"output_router_logits": True}
    out = parts.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **more)
    hidden = out.last_hidden_state
    logits = parts.get_output_embeddings()(hidden)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    if measure is None:
        return Output(logits, hidden, torch.zeros((), device=hidden.device))
    layers = [measure(layer.view(*ids.shape, -1), config.num_experts_per_tok) for layer in out.router_logits]
    return Output(logits, hidden, torch.stack(layers).mean())


def switch_balance(logits: Tensor, active: int) -> Tensor:
    """E · Σ_e f_e · P_e: f_e the share of the batch's choices that fall on expert e, P_e its mean probability.

    Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, eq. 4–6) for `active` experts a token, per layer.
    transformers' own `load_balancing_loss_func` mixes the layers before it multiplies (expert 0 of one layer hides the
    lack of another layer's) and is `active` times as large.

    Args:
        logits: (B, T, E) of one layer's router.
        active: experts a token uses.
    """
    probabilities = logits.float().softmax(-1).flatten(0, 1)
    return _agreement(probabilities, probabilities, active)


def sequence_balance(logits: Tensor, active: int) -> Tensor:
    """The complementary balance loss of DeepSeek-V3 (arXiv 2412.19437 §2.1.2, eq. 17–20) without its factor α.

    Σ_i f_i P_i in each row, f_i = E / (active · T) · how often i is among the row's choices, P_i the row's mean of
    sigmoid scores that are normalised over the experts; the mean over the rows. As in the paper the choices are by
    score alone, without the selection bias.

    Args:
        logits: (B, T, E) of one layer's router, before the sigmoid.
        active: experts a token uses.
    """
    scores = logits.float().sigmoid()
    return _agreement(scores, scores / scores.sum(-1, keepdim=True), active).mean()


def _agreement(scores: Tensor, shares: Tensor, active: int) -> Tensor:
    """E · Σ_e (share of the choices) · (mean share of the scores), over the tokens (the last dimension but one)."""
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(active, dim=-1).indices, 1.0)
    return scores.shape[-1] / active * (chosen.mean(-2) * shares.mean(-2)).sum(-1)


_BALANCE = {"qwen2_moe": switch_balance, "qwen3_moe": switch_balance, "deepseek_v3": sequence_balance}


def next_token_nats(logits: Tensor, asked: Tensor) -> Tensor:
    """Cross-entropy of each place, (…), float32, 0 where `IGNORED` is asked; logits (…, V) in any precision.

    Not in float32 under autocast: for a small model the copy of its logits costs a sixth of the whole step, and the
    gradient is no better for it (the softmax computes in float32 inside anyway).
    """
    with torch.autocast(logits.device.type, enabled=False):
        nats = F.cross_entropy(logits.flatten(0, -2), asked.reshape(-1), ignore_index=IGNORED, reduction="none")
    return nats.float().view(asked.shape)


@contextmanager
def quick(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, compute meanwhile in the way that trains small models on short rows fastest; elsewhere nothing.

    Eager attention makes a dense step a sixth faster than the fused kernel. `split_experts` in bfloat16 makes a step
    with 8 experts of 256 neurons 1.2 to 1.4 times as fast as transformers' grouped_mm, which stays in float32, and
    1.1 to 1.2 times as fast as its eager; with 32 experts it is level with the one and twice as fast as the other.
    """
    if model.device.type != "cpu":
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = model.config._attn_implementation, model.config._experts_implementation
    model.set_attn_implementation("eager")
    if model.config.model_type in _BALANCE:
        ALL_EXPERTS_FUNCTIONS.register("split", split_experts)
        model.set_experts_implementation("split")
    try:
        yield
    finally:
        model.set_attn_implementation(before[0])
        if model.config.model_type in _BALANCE:
            model.set_experts_implementation(before[1])


def split_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer, each on its own tokens: transformers' interface for experts.

    Differs from its eager way in taking the weights apart once: there the backward pass fills a gradient of the size
    of all experts for each expert.

    Args:
        module: holds gate_up_proj (E, 2 m, d) and down_proj (E, d, m).
        hidden_states: (N, d). top_k_index: (N, k) experts of each token. top_k_weights: (N, k) their weights.
    """
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    tokens = order // top_k_index.shape[-1]
    rows = hidden_states[tokens].split(torch.bincount(chosen, minlength=module.num_experts).tolist())
    weights = zip(rows, module.gate_up_proj.unbind(), module.down_proj.unbind(), strict=True)
    outputs = [F.linear(module._apply_gate(F.linear(own, gate_up)), down) for own, gate_up, down in weights]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
    return torch.zeros_like(hidden_states).index_add(0, tokens, weighted.to(hidden_states.dtype))
