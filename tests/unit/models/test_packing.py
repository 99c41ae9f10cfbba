"""Rows end to end: where each token goes, and that none sees another row."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.models import trunk
from rlhf_lightning.models.attention import NAME, knows_rows, use_rows
from rlhf_lightning.models.packing import Run, pack
from rlhf_lightning.models.trunk import hidden_states

VOCABULARY = 40
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}
SIZES["gpt2"]["resid_pdrop"] = 0.0
SIZES["qwen3"] = SIZES["mistral"] = SIZES["gemma3_text"] = {**SIZES["llama"], "num_key_value_heads": 2, "head_dim": 8}
SIZES["gpt_neox"] = SIZES["llama"]
WINDOW = {"mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4, "num_hidden_layers": 6}}
LENGTHS = [7, 3, 9, 3, 1, 7]


def build(kind):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, **special, **{**SIZES.get(kind, {}), **WINDOW.get(kind, {})}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model


def batch(side):
    width = max(LENGTHS)
    columns, lengths = torch.arange(width), torch.tensor(LENGTHS)[:, None]
    mask = columns < lengths if side == "right" else columns >= width - lengths
    return torch.randint(3, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1)), mask


def test_the_plan_by_hand():
    packing = pack(torch.tensor([[True, True, False], [False, False, True], [False, True, True]]))
    assert packing.places.tolist() == [5, 0, 1, 7, 8]
    assert packing.positions.tolist() == [0, 0, 1, 0, 1]
    assert packing.runs == (Run(0, 1, 1), Run(1, 2, 2))
    assert [packing.at[0, 0], packing.at[0, 1], packing.at[1, 2], packing.at[2, 1], packing.at[2, 2]] == [1, 2, 0, 3, 4]


def test_a_row_without_any_token_is_no_row():
    packing = pack(torch.tensor([[False, False], [True, True]]))
    assert packing.runs == (Run(0, 1, 2),)
    assert packing.places.tolist() == [2, 3]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "gemma3_text", "gpt_neox"])
def test_packed_rows_are_what_each_row_is_alone(kind, side):
    model = build(kind)
    ids, mask = batch(side)
    with torch.no_grad():
        alone = [
            model.base_model(input_ids=row[real][None], use_cache=False).last_hidden_state[0]
            for row, real in zip(ids, mask, strict=True)
        ]
        use_rows(model)
        assert knows_rows(model)
        states = hidden_states(model, ids, mask)
    assert len(states.hidden) == sum(LENGTHS)  # no padding has gone through the network
    for row, expected in enumerate(alone):
        torch.testing.assert_close(states.hidden[states.at[row][mask[row]]], expected, atol=1e-5, rtol=1e-5)


def test_a_row_neither_sees_nor_moves_another():
    """Not to a tolerance: the gradient from one row to the tokens of another is zero."""
    model = build("llama")
    use_rows(model)
    ids, mask = batch("right")
    embedded = []
    model.model.embed_tokens.register_forward_hook(
        lambda m, i, out: embedded.append(out.retain_grad()) or embedded.append(out)
    )
    states = hidden_states(model, ids, mask)
    states.hidden[states.at[2][mask[2]]].sum().backward()
    reached = embedded[1].grad[0].abs().sum(-1) > 0
    own = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    own[states.at[2][mask[2]]] = True
    assert torch.equal(reached, own)


def test_checkpointed_activations_are_computed_again_in_their_rows():
    model = build("llama").train()
    use_rows(model)
    ids, mask = batch("left")
    hidden_states(model, ids, mask).hidden.square().sum().backward()
    plain = [p.grad.clone() for p in model.base_model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden_states(model, ids, mask).hidden.square().sum().backward()
    for again, expected in zip((p.grad for p in model.base_model.parameters()), plain, strict=True):
        torch.testing.assert_close(again, expected)


def test_without_rows_the_network_is_what_it_was():
    model = build("qwen3")
    ids, mask = batch("right")
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
        use_rows(model)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask.long()).logits[mask], before)


def test_an_architecture_that_mixes_rows_stays_padded_and_says_so(caplog):
    """Bloom has biases of position that know nothing of rows."""
    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING):
        use_rows(model)
    assert not knows_rows(model)
    ids, mask = batch("right")
    states = hidden_states(model, ids, mask)
    assert states.hidden.shape[0] == mask.numel()
    assert torch.equal(states.hidden[states.at], states.hidden.view(*mask.shape, -1))


def test_an_attention_that_was_asked_for_stays():
    model = build("llama")
    model.set_attn_implementation("eager")
    use_rows(model)
    assert model.config._attn_implementation == "eager" != NAME


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_network_that_stays_padded_is_told_where_each_row_begins(kind, side):
    model = build(kind)
    ids, mask = batch(side)
    with torch.no_grad():
        states = hidden_states(model, ids, mask)
        for row, real, at in zip(ids, mask, states.at, strict=True):
            alone = model.base_model(input_ids=row[real][None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states.hidden[at[real]], alone, atol=1e-5, rtol=1e-5)


def in_groups(side):
    """Eight rows to three prompts, one of which is a row's alone; each with a response of its own length."""
    prompts = [[5, 6, 7], [5, 6, 7], [8], [9, 9], [8], [5, 6, 7], [8], [8]]
    responses = [[3] * n + [4] for n in (2, 5, 3, 1, 3, 0, 6, 2)]
    rows = [p + [t + i % 5 for i, t in enumerate(r)] for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows)) + 1
    ids, mask, response = (torch.zeros(8, width, dtype=torch.long) for _ in range(3))
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = width - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
        response[number, start + len(prompt) : start + len(row)] = 1
    return ids, mask.bool(), response.bool()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral"])
def test_a_prompt_that_rows_share_is_read_once_and_changes_nothing(kind, side, monkeypatch):
    monkeypatch.setitem(trunk.SHORTEST_SHARED, "cpu", 1)
    model = build(kind)
    use_rows(model)
    ids, mask, response = in_groups(side)
    weights = torch.randn(*mask.shape, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for shared in (None, response):
        states = hidden_states(model, ids, mask, shared)
        hidden = states.hidden[states.at[mask]]
        model.zero_grad()
        (hidden * weights[mask]).sum().backward()
        found.append((len(states.hidden), hidden.detach(), [p.grad.clone() for p in model.base_model.parameters()]))
    (every, expected, gradients), (fewer, got, same) = found
    assert every - fewer == 2 * 3 + 3 * 1  # two copies of the longest prompt, three of the shortest
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(same, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class SlicesOfTheLongRow(TorchDispatchMode):
    """Counts gradients of slices of the long row, each of which is as long as all of it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func == torch.ops.aten.slice_backward.default and args[2] == 0
        return func(*args, **(kwargs or {}))


def test_prompts_too_short_to_share_are_read_with_each_row(monkeypatch):
    model = build("llama")
    use_rows(model)
    ids, mask, response = in_groups("right")
    counts = []
    for shortest in (1, 2, 3, 4):  # the prompts have 3, 1 and 2 tokens, the last of them one row alone
        monkeypatch.setitem(trunk.SHORTEST_SHARED, "cpu", shortest)
        counts.append(len(hidden_states(model, ids, mask, response).hidden))
    every = int(mask.sum())
    assert counts == [every - 2 * 3 - 3 * 1, every - 2 * 3, every - 2 * 3, every]


def test_the_gradient_does_not_grow_with_the_square_of_the_rows(monkeypatch):
    """64 pairs of the embedded world spent more on zeros between their rows than on all matrix products."""
    monkeypatch.setitem(trunk.SHORTEST_SHARED, "cpu", 1)
    model = build("llama")
    use_rows(model)
    hidden = hidden_states(model, *in_groups("right")).hidden
    with SlicesOfTheLongRow() as slices:
        hidden.sum().backward()
    assert slices.count == 0
