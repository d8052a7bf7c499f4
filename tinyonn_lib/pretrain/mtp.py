"""Multi-token prediction of depth 1: a head that guesses token t+2 from what the model knows at t and token t+1.

DeepSeek-V3 (arXiv 2412.19437) §2.2; document 002, 2025-06-09. The head lives beside the model: its weights travel as
`mtp.safetensors` next to a standard checkpoint, which plain `AutoModelForCausalLM` loads as if the file were not there.
"""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.pretrain.forward import next_token_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "mtp.safetensors"
MODELS = ("qwen3", "qwen3_moe", "qwen2_moe", "deepseek_v3")
_DRAFT_TOKENS = 4096  # in one forward pass of `draft_acceptance`


class MTPHead(nn.Module):
    """norm(hidden at t) and norm(embedding of token t+1), joined, 2d → d, one decoder layer, the model's norm and head.

    The layer is of the model's own class with a dense FFN of `intermediate_size` neurons, for models of experts, too:
    it needs no load balance of its own. Embedding, final norm and output head are the model's, not copies, so they
    learn from this loss as well; the model is given to each call, so `parameters()` holds the head's own only. Nothing
    is kept between calls: several threads may use one head.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        """
        Args:
            model: of one of `MODELS`; dtype and device are taken from its embedding.
            seed: of the starting weights: normal with the config's `initializer_range`, o_proj and down_proj zero as
                in `lm.models.new_model`. The global random state is left as it was.

        Raises:
            BenchError: a model of another kind.
        """
        super().__init__()
        kind = model.config.model_type
        if kind not in MODELS:
            why = ": its AltUp layers carry several streams, not one" if kind.startswith("gemma3n") else ""
            raise BenchError(f"No multi-token prediction for {kind}{why}; choose one of {', '.join(MODELS)}.")
        decoder = cast("Any", model).model
        config = copy.deepcopy(model.config)
        # Layer 0 dense and looking at everything, whatever the model's own layer 0 is.
        config.mlp_only_layers, config.first_k_dense_replace = [0], 1
        config.layer_types, config.sliding_window = ["full_attention"] * config.num_hidden_layers, None
        width, eps = config.hidden_size, config.rms_norm_eps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden_norm = type(decoder.norm)(width, eps=eps)
            self.token_norm = type(decoder.norm)(width, eps=eps)
            self.projection = nn.Linear(2 * width, width, bias=False)
            self.layer = type(decoder.layers[0])(config, 0)
            for name, part in self.named_modules():
                if isinstance(part, nn.Linear):
                    last = name.endswith(("o_proj", "down_proj"))
                    nn.init.normal_(part.weight, std=0.0 if last else config.initializer_range)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
        self.layer.self_attn.config = model.config  # so that the model's choice of attention kernel is the head's
        table = cast("Tensor", model.get_input_embeddings().weight)
        self.to(device=table.device, dtype=table.dtype)

    def states(self, model: PreTrainedModel, hidden: Tensor, following: Tensor, positions: Tensor | None) -> Tensor:
        """What the model's output head makes guesses of token t+2 from, (B, T, d), after the final norm.

        Args:
            model: the one this head was made for.
            hidden: (B, T, d), the model's last states after its final norm.
            following: (B, T) ids of the tokens t+1.
            positions: (B, T) of the tokens t; each document inside a row counts from 0 again. None: one document.
        """
        from transformers.masking_utils import create_causal_mask

        decoder = cast("Any", model).model
        tokens = self.token_norm(decoder.embed_tokens(following))
        x = self.projection(torch.cat([self.hidden_norm(hidden), tokens], dim=-1))
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.layer.self_attn.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = decoder.rotary_emb(x, positions)
        return decoder.norm(self.layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary))

    def loss(
        self,
        model: PreTrainedModel,
        hidden: Tensor,
        ids: Tensor,
        positions: Tensor | None = None,
        *,
        pad: int | None = None,
        count: float | None = None,
    ) -> Tensor:
        """Mean cross-entropy of token t+2 given all up to t and token t+1, a scalar in nats.

        Documents: no target lies across a border, so where t+1 is of another document than t nothing is asked for. A
        token t+2 that begins the next document is asked for, as in the model's own loss: it is the EOS that ends this
        one (`layout.lay`).

        Args:
            model: the one this head was made for.
            hidden: (B, T, d), the model's last states after its final norm for ids[:, :T].
            ids: (B, at least T+1) token ids.
            positions: (B, at least T); a value that is not its left neighbour's plus one begins a document. None: a
                row is one document.
            pad: a token that is never asked for.
            count: what the sum is divided by; None is the number of targets. Parts of a batch with a count by their
                rows weigh alike, whatever the number of targets in each.

        Returns:
            0 (with gradients of 0) where no target is left.

        Raises:
            BenchError: rows of less than three tokens.
        """
        known = ids.shape[1] if positions is None else positions.shape[1]
        long = min(hidden.shape[1], ids.shape[1] - 2, known - 1)
        if long < 1:
            raise BenchError(f"Rows of {ids.shape[1]} tokens have no token after next: give longer ones.")
        own = None if positions is None else positions[:, :long]
        states, targets = self.states(model, hidden[:, :long], ids[:, 1 : long + 1], own), ids[:, 2 : long + 2]
        if positions is not None or pad is not None:
            kept = asked_after(ids[:, : long + 2], positions, pad)
            states, targets = states[kept], targets[kept]
        logits = cast("Any", model).lm_head(states)
        return next_token_nats(logits, targets).sum() / (max(1, targets.numel()) if count is None else count)

    def save(self, folder: str | Path) -> Path:
        """Write `mtp.safetensors` into the folder that `model.save_pretrained` wrote.

        Raises:
            BenchError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(folder) / FILE
        unfinished = path.with_name(f".{FILE}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, unfinished)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise BenchError(f"Cannot write {path}: {error}. Free space or choose another folder.") from error
        return path


def asked_after(ids: Tensor, positions: Tensor | None, pad: int | None) -> Tensor:
    """(B, T−2) whether token t+2 is asked for at t: see `MTPHead.loss`."""
    inside = _inside(ids, positions)[:, : ids.shape[1] - 2]
    return inside if pad is None else inside & (ids[:, 2:] != pad)


def _inside(ids: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T−1) whether token t+1 is of the same document as t."""
    if positions is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return positions[:, 1:] - positions[:, :-1] == 1


def load_mtp(folder: str | Path, model: PreTrainedModel) -> MTPHead:
    """The head that `MTPHead.save` wrote for this model, in eval mode.

    Raises:
        BenchError: no such file, a damaged one, or one of a model of other sizes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, head = Path(folder) / FILE, MTPHead(model)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise BenchError(f"{path.parent} holds no {FILE}: train with multi-token prediction, or do without.") from error
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".:")
        raise BenchError(f"{path} is damaged ({reason}): save or copy it again.") from error
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        name = min(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise BenchError(
            f"{path} is of another model: {name} is {found.get(name, 'missing')} there, {wanted.get(name, 'unknown')} "
            "here; take both from one training."
        )
    head.load_state_dict(tensors)
    return head.eval()


def draft_acceptance(model: PreTrainedModel, head: MTPHead, ids: Tensor, positions: Tensor | None = None) -> float:
    """Share of the head's greedy guesses of t+2 that the model itself, given the true t+1, would make: 0 to 1.

    What greedy self-speculative decoding would accept along this text (DeepSeek-V3 §5.4.3 reports 0.85 to 0.90).
    Positions whose token t+1 is of another document are left out.

    Args:
        model, head: of one training.
        ids: (N, T ≥ 2) token ids.
        positions: (N, T) as in `MTPHead.loss`.

    Raises:
        BenchError: no position to judge.
    """
    step = max(1, _DRAFT_TOKENS // ids.shape[1])
    accepted = asked = 0
    if ids.shape[1] < 2:
        raise BenchError("No position with two tokens of one document: give longer texts.")
    with torch.inference_mode():
        for place in range(0, len(ids), step):
            rows = ids[place : place + step].to(model.device)
            own = None if positions is None else positions[place : place + step].to(model.device)
            parts = cast("Any", model)
            hidden = parts.model(input_ids=rows, position_ids=own, use_cache=False).last_hidden_state
            said = parts.lm_head(hidden[:, 1:]).argmax(-1)
            before = None if own is None else own[:, :-1]
            guess = parts.lm_head(head.states(model, hidden[:, :-1], rows[:, 1:], before)).argmax(-1)
            inside = _inside(rows, own)
            accepted += int((said.eq(guess) & inside).sum())
            asked += int(inside.sum())
    if not asked:
        raise BenchError("No position with two tokens of one document: give longer texts.")
    return accepted / asked
