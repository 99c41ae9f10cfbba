"""Up to which length an architecture computes packed sequences, and sequences of one batch, as it computes each alone.

Some rules begin at a length: a window or chunk that exists only in the model's own mask, or rotary frequencies that change
for the complete batch when its longest sequence passes a bound. A few tokens never reach them. So a small throw-away network
of the same class is built whose windows, chunks and bounds are a few tokens, and is read at lengths beyond them.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

SHORT = 4  # tokens: what windows, chunks and bounds become
ROWS = (3, 17, 10, 14)  # lengths of the sequences that are read
LARGEST = 20_000_000  # parameters of the throw-away network
VOCABULARY = WIDTH = 64  # of one that is made smaller
BOUND = re.compile(r"window|chunk|block_size|local_attention|floor_scale|index_topk|original_max_position")
NO_BOUND = re.compile(r"layer|pattern|kernel|feed_forward|lm_head|^num_|^use_")
ROPE = ("rope_parameters", "rope_scaling")
FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError)

Field = tuple[str, ...]  # keys from the config down to a value
Run = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]  # network, ids and mask to hidden states and their indices


class LengthRules(NamedTuple):
    """Bounds of an architecture, in tokens; None where there is none, 0 where not even short sequences may.

    Attributes:
        packed: Longest sequence that may be packed with others.
        together: Longest sequence that may be in a batch with others, packed or padded.
    """

    packed: int | None = None
    together: int | None = None


def trunk_of(network: PreTrainedModel) -> PreTrainedModel:
    """The transformer below the head. Llama-4 names as its base what only its multimodal variant has."""
    trunk: Any = network.base_model
    if trunk is network and network.can_generate():
        return next((part for part in network.children() if isinstance(part, PreTrainedModel)), network)
    return trunk


_KNOWN: dict[tuple[type, str], LengthRules] = {}


@torch.no_grad()
def length_rules(network: PreTrainedModel, packed: Run, unpacked: Run, padded: Run) -> LengthRules:
    """The bounds of a network's architecture. Its weights are not read.

    An architecture that can't be built small is taken to follow each rule that its config mentions.

    Args:
        network: A causal model with a head of any kind.
        packed: Gives hidden states of packed sequences.
        unpacked: Gives hidden states of a padded batch, with the attention that packed sequences need.
        padded: Gives hidden states of a padded batch.
    """
    config = network.config.get_text_config()
    fields = length_fields(config)
    trunk: Any = next((m for m in network.modules() if _is_trunk(m) and m.config is config), None)
    if trunk is None:
        return LengthRules()
    key = (type(trunk), json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _KNOWN:
        with torch.device("cpu"):  # where the caller builds may be a GPU, or nowhere at all
            _KNOWN[key] = _measured(type(trunk), config, fields, packed, unpacked, padded)
    return _KNOWN[key]


def length_fields(config: PretrainedConfig) -> dict[Field, int]:
    """Config fields that a rule about lengths may begin at, with their values."""
    leaves = list(_leaves(config.to_dict()))
    found = {
        field: value
        for field, value in leaves
        if type(value) is int and value > 0 and BOUND.search(field[-1]) and not NO_BOUND.search(field[-1])
    }
    if any("dynamic" in str(value) for field, value in leaves if field[-1] in ("rope_type", "type")):
        found[("max_position_embeddings",)] = config.max_position_embeddings
    return found


def _leaves(fields: dict[str, Any], above: Field = ()) -> Iterator[tuple[Field, Any]]:
    """Values with their keys, of the config itself and of its rotary settings, which may be nested by kind of layer."""
    for name, value in fields.items():
        key = (*above, str(name))
        if not isinstance(value, dict):
            yield key, value
        elif key[0] in ROPE:
            yield from _leaves(value, key)


def _is_trunk(module: Any) -> bool:
    return isinstance(module, PreTrainedModel) and trunk_of(module) is module


def _measured(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    fields: dict[Field, int],
    packed: Run,
    unpacked: Run,
    padded: Run,
) -> LengthRules:
    """Shrink all fields at once; where something differs then, each alone, to see which of them is the bound."""
    plain = _kept(kind, config, [], packed, padded, min(fields.values(), default=max(ROWS)))
    shrunk = _kept(kind, config, list(fields), packed, padded) if fields and plain else plain
    if plain is None or shrunk is None:
        rotary = [value for field, value in fields.items() if field[0] in ROPE or "max_position" in field[-1]]
        return LengthRules(min(fields.values(), default=None), min(rotary, default=None))
    several = plain != shrunk and len(fields) > 1
    single = {field: _kept(kind, config, [field], packed, padded) for field in fields} if several else {}
    bounds: list[int | None] = []
    for index, short in enumerate(plain):
        causes = [fields[field] for field, kept in single.items() if kept is None or not kept[index]]
        bound = None if shrunk[index] else min(causes or fields.values(), default=0)
        bounds.append(bound if short else 0)
    if bounds[0]:  # or does the rule begin at a number of tokens of all packed sequences together?
        short_rows = _kept(kind, config, list(fields), packed, padded, SHORT)
        bounds[0] = bounds[0] if short_rows and short_rows[0] else 0
    if (
        bounds[0] and bounds[1] is None
    ):  # longer rows will be padded; some models make their masks by the attention's name
        long_rows = _kept(kind, config, list(fields), unpacked, padded)
        bounds[0] = bounds[0] if long_rows and long_rows[0] else 0
    return LengthRules(*bounds)


def _kept(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    fields: list[Field],
    packed: Run,
    padded: Run,
    longest: int = max(ROWS),
) -> tuple[bool, bool] | None:
    """Whether packed sequences, and padded ones, are what each is alone when these fields are a few tokens long.

    None where that can't be found out. No sequence has more than ``longest`` tokens.
    """
    network = _built(kind, config, fields)
    if network is None:
        return None

    def fresh() -> Any:
        """Rotary embeddings remember the longest sequence, past a bound."""
        return copy.deepcopy(network) if fields else network

    lengths = torch.tensor(ROWS).clamp(max=longest)
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths[:, None]
    ids = (columns + 11 * torch.arange(len(ROWS))[:, None]) * 7 % network.config.vocab_size
    try:
        alone = [
            fresh()(input_ids=row[real][None], use_cache=False).last_hidden_state[0]
            for row, real in zip(ids, mask, strict=True)
        ]
    except FAILURES:
        return None
    expected = torch.cat(alone)
    if not bool(expected.isfinite().all()):
        return None

    def same(run: Run) -> bool:
        try:
            hidden, at = run(fresh(), ids, mask)
        except FAILURES:
            return False
        return torch.allclose(hidden[at[mask]], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    as_padded = same(padded)
    return same(packed), as_padded


def _built(kind: type[PreTrainedModel], config: PretrainedConfig, fields: list[Field]) -> PreTrainedModel | None:
    """A small network whose ``fields`` are a few tokens, in float32 on the CPU; None if none can be built.

    The config is changed as little as its size allows. Random numbers and defaults of the caller stay as they are.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    attention = {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager", "dtype": torch.float32}
    try:
        for smaller in ((), (_fewer_layers,), (_fewer_layers, _narrower)):
            shrunk = copy.deepcopy(config)
            try:
                for change in smaller:
                    change(shrunk)
                for field in fields:
                    _set(shrunk, field, SHORT)
                if _parameters(kind, shrunk) <= LARGEST:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(0)
                        return _drawn(kind._from_config(shrunk, **attention).eval())
            except (*FAILURES, StrictDataclassError):  # sizes that this architecture can't have
                continue
        return None
    finally:
        torch.set_default_dtype(dtype)


def _parameters(kind: type[PreTrainedModel], config: PretrainedConfig) -> int:
    """How many a network of this config has, or that it is small enough."""
    width, layers = getattr(config, "hidden_size", LARGEST), getattr(config, "num_hidden_layers", 1)
    if max(width, config.vocab_size) * width * layers < LARGEST // 100:  # some factors of the width are left
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in kind._from_config(copy.deepcopy(config)).parameters())


@torch.no_grad()
def _drawn(network: PreTrainedModel) -> PreTrainedModel:
    """Wide weights, so that each token that is seen or not makes a difference; none zero, as gates begin."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


def _set(config: PretrainedConfig, field: Field, value: int) -> None:
    part: Any = config
    for key in field[:-1]:
        part = part[key] if isinstance(part, dict) else getattr(part, key)
    if isinstance(part, dict):
        part[field[-1]] = value
    else:
        setattr(part, field[-1], value)


def _fewer_layers(config: Any) -> None:
    """The first layers, of each kind at least one, and a small vocabulary."""
    count, fields = config.num_hidden_layers, config.to_dict()
    by_layer = {k: [str(x) for x in v] for k, v in fields.items() if isinstance(v, list) and len(v) == count}
    kinds = [v for v in by_layer.values() if len(set(v)) < count]  # not the indices of layers
    kept = min(count, 4)
    while any(len(set(v[:kept])) < len(set(v)) for v in kinds):
        kept += 1
    config.num_hidden_layers = kept
    for name in by_layer:
        setattr(config, name, fields[name][:kept])
    for name in fields:
        if name.startswith("vocab_size"):
            setattr(config, name, VOCABULARY)
    config.pad_token_id = None


def _narrower(config: Any) -> None:
    """Two heads of their own size, and a few experts."""
    fields = config.to_dict()
    heads = config.num_attention_heads
    shared = fields.get("num_key_value_heads") or heads
    size = fields.get("head_dim") or config.hidden_size // heads
    config.num_attention_heads = 2
    config.num_key_value_heads = 1 if shared < heads else 2
    config.hidden_size = 2 * size
    experts = 2 * max([fields.get(key) or 1 for key in ("num_experts_per_tok", "moe_k", "top_k", "n_group")])
    for name, value in fields.items():
        if "intermediate_size" in name or name in ("ffn_dim", "q_lora_rank", "kv_lora_rank"):
            smaller: Any = [min(x, WIDTH) for x in value] if isinstance(value, list) else value and min(value, WIDTH)
            setattr(config, name, smaller)
        elif re.fullmatch(r"(moe_)?num_(local_)?experts|n_routed_experts", name) and value:
            setattr(config, name, min(value, experts))
