"""Bases, adapters as a training leaves them, and what the tests of both look at."""

import gc

import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import LoRA

LORA = LoRA(rank=3, alpha=6)


def learnt(network, seed=1):
    """Adapters (and heads) as a training leaves them: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    return network


def logits(network, ids):
    with torch.no_grad():
        return network.eval()(input_ids=ids, use_cache=False).logits


class Run:
    """As much of a module as the export looks at."""

    def __init__(self, trained, tokenizer):
        self.tokenizer, self.actor_critic = tokenizer, None
        self.policy, self.network = (trained, None) if isinstance(trained, PolicyNetwork) else (None, trained)


def exported(trained, tokenizer, folder, **kwargs):
    return export_module(Run(trained, tokenizer), folder, **kwargs)


def parameters_alive():
    """All there are; held, none of them can go while something is measured."""
    gc.collect()
    return [p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter)]


def bytes_beside(before):
    """Of the parameters that have come since, memory that several share counted once."""
    known = {p.data_ptr() for p in before}
    fresh = {p.data_ptr(): p.numel() * p.element_size() for p in parameters_alive() if p.data_ptr() not in known}
    return sum(fresh.values())


def change(folder):
    """Another model of the same shapes in the place of this one."""
    weights = load_file(f"{folder}/model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, f"{folder}/model.safetensors", {"format": "pt"})
