"""Build or load the two kinds of network: causal language models and scalar (reward, value) models."""

import logging
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_lightning.data.tokenizers import token_ids
from rlhf_lightning.errors import UserError, missing_model
from rlhf_lightning.models.adapter_files import read_adapter
from rlhf_lightning.models.adapters import has_adapter, same_adapter_again, with_adapter
from rlhf_lightning.models.head import mask_missing_tokens
from rlhf_lightning.models.precision import cast
from rlhf_lightning.models.quantization import quantized
from rlhf_lightning.models.routers import set_up_routers
from rlhf_lightning.models.spec import ModelSpec

log = logging.getLogger(__name__)

SOURCE_DTYPE = "_rlhf_source_dtype"  # attribute of a loaded model


def load_causal_lm(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load or build a causal language model whose vocabulary and special tokens fit the tokenizer; dropout is off.

    Args:
        spec: What to build.
        tokenizer: Has distinct pad and EOS tokens (see :func:`rlhf_lightning.data.tokenizers.repair_pad_token`).

    Returns:
        The model, in ``spec.dtype``, on the CPU.

    Raises:
        UserError: If the folder is missing, holds no such model, or not all of its weights.
    """
    if spec.path is None:
        model = _from_scratch(AutoModelForCausalLM, spec, tokenizer)
    else:
        model, missing = _from_path(AutoModelForCausalLM, spec)
        _refuse_missing(spec.path, missing)
    return with_adapter(_fit_to_tokenizer(model, tokenizer, spec), spec)


def load_scalar_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, new_head: bool = False, members: int | None = 1
) -> PreTrainedModel:
    """Load or build a sequence classifier with one label, or several for an ensemble: a reward model or a critic.

    Args:
        spec: What to build.
        tokenizer: As in :func:`load_causal_lm`.
        new_head: Allow a head that is not in the checkpoint; it is then drawn from N(0, 1/(d+1)), as in OpenAI's
            summarize-from-feedback. Only the training of a reward model may ask for that.
        members: Number of heads on the trunk; None for as many as the checkpoint holds.

    Returns:
        The model, in ``spec.dtype``, on the CPU.

    Raises:
        UserError: As :func:`load_causal_lm`, and if a head is missing without ``new_head``, or there are others than wanted.
    """
    if spec.path is None:
        model = _from_scratch(AutoModelForSequenceClassification, spec, tokenizer, num_labels=members or 1)
        missing = [name for name, _ in last_linear(model).named_parameters()]
    else:
        model, missing = _from_path(AutoModelForSequenceClassification, spec, members)
        _refuse_missing(spec.path, [name for name in missing if not _is_of_head(model, name)])
    if missing and not new_head and not _adapter_has_head(spec):
        raise UserError(
            f"{spec.path or 'a network from scratch'} holds no trained scalar head ({', '.join(missing)} missing): it is not a"
            " reward model; give the export folder of a RewardModelModule run"
        )
    if missing:
        _draw_head(last_linear(model))
    if spec.adapter is None:
        return _fit_to_tokenizer(model, tokenizer, spec)
    if last_linear(model).out_features > 1:
        raise UserError(f"{spec.path}: an adapter goes with one scalar head; train an ensemble without one")
    return with_adapter(_fit_to_tokenizer(model, tokenizer, spec), spec, scalar_head(model))


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that maps a hidden state to the scalar.

    Raises:
        UserError: If the architecture has no token-level linear head named ``score`` (encoders have none).
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear `score` head; use a decoder such as llama, qwen3 or gpt2"
        )
    return head


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether a sequence classifier reads a text as a whole, as BERT does, and pools it in a head of its own."""
    return isinstance(getattr(model, "classifier", None), nn.Module)


def last_linear(model: PreTrainedModel) -> nn.Linear:
    """The layer that the scalar comes out of: ``score``, or the last one of an encoder's classification head."""
    head: Any = model.classifier if is_encoder(model) else nn.Identity()
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    return linear[-1] if linear else scalar_head(model)


def _is_of_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is not the trunk's: an encoder's pooler is trained with its head, and in no masked language model."""
    if not is_encoder(model):
        return name.startswith("score.")
    return ".pooler." in name or not name.startswith(f"{model.base_model_prefix}.")


def embedding_weight(model: PreTrainedModel) -> nn.Parameter:
    """The input embedding, shape (vocabulary, hidden)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def source_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Precision of the weights in the folder that a model was loaded from; None if there was none, or it does not say."""
    stored = getattr(model, SOURCE_DTYPE, None)
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else None


def _from_path(auto: Any, spec: ModelSpec, members: int | None = None) -> tuple[PreTrainedModel, list[str]]:
    path = str(spec.path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        if (Path(path) / "adapter_config.json").is_file():
            raise UserError(f"{path} is an adapter; give its base as `path`, and this as `adapter.path`")
        raise UserError(f"{path} holds no config.json; give a folder in Hugging Face format, such as a run's export/")
    looks_local = path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1
    if looks_local and not Path(path).exists():
        raise UserError(missing_model(path))
    common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = _without_dropout(AutoConfig.from_pretrained(path, **common))
        stored = config.dtype  # loading overwrites it with the dtype that is asked for
        if auto is AutoModelForSequenceClassification:
            config.num_labels = _heads(config, members, path)
        if torch.get_default_device().type == "meta":  # another rank reads the weights and hands them on
            model = _without_weights(auto, config, spec)
            setattr(model, SOURCE_DTYPE, stored)
            return model, []
        model, info = auto.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantized(spec),
            **common,
        )
    except (OSError, ValueError) as error:
        if not Path(path).exists():
            raise UserError(missing_model(path)) from error
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path} brings code of its own, which is not run; if you have read it, set trust_remote_code: true for this "
                f"model and add --import {path} to the command line"
            ) from error
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    setattr(model, SOURCE_DTYPE, stored)
    if has_adapter(model):  # transformers has put it in, and would save that alone
        raise UserError(f"{path} holds an adapter; give its base as `path`, and this as `adapter.path`")
    return model, sorted(info["missing_keys"])


def _heads(config: PretrainedConfig, members: int | None, path: str) -> int:
    """How many scalar heads to build: as many as wanted, which a checkpoint that has any must hold."""
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    held = config.num_labels if classifies else None
    wanted = members or held or 1
    if held not in (None, wanted):
        raise UserError(
            f"{path} holds {held} scalar heads on one trunk, not {wanted}; an ensemble is scored with by EnsembleReward"
        )
    return wanted


def _without_weights(auto: Any, config: PretrainedConfig, spec: ModelSpec) -> PreTrainedModel:
    """What ``from_pretrained`` gives, but for the weights."""
    if spec.quantization is not None:
        raise UserError(
            f"{spec.path}: {spec.quantization} weights can't be cut into shards; use -c configs/strategy/ddp.yaml"
        )
    model = auto.from_config(
        config,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )
    if model.can_generate():
        with suppress(OSError):  # it has none of its own; from_pretrained passes over that as well
            model.generation_config = GenerationConfig.from_pretrained(str(spec.path), revision=spec.revision or "main")
    return model


def _refuse_missing(path: str, names: list[str]) -> None:
    """Transformers draws weights that it does not find at random, and says so in a log line only."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"{path} has no weights for {', '.join(names[:3])}{more}: give a folder that holds the whole model"
        )


def _from_scratch(auto: Any, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    fields = dict(spec.architecture or {})
    model_type = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError as error:
        raise UserError(f"architecture.model_type {model_type!r} is unknown to transformers") from error
    for key in fields:
        if key not in known:
            near = "".join(f" (did you mean {name}?)" for name in get_close_matches(key, known, 1))
            raise UserError(f"architecture.{key} is not a field of the {model_type} config{near}; it would be ignored")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(
        model_type, **{"vocab_size": max(token_ids(tokenizer)) + 1, **ids, **fields, **kwargs}
    )
    try:
        model = auto.from_config(_without_dropout(config), attn_implementation=spec.attn_implementation)
    except ValueError as error:  # a model of another kind
        raise UserError(f"architecture.model_type {model_type}: {str(error).splitlines()[0]}") from error
    cast(model, getattr(torch, spec.dtype))
    return model


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout, of units or of layers, makes old and new log-probabilities differ at equal weights; no stage here uses it."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):  # as DBRX has one for attention and one for experts
            _without_dropout(value)
        elif ("dropout" in key or key.endswith(("pdrop", "layerdrop"))) and isinstance(value, float) and value > 0:
            setattr(config, key, 0.0)
    return config


def _adapter_has_head(spec: ModelSpec) -> bool:
    """Whether the head comes with a trained adapter."""
    path = spec.adapter.path if spec.adapter is not None else None
    return path is not None and read_adapter(path).has_head


def _draw_head(head: nn.Linear) -> None:
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> PreTrainedModel:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError("the tokenizer's pad token is missing or equal to EOS; repair it before a model is loaded")
    ids, rows = token_ids(tokenizer), embedding_weight(model).shape[0]
    beyond = {index for index in ids if index >= rows}
    if spec.adapter is not None and beyond - {tokenizer.pad_token_id}:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens up to id {max(ids)} and {spec.path} embeddings for {rows}: an adapter "
            "would leave the others at random; give a base that has them, such as the export of an SFT run without an adapter"
        )
    if beyond and spec.adapter is None:
        log.warning("%s: embeddings grow from %d to %d rows for the tokenizer's tokens", spec.path, rows, max(ids) + 1)
        rows = max(ids) + 1
        model.resize_token_embeddings(rows, mean_resizing=False)
    for name in ("pad", "bos", "eos"):
        index = getattr(tokenizer, f"{name}_token_id")
        # Padding is masked wherever the network is called, so that it needs no row of a base that an adapter leaves as it is.
        setattr(model.config, f"{name}_token_id", None if index is not None and index >= rows else index)
    if tokenizer.pad_token_id == getattr(tokenizer, "unk_token_id", None):
        embedding: Any = model.get_input_embeddings()
        embedding.padding_idx = None  # it would keep a token of the data from being learnt
    mask_missing_tokens(model, ids)
    set_up_routers(model, spec.router_aux_loss_coef)
    model.train()  # from_pretrained leaves eval mode, in which gradient checkpointing does nothing; dropout is off anyway
    if spec.gradient_checkpointing:
        again = {"use_reentrant": False} | ({"context_fn": same_adapter_again(model)} if spec.adapter else {})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    return model
