"""A trained process reward model as a reward: a response is worth what its steps are worth together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.collate import pad_right
from rlhf_lightning.data.messages import Prompt
from rlhf_lightning.data.prompt_format import match_format
from rlhf_lightning.data.steps import EncodedSteps, StepEncoder, split_steps
from rlhf_lightning.data.template_inputs import TemplateInputs, inputs_of_columns
from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.process import Aggregation, aggregate_steps
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import placed
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward import Reward, Samples


class ProcessReward(Reward):
    """Splits responses into steps and scores each with an exported process reward model."""

    def __init__(
        self,
        path: str,
        aggregation: Aggregation = "product",
        log: bool = False,
        split_at: str | None = None,
        batch_size: int = 64,
        dtype: str = "float32",
    ) -> None:
        """Remember where the model is; it is loaded when scoring begins.

        Args:
            path: Folder that a ``ProcessRewardModule`` run exported, or hub id of such a folder.
            aggregation: What a solution is worth: its steps' product, least, last or mean probability.
            log: Score by the logarithm: a product of many small numbers is then no tie at zero.
            split_at: What stands between the steps of a response; None for the separator of the model.
            batch_size: Responses a forward.
            dtype: Of the weights.
        """
        self.spec = ModelSpec(path=path, dtype=dtype)  # type: ignore[arg-type]
        self.path, self.aggregation, self.log, self.split_at = path, aggregation, log, split_at
        self.batch_size = batch_size
        self.model: Frozen | None = None

    @property
    def name(self) -> str:
        return "process_reward"

    @property
    def title(self) -> str:
        return "process reward model's score"

    def prepare(self, device: torch.device | str) -> None:
        """Load model and tokenizer.

        Raises:
            UserError: If the folder is missing or holds no process reward model.
        """
        tokenizer = load_tokenizer(self.path)
        repair_pad_token(tokenizer)
        network = load_scalar_model(self.spec, tokenizer)
        separator = getattr(network.config, "step_separator", None)
        if separator is None:
            raise UserError(
                f"{self.path} is no process reward model (its config.json names no step_separator); give the export of a "
                "ProcessRewardModule run, or use RewardModelReward"
            )
        if self.split_at is None and separator in tokenizer.all_special_tokens:
            raise UserError(f"{separator!r} is a special token, which no text of a response holds; set split_at")
        self.encoder, self.pad_id = StepEncoder(tokenizer, separator), int(tokenizer.pad_token_id)
        self.model, self.device = Frozen(ScalarModel(network)), torch.device(device)
        placed(self.model.network, self.device)

    def networks(self) -> list[nn.Module]:
        return [self.model.network] if self.model is not None else []

    def score(self, samples: Samples) -> Tensor:
        between = self.split_at if self.split_at is not None else self._ready().separator
        steps = [split_steps(text, between) for text in samples.completions]
        logits = self.step_logits(samples.prompts, steps, inputs_of_columns(samples.columns, len(steps)))
        longest = max(map(len, logits), default=1)
        table = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in logits])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in logits])[:, None]
        logps = aggregate_steps(table, mask, self.aggregation)
        return logps if self.log else logps.exp()

    def step_scores(self, prompts: Sequence[Prompt], solutions: Sequence[list[str]]) -> list[list[float]]:
        """The probability that each step is right. Solutions need not be finished: later steps change no earlier score.

        Args:
            prompts: Text, or messages.
            solutions: The steps of each, without separators.

        Raises:
            UserError: If a step holds the separator.
        """
        for steps in solutions:
            self._ready().check(steps)
        return [row.sigmoid().tolist() for row in self.step_logits(prompts, solutions)]

    def step_logits(
        self,
        prompts: Sequence[Prompt],
        solutions: Sequence[list[str]],
        inputs: Sequence[TemplateInputs] | None = None,
    ) -> list[Tensor]:
        """Log-odds that each step is right; ``inputs`` are of each row's chat template. Shape (steps,) each, on the CPU."""
        match_format(self._ready().encoder.tokenizer, prompts)
        encoded = self._ready().encode(list(prompts), list(solutions), inputs)
        # By length, so that a batch holds little padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found |= dict(zip(rows, self._forward([encoded[i] for i in rows]), strict=True))
        return [found[row] for row in range(len(encoded))]

    def _forward(self, rows: list[EncodedSteps]) -> list[Tensor]:
        model: Any = self.model
        ids, mask = pad_right([row.ids for row in rows], self.pad_id)
        table = model(ids.to(self.device), mask.to(self.device), pooled=False, normalised=False).cpu()
        return [values[row.ends] for values, row in zip(table, rows, strict=True)]

    def _ready(self) -> StepEncoder:
        if self.model is None:
            raise UserError("ProcessReward.prepare(device) comes before score")
        return self.encoder
