"""Networks of a few thousand weights, drawn wide so that every position and every token matters."""

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from tests.unit.models.adapted import LORA, exported, learnt

torch.set_num_threads(1)  # threads that wait for each other cost more than they give

ARCHITECTURES = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
    },  # dropout 0.1 by default
}


def widened(network):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35, generator=generator)
    return network


@pytest.fixture
def tokenizer():
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, then a to h."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]


@pytest.fixture
def spec(architecture):
    return ModelSpec(architecture=architecture)


@pytest.fixture
def causal(spec, tokenizer):
    return widened(load_causal_lm(spec, tokenizer))


@pytest.fixture
def scalar(spec, tokenizer):
    return widened(load_scalar_model(spec, tokenizer, new_head=True))


class Rows:
    """Sequences of mixed lengths, the pad id among their real tokens, and how to lay them out."""

    tokens = ([1, 5, 0, 7, 4, 9, 2], [1, 6, 0, 2], [5, 8, 2, 6, 2], [1, 10, 11])
    prompts = (3, 1, 3, 2)  # of these, as many tokens are the prompt

    @classmethod
    def laid_out(cls, side, extra=0, garbage=0):
        """input_ids, attention_mask and response_mask, padded on one side to a common width."""
        width = max(map(len, cls.tokens)) + extra
        ids = torch.full((len(cls.tokens), width), garbage)
        attention, response = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
        for b, (row, prompt) in enumerate(zip(cls.tokens, cls.prompts, strict=True)):
            start = 0 if side == "right" else width - len(row)
            ids[b, start : start + len(row)] = torch.tensor(row)
            attention[b, start : start + len(row)] = True
            response[b, start + prompt : start + len(row)] = True
        return ids, attention, response


@pytest.fixture
def rows():
    return Rows


@pytest.fixture
def base(causal, tokenizer, tmp_path):
    return str(export_folder(causal, tokenizer, tmp_path / "base"))


@pytest.fixture
def adapted(base):
    return ModelSpec(path=base, adapter=LORA)


@pytest.fixture
def batch(rows):
    return rows.laid_out("right")


@pytest.fixture
def reward_adapter(base, tokenizer, tmp_path):
    """A trained reward model: its adapter folder, and the model."""
    model = ScalarModel(load_scalar_model(ModelSpec(path=base, adapter=LORA), tokenizer, new_head=True))
    learnt(model, seed=3)
    model.normalise(2.0, 3.0)
    return exported(model, tokenizer, tmp_path / "reward") / "adapter", model
