"""Generation through transformers' own ``generate``, and through its continuous batching."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import log_softmax, response_mask_from_tokens
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.sampling import penalized, seen_tokens
from rlhf_lightning.generation.stop_strings import StopStrings, stop_strings_of
from rlhf_lightning.models.head import missing_tokens
from rlhf_lightning.models.loading import embedding_weight


class TransformersEngine(GenerationEngine):
    """Generates with transformers' own ``generate``, for any architecture.

    Nothing in a model's folder changes the distribution: its generation config is set aside.
    """

    def __init__(self, continuous_batching: bool = False) -> None:
        """Remember how to batch.

        Args:
            continuous_batching: Replace a finished row by the next prompt; made for GPUs.
        """
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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Generation:
        config = generation_settings(sampling, eos_ids=eos_ids, pad_id=pad_id)
        suppress_missing(config, network)
        with no_defaults_of_the_model(network, config), padding_without_row(network, pad_id):
            if self.continuous_batching:
                refuse_dropped(sampling)
                return _continuously(network, input_ids, attention_mask, config, sampling.samples_the_policy)
            generate: Any = network.generate
            rules = generation_rules(sampling, attention_mask, tokenizer)
            drawn = DrawnLogprobs(sampling.temperature) if sampling.samples_the_policy else None
            if drawn is not None:
                rules["logits_processor"] = LogitsProcessorList(
                    [drawn]
                )  # a policy as it is has no other rules on logits
            output = generate(
                inputs=input_ids,
                attention_mask=attention_mask.long(),
                generation_config=config,
                **rules,
            )
        tokens = output[:, input_ids.shape[1] :]
        if drawn is None:
            return Generation(tokens)
        mask = until_the_end(tokens, eos_ids, stop_strings_of(sampling, tokenizer))
        return Generation(tokens, drawn.of(tokens).masked_fill(~mask, 0))


def until_the_end(tokens: Tensor, eos_ids: list[int], stops: StopStrings | None) -> Tensor:
    """True up to and including what ends a response. Shape of ``tokens``, (batch, length), bool."""
    mask, _ = response_mask_from_tokens(tokens, torch.tensor(eos_ids, device=tokens.device))
    for row, ids in enumerate(tokens.tolist() if stops is not None else []):
        assert stops is not None
        mask[row, stops.end(ids) or len(ids) :] = False
    return mask


class DrawnLogprobs(LogitsProcessor):
    """Keeps the log-probability of each token as it is drawn, and changes nothing.

    ``generate`` could return the scores of all steps, which are as many as tokens times vocabulary. Here those of one step are
    kept until the next call shows which token was drawn.
    """

    def __init__(self, temperature: float) -> None:
        """Args: ``temperature``, which ``generate`` applies after this."""
        self.temperature = temperature
        self.before: Tensor | None = None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take note of the token drawn last; called by ``generate`` before it draws the next.

        Args:
            input_ids: What there is so far. Shape (batch, length), int64.
            scores: Logits of the next token. Shape (batch, vocabulary).
        """
        if self.before is not None:
            self._saw(input_ids[:, -1])
        self.before = log_softmax(scores, self.temperature)
        return scores

    def _saw(self, tokens: Tensor) -> None:
        assert self.before is not None
        known = tokens.clamp(
            max=self.before.shape[-1] - 1
        )  # after its end a row may be padded with an id without logit
        self.logprobs.append(self.before.gather(-1, known[:, None]).squeeze(-1).float())

    def of(self, tokens: Tensor) -> Tensor:
        """The log-probabilities of all that was drawn; anything after the end of a response.

        Args:
            tokens: The responses. Shape (batch, longest), int64.

        Returns:
            Same shape, float32, nats.
        """
        self._saw(tokens[:, -1])
        return torch.stack(self.logprobs, dim=1)


def suppress_missing(config: GenerationConfig, network: PreTrainedModel) -> None:
    """Never draw an id that no token has, as in :func:`rlhf_lightning.models.head.head_logits`."""
    if (missing := missing_tokens(network)) is not None:
        config.suppress_tokens = missing.tolist()


@contextmanager
def padding_without_row(network: PreTrainedModel, pad_id: int) -> Iterator[None]:
    """Let ``generate`` pad with an id that the network has no row for: some other row is read, and masked, for it."""
    rows = len(embedding_weight(network))
    if pad_id < rows:
        yield
        return
    hook = network.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].clamp(max=rows - 1), *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def no_defaults_of_the_model(network: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put a generation config in the place of the model's own, from which ``generate`` would fill in every unset field."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


def refuse_dropped(sampling: SamplingParameters) -> None:
    """Refuse what continuous batching would drop with a warning.

    Raises:
        UserError: If there is such a setting.
    """
    dropped = {"repetition_penalty": sampling.repetition_penalty != 1, "min_new_tokens": sampling.min_new_tokens != 0}
    if names := [name for name, used in dropped.items() if used]:
        raise UserError(
            f"transformers' continuous batching ignores {' and '.join(names)}; set continuous_batching: false, or use the "
            "native engine"
        )


def _continuously(
    network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig, logprobs: bool
) -> Generation:
    """Responses by continuous batching, with their log-probabilities where these are wanted.

    Raises:
        UserError: If a response could not be generated.
    """
    prompts = [row[real].tolist() for row, real in zip(input_ids, attention_mask, strict=True)]
    known: Any = network.config.get_text_config()._attn_implementation
    generate: Any = network.generate_batch
    network.set_attn_implementation("sdpa")  # of which it has a paged version
    try:
        # Without the graphs that it would capture first: weights change from call to call.
        batching = ContinuousBatchingConfig(return_logprobs=logprobs)
        outputs = generate(prompts, generation_config=config, continuous_batching_config=batching, warmup=False)
    finally:
        network.set_attn_implementation(known)
    ordered = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1]))]
    if failed := [output.error for output in ordered if output.error is not None]:
        raise UserError(f"continuous batching failed on {len(failed)} of {len(prompts)} prompts: {failed[0]}")
    device = input_ids.device
    rows = [torch.tensor(output.generated_tokens, device=device) for output in ordered]
    tokens = pad_sequence(rows, batch_first=True, padding_value=int(config.pad_token_id))
    if not logprobs:
        return Generation(tokens)
    drawn = [torch.tensor(output.logprobs, dtype=torch.float32, device=device) for output in ordered]
    return Generation(tokens, pad_sequence(drawn, batch_first=True))


def generation_settings(sampling: SamplingParameters, *, eos_ids: list[int], pad_id: int) -> GenerationConfig:
    """Sampling parameters as a generation config.

    Repetition penalty and stop strings are not part of it: see :func:`generation_rules`.
    """
    greedy = sampling.temperature == 0
    fields: dict[str, Any] = {"min_new_tokens": sampling.min_new_tokens or None}
    if not greedy:
        fields |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        fields |= {"min_p": sampling.min_p or None}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        **fields,
    )


def generation_rules(
    sampling: SamplingParameters, attention_mask: Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Arguments of ``generate`` for what transformers has, but reads the padding or the prompt into.

    Its repetition penalty counts the padding of short prompts as a token, and its stop strings may begin in the prompt.

    Args:
        sampling: How to sample.
        attention_mask: True on the real tokens of the prompts. Shape (batch, prompt_length).
        tokenizer: Needed for stop strings.
    """
    arguments: dict[str, Any] = {}
    if sampling.repetition_penalty != 1:
        penalty = PenaltyWithoutPadding(sampling.repetition_penalty, attention_mask)
        arguments["logits_processor"] = LogitsProcessorList([penalty])
    if (stops := stop_strings_of(sampling, tokenizer)) is not None:
        criterion = StopAfterStrings(stops, attention_mask.shape[1])
        arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
    return arguments


class PenaltyWithoutPadding(LogitsProcessor):
    """Repetition penalty on the real tokens of the prompt and on the response."""

    def __init__(self, penalty: float, attention_mask: Tensor) -> None:
        """Args: the penalty, and True on the real tokens of the prompts, shape (batch, prompt_length)."""
        self.penalty, self.prompt_mask = penalty, attention_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = self.prompt_mask.new_ones(len(input_ids), input_ids.shape[1] - self.prompt_mask.shape[1])
        seen = seen_tokens(input_ids, torch.cat([self.prompt_mask, new], dim=1), scores.shape[-1])
        return penalized(scores, seen, self.penalty)


class StopAfterStrings(StoppingCriteria):
    """Ends a row after the token that completes a stop string."""

    def __init__(self, stops: StopStrings, prompt_length: int) -> None:
        """Args: finds the strings, and the length of the padded prompts."""
        self.stops, self.prompt_length = stops, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.stops.completed(input_ids[:, self.prompt_length :])
