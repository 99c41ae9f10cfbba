"""Our own generation: each prompt read once, finished rows out of the way, log-probabilities kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import log_softmax
from rlhf_lightning.functional.token_scores import LEAST
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.sampling import LogitsRules, drawn, filtered
from rlhf_lightning.generation.stop_strings import stop_strings_of
from rlhf_lightning.generation.store import Decode, Prefill, Store
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.attention import knows_rows, over_rows, rules_of
from rlhf_lightning.models.head import head_logits
from rlhf_lightning.models.packing import pack


@dataclass
class Work:
    """What generation has cost since the engine was made.

    Attributes:
        prompts: That were asked for.
        prefills: Prompts that were read.
        tokens: Generated.
        row_steps: Rows in the forwards that followed the prefills.
    """

    prompts: int = 0
    prefills: int = 0
    tokens: int = 0
    row_steps: int = 0


class NativeEngine(GenerationEngine):
    """Generates with the policy's own modules; memory for keys and values is taken once, as long as the longest answer.

    A prompt that is given several times is read once. A row that has ended takes no more part in anything.
    """

    def __init__(self) -> None:
        self.work = Work()

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
        longest = int(attention_mask.sum(dim=1).max()) + sampling.max_new_tokens
        if not knows_rows(network, longest):
            bound = f" beyond {rules_of(network).packed} tokens" if knows_rows(network, 0) else ""
            raise UserError(
                f"{type(network).__name__} can't be generated from natively{bound}; set the engine to "
                "rlhf_lightning.generation.transformers_engine.TransformersEngine"
            )
        count, device = len(input_ids), input_ids.device
        tokens = torch.full((count, sampling.max_new_tokens), pad_id, device=device)
        logprobs, entropies = torch.zeros(2, *tokens.shape, dtype=torch.float32, device=device)
        store, logits = self._prefill(network, input_ids, attention_mask, sampling.max_new_tokens)
        lengths, ends = attention_mask.sum(dim=1), torch.tensor(eos_ids, device=device)
        rows = torch.arange(count, device=device)
        rules = LogitsRules(sampling, input_ids, attention_mask, logits.shape[-1], eos_ids)
        stops = stop_strings_of(sampling, tokenizer)
        for step in range(sampling.max_new_tokens):
            logits = rules.apply(logits, step)
            if sampling.temperature == 0:
                new = logits.argmax(-1)
            else:
                log_probs = log_softmax(logits, sampling.temperature).clamp_(min=LEAST)
                weights = log_probs.exp()
                new = self.draw(weights, sampling, rows, step)
                logprobs[rows, step] = log_probs.gather(-1, new[:, None]).squeeze(-1).float()
                entropies[rows, step] = -torch.linalg.vecdot(weights, log_probs).float()
            tokens[rows, step] = new
            self.work.tokens += len(rows)
            going_on = ~torch.isin(new, ends)
            if stops is not None:
                going_on &= ~stops.completed(tokens[rows, : step + 1])
            rules.saw(new)
            if step + 1 == sampling.max_new_tokens or not bool(going_on.any()):
                break
            if not bool(going_on.all()):
                moved = store.keep(going_on)
                rows, new = rows[moved], new[moved]
                rules.keep(moved)
            logits = self._decode(network, new, lengths[rows] + step, store)
        width = step + 1
        if not sampling.samples_the_policy:
            return Generation(tokens[:, :width])
        return Generation(tokens[:, :width], logprobs[:, :width], entropies[:, :width])

    def draw(self, probabilities: Tensor, sampling: SamplingParameters, rows: Tensor, step: int) -> Tensor:
        """The next token of every active row.

        Args:
            probabilities: Of the whole vocabulary, temperature applied. Shape (active, vocabulary).
            sampling: How to draw.
            rows: Their numbers in the batch. Shape (active,), int64.
            step: Place of the token in the response, from 0.

        Returns:
            Shape (active,), int64.
        """
        return drawn(filtered(probabilities, sampling))

    def _prefill(
        self, network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, new_tokens: int
    ) -> tuple[Store, Tensor]:
        """Read every prompt once; the logits after each row's prompt."""
        first, same_as = _distinct(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1)
        store = Store(lengths, int(lengths.max()) + new_tokens - 1)
        packing = pack(attention_mask[first])
        by_length = lengths[first].sort(stable=True).indices
        rows = Prefill(packing, first[by_length], store)
        hidden = over_rows(network, input_ids[first].flatten()[packing.places], packing.positions, rows)
        again = (first[same_as] != torch.arange(len(lengths), device=lengths.device)).nonzero().squeeze(1)
        store.copy(first[same_as][again], again)
        last = packing.at[:, -1]  # prompts are padded on the left
        self.work.prompts += len(input_ids)
        self.work.prefills += len(first)
        return store, head_logits(network, hidden[last])[same_as]

    def _decode(self, network: PreTrainedModel, tokens: Tensor, positions: Tensor, store: Store) -> Tensor:
        """The logits after one more token a row."""
        hidden = over_rows(network, tokens, positions, Decode(store))
        store.column += 1
        self.work.row_steps += len(tokens)
        return head_logits(network, hidden)


def engine_for(sampling: SamplingParameters) -> GenerationEngine:
    """The engine that the parameters name, or a native one."""
    engine = sampling.engine or NativeEngine()
    require_interface("sampling.engine", engine, GenerationEngine)
    engine.expect(sampling)
    return engine


def _distinct(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each distinct prompt (distinct,), and which of these each row repeats (batch,)."""
    seen: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    same_as: list[int] = []
    for number, (row, real) in enumerate(zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)):
        prompt = tuple(row[len(row) - real :])
        if prompt not in seen:
            seen[prompt] = len(first)
            first.append(number)
        same_as.append(seen[prompt])
    return torch.tensor(first, device=input_ids.device), torch.tensor(same_as, device=input_ids.device)
