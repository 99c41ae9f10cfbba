"""What a network is made from, as plain data that a YAML can say."""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class ModelSpec:
    """A network: from a folder or hub id, or from scratch.

    Attributes:
        path: Folder in Hugging Face format, or hub id.
        architecture: Instead of ``path``: ``model_type`` and the fields of its transformers config, for instance
            ``{model_type: llama, hidden_size: 96, num_hidden_layers: 3}``. Vocabulary and special tokens come from the
            tokenizer.
        dtype: Of the weights. Losses and log-softmax are float32 whatever this is.
        attn_implementation: As in transformers: sdpa, eager, flash_attention_2, ...; None for its choice.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        revision: Of the hub repository.
        trust_remote_code: Run code that the repository brings. Only for repositories that you have read.
    """

    path: str | None = None
    architecture: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse a network that is described twice or not at all."""
        if (self.path is None) == (self.architecture is None):
            raise UserError("a model needs either `path` (a folder or hub id) or `architecture`, and not both")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise UserError("`architecture` needs a `model_type`, for instance llama, gpt2 or qwen3")
