"""A trained reward model as a reward, with its own tokenizer and template."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.data.encoding import encode_pairs
from rlhf_lightning.data.messages import Prompt
from rlhf_lightning.data.prompt_format import match_format
from rlhf_lightning.data.template_inputs import inputs_of_columns
from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.ensemble import load_trained, member_folders, members_of
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.sharding import placed
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward import Reward, Samples


class RewardModelReward(Reward):
    """Scores text with an exported reward model: the policy may have another tokenizer and another template."""

    wanted: ClassVar[int | None] = 1  # reward models in the folder; None for as many as there are

    def __init__(self, path: str, batch_size: int = 64, dtype: str = "float32", calibrated: bool = False) -> None:
        """Remember where the model is; it is loaded when training begins.

        Args:
            path: Folder that a ``RewardModelModule`` run exported, or hub id.
            batch_size: Responses a forward.
            dtype: Of the weights.
            calibrated: Instead of the normalised score, with mean 0 and spread 1, the one whose differences are log-odds of
                preference: the raw score over the temperature that the run found (``calibrate: true``).
        """
        self.spec = ModelSpec(path=path, dtype=dtype)  # type: ignore[arg-type]
        self.path = path
        self.batch_size, self.calibrated = batch_size, calibrated
        self.model: Frozen | None = None

    @property
    def name(self) -> str:
        return "reward_model"

    @property
    def title(self) -> str:
        return "reward model's score"

    def prepare(self, device: torch.device | str) -> None:
        """Load model and tokenizer.

        Raises:
            UserError: If the folder is missing or its scalar head is not in the checkpoint, or holds an ensemble; or if the
                temperature is asked for that no run has found.
        """
        folders = member_folders(self.path)
        if folders and self.wanted == 1:
            raise UserError(f"{self.path} holds an ensemble of {len(folders)}: score with EnsembleReward")
        self.tokenizer = load_tokenizer(folders[0] if folders else self.path)
        repair_pad_token(self.tokenizer)
        trained = load_trained(self.spec, self.tokenizer, self.wanted)
        if any(hasattr(member.network.config, "step_separator") for member in members_of(trained)):
            raise UserError(
                f"{self.path} scores steps, and was never asked about the end of a response: use ProcessReward"
            )
        self.model = Frozen(trained)
        if self.calibrated and not bool(self.model.network.temperature.all()):  # type: ignore[operator]
            raise UserError(
                f"{self.path} holds no temperature: train it with calibrate: true, or set calibrated to false"
            )
        self.device = torch.device(device)
        placed(self.model.network, self.device)

    def networks(self) -> list[nn.Module]:
        return [self.model.network] if self.model is not None else []

    def score(self, samples: Samples) -> Tensor:
        return self.member_scores(samples).squeeze(-1)

    def member_scores(self, samples: Samples) -> Tensor:
        """Scores of every reward model in the folder. Shape (samples, members), float32."""
        if self.model is None:
            raise UserError("RewardModelReward.prepare(device) comes before score")
        sequences = self._encode(samples)
        # By length, so that a batch holds little padding.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        found = [self._forward([sequences[i] for i in rows]).reshape(len(rows), -1).cpu() for rows in batches]
        return torch.cat(found)[torch.tensor(order).argsort()]

    def _encode(self, samples: Samples) -> list[Tensor]:
        responses: list[Prompt] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ]
        inputs = inputs_of_columns(samples.columns, len(responses))
        match_format(self.tokenizer, samples.prompts)
        encoded = encode_pairs(self.tokenizer, samples.prompts, responses, inputs)
        # A response that never ended is shown to the reward model without the end that it lacks.
        return [
            torch.tensor([*pair.prompt_ids, *(pair.response_ids[:-1] if truncated else pair.response_ids)])
            for pair, truncated in zip(encoded, samples.truncated, strict=True)
        ]

    def _forward(self, sequences: list[Tensor]) -> Tensor:
        assert self.model is not None
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(s) for s in sequences])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        inputs = ids.to(self.device), mask.to(self.device)
        if self.calibrated:
            return self.model(*inputs, normalised=False) / self.model.network.temperature
        return self.model(*inputs)
