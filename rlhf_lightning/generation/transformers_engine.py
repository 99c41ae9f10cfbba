"""Generation through transformers' own ``generate``, and through its continuous batching."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters


class TransformersEngine(GenerationEngine):
    """Every sampling default stated, so that nothing in a model's folder changes the distribution; for any architecture."""

    def __init__(self, continuous_batching: bool = False) -> None:
        """Args: ``continuous_batching`` fills the place of a finished row with the next prompt; made for GPUs."""
        self.continuous_batching = continuous_batching

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
    ) -> Generation:
        config = generation_settings(sampling, eos_ids=eos_ids, pad_id=pad_id)
        own, network.generation_config = network.generation_config, config
        try:
            if self.continuous_batching:
                return Generation(_continuously(network, input_ids, attention_mask, config))
            generate: Any = network.generate
            output = generate(inputs=input_ids, attention_mask=attention_mask.long(), generation_config=config)
        finally:
            network.generation_config = own
        return Generation(output[:, input_ids.shape[1] :])


def _continuously(
    network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> Tensor:
    """Shape (batch, longest response), int64.

    Raises:
        UserError: If a response could not be generated.
    """
    prompts = [row[real].tolist() for row, real in zip(input_ids, attention_mask, strict=True)]
    known: Any = network.config.get_text_config()._attn_implementation
    generate: Any = network.generate_batch
    network.set_attn_implementation("sdpa")  # of which it has a paged version
    try:
        # Without the graphs that it would capture first: weights change from call to call.
        outputs = generate(prompts, generation_config=config, warmup=False)
    finally:
        network.set_attn_implementation(known)
    ordered = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1]))]
    if failed := [output.error for output in ordered if output.error is not None]:
        raise UserError(f"continuous batching failed on {len(failed)} of {len(prompts)} prompts: {failed[0]}")
    rows = [torch.tensor(output.generated_tokens, device=input_ids.device) for output in ordered]
    return pad_sequence(rows, batch_first=True, padding_value=int(config.pad_token_id))


def generation_settings(sampling: SamplingParameters, *, eos_ids: list[int], pad_id: int) -> GenerationConfig:
    """Our sampling parameters in transformers' words."""
    greedy = sampling.temperature == 0
    drawn = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=not greedy, eos_token_id=eos_ids, pad_token_id=pad_id, **drawn
    )
