"""What a network is made from, as plain data that a YAML can say."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, overload

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class LoRA:
    r"""Small trained matrices beside weights that stay as they are: :math:`W x + \frac{\alpha}{r} B A x`, B zero at first.

    There is no dropout: old and new log-probabilities must be equal at equal weights.

    Attributes:
        rank: Rows of A.
        alpha: Numerator of the scale.
        target_modules: Names of linear layers of the trunk, as peft matches them (q_proj, v_proj, ...); or all of them.
        use_rslora: The scale is alpha over the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732).
        init: How A is drawn.
        path: Instead of all these: folder or hub id of a trained adapter to go on with.

    Source: Hu et al. 2021 (arXiv 2106.09685).
    """

    rank: int = 16
    alpha: int = 32
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    use_rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    path: str | None = None

    def __post_init__(self) -> None:
        """Refuse an adapter that could not learn, and settings that a trained one has already."""
        if self.rank < 1 or self.alpha < 1 or not self.target_modules:
            raise UserError(f"an adapter needs a rank, an alpha and target_modules: {self}")
        if self.path is not None and replace(self, path=None) != LoRA():
            raise UserError(f"the adapter in {self.path} has its own rank, alpha and targets: give `path` alone")


@dataclass(frozen=True)
class ModelSpec:
    """A network: from a folder or hub id, or from scratch.

    Attributes:
        path: Folder in Hugging Face format, or hub id.
        architecture: Instead of ``path``: ``model_type`` and the fields of its transformers config, for instance
            ``{model_type: llama, hidden_size: 96, num_hidden_layers: 3}``. Vocabulary and special tokens come from the
            tokenizer.
        dtype: Of the weights. Losses and log-softmax are float32 whatever this is, and so are the weights of an adapter.
            Trained weights in half precision need :class:`~rlhf_lightning.modules.master_weights.MasterWeights` at learning
            rates below 1e-4; a frozen reference or reward model may be in half precision.
        attn_implementation: As in transformers: sdpa, eager, flash_attention_2, ...; None for its choice.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        adapter: Train this beside the weights instead of the weights; None trains them all.
        router_aux_loss_coef: Of mixtures of experts: weight of the loss that keeps all experts in use, added in every method
            that trains the network. None for that of its config, 0 for none.
        quantization: Of the frozen weights below an adapter (bitsandbytes, needs a CUDA GPU): 4bit (NF4) or 8bit.
        revision: Of the hub repository.
        trust_remote_code: Run code that the repository brings. Only for repositories that you have read.
    """

    path: str | None = None
    architecture: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    adapter: LoRA | None = None
    router_aux_loss_coef: float | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse a network that is described twice or not at all, and one of which nothing could be trained."""
        if (self.path is None) == (self.architecture is None):
            raise UserError("a model needs either `path` (a folder or hub id) or `architecture`, and not both")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise UserError("`architecture` needs a `model_type`, for instance llama, gpt2 or qwen3")
        if self.adapter is not None and self.path is None:
            raise UserError("an `adapter` needs a trained base: give `path`; a network from scratch is trained whole")
        if self.quantization is not None and self.adapter is None:
            raise UserError("`quantization` is for frozen weights below an `adapter`; give one, or leave it out")

    def shares_base_with(self, other: "ModelSpec") -> bool:
        """Whether both are adapters on one and the same base, which then need not be loaded twice."""
        return None not in (self.adapter, other.adapter) and replace(self, adapter=other.adapter) == other


if TYPE_CHECKING:
    Model: TypeAlias = ModelSpec | str | Path
else:
    # What a config can say. Annotated: an argument of ``ModelSpec | str | None`` without a default can't be null in a config.
    Model = Annotated[ModelSpec | str, "a path stands for a description"]


@overload
def as_spec(model: Model) -> ModelSpec: ...
@overload
def as_spec(model: None) -> None: ...
@overload
def as_spec(model: Model | None) -> ModelSpec | None: ...
def as_spec(model: Model | None) -> ModelSpec | None:
    """The description of a network that may be given by its path alone.

    Raises:
        UserError: If it is neither text nor a description.
    """
    if model is None or isinstance(model, ModelSpec):
        return model
    if isinstance(model, str | Path):
        return ModelSpec(path=str(model))
    raise UserError(
        f"a model is given as a path, a hub id or a ModelSpec (rlhf_lightning.models.spec), not as a {type(model).__name__}"
    )


def as_wide_as(policy: ModelSpec, reference: ModelSpec | None) -> ModelSpec:
    """The reference of a policy: one in float32 is read in the policy's half precision, for both must round alike.

    Args:
        policy: What is trained.
        reference: What it is compared with; None for the policy as it starts.
    """
    if reference is None:
        return policy
    return replace(reference, dtype=policy.dtype) if reference.dtype == "float32" else reference
