"""Exported policies answer prompts; their answers are kept with what policy and reference think of them."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_lightning.evaluation.statistics import estimate, prompt_clusters
from rlhf_lightning.generation.context import capped
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.handoff import ready_tokenizer
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.collect import generate_responses
from rlhf_lightning.rollouts.prompts import as_prompt_batch

BATCH = 500  # prompts a forward
VERSIONS = itertools.count()  # of weights: one for each policy that is loaded


@dataclass(frozen=True)
class Answers:
    """Several answers to each of a list of prompts.

    Attributes:
        prompts: As the dataset gave them. Length n.
        texts: Shape (n, samples) as nested lists.
        truncated: Whether an answer was cut off before EOS. Shape (n, samples), bool.
        lengths: Tokens, EOS included. Shape (n, samples).
        kl: log policy - log reference of the whole answer, in nats. Shape (n, samples).
        columns: Other columns of the prompts' rows. Length n each.
    """

    prompts: list[Any]
    texts: list[list[str]]
    truncated: NDArray[np.bool_]
    lengths: NDArray[np.floating]
    kl: NDArray[np.floating]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def clusters(self) -> list[str]:
        """The cluster of each prompt: the same one may be asked more than once."""
        return prompt_clusters(self.prompts)

    def samples(self) -> Samples:
        """All answers in one list, those to one prompt side by side."""
        width = self.truncated.shape[1]
        return Samples(
            prompts=repeated(self.prompts, width),
            completions=[text for texts in self.texts for text in texts],
            completion_ids=[[] for _ in range(self.truncated.size)],
            truncated=self.truncated.flatten().tolist(),
            columns={name: repeated(values, width) for name, values in self.columns.items()},
        )


def kl_figures(answers: Answers) -> dict[str, Any]:
    """Mean KL in nats a response, and its 95 % interval over distinct prompts."""
    _, low, high = estimate(answers.kl, answers.clusters)
    return {"kl": float(answers.kl.mean()), "kl_interval": {"low": low, "high": high}}


class Answerer:
    """An exported policy and the one that it is measured from."""

    def __init__(self, folder: str | Path, reference: str | Path, device: str = "cpu") -> None:
        """Load both.

        Args:
            folder: The policy's export.
            reference: The export that the KL is taken against, with the same tokenizer.
            device: Where to compute.
        """
        self.tokenizer = ready_tokenizer(str(folder))
        self.policy = self._load(folder).to(device)
        self.reference = self._load(reference).to(device)
        self.device, self.version = device, next(VERSIONS)

    def _load(self, folder: str | Path) -> Frozen:
        return Frozen(PolicyNetwork(load_causal_lm(ModelSpec(path=str(folder)), self.tokenizer)))

    def answer(
        self,
        prompts: list[Any],
        sampling: SamplingParameters,
        *,
        samples: int,
        seed: int,
        columns: dict[str, list[Any]] | None = None,
    ) -> Answers:
        """Answer every prompt ``samples`` times, from a fixed seed; ``columns`` are others of their rows."""
        parts, columns = [], columns or {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            asked = repeated(prompts, samples)
            beside = {name: repeated(values, samples) for name, values in columns.items()}
            for start in range(0, len(asked), BATCH):
                part = {name: values[start : start + BATCH] for name, values in beside.items()}
                parts.append(self._batch(asked[start : start + BATCH], sampling, part))
        texts = [text for part in parts for text in part[0]]
        numbers = [
            np.concatenate(column).reshape(len(prompts), samples)
            for column in zip(*(p[1:] for p in parts), strict=True)
        ]
        truncated, lengths, kl = numbers
        grouped = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        return Answers(prompts, grouped, truncated.astype(bool), lengths, kl, columns)

    def _batch(
        self, prompts: list[Any], sampling: SamplingParameters, columns: dict[str, list[Any]]
    ) -> tuple[list[str], Any, Any, Any]:
        batch = as_prompt_batch(self.tokenizer, prompts, columns, self.device)
        network: Any = self.policy.network.network
        engine = engine_for(sampling)
        engine.take_weights(network, self.tokenizer, self.version)
        sampling = capped(sampling, network, batch.input_ids.shape[1], self.tokenizer.name_or_path)
        responses = generate_responses(batch, network, self.tokenizer, engine, sampling)
        inputs = responses.input_ids, responses.attention_mask, responses.sequence_mask
        log_ratio = self.policy(*inputs).logprobs - self.reference(*inputs).logprobs
        lengths = responses.response_mask.sum(1).float()
        return (
            responses.samples.completions,
            responses.truncated.cpu().numpy(),
            lengths.cpu().numpy(),
            log_ratio.sum(1).cpu().numpy(),
        )


def repeated(values: list[Any], times: int) -> list[Any]:
    """Each value ``times`` times, copies side by side."""
    return [value for value in values for _ in range(times)]
