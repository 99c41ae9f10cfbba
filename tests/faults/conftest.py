"""Models for the tests of faults."""

import pytest
import torch

from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random policy and a random reward model as exported folders."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    spec = ModelSpec(architecture={"model_type": "llama", **fields})
    export_folder(load_causal_lm(spec, tokenizer), tokenizer, folder / "policy")
    export_folder(load_scalar_model(spec, tokenizer, new_head=True), tokenizer, folder / "reward")
    return folder
