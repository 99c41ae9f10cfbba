"""What both sides are given: tiny networks and rows that come from nothing but a seed.

Weights are drawn with Python's generator, whose numbers are the same on every machine and in every version.
"""

import hashlib
import random
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec

PAD, BOS, EOS = 0, 1, 2
WORDS = "abcdefghijklmnop"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
SEEDS = {"policy": 1, "reference": 2, "reward": 3, "critic": 4}


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, then a to p: one word a token."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: f"<{name.split('_')[0]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    ensure_chat_template(made)
    return made


def tokenizer_padding_with(token: str) -> PreTrainedTokenizerFast:
    """The same with another pad token."""
    made = deepcopy(tokenizer())
    made.pad_token = token
    return made


# ---------------------------------------------------------------- networks


def network(architecture: str, role: str) -> PreTrainedModel:
    """The policy, another policy to be its reference, a reward model or a critic."""
    spec = ModelSpec(architecture=ARCHITECTURES[architecture])
    causal = role in ("policy", "reference")
    built = load_causal_lm(spec, tokenizer()) if causal else load_scalar_model(spec, tokenizer(), new_head=True)
    return draw(built, SEEDS[role])


def draw(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights so wide that every position and every token matters; norms near 1, biases near 0."""
    generator = random.Random(seed)
    for name, parameter in sorted(model.named_parameters()):
        centre, width = (0.0, 0.5) if parameter.dim() > 1 else (0.0 if name.endswith("bias") else 1.0, 0.3)
        values = [centre + width * (2 * generator.random() - 1) for _ in range(parameter.numel())]
        parameter.data.copy_(torch.tensor(values, dtype=torch.float64).view(parameter.shape))
    return model


def folders(architecture: str, root: Path) -> dict[str, str]:
    """Every network in Hugging Face format, by role."""
    return {
        role: str(export_folder(network(architecture, role), tokenizer(), root / architecture / role)) for role in SEEDS
    }


# ---------------------------------------------------------------- rows


def words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(count))


def _pairs(lengths: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    generator = random.Random(7)
    return [
        {
            "prompt": words(generator, prompt),
            "chosen": " " + words(generator, chosen),
            "rejected": " " + words(generator, rejected),
            "margin": 0.25 * number,
        }
        for number, (prompt, chosen, rejected) in enumerate(lengths)
    ]


UNEVEN = _pairs([(1, 2, 5), (4, 3, 1), (2, 6, 2), (3, 1, 4)])
EVEN = _pairs([(2, 3, 3), (4, 3, 3), (1, 3, 3), (3, 3, 3)])  # every response is three words and EOS
PROMPTS = ["a", "b c d", "e f", "g h i j", "k", "l m", "n o p", "a p b o"]
WIDTH = 6  # new tokens


def _responses(lengths: list[int | None]) -> list[list[int]]:
    generator = random.Random(8)
    drawn = [[4 + generator.randrange(16) for _ in range(WIDTH)] for _ in lengths]
    # What stands after EOS is never seen: generation stops there.
    return [row if n is None else [*row[: n - 1], EOS, *row[n:]] for row, n in zip(drawn, lengths, strict=True)]


RESPONSES = {
    "full": _responses([None, WIDTH, WIDTH, None, WIDTH, WIDTH, None, WIDTH]),  # EOS in the last column, or cut off
    "early": _responses([None, 1, 3, WIDTH, 2, 5, 4, 3]),  # length with EOS
}


def encoded(pair: dict[str, Any], end: tuple[int, ...] = (EOS,)) -> dict[str, Any]:
    """Token ids of a pair, EOS at the end of each response."""
    ids = {side: tokenizer()(pair[side])["input_ids"] for side in ("prompt", "chosen", "rejected")}
    return {
        "prompt_ids": ids["prompt"],
        "chosen_ids": [*ids["chosen"], *end],
        "rejected_ids": [*ids["rejected"], *end],
        "margin": pair["margin"],
    }


def checksum() -> str:
    """Of every weight and every row: equal on two machines if and only if they compare the same problem."""
    digest = hashlib.sha256(repr((UNEVEN, EVEN, PROMPTS, RESPONSES)).encode())
    for architecture in ARCHITECTURES:
        for role in SEEDS:
            for name, parameter in sorted(network(architecture, role).named_parameters()):
                digest.update(name.encode())
                digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]
