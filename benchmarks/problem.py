"""What every side is given: one set of weights, rows and response lengths that come from nothing but a seed."""

import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PAD, EOS, UNK, FIRST_WORD = 0, 1, 2, 3
METHODS = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo")
GROUPED = ("grpo", "rloo")
ONLINE = ("ppo", *GROUPED)
LR, DPO_BETA, KL_COEF, MAX_GRAD_NORM = 1e-5, 0.1, 0.05, 1.0


@dataclass(frozen=True)
class Lengths:
    """Log-normal numbers of tokens, cut off on both sides."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, generator: random.Random) -> int:
        """One length."""
        drawn = round(self.median * generator.lognormvariate(0, self.sigma))
        return min(max(drawn, self.least), self.most)


@dataclass(frozen=True)
class Size:
    """A network, its rows and how long one run lasts.

    Attributes:
        vocabulary, hidden, layers, heads, kv_heads, intermediate: Of a Llama with tied embeddings.
        rows: Demonstrations a step.
        pairs: Pairs a step.
        rollouts: Responses an iteration of PPO.
        group: Responses to one prompt.
        groups: Prompts an iteration of GRPO or RLOO, and responses to each, which are learnt from once.
        epochs: Passes over PPO's responses.
        micro: Responses a forward of our PPO's update; None for all.
        steps: Warm-up and timed steps.
        ppo_steps: Warm-up and timed iterations of the methods that sample.
        prompt: Lengths of prompts.
        response: Lengths of responses, EOS included; the longest is what may be generated.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    rows: int = 16
    pairs: int = 8
    rollouts: int = 32
    group: int = 1
    groups: tuple[int, int] = (8, 4)
    epochs: int = 4
    micro: int | None = None
    steps: tuple[int, int] = (2, 10)
    ppo_steps: tuple[int, int] = (1, 2)
    prompt: Lengths = Lengths(40, 0.5, 8, 128)
    response: Lengths = Lengths(60, 0.7, 4, 256)


TOY: dict[str, Any] = {
    "rows": 4,
    "pairs": 3,
    "rollouts": 5,
    "groups": (2, 3),
    "epochs": 2,
    "steps": (1, 2),
    "ppo_steps": (1, 1),
    "prompt": Lengths(20, 0.3, 16, 32),  # a prompt of under 16 tokens is not shared on a CPU
    "response": Lengths(6, 0.7, 2, 16),
}
GPU: dict[str, Any] = {
    "rows": 32,
    "pairs": 16,
    "rollouts": 256,
    "epochs": 1,
    "micro": 8,
    "steps": (2, 5),
    "ppo_steps": (1, 1),
    "prompt": Lengths(256, 0.5, 32, 768),
    "response": Lengths(256, 0.7, 16, 1024),
}
SIZES = {
    "toy": Size(97, 16, 2, 4, 2, 24, **TOY),
    "tiny": Size(4096, 128, 4, 4, 2, 384),
    "small": Size(32000, 384, 6, 6, 3, 1536, rollouts=8, groups=(4, 4), epochs=2, steps=(1, 3), ppo_steps=(1, 2)),
    # For gpu.py, in the shapes of Qwen2.5-0.5B, of Llama 3.2 1B and of Qwen2.5-1.5B.
    "0.5b": Size(151936, 896, 24, 14, 2, 4864, **GPU),
    "1b": Size(128256, 2048, 16, 32, 8, 8192, **GPU),
    "1.5b": Size(151936, 1536, 28, 12, 2, 8960, **GPU),
}


@dataclass(frozen=True)
class Spec:
    """One run of one side, as plain data.

    Attributes:
        method: sft, reward, dpo or ppo.
        size: Name in ``SIZES``.
        side: Who runs it.
        precision: "32" or "bf16".
        threads: Of the matrix products.
        warmup: Steps that are not timed; the first of them is compared and counted.
        steps: Steps that are timed.
        folder: Where :func:`write` put weights and rows.
        device: "cpu" or "cuda".
        ranks: Processes that share each batch; only of our side.
        changes: Fields of the size that are not as its name says; of a ``Lengths`` its four numbers.
    """

    method: str
    size: str
    side: str
    precision: str
    threads: int
    warmup: int
    steps: int
    folder: str
    device: str = "cpu"
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Size:
        """The size that is named, with its changes; ``rollouts`` and ``group`` are those of the method."""
        changes: dict[str, Any] = {
            name: Lengths(*value) if isinstance(value, list) else value for name, value in self.changes.items()
        }
        shape = replace(SIZES[self.size], **changes)
        if self.method not in GROUPED:
            return shape
        prompts, group = shape.groups
        return replace(shape, rollouts=prompts * group, group=group, epochs=1)

    @property
    def batch_size(self) -> int:
        """Rows, pairs or responses a step."""
        size = self.shape
        if self.method in ONLINE:
            return size.rollouts
        return size.rows if self.method == "sft" else size.pairs

    @property
    def policy(self) -> str:
        """Folder of the language model."""
        return str(Path(self.folder, "policy"))

    @property
    def reference(self) -> str:
        """Folder of DPO's reference: the policy, a little moved, so that the first loss is not log 2 whoever computes it."""
        return str(Path(self.folder, "reference"))

    @property
    def scalar(self) -> str:
        """Folder of the model with a scalar head: what a reward model starts from, and PPO's reward model and critic."""
        return str(Path(self.folder, "scalar"))

    def rows(self) -> list[dict[str, list[int]]]:
        """The rows of the whole run, in order."""
        rows: list[dict[str, list[int]]] = json.loads(Path(self.folder, "rows.json").read_text())
        return rows[: self.batch_size * (self.warmup + self.steps)]

    def batches(self) -> list[list[dict[str, list[int]]]]:
        """The same, step by step."""
        rows, size = self.rows(), self.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def json(self) -> str:
        """For the command line of a process."""
        return json.dumps(asdict(self))


def draw_rows(size: Size, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, ``size.group`` a prompt; responses end with EOS."""
    generator = random.Random(seed)

    def words(number: int) -> list[int]:
        return [generator.randrange(FIRST_WORD, size.vocabulary) for _ in range(number)]

    def response() -> list[int]:
        return [*words(size.response.draw(generator) - 1), EOS]

    rows: list[dict[str, list[int]]] = []
    for number in range(count):
        again = number % size.group
        prompt = rows[-1]["prompt_ids"] if again else words(size.prompt.draw(generator))
        rows.append({"prompt_ids": prompt, "chosen_ids": response(), "rejected_ids": response()})
    return rows


def sequences(method: str, row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """What a step on this row has to read: prompt and response, once for each response that the method learns from.

    KTO reads each again, behind another prompt: other sequences with as many tokens.
    """
    names = ("chosen_ids", "rejected_ids") if method in ("reward", "dpo", "kto") else ("chosen_ids",)
    return [(row["prompt_ids"], row[name]) for name in names * (2 if method == "kto" else 1)]


def crossed(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Each prompt with the response of the row before, the first with the last one's."""
    return [(prompt, pairs[number - 1][1]) for number, (prompt, _) in enumerate(pairs)]


def odd_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: which part of a response's ids is odd."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def text(ids: list[int]) -> str:
    """Ids as text, without the closing EOS."""
    return " ".join(f"w{token}" for token in ids if token != EOS)


def tokenizer(vocabulary: int) -> Any:
    """One word a token: w3, w4 and so on."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{token}" for token in range(FIRST_WORD, vocabulary))]
    backend = Tokenizer(WordLevel({name: token for token, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def write(size: Size, folder: Path, count: int, dtype: str = "float32") -> None:
    """Put weights, tokenizer and rows into a folder that every side loads.

    Args:
        size: What to make.
        folder: New.
        count: Number of rows; a multiple of ``size.group``.
        dtype: Of the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    fields: dict[str, Any] = {"num_labels": 1}
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(512, size.prompt.most + size.response.most),
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **fields,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    scalar = LlamaForSequenceClassification(config)
    scalar.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.normal_(scalar.score.weight, std=(size.hidden + 1) ** -0.5)
    reference = LlamaForCausalLM(config)
    for moved, weight in zip(reference.parameters(), policy.parameters(), strict=True):
        moved.data.copy_(weight.data + 0.003 * torch.randn_like(weight))
    words = tokenizer(size.vocabulary)
    for name, model in (("policy", policy), ("reference", reference), ("scalar", scalar)):
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "rows.json").write_text(json.dumps(draw_rows(size, count)))
