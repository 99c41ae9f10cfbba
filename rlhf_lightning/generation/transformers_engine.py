"""Generation through transformers' own ``generate``."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rlhf_lightning.generation.engine import GenerationEngine, SamplingParameters


class TransformersEngine(GenerationEngine):
    """``generate`` with every sampling default stated, so that nothing in a model's folder changes the distribution."""

    @torch.no_grad()
    def generate(
        self,
        network: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: SamplingParameters,
        *,
        eos_ids: list[int],
        pad_id: int,
    ) -> Tensor:
        config = generation_settings(sampling, eos_ids=eos_ids, pad_id=pad_id)
        own, network.generation_config = network.generation_config, config
        try:
            generate: Any = network.generate
            output = generate(inputs=input_ids, attention_mask=attention_mask.long(), generation_config=config)
        finally:
            network.generation_config = own
        return output[:, input_ids.shape[1] :]


def generation_settings(sampling: SamplingParameters, *, eos_ids: list[int], pad_id: int) -> GenerationConfig:
    """Our sampling parameters in transformers' words."""
    greedy = sampling.temperature == 0
    drawn = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=not greedy, eos_token_id=eos_ids, pad_token_id=pad_id, **drawn
    )
