"""Which attention path each precision takes, shown on a kernel that stands in for the GPU's."""

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.models import trunk, varlen
from rlhf_lightning.models.attention import knows_rows, use_rows
from rlhf_lightning.models.trunk import hidden_states

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 3},
    "llama": {"num_key_value_heads": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
}


class Kernel:
    """Computes a sequence at a time, and takes what the kernel of a GPU takes; counts its calls."""

    def __init__(self):
        self.dtypes, self.failure = [], None

    def run(self, query, key, value, starts_q, starts_k, scale, window):
        if self.failure is not None:
            raise self.failure
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.float16, torch.bfloat16)
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        if len(query) > 2:  # not the trial of two tokens
            self.dtypes.append(query.dtype)
        parts = []
        for i in range(len(starts_q) - 1):
            own, seen = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
            q, k, v = (x.transpose(0, 1)[None] for x in (query[own], key[seen], value[seen]))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            if window[0] >= 0:
                mask = mask.triu(k.shape[2] - q.shape[2] - window[0])
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    def old(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        """As in torch 2.11: no heads that are shared."""
        assert query.shape[1] == key.shape[1]
        return self.run(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    def new(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return self.run(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)


@pytest.fixture(params=["old", "new"])
def kernel(request, monkeypatch):
    fake = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", getattr(fake, request.param))
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    monkeypatch.setitem(trunk.SHORTEST_SHARED, "cpu", 1)
    varlen._runs.cache_clear()
    yield fake
    varlen._runs.cache_clear()


def build(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    use_rows(model.to(dtype))
    assert knows_rows(model)
    return model


def batch():
    """Two rows that share a prompt of three tokens, and one by itself."""
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[1, :3] = ids[0, :3]
    mask = torch.arange(9) < torch.tensor([9, 6, 7])[:, None]
    return ids, mask, mask & (torch.arange(9) >= 3)


def states(model, dtype, shared=None):
    ids, mask, _ = batch()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found = hidden_states(model, ids, mask, shared)
    return found.hidden[found.at[mask]].float()


HALF = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_every_half_precision_takes_the_kernel_in_its_own_dtype(kind, precision, kernel):
    weights, autocast = HALF[precision]
    model = build(kind, weights)
    expected = states(build(kind), None)
    kernel.dtypes.clear()
    for shared in (None, batch()[2]):
        got = states(model, autocast, shared)
        assert (got - expected).norm() < 0.03 * expected.norm()
    assert kernel.dtypes == [autocast or weights] * 2 * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision_does_not(kind, kernel):
    states(build(kind), None)
    assert kernel.dtypes == []


def test_gradients_go_through_the_kernel(kernel):
    model, plain = build("deepseek_v3", torch.bfloat16), build("deepseek_v3")
    for network in (model, plain):
        states(network, None, batch()[2]).sum().backward()
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is not None and parameter.dim() > 1:
            got = dict(model.model.named_parameters())[name].grad.float()
            assert (got - parameter.grad).norm() < 0.1 * parameter.grad.norm(), name


def test_a_device_without_the_kernel_falls_back_and_says_why(kernel, caplog):
    kernel.failure = RuntimeError("FlashAttention only supports Ampere GPUs or newer")
    with caplog.at_level(logging.WARNING):
        model = build("mistral", torch.bfloat16)
        got = states(model, None)
    assert "only supports Ampere" in caplog.text
    expected = states(build("mistral"), None)
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("failure", [TypeError("unexpected keyword"), torch.cuda.OutOfMemoryError("out of memory")])
def test_anything_else_is_no_reason_to_fall_back(kernel, failure):
    model = build("mistral")
    kernel.failure = failure
    with pytest.raises(type(failure)):
        states(model.to(torch.bfloat16), None)


def test_the_kernel_of_this_torch_takes_what_it_is_given():
    known = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= known.keys()
