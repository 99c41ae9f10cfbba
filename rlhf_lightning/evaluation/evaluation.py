"""Evaluations of exported models at the end of a pipeline, as objects that YAML names."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from transformers import AutoConfig

from rlhf_lightning.data.columns import Columns
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split, drawn, load_part
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import Answerer, Answers, kl_figures
from rlhf_lightning.evaluation.leaderboard import envelope
from rlhf_lightning.evaluation.statistics import estimate, win_rate
from rlhf_lightning.evaluation.thresholds import Threshold
from rlhf_lightning.evaluation.world import (
    THRESHOLDS,
    Judged,
    best_of,
    comparisons,
    judge,
    reward_model_summary,
    summary,
)
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.ensemble import member_folders
from rlhf_lightning.rewards.ensemble import EnsembleReward
from rlhf_lightning.rewards.reward import Reward, Samples, checked_scores
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import HHHWorld

console = Console(markup=False)


class Evaluation(ABC):
    """Turns exported folders into figures.

    Attributes:
        thresholds: What a good run reaches, where the user gives no thresholds.
    """

    thresholds: ClassVar[Sequence[Threshold]] = ()

    def check(self) -> None:
        """Before the first stage: raise a UserError for what would fail after the last one."""
        return

    def check_stage(self, name: str, data: dict[str, Any]) -> None:
        """After a stage: raise a UserError if it was trained on what is to be evaluated.

        Args:
            name: Of the stage.
            data: Arguments of its data module, as in its ``config.yaml``.
        """
        return

    @abstractmethod
    def run(self, exports: dict[str, Path], seed: int) -> dict[str, Any]:
        """Figures for the report: policies, comparisons, samples, and the name of the reward; see the classes below.

        Args:
            exports: Folder by stage, in order; the first policy is what the others are compared with.
            seed: Of the run.
        """


def by_task(exports: dict[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Policies and reward models, ensembles among them, of exported folders; process reward models are neither.

    Raises:
        UserError: If there is no policy.
    """
    configs = {n: AutoConfig.from_pretrained((member_folders(str(p)) or [str(p)])[0]) for n, p in exports.items()}
    scalar = {name for name, config in configs.items() if "SequenceClassification" in str(config.architectures)}
    policies = {name: path for name, path in exports.items() if name not in scalar}
    if not policies:
        raise UserError(
            f"no stage trains a policy ({', '.join(exports)}): an evaluation has nothing to ask; leave it out"
        )
    return policies, {n: exports[n] for n in exports if n in scalar and not hasattr(configs[n], "step_separator")}


class WorldEvaluation(Evaluation):
    """Gold reward of every policy, sampled and greedy, on held-out and out-of-distribution prompts; best of n; thresholds."""

    thresholds = THRESHOLDS

    def __init__(
        self,
        world: HHHWorld | None = None,
        prompts: int = 1000,
        samples: int = 2,
        best_of_prompts: int = 400,
        best_of_samples: int = 16,
        max_new_tokens: int = 24,
        shown: int = 12,
        envelope_samples: int = 0,
        sampling: SamplingParameters | None = None,
    ) -> None:
        """Choose how much is asked.

        Args:
            world: The one that the stages learnt from; None for the default one with the pipeline's seed.
            prompts: Prompts of each split.
            samples: Sampled answers to each.
            best_of_prompts: Prompts of the best-of-n curve.
            best_of_samples: Largest n; 0 leaves the curve out.
            max_new_tokens: Longest answer, where ``sampling`` is None.
            shown: Prompts whose answers stand in the report.
            envelope_samples: Samples of the first policy to each prompt, from which the best attainable gold reward at each KL
                is computed; 0 leaves that out.
            sampling: How answers are sampled, with its own ``max_new_tokens``; None samples from the policy itself at
                temperature 1. Greedy answers have the same settings at temperature 0.
        """
        self.envelope_samples = envelope_samples
        self.world, self.prompts, self.samples = world, prompts, samples
        self.best_of_prompts, self.best_of_samples, self.shown = best_of_prompts, best_of_samples, shown
        self.sampled = sampling or SamplingParameters(max_new_tokens)
        self.greedy = replace(self.sampled, temperature=0)
        if envelope_samples and self.sampled.departures:
            raise UserError(
                "the envelope is computed from samples of the policy itself: leave out "
                f"{', '.join(self.sampled.departures)}, or envelope_samples"
            )

    def run(self, exports: dict[str, Path], seed: int) -> dict[str, Any]:
        world = self.world or HHHWorld(seed=seed)
        policies, reward_models = by_task(exports)
        reward = _prepared(next(iter(reward_models.values()), None))
        rows = world.load("prompts")
        prompts = {name: list(rows[split]["prompt"])[: self.prompts] for name, split in SPLITS.items()}
        base = next(iter(policies))
        judged = {name: self._judge(world, path, policies[base], prompts, name) for name, path in policies.items()}
        report: dict[str, Any] = {
            "reward": {"figure": "gold", "name": "gold reward", "about": GOLD},
            "conditions": {
                f"{split}/{mode}": _condition(rows, sampling, samples)
                for split, rows in prompts.items()
                for mode, sampling, samples in (("sampled", self.sampled, self.samples), ("greedy", self.greedy, 1))
            },
            "policies": {name: self._summaries(parts, reward) for name, parts in judged.items()},
            "comparisons": {name: comparisons(judged[base], parts) for name, parts in judged.items() if name != base},
            "samples": self._side_by_side(judged),
        }
        if self.envelope_samples:
            report["envelope"] = self._envelope(world, policies[base], prompts["held_out"])
        if reward is not None:
            report["reward_model"] = self._reward_model(world, reward)
            if self.best_of_samples:
                report["best_of_n"] = self._best_of(world, policies[base], reward, prompts["held_out"])
        return report

    def _judge(
        self, world: HHHWorld, path: Path, base: Path, prompts: dict[str, list[Any]], name: str
    ) -> dict[str, Judged]:
        console.print(f"{name} answers {sum(map(len, prompts.values()))} prompts")
        answerer = Answerer(path, base)
        judged = {}
        for split, rows in prompts.items():
            judged[f"{split}/sampled"] = judge(world, answerer.answer(rows, self.sampled, samples=self.samples, seed=0))
            judged[f"{split}/greedy"] = judge(world, answerer.answer(rows, self.greedy, samples=1, seed=0))
        return judged

    def _summaries(self, parts: dict[str, Judged], reward: Reward | None) -> dict[str, Any]:
        return {where: summary(judged, _scores(reward, judged.answers)) for where, judged in parts.items()}

    def _reward_model(self, world: HHHWorld, reward: Reward) -> dict[str, Any]:
        pairs = world.load("preferences")
        result = {}
        for name, split in SPLITS.items():
            rows = to_canonical(pairs[split], "preferences", origin=str(world))
            chosen, rejected = (_score_side(reward, rows, side) for side in ("chosen", "rejected"))
            result[name] = reward_model_summary(world, pairs[split], chosen, rejected)
        return result

    def _best_of(self, world: HHHWorld, base: Path, reward: Reward, prompts: list[Any]) -> dict[str, Any]:
        console.print(f"best of {self.best_of_samples} on {min(len(prompts), self.best_of_prompts)} prompts")
        answers = Answerer(base, base).answer(
            prompts[: self.best_of_prompts], self.sampled, samples=self.best_of_samples, seed=1
        )
        proxy = _scores(reward, answers)
        assert proxy is not None
        return best_of(judge(world, answers), proxy)

    def _envelope(self, world: HHHWorld, base: Path, prompts: list[Any]) -> dict[str, list[float]]:
        count = self.envelope_samples
        answers = Answerer(base, base).answer(prompts[: self.best_of_prompts], self.sampled, samples=count, seed=2)
        kl, gold = envelope(judge(world, answers).gold, np.logspace(1.5, -2.5, 60))
        return {"kl": kl, "gold": gold}

    def _side_by_side(self, judged: dict[str, dict[str, Judged]]) -> list[dict[str, Any]]:
        """The first prompts of every kind in turn, with each policy's greedy answer and its gold reward."""
        first = next(iter(judged.values()))["held_out/greedy"]
        order = _one_of_each(list(first.kinds), [str(prompt) for prompt in first.answers.prompts])[: self.shown]
        rows = []
        for i in order:
            answers = {
                name: {
                    "text": parts["held_out/greedy"].answers.texts[i][0],
                    "score": float(parts["held_out/greedy"].gold[i, 0]),
                }
                for name, parts in judged.items()
            }
            prompt = first.answers.prompts[i][-1]["content"]
            rows.append({"prompt": prompt, "kind": str(first.kinds[i]), "answers": answers})
        return rows


GOLD = "The gold reward is the world's own: no training sees it, and 1 is the best."
OWN_MODEL = (
    'The score is that of the reward model of stage "{}". A policy that was trained on it may exploit its mistakes: '
    "read the answers before you believe a rise."
)
SPLITS = {"held_out": "validation", "ood": "ood"}


class RewardEvaluation(Evaluation):
    """For your own data: each policy answers held-out prompts; a reward scores them and says who wins."""

    def __init__(
        self,
        source: Source | str,
        reward: Reward | None = None,
        prompts: int = 200,
        samples: int = 2,
        max_new_tokens: int = 128,
        split: Split = Split(),  # noqa: B008  (frozen)
        sampling: SamplingParameters | None = None,
        columns: Columns | None = None,
    ) -> None:
        """Choose prompts and reward.

        Args:
            source: Where the prompts come from.
            reward: Scores the answers; None for the pipeline's own reward model.
            prompts: Held-out prompts to answer, drawn by the split's seed.
            samples: Sampled answers to each.
            max_new_tokens: Longest answer, where ``sampling`` is None.
            split: What is held out; the same as in the stages.
            sampling: How answers are sampled, with its own ``max_new_tokens``; None samples from the policy itself at
                temperature 1.
            columns: Which columns are read as which, such as {prompt: question}; the same as in the stages.
        """
        self.columns = columns
        self.source, self.reward, self.prompts, self.samples, self.split = source, reward, prompts, samples, split
        self.sampling = sampling or SamplingParameters(max_new_tokens)

    def check(self) -> None:
        if isinstance(self.source, Source) or Path(self.source).expanduser().exists():
            self._held_out()

    def check_stage(self, name: str, data: dict[str, Any]) -> None:
        if str(data.get("source")) != str(self.source):
            return
        other, own = Split(**(data.get("split") or {})), self.split
        if other.seed != own.seed or other.validation < own.validation:
            raise UserError(
                f"evaluation.split holds out {own.validation:g} of {self.source} with seed {own.seed}, and stage {name} "
                f"{other.validation:g} with seed {other.seed}: prompts that it was trained on would be evaluated; give the "
                "evaluation the split of the stage"
            )

    def _held_out(self) -> dict[str, list[Any]]:
        """The prompts to answer, and the other columns of their rows.

        Raises:
            UserError: If none is held out.
        """
        held_out = load_part(self.source, "prompts", "validation", self.split, columns=self.columns)
        return drawn(held_out, self.prompts, self.split.seed)[:]

    def run(self, exports: dict[str, Path], seed: int) -> dict[str, Any]:
        policies, reward_models = by_task(exports)
        own = None if self.reward else next(iter(reward_models), None)
        reward = self.reward or _prepared(reward_models[own] if own else None)
        if reward is None:
            raise UserError("RewardEvaluation has no reward: give one, or a stage that trains a reward model")
        reward.prepare("cpu")
        columns = self._held_out()
        prompts = columns.pop("prompt")
        base = next(iter(policies))
        answers = {
            name: Answerer(path, policies[base]).answer(
                prompts, self.sampling, samples=self.samples, seed=0, columns=columns
            )
            for name, path in policies.items()
        }
        scores = {name: _scores(reward, given) for name, given in answers.items()}
        clusters = answers[base].clusters
        return {
            "reward": {"figure": "score", "name": reward.title} | ({"about": OWN_MODEL.format(own)} if own else {}),
            "conditions": {"held_out/sampled": _condition(prompts, self.sampling, self.samples)},
            "policies": {name: {"held_out/sampled": _plain_summary(answers[name], scores[name])} for name in policies},
            "comparisons": {
                name: {
                    "held_out/sampled": {
                        "gain": estimate(scores[name] - scores[base], clusters)._asdict(),
                        "win_rate": win_rate(scores[name], scores[base], clusters)._asdict(),
                    }
                }
                for name in policies
                if name != base
            },
            "samples": [
                {
                    "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                    "answers": {
                        name: {"text": answers[name].texts[i][0], "score": float(scores[name][i, 0])}
                        for name in policies
                    },
                }
                for i, prompt in enumerate(prompts[:12])
            ],
        }


def _plain_summary(answers: Answers, scores: Any) -> dict[str, Any]:
    return {
        "score": estimate(scores, answers.clusters)._asdict(),
        **kl_figures(answers),
        "length": float(answers.lengths.mean()),
        "truncated": float(answers.truncated.mean()),
    }


def _condition(prompts: list[Any], sampling: SamplingParameters, samples: int) -> dict[str, Any]:
    """How many prompts were answered how, for the report's headings."""
    greedy = sampling.temperature == 0
    how = "greedy" if greedy else f"sampled at temperature {sampling.temperature:g}"
    others = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    how += "".join(f", {name} {value:g}" for name, none in others.items() if (value := getattr(sampling, name)) != none)
    return {
        "prompts": len(prompts),
        "distinct": len({str(prompt) for prompt in prompts}),
        "samples": samples,
        "sampling": how,
    }


def _prepared(path: Path | None) -> Reward | None:
    if path is None:
        return None
    single = not member_folders(str(path)) and AutoConfig.from_pretrained(path).num_labels == 1
    reward: Reward = (RewardModelReward if single else EnsembleReward)(str(path), batch_size=256)
    reward.prepare("cpu")
    return reward


def _scores(reward: Reward | None, answers: Answers) -> Any:
    """Scores of all answers, shape (prompts, samples); None without a reward."""
    if reward is None:
        return None
    return checked_scores(reward, answers.samples()).cpu().numpy().reshape(answers.truncated.shape)


def _score_side(reward: Reward, rows: Dataset, side: str) -> NDArray[np.floating]:
    texts = [messages[-1]["content"] for messages in rows[side]]
    samples = Samples(list(rows["prompt"]), texts, [[] for _ in texts], [False] * len(texts))
    return checked_scores(reward, samples).numpy()


def _one_of_each(kinds: list[str], prompts: list[str]) -> list[int]:
    """Row numbers: the first of every kind, then the second of every kind, and so on, no prompt twice."""
    rank: dict[str, int] = {}
    seen: set[str] = set()
    keyed = []
    for i, (kind, prompt) in enumerate(zip(kinds, prompts, strict=True)):
        if prompt not in seen:
            seen.add(prompt)
            rank[kind] = rank.get(kind, 0) + 1
            keyed.append((rank[kind], kind, i))
    return [i for *_, i in sorted(keyed)]
