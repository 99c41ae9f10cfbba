"""QLoRA: frozen weights in four or eight bits below an adapter, through bitsandbytes."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.spec import ModelSpec


def quantized(spec: ModelSpec) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that pack the weights as they are read; none where that is not asked for.

    Four bits are NF4 with quantized constants, as in the paper. Matrix products are in ``spec.dtype``.

    Raises:
        UserError: Without a CUDA device, or without bitsandbytes.

    Source: Dettmers et al. 2023 (arXiv 2305.14314).
    """
    if spec.quantization is None:
        return {}
    if not torch.cuda.is_available():
        raise UserError(f"quantization: {spec.quantization} needs a CUDA GPU, and there is none here; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization needs bitsandbytes: pip install 'rlhf_lightning[qlora]'")
    if spec.quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
