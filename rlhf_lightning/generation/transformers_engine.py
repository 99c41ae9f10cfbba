"""Generation through transformers' own ``generate``."""

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
        greedy = sampling.temperature == 0
        chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
            **chosen,
        )
        own, network.generation_config = network.generation_config, config
        try:
            output = network.generate(inputs=input_ids, attention_mask=attention_mask.long(), generation_config=config)
        finally:
            network.generation_config = own
        return output[:, input_ids.shape[1] :]
