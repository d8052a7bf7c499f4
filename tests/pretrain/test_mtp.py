from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.pretrain.mtp import FILE, MODELS, MTPHead, draft_acceptance, load_mtp

VOCABULARY, WIDTH, LENGTH = 60, 32, 12
# Three documents in the first row, one of a single token among them; two in the second.
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]])


def make(kind: str, seed: int = 0, width: int = WIDTH) -> Any:
    """A tiny model of random weights, none of them zero."""
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
    latent = {
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    name, more = {
        "qwen3": ("Qwen3", {}),
        "qwen3_moe": ("Qwen3Moe", {**experts, "num_experts": 4}),
        "qwen2_moe": ("Qwen2Moe", {**experts, "num_experts": 4, "shared_expert_intermediate_size": 16}),
        "deepseek_v3": ("DeepseekV3", {**experts, **latent}),
    }[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, name + "ForCausalLM")(
        getattr(transformers, name + "Config")(**{**common, **more})
    ).eval()
    return noisy(model)


def noisy(module: torch.nn.Module) -> Any:
    """Large enough weights that nothing is nearly linear; norms are not 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.3
            value.copy_(1 + noise if "norm" in name else noise)
    return module


def pair(kind: str) -> tuple[Any, MTPHead, Tensor]:
    model = make(kind)
    ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    return model, noisy(MTPHead(model)), ids


def hidden_of(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    return model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


def documents(positions: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, first place, place after the last) of each document."""
    for row in range(len(positions)):
        starts = [place for place in range(positions.shape[1]) if positions[row, place] == 0]
        for begin, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True):
            yield row, begin, end


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, position: int) -> Tensor:
    """One vector of a head, its halves turned against each other."""
    half = len(x) // 2
    turned = x.clone()
    for i in range(half):
        angle = position / 10_000.0 ** (2 * i / len(x))
        a, b = x[i], x[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def qwen3_by_hand(model: Any, head: MTPHead, hidden: Tensor, ids: Tensor, positions: Tensor) -> float:
    """One position after the other, in float64, with nothing of transformers."""
    weight = {name: value.double() for name, value in head.state_dict().items()}
    own = {name: value.double() for name, value in model.state_dict().items()}
    table, losses = own["model.embed_tokens.weight"], []
    at = "layer.self_attn."
    for row, begin, end in documents(positions):
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for t in range(begin, min(end, ids.shape[1] - 1)):
            token = rms(table[ids[row, t + 1]], weight["token_norm.weight"])
            state = rms(hidden[row, t].double(), weight["hidden_norm.weight"])
            x = weight["projection.weight"] @ torch.cat([state, token])
            y = rms(x, weight["layer.input_layernorm.weight"])
            key = rms(weight[at + "k_proj.weight"] @ y, weight[at + "k_norm.weight"])
            keys.append(rotate(key, t - begin))
            values.append(weight[at + "v_proj.weight"] @ y)
            heads = []
            for query in (weight[at + "q_proj.weight"] @ y).split(16):
                query = rotate(rms(query, weight[at + "q_norm.weight"]), t - begin)
                share = torch.stack([query @ key / 4.0 for key in keys]).softmax(0)
                heads.append(sum(p * value for p, value in zip(share, values, strict=True)))
            x = x + weight[at + "o_proj.weight"] @ torch.cat(heads)
            y = rms(x, weight["layer.post_attention_layernorm.weight"])
            inner = F.silu(weight["layer.mlp.gate_proj.weight"] @ y) * (weight["layer.mlp.up_proj.weight"] @ y)
            x = rms(x + weight["layer.mlp.down_proj.weight"] @ inner, own["model.norm.weight"])
            if t + 1 < end and t + 2 < ids.shape[1]:
                losses.append(-(table @ x).log_softmax(0)[ids[row, t + 2]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_loop_over_positions(packed: bool) -> None:
    model, head, ids = pair("qwen3")
    positions = POSITIONS if packed else torch.arange(LENGTH).expand(2, -1)
    given = positions if packed else None
    hidden = hidden_of(model, ids, given).detach()
    expected = qwen3_by_hand(model, head, hidden, ids, positions)
    assert head.loss(model, hidden, ids, given).item() == pytest.approx(expected, rel=1e-5)
    # As a trainer calls it: states and positions of all tokens but the last.
    short = None if given is None else given[:, :-1]
    assert head.loss(model, hidden[:, :-1], ids, short).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_documents_in_a_row_are_as_documents_alone(kind: str) -> None:
    """Each document in a row of its own, with the token after it as its last target."""
    model, head, ids = pair(kind)
    total, count = 0.0, 0
    for row, begin, end in documents(POSITIONS):
        alone = ids[row : row + 1, begin : min(end + 1, LENGTH)]
        if alone.shape[1] > 2:
            hidden = hidden_of(model, alone[:, : end - begin])
            targets = alone.shape[1] - 2
            total += targets * head.loss(model, hidden, alone).item()
            count += targets
    packed = head.loss(model, hidden_of(model, ids, POSITIONS), ids, POSITIONS)
    assert count == 3 + 6 - 1 + 8 + 1
    assert packed.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_an_untrained_head_knows_nothing_yet(kind: str) -> None:
    torch.manual_seed(0)
    model = new_model(vocab_size=VOCABULARY, width=WIDTH) if kind == "qwen3" else type(make(kind))(make(kind).config)
    head, ids = MTPHead(model), torch.randint(2, VOCABULARY, (2, LENGTH))
    assert head.loss(model, hidden_of(model, ids), ids).item() == pytest.approx(math.log(VOCABULARY), abs=0.1)
    assert not any(value.any() for name, value in head.named_parameters() if "o_proj" in name or "down_proj" in name)
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {
        "hidden_norm", "token_norm", "projection", "layer"
    }  # fmt: skip
    assert head.layer.mlp.down_proj.in_features == model.config.intermediate_size
    again, other = MTPHead(model).state_dict(), MTPHead(model, seed=1).state_dict()
    assert all(value.equal(again[name]) for name, value in head.state_dict().items())
    assert not other["projection.weight"].equal(again["projection.weight"])


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_reaches_head_and_model(kind: str) -> None:
    model, head, ids = pair(kind)
    head.loss(model, hidden_of(model, ids, POSITIONS), ids, POSITIONS).backward()
    for name, value in [*head.named_parameters(), *model.named_parameters()]:
        expected = "e_score_correction_bias" not in name  # chosen with, never learned by gradient
        assert (value.grad is not None and bool(value.grad.any())) == expected, name


@pytest.mark.parametrize("kind", MODELS)
def test_two_threads_get_what_one_gets(kind: str) -> None:
    model, head, _ = pair(kind)
    rows = torch.randint(2, VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(3))
    params = [*head.parameters(), *(p for p in model.parameters() if p.requires_grad)]

    def gradients(number: int) -> list[Tensor]:
        own = POSITIONS if number % 2 else None  # other masks in other threads at the same time
        part = rows[2 * (number % 8) : 2 * (number % 8) + 2]
        loss = head.loss(model, hidden_of(model, part, own), part, own)
        found = torch.autograd.grad(loss, params, allow_unused=True)
        return [value for value in found if value is not None]

    alone = [gradients(number) for number in range(8)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(gradients, range(8)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_changing_the_attention_kernel_changes_nothing() -> None:
    model, head, ids = pair("qwen3")
    found = []
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        assert head.layer.self_attn.config._attn_implementation == kernel
        found.append(head.loss(model, hidden_of(model, ids, POSITIONS), ids, POSITIONS).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_padding_is_never_asked_for() -> None:
    model, head, ids = pair("qwen3")
    padded = torch.cat([ids[:1, :7], torch.ones(1, 5, dtype=torch.long)], 1)
    expected = head.loss(model, hidden_of(model, ids[:1, :7]), ids[:1, :7])
    assert head.loss(model, hidden_of(model, padded), padded, pad=1).item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = head.loss(model, hidden_of(model, padded), torch.ones_like(padded), pad=1)
    nothing.backward()
    assert nothing.item() == 0
    assert head.projection.weight.grad is not None
    assert not head.projection.weight.grad.any()


def test_too_short_rows_and_other_models_are_refused() -> None:
    model, head, ids = pair("qwen3")
    with pytest.raises(BenchError, match="no token after next"):
        head.loss(model, hidden_of(model, ids[:, :2]), ids[:, :2])
    with pytest.raises(BenchError, match="two tokens"):
        draft_acceptance(model, head, ids[:, :1])
    with pytest.raises(BenchError, match="two tokens"):
        draft_acceptance(model, head, ids, torch.zeros_like(ids))


def test_gemma3n_is_refused() -> None:
    class Gemma:
        class config:
            model_type = "gemma3n_text"

    with pytest.raises(BenchError, match=r"gemma3n_text: its AltUp .* choose one of qwen3, "):
        MTPHead(Gemma())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODELS)
def test_travels_beside_a_standard_checkpoint(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, head, ids = pair(kind)
    model.save_pretrained(tmp_path)
    assert head.save(tmp_path) == tmp_path / FILE
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    back = load_mtp(tmp_path, loaded)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in head.state_dict().items())
    assert not back.training
    assert draft_acceptance(loaded, back, ids) == draft_acceptance(model, head, ids)
    assert not list(tmp_path.glob(".*"))


def test_damaged_foreign_and_missing_files_are_one_line(tmp_path: Path) -> None:
    model, head, _ = pair("qwen3")
    with pytest.raises(BenchError, match=f"holds no {FILE}"):
        load_mtp(tmp_path, model)
    path = head.save(tmp_path)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(BenchError, match="damaged") as failed:
            load_mtp(tmp_path, model)
        assert "\n" not in str(failed.value)
    path.write_bytes(whole)
    with pytest.raises(BenchError, match="of another model: .* missing there|of another model: .* unknown"):
        load_mtp(tmp_path, make("deepseek_v3"))
    with pytest.raises(BenchError, match=r"of another model: .*\(32,\) there, \(64,\) here"):
        load_mtp(tmp_path, make("qwen3", width=64))
    with pytest.raises(BenchError, match="Cannot write"):
        head.save(path / "below a file")


@pytest.mark.parametrize("packed", [False, True])
def test_acceptance_counts_equal_greedy_tokens(packed: bool) -> None:
    model, head, _ = pair("qwen3")
    ids = torch.randint(2, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(4))
    positions = POSITIONS.repeat(3, 1) if packed else torch.arange(LENGTH).expand(6, -1)
    accepted = asked = 0
    for row, begin, end in documents(positions):
        for t in range(begin, end - 1):
            with torch.no_grad():
                own = model(ids[row : row + 1, begin : t + 2]).logits[0, -1].argmax()
                hidden = hidden_of(model, ids[row : row + 1, begin : t + 1])
                states = head.states(model, hidden, ids[row : row + 1, begin + 1 : t + 2], None)
            accepted += int(model.lm_head(states)[0, -1].argmax() == own)
            asked += 1
    head_copies_model = draft_acceptance(model, head, ids, positions if packed else None)
    assert asked > accepted > 0
    assert head_copies_model == accepted / asked


def test_learns_what_comes_after_next() -> None:
    """Counting in a circle: t+2 follows from t+1, and the frozen model does not know it."""
    model = make("qwen3")
    before = copy.deepcopy(model.state_dict())
    head = MTPHead(model)
    ids = (torch.arange(LENGTH)[None] + torch.arange(8)[:, None]) % 20 + 2
    hidden = hidden_of(model, ids).detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        loss = head.loss(model, hidden, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * math.log(20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
