"""Tokenizers without a pad token, ids with holes, and more embeddings than tokens."""

import json

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.data.tokenizers import repair_pad_token
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.generation.vllm_requests import requests
from rlhf_lightning.models.export import eos_ids, export_folder
from rlhf_lightning.models.head import missing_tokens
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from tests.unit.models.adapted import LORA, exported, learnt

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_of(vocab, **special):
    backend = Tokenizer(WordLevel(vocab, unk_token=special.get("unk_token")))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def words(*names, holes=()):
    free = (i for i in range(1000) if i not in holes)
    return {name: next(free) for name in names}


def without_pad(kind):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "reserved":
        return tokenizer_of(words("<s>", "</s>", "<|reserved_special_token_0|>", *"abcdef"), **special)
    if kind == "unk":
        return tokenizer_of(words("<s>", "</s>", "<unk>", *"abcdef"), unk_token="<unk>", **special)
    return tokenizer_of(words("</s>", *"abcdef"), eos_token="</s>")  # nothing to spare, as GPT-2


def save_base(folder, rows, tokenizer):
    """A trained model whose weights are drawn wide, with its tokenizer as it came."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, eos_token_id=tokenizer.eos_token_id, **SIZES))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ready(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    repair_pad_token(tokenizer)
    return tokenizer


def rows_of(network):
    return network.get_input_embeddings().weight.shape[0]


# ---------------------------------------------------------------- no pad token


@pytest.mark.parametrize("kind", ["reserved", "unk", "nothing"])
def test_an_adapter_is_trained_and_exported_without_a_row_for_padding(kind, tmp_path):
    tokenizer = without_pad(kind)
    size = len(tokenizer)
    base = save_base(tmp_path / "base", size, tokenizer)
    tokenizer = ready(base)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    policy = PolicyNetwork(load_causal_lm(ModelSpec(path=base, adapter=LORA), tokenizer))
    assert rows_of(policy.network) == size
    learnt(policy, seed=1)
    folder = exported(policy, tokenizer, tmp_path / "run")
    plain, saved = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert rows_of(plain) == plain.config.vocab_size == len(saved) == size
    assert saved("a b").input_ids == tokenizer("a b").input_ids
    assert len(AutoTokenizer.from_pretrained(folder / "adapter")) == size
    again = ready(folder)  # the next stage starts from it
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("attention", [None, "eager"])  # packed, and padded
@pytest.mark.parametrize("kind", ["reserved", "unk", "nothing"])
def test_padding_without_a_row_never_reaches_the_network(kind, attention, tmp_path):
    base = save_base(tmp_path / "base", len(without_pad(kind)), without_pad(kind))
    tokenizer = ready(base)
    spec = ModelSpec(path=base, adapter=LORA, attn_implementation=attention)
    policy = PolicyNetwork(load_causal_lm(spec, tokenizer))
    ids = torch.tensor([[3, 4, 5, 4, 5], [4, 4, 3, 9, 9]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = []
    for padding in (tokenizer.pad_token_id, 4):
        for side in ("right", "left"):
            rows, real = ids.masked_fill(~mask, padding), mask
            if side == "left":
                rows[1], real = rows[1].roll(2), torch.stack([mask[0], mask[1].flip(0)])
            response = real & (torch.arange(5) > 0)
            output = policy(rows, real, response)
            found.append(output.logprobs[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", [NativeEngine(), TransformersEngine()], ids=["native", "transformers"])
def test_engines_pad_with_an_id_that_the_network_has_no_row_for(engine, tmp_path):
    base = save_base(tmp_path / "base", len(without_pad("nothing")), without_pad("nothing"))
    tokenizer = ready(base)
    policy = PolicyNetwork(load_causal_lm(ModelSpec(path=base, adapter=LORA), tokenizer).eval())
    pad, ends = tokenizer.pad_token_id, eos_ids(policy.network, tokenizer)
    assert pad >= rows_of(policy.network)
    ids = torch.tensor([[1, 2, 3]] * 20 + [[pad, 2, 3]] * 20)
    sampling = SamplingParameters(max_new_tokens=12)
    torch.manual_seed(0)
    tokens = engine.generate(policy.network, ids, ids != pad, sampling, eos_ids=ends, pad_id=pad).tokens
    ended = [row.index(ends[0]) + 1 for row in tokens.tolist() if ends[0] in row]
    assert len(set(ended)) > 2
    for row in tokens.tolist():
        end = row.index(ends[0]) + 1 if ends[0] in row else len(row)
        assert pad not in row[:end]
        assert set(row[end:]) <= {pad}


def test_a_model_that_is_trained_completely_gets_a_row_only_where_nothing_else_serves(tmp_path):
    for kind, grown in (("reserved", 0), ("unk", 0), ("nothing", 1)):
        size = len(without_pad(kind))
        base = save_base(tmp_path / kind, size, without_pad(kind))
        tokenizer = ready(base)
        model = load_causal_lm(ModelSpec(path=base), tokenizer)
        assert rows_of(model) == len(tokenizer) == size + grown
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert (
            rows_of(AutoModelForCausalLM.from_pretrained(export_folder(model, tokenizer, tmp_path / "out")))
            == size + grown
        )


def test_a_pad_token_that_is_in_the_data_is_learnt(tmp_path):
    """An export names ``unk`` as its pad token, and transformers then keeps that row of the embedding from its gradient."""
    base = save_base(tmp_path / "base", len(without_pad("unk")), without_pad("unk"))
    tokenizer = ready(base)
    folder = export_folder(load_causal_lm(ModelSpec(path=base), tokenizer), tokenizer, tmp_path / "out")
    network = load_causal_lm(ModelSpec(path=str(folder)), tokenizer)
    unk = tokenizer.unk_token_id
    assert network.config.pad_token_id == unk
    ids = torch.tensor([[3, unk, 4, 5]])
    PolicyNetwork(network)(ids, torch.ones_like(ids).bool(), torch.arange(4)[None] > 0).logprobs.sum().backward()
    assert network.get_input_embeddings().weight.grad[unk].abs().sum() > 0


def test_tokens_other_than_padding_still_need_rows_below_an_adapter(tmp_path):
    tokenizer = without_pad("unk")
    base = save_base(tmp_path / "base", len(tokenizer) - 2, tokenizer)
    with pytest.raises(UserError, match="leave the others at random"):
        load_causal_lm(ModelSpec(path=base, adapter=LORA), ready(base))


# ---------------------------------------------------------------- holes, and more embeddings than tokens


def with_holes():
    """Ids 3, 5 and 6 have no token; the largest is two more than the number of tokens."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tokenizer_of(words("<s>", "</s>", "<pad>", *"abcdef", holes=(3, 5, 6)), **special)


HOLES = [3, 5, 6]


@pytest.fixture
def holed(tmp_path):
    """More rows than ids, and ids without tokens among them; those have the largest logits."""
    base = save_base(tmp_path / "base", 15, with_holes())
    tokenizer = ready(base)
    network = load_causal_lm(ModelSpec(path=base), tokenizer)
    with torch.no_grad():
        network.get_output_embeddings().weight[[*HOLES, 12, 13, 14]] *= 5
    return network.eval(), tokenizer


@pytest.mark.parametrize("load", [load_causal_lm, lambda *args: load_scalar_model(*args, new_head=True)])
def test_a_network_from_scratch_has_a_row_for_the_largest_id(load):
    network = load(ModelSpec(architecture={"model_type": "llama", **SIZES}), with_holes())
    assert len(with_holes()) == 9
    assert rows_of(network) == network.config.vocab_size == 12


def test_embeddings_grow_to_the_largest_id(tmp_path):
    tokenizer = with_holes()
    base = save_base(tmp_path / "base", 9, tokenizer)
    assert rows_of(load_causal_lm(ModelSpec(path=base), tokenizer)) == 12


@pytest.mark.parametrize("engine", [NativeEngine(), TransformersEngine()], ids=["native", "transformers"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_engine_draws_an_id_without_a_token(engine, temperature, holed):
    network, tokenizer = holed
    PolicyNetwork(network)
    torch.manual_seed(0)
    ids = torch.tensor([[7, 8, 9]] * 40)
    sampling = SamplingParameters(max_new_tokens=10, temperature=temperature)
    tokens = engine.generate(network, ids, ids > 0, sampling, eos_ids=[1], pad_id=2).tokens
    assert set(tokens.flatten().tolist()) <= set(tokenizer.get_vocab().values())
    plain = network(ids).logits[:, -1].softmax(-1)
    assert plain[0, [*HOLES, 12, 13, 14]].sum() > 0.3  # without the mask they would have been


def test_vllm_is_told_of_ids_without_tokens(holed):
    fields = requests(1, SamplingParameters(), [1], missing_tokens(holed[0]))[0]
    assert fields["logit_bias"] == {str(index): -100.0 for index in (*HOLES, 12, 13, 14)}
    assert "logit_bias" not in requests(1, SamplingParameters(), [1])[0]


@pytest.mark.parametrize("engine", [NativeEngine(), TransformersEngine()], ids=["native", "transformers"])
def test_what_is_trained_on_is_the_distribution_that_was_sampled(engine, holed):
    """Log-probabilities, entropy and mean logit are over the tokens that exist, and sum to one there."""
    network, tokenizer = holed
    policy = PolicyNetwork(network)
    torch.manual_seed(1)
    prompt = torch.tensor([[7, 8, 9]] * 6)
    drawn = engine.generate(
        network, prompt, prompt > 0, SamplingParameters(max_new_tokens=5, temperature=0.7), eos_ids=[99], pad_id=2
    )
    ids = torch.cat([prompt, drawn.tokens], dim=1)
    response = torch.arange(8).expand(6, -1) >= 3
    output = policy(ids, torch.ones_like(response), response, temperature=0.7, collisions=True)
    torch.testing.assert_close(output.logprobs[:, 2:], drawn.logprobs, atol=1e-5, rtol=1e-5)
    if drawn.entropy is not None:  # the transformers engine keeps none
        torch.testing.assert_close(output.entropy[:, 2:], drawn.entropy, atol=1e-5, rtol=1e-5)
    known = sorted(tokenizer.get_vocab().values())
    logits = network(ids).logits[:, 2:-1, known]
    expected = (logits / 0.7).log_softmax(-1)
    places = torch.tensor([[known.index(t) for t in row] for row in drawn.tokens.tolist()])
    torch.testing.assert_close(
        output.logprobs[:, 2:], expected.gather(-1, places[..., None])[..., 0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(output.mean_logit[:, 2:], logits.mean(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(output.greedy[:, 2:], places == logits.argmax(-1))
    torch.testing.assert_close(output.collisions[:, 2:], expected.exp().square().sum(-1).log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_ids_without_tokens_get_no_gradient_and_the_others_that_of_autograd(entropy_gradient, holed):
    network, tokenizer = holed
    known = sorted(tokenizer.get_vocab().values())
    ids = torch.tensor([[7, 8, 9, 10, 4, 1]])
    policy = PolicyNetwork(network)
    output = policy(ids, ids > 0, torch.arange(6)[None] > 1, entropy_gradient=entropy_gradient)
    (output.logprobs.sum() + (output.entropy.sum() if entropy_gradient else 0)).backward()
    got = {name: p.grad.clone() for name, p in network.named_parameters()}
    assert not got["lm_head.weight"][[*HOLES, 12, 13, 14]].any()
    network.zero_grad()
    log_probs = network(ids).logits[:, 1:-1, known].log_softmax(-1)
    places = torch.tensor([[known.index(t) for t in ids[0, 2:].tolist()]])
    loss = log_probs.gather(-1, places[..., None]).sum()
    loss = loss - (log_probs.exp() * log_probs).sum() if entropy_gradient else loss
    loss.backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_complete_vocabulary_has_no_mask(tmp_path):
    tokenizer = without_pad("unk")
    base = save_base(tmp_path / "base", len(tokenizer), tokenizer)
    assert missing_tokens(load_causal_lm(ModelSpec(path=base), ready(base))) is None


def test_a_pad_token_that_would_take_anothers_id_is_refused():
    tokenizer = tokenizer_of(words("</s>", *"abcdef", holes=(3,)), eos_token="</s>")
    with pytest.raises(UserError, match="its ids have holes"):
        repair_pad_token(tokenizer)


def test_the_mask_is_no_weight(holed, tmp_path):
    network, tokenizer = holed
    folder = export_folder(network, tokenizer, tmp_path / "out")
    assert rows_of(AutoModelForCausalLM.from_pretrained(folder)) == 15
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 15
    assert not any("missing" in name for name in network.state_dict())
