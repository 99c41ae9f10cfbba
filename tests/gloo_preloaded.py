"""What every rank of tests/gloo.py needs, imported once."""

from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.callbacks import checkpoint_file
from rlhf_lightning.models import loading, policy, scalar_head, sharding, shards
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.worlds import world_tokenizer

PRELOADED = (
    PPOModule,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    checkpoint_file,
    loading,
    policy,
    scalar_head,
    sharding,
    shards,
    world_tokenizer,
)
