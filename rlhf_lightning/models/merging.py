"""What a network with an adapter comes to as plain weights, and its adapter by itself."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_lightning.models.adapter_files import HEAD, NORMALISATION, Adapter, needs_peft
from rlhf_lightning.models.adapters import BASE, DEFAULT, adapter_weights, has_adapter, lora_layers

BELOW = ".base_layer"  # where peft keeps the frozen layer


def plain_weights(network: PreTrainedModel, writes: bool = True) -> dict[str, Tensor]:
    r"""State dict of the same network without adapters: :math:`W + \frac{\alpha}{r} B A` in the place of each adapted weight.

    Computed in float32 and rounded once to the precision of the base; a quantized base is unpacked. What is in shards is
    gathered: every rank must call. The network itself stays as it is.

    Args:
        network: With or without an adapter.
        writes: Whether this rank keeps what is gathered.

    Returns:
        By the names that a plain transformers model has; empty for a rank that does not write.
    """
    layers, dtype = dict(lora_layers(network, named=True)), base_dtype(network)
    plain: dict[str, Tensor] = {}
    for module_name, module in network.named_modules(remove_duplicate=False):
        owner = module_name.removesuffix(BELOW)
        if ".lora_" in module_name and any(module_name.startswith(f"{name}.lora_") for name in layers):
            continue
        for leaf, tensor in own_tensors(module):
            if owner in layers and leaf == "weight":
                tensor = merged_weight(layers[owner], module).to(dtype)
            elif leaf == "weight" and is_quantized(tensor):
                tensor = unpacked(module).to(dtype)
            else:
                tensor = whole(tensor)
            if writes and leaf != BASE:
                plain[f"{owner}.{leaf}"] = tensor
    return plain


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and saved buffers of a module itself, not of what is in it."""
    buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
    return [*module.named_parameters(recurse=False), *buffers]


@torch.no_grad()
def merged_weight(layer: Any, base: nn.Module) -> Tensor:
    """The weight of one of peft's layers with the trained adapter in it, float32."""
    weight = whole(unpacked(base)).float()
    if DEFAULT not in layer.lora_A:
        return weight
    up, down = (whole(matrices[DEFAULT].weight).float() for matrices in (layer.lora_B, layer.lora_A))
    change = up @ down * layer.scaling[DEFAULT]
    return weight + (change.T if layer.fan_in_fan_out else change)


def is_quantized(tensor: Tensor) -> bool:
    """Whether bitsandbytes packed it."""
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def unpacked(layer: nn.Module) -> Tensor:
    """A layer's weight in floating point."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if not is_quantized(weight):
        return weight
    needs_peft()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None))


def whole(tensor: Tensor) -> Tensor:
    """Gathered from the ranks, if it is in shards."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().cpu()
    return tensor.detach()


def own_adapter(network: PreTrainedModel) -> Adapter | None:
    """The trained adapter, with the scalar head that was trained beside it; None where there is none.

    Every rank must call, as for :func:`plain_weights`.
    """
    if not has_adapter(network):
        return None
    config: Any = copy.deepcopy(network.peft_config[DEFAULT])
    weights = {name: whole(weight) for name, weight in adapter_weights(network, DEFAULT).items()}
    about: dict[str, Any] = {"base": config.base_model_name_or_path, BASE: network.base}
    if config.task_type == "SEQ_CLS":
        head = network.get_submodule(HEAD)
        weights |= {f"{HEAD}.{name}": whole(parameter) for name, parameter in head.named_parameters()}
        about |= {key: float(getattr(network.config, key)) for key in NORMALISATION if hasattr(network.config, key)}
    return Adapter(config, weights, about)


def base_dtype(network: PreTrainedModel) -> torch.dtype:
    """That of the frozen weights, where they are not packed."""
    weight = network.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def unquantized(network: PreTrainedModel) -> PretrainedConfig:
    """A copy of the config that says nothing of quantization."""
    config = copy.deepcopy(network.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton(network: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A network of the same class without weights and without quantization, which writes plain weights to a folder.

    Args:
        network: The network.
        dtype: Of the weights that will be written; None for that of the network's.
    """
    config = unquantized(network)
    with torch.device("meta"):
        plain = type(network)(config)
    nn.Module.to(plain, dtype or base_dtype(network))
    if network.can_generate():
        plain.generation_config = network.generation_config
    return plain
