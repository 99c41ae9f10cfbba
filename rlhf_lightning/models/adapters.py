"""LoRA adapters inside stock transformers models: put in through peft, switched, and alone in checkpoints.

The network stays the ``PreTrainedModel`` that it was; linear layers of its trunk become peft's, which hold the frozen weight
and the matrices of every adapter by name. ``DEFAULT`` is the one that is trained; a policy may carry two more.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_files import HEAD, NORMALISATION, Adapter, base_sha256, needs_peft, read_adapter
from rlhf_lightning.models.length_rules import trunk_of
from rlhf_lightning.models.spec import LoRA, ModelSpec

log = logging.getLogger(__name__)

DEFAULT, CRITIC, REFERENCE = "default", "critic", "reference"
BASE = "base_sha256"  # a buffer, so that the checkpoint of an adapter knows its base


def has_adapter(network: nn.Module) -> bool:
    """Whether an adapter has been put into it."""
    return hasattr(network, "peft_config")


def with_adapter(network: PreTrainedModel, spec: ModelSpec, head: nn.Linear | None = None) -> PreTrainedModel:
    """Freeze a network and put the spec's adapter into it; without one, nothing happens.

    Args:
        network: As loaded from ``spec.path``.
        spec: What it was loaded from.
        head: A scalar head of it, which is trained too.

    Raises:
        UserError: If peft is missing, or the adapter does not fit the base.
    """
    if spec.adapter is None:
        return network
    needs_peft()
    adapted: Any = network
    adapted.base = base_sha256(str(spec.path), spec.revision)
    adapted.register_buffer(BASE, torch.tensor(list(bytes.fromhex(adapted.base)), dtype=torch.uint8))
    take_normalisation(network.config, put_in(network, DEFAULT, spec, head))
    checkpoint_only(network, is_trained)
    return network


def put_in(network: PreTrainedModel, name: str, spec: ModelSpec, head: nn.Linear | None = None) -> dict[str, Any]:
    """Put one more adapter into a network; the active one stays ``DEFAULT``.

    Args:
        network: A base, as ``with_adapter`` leaves it.
        name: Of the adapter.
        spec: Whose adapter it is.
        head: A scalar head that goes with it.

    Returns:
        What the folder says of a trained adapter; empty for a new one.
    """
    assert spec.adapter is not None
    trained = read_adapter(spec.adapter.path) if spec.adapter.path else None
    config = trained.config if trained else new_config(spec.adapter, head)
    if config.target_modules == "all-linear":
        config.exclude_modules = [n for n, m in network.named_modules() if is_router(m)] or None
    config.base_model_name_or_path = str(spec.path)
    peft = needs_peft()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is wanted
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and then to what it should be
        try:
            peft.inject_adapter_in_model(config, network, name)
        except ValueError as error:  # no such modules, or modules of a kind that peft can't adapt
            raise UserError(f"an adapter for {spec.path}: {str(error).splitlines()[0]}") from error
    from peft.functional import cast_adapter_dtype

    cast_adapter_dtype(network, name)
    check_layers(network, spec)
    if trained is not None:
        load_trained(network, name, trained, spec, head)
    for layer in lora_layers(network):
        layer._active_adapter = [DEFAULT]
    for each in network.peft_config:
        for parameter in adapter_weights(network, each).values():
            parameter.requires_grad_(each != REFERENCE)
    if head is not None:
        head.float().requires_grad_(True)  # as peft has the matrices
    return trained.about if trained else {}


def take_normalisation(config: PretrainedConfig, about: dict[str, Any]) -> None:
    """Give a scalar model's config the scale and shift that go with its trained adapter."""
    for key in NORMALISATION & about.keys():
        setattr(config, key, about[key])


def new_config(adapter: LoRA, head: nn.Linear | None) -> Any:
    """The same in peft's words."""
    peft = needs_peft()
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        init_lora_weights=True if adapter.init == "kaiming" else adapter.init,
        lora_dropout=0.0,
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )


def check_layers(network: PreTrainedModel, spec: ModelSpec) -> None:
    """Refuse what merging, or a head that is called apart from the trunk, would pass over.

    Raises:
        UserError: If an adapter is on an embedding or a head, or is more than two matrices.
    """
    trunk = set(trunk_of(network).modules())
    for name, layer in lora_layers(network, named=True):
        if layer not in trunk or isinstance(layer.get_base_layer(), nn.Embedding) or is_router(layer.get_base_layer()):
            raise UserError(
                f"an adapter for {spec.path}: {name} is not a linear layer of the trunk; leave it out of the targets"
            )
        if layer.lora_variant or any(layer.lora_bias.values()):
            raise UserError(
                f"an adapter for {spec.path}: {name} has more than the two matrices of LoRA; merge it into its base"
            )


def is_router(module: nn.Module) -> bool:
    """Whether a linear layer of an architecture does more than a matrix product, as routers that choose experts do."""
    kind = type(module)
    own = isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward
    return own and "modeling_" in kind.__module__


def load_trained(
    network: PreTrainedModel, name: str, trained: Adapter, spec: ModelSpec, head: nn.Linear | None
) -> None:
    """Give an adapter the weights of a folder, each of them and no others.

    Raises:
        UserError: If the folder was made for another base, or a weight is missing, left over or of another shape.
    """
    path = spec.adapter.path  # type: ignore[union-attr]
    if trained.about.get(BASE, network.base) != network.base:
        raise UserError(
            f"{path} is an adapter for another base than {spec.path}: it was trained on {trained.about['base']}, whose weights "
            "are not these"
        )
    if not trained.about:
        log.warning("%s does not say which weights it was trained on; shapes alone are compared", path)
    wanted: dict[str, Tensor] = dict(adapter_weights(network, name))
    if head is not None and trained.has_head:
        wanted |= {f"{HEAD}.{name}": parameter for name, parameter in head.named_parameters()}
    elif trained.has_head:
        raise UserError(f"{path} is the adapter of a reward model, and {spec.path} is to be a policy here")
    for key in [*wanted, *trained.weights]:
        there, here = (str(tuple(x[key].shape)) if key in x else "missing" for x in (trained.weights, wanted))
        if there != here:
            raise UserError(
                f"{path} is an adapter for another base than {spec.path}: {key} is {there} there and {here} here"
            )
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(trained.weights[key])


def lora_layers(network: nn.Module, *, named: bool = False) -> list[Any]:
    """peft's layers, or pairs of name and layer."""
    if not has_adapter(network):
        return []
    from peft.tuners.lora import LoraLayer

    found = [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    return found if named else [module for _, module in found]


def adapter_weights(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The matrices of one adapter, by the names that they have in peft's files."""
    return {
        f"{name}.{side}.weight": matrices[adapter].weight
        for name, layer in lora_layers(network, named=True)
        for side, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        if adapter in matrices
    }


@contextmanager
def active(network: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Compute with these adapters for a while; with none of them, the network is its base.

    peft's own switch also turns ``requires_grad`` off in the adapters that it leaves, and gradients that are still to come
    for them are lost without a word. This one changes what the forward adds up, and nothing else.
    """
    layers = lora_layers(network)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = list(adapters)
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def same_adapter_again(network: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """For activation checkpointing: the forward that the backward repeats is that of the adapter of then, not of now."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        layers = lora_layers(network)
        return nullcontext(), active(network, layers[0]._active_adapter if layers else [])

    return contexts


# ---------------------------------------------------------------- checkpoints


def is_trained(name: str, parameter: Tensor | None) -> bool:
    """Adapters and heads; of the frozen base its fingerprint alone."""
    return name == BASE or (parameter is not None and parameter.requires_grad)


def checkpoint_only(network: PreTrainedModel, kept: Callable[[str, Tensor | None], bool]) -> None:
    """Leave everything else out of the network's state dict, and do not miss it when one is loaded.

    Args:
        network: The one whose state dict it is.
        kept: Whether a name, with its parameter if it is one, stays in.
    """

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for key in [key for key in state if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if not kept(name, parameters.get(name)):
                del state[key]

    def fill_in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        check_base(module, state.get(f"{prefix}{BASE}"))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not kept(name, parameter):
                state.setdefault(f"{prefix}{name}", parameter.detach())  # itself

    network.register_state_dict_post_hook(leave_out)
    network.register_load_state_dict_pre_hook(fill_in)


def check_base(network: nn.Module, saved: Tensor | None) -> None:
    """The base of a checkpoint is that of the network.

    Raises:
        UserError: If its weights are others by now.
    """
    if saved is not None and not torch.equal(saved.cpu(), network.get_buffer(BASE).cpu()):
        base = network.peft_config[DEFAULT].base_model_name_or_path  # type: ignore[index, union-attr]
        raise UserError(
            f"the checkpoint's adapter was trained on other weights than {base} has now; put the old ones back"
        )
