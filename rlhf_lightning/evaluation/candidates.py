"""Several scored samples of every prompt, in a file that a killed run goes on with."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from rlhf_lightning.data.bad_rows import Policy
from rlhf_lightning.data.columns import Columns
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split, drawn, load_part
from rlhf_lightning.data.template_inputs import TEMPLATE_COLUMNS
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.context import capped
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.models.export import replace_file
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.handoff import ready_tokenizer
from rlhf_lightning.rewards.reward import Reward, checked_scores
from rlhf_lightning.rollouts.collect import generate_responses
from rlhf_lightning.rollouts.prompts import as_prompt_batch

SETTINGS, CANDIDATES = "settings.json", "candidates.jsonl"
SEED_STEP = 1_000_003


@dataclass(frozen=True)
class PromptRows:
    """Which prompts are answered.

    Attributes:
        source: A world, the path of a file or folder, or a hub id: whatever holds prompts.
        part: Training rows, or those that are held out.
        limit: Number of prompts, drawn by the split's seed; None for all.
        format: Name of the row format where it should not be detected.
        columns: Which columns are read as which, such as {prompt: question}, as in data modules.
        bad_rows: Whether bad rows end the command or are dropped and counted, as in data modules.
        split: What is held out; the same as in training.
        chat_template_kwargs: Variables of the chat template; None for those that the policy was trained with, which its
            tokenizer remembers. A row's own column of that name comes before.
    """

    source: Source | str
    part: Literal["train", "validation", "ood"] = "train"
    limit: int | None = None
    format: str | None = None
    columns: Columns | None = None
    bad_rows: Policy = "error"
    split: Split = Split()  # noqa: RUF009  (frozen)
    chat_template_kwargs: dict[str, Any] | None = None

    def load(self) -> Dataset:
        """The rows.

        Raises:
            UserError: If the source has no such part.
        """
        rows = load_part(self.source, "prompts", self.part, self.split, self.format, self.columns, self.bad_rows)
        return rows if self.limit is None else drawn(rows, self.limit, self.split.seed)


class Scorer:
    """A policy that answers prompts several times, and the rewards that score its answers."""

    def __init__(
        self, policy: ModelSpec, sampling: SamplingParameters, rewards: dict[str, Reward], device: str
    ) -> None:
        """Load everything.

        Args:
            policy: Its ``path`` also gives the tokenizer.
            sampling: How answers are drawn.
            rewards: By the name under which their scores are kept.
            device: Where to compute.
        """
        self.tokenizer = ready_tokenizer(str(policy.path))
        self.network = PolicyNetwork(load_causal_lm(policy, self.tokenizer)).eval().to(device).network
        self.sampling, self.rewards, self.device = sampling, rewards, device
        self.engine = engine_for(sampling)
        self.engine.take_weights(self.network, self.tokenizer, 0)
        for reward in rewards.values():
            reward.prepare(device)

    @torch.no_grad()
    def answer(self, rows: dict[str, list[Any]], n: int, seed: int) -> list[dict[str, Any]]:
        """Each prompt with ``n`` answers and their scores; the same ones for the same rows and seed.

        Raises:
            UserError: If a prompt leaves no room for an answer, or a reward fails.
        """
        repeated = {name: [value for value in values for _ in range(n)] for name, values in rows.items()}
        prompts = repeated.pop("prompt")
        batch = as_prompt_batch(self.tokenizer, prompts, repeated, self.device)
        sampling = capped(self.sampling, self.network, batch.input_ids.shape[1], self.tokenizer.name_or_path)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            responses = generate_responses(batch, self.network, self.tokenizer, self.engine, sampling)
        samples = responses.samples
        scores = {name: checked_scores(reward, samples).tolist() for name, reward in self.rewards.items()}
        answers = [
            {"text": text, "truncated": cut, "tokens": len(ids), **{name: scores[name][i] for name in scores}}
            for i, (text, cut, ids) in enumerate(
                zip(samples.completions, samples.truncated, samples.completion_ids, strict=True)
            )
        ]
        # What the prompt was rendered with, so that what learns from the answers renders it alike.
        inputs = {name: rows[name] for name in TEMPLATE_COLUMNS if name in rows}
        return [
            {
                "prompt": prompt,
                **{name: values[i] for name, values in inputs.items()},
                "samples": answers[i * n : (i + 1) * n],
            }
            for i, prompt in enumerate(rows["prompt"])
        ]


class CandidateFile:
    """The samples so far, one line a prompt, in a folder that remembers what they were drawn with."""

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Begin, or go on.

        Args:
            folder: Of the whole result.
            settings: What the samples depend on; plain data.
            overwrite: Begin anew if they were drawn with others.

        Raises:
            UserError: If they were and ``overwrite`` is false, or the folder holds something else.
        """
        self.path, settings = folder / CANDIDATES, json.loads(json.dumps(settings))
        known = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else None
        if known is None and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no samples; give another --output")
        if known is not None and known != settings:
            other = ", ".join(sorted(key for key in known | settings if known.get(key) != settings.get(key)))
            if not overwrite:
                raise UserError(
                    f"{folder} holds samples drawn otherwise (another {other}); give another --output, or --overwrite true"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / SETTINGS, json.dumps(settings, indent=2))

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; half a line is what a kill leaves behind."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]]

    def fill(self, rows: Dataset, scorer: Scorer, n: int, batch: int, seed: int) -> Iterator[int]:
        """Draw what is not there yet, ``batch`` prompts at a time; after each, how many prompts have their samples.

        A batch is drawn from a seed of its own, so a run that went on has the samples of one that never stopped.
        """
        done = len(self.read()) // batch * batch
        kept = self.path.read_text(encoding="utf-8").split("\n")[:done] if done else []
        replace_file(self.path, "".join(f"{line}\n" for line in kept))
        with self.path.open("a", encoding="utf-8") as file:
            for start in range(done, len(rows), batch):
                lines = scorer.answer(rows[start : start + batch], n, seed * SEED_STEP + start)
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
                yield start + len(lines)


def described(value: Any) -> Any:
    """An object from a config as plain data: its class and what it was given; of a folder with weights, which they are."""
    if isinstance(value, str) and (stamp := weights_stamp(value)):
        return {"path": value, "weights": stamp}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, dict):
        return {str(key): described(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{k: described(v) for k, v in asdict_shallow(value).items()}}
    if isinstance(value, Source):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    public = (
        {k: described(v) for k, v in vars(value).items() if not k.startswith("_")} if hasattr(value, "__dict__") else {}
    )
    return {"class": type(value).__name__, **public}


def weights_stamp(path: str) -> list[Any]:
    """Name, size and time of the files with a model's weights: another training leaves others. Empty where there are none."""
    files = sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def asdict_shallow(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, whose values stay what they are."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
