"""A small world that is helpful, honest and harmless to talk about, whose true reward is known.

It stands in for people: its writers give demonstrations that are often wrong, its annotators noisy preferences. A
policy is trained on those alone and judged by the gold reward, which no trainer sees. Everything follows from the seed.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.sources import Kind as RowKind
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.worlds.acts import CLOSINGS, render_act, right_act
from rlhf_lightning.worlds.annotators import LengthBias, annotators, bayes_accuracy, noisy_ranks
from rlhf_lightning.worlds.composer import compose_candidates, compose_demonstration
from rlhf_lightning.worlds.facts import draw_facts, kind_of
from rlhf_lightning.worlds.gold import GoldScore, gold_score
from rlhf_lightning.worlds.grammar import Kind, parse_prompt
from rlhf_lightning.worlds.questions import Question, QuestionPool, SplitName
from rlhf_lightning.worlds.tokenizer import world_tokenizer

RANKED = 4  # responses in a ranking
Prompt = str | Sequence[Mapping[str, Any]]


class HHHWorld(Source):
    """Demonstrations, preferences and prompts of one world, and its gold reward.

    "validation" asks in held-out combinations of question and wording, "ood" in a wording of its own and about requests
    never seen. Draws are with replacement: the world is small, so prompts repeat.
    """

    def __init__(
        self,
        seed: int = 0,
        demonstrations: int = 8000,
        preferences: int = 8000,
        prompts: int = 4000,
        held_out: int = 1000,
        length_biased_annotators: LengthBias = "none",
        unpaired: int = 16000,
        rankings: int = 3000,
    ) -> None:
        """Choose a world and how much of it is seen.

        Args:
            seed: Facts, splits, texts and labels follow from it; another seed is another world.
            demonstrations: Training rows for supervised fine-tuning.
            preferences: Training rows for reward models and DPO.
            prompts: Training rows for reinforcement learning.
            held_out: Rows of each "validation" and each "ood" split.
            length_biased_annotators: How many of the six annotators like every further word.
            unpaired: Training rows for KTO and its relatives: as many responses as the pairs have.
            rankings: Training rows of four ranked responses.

        Raises:
            UserError: If a count is below 1 or the bias is not one of the three.
        """
        self.rows: dict[RowKind, int] = {
            "demonstrations": demonstrations,
            "preferences": preferences,
            "prompts": prompts,
            "unpaired": unpaired,
            "rankings": rankings,
        }
        for name, count in (*self.rows.items(), ("held_out", held_out)):
            if count < 1:
                raise UserError(f"HHHWorld: {name} is {count}; give at least 1")
        if length_biased_annotators not in ("none", "half", "all"):
            raise UserError(
                f"HHHWorld: length_biased_annotators is {length_biased_annotators!r}; choose 'none', 'half' or 'all'"
            )
        self.seed, self.held_out = seed, held_out
        self.facts = draw_facts(seed)
        self.annotators = annotators(length_biased_annotators)

    def __str__(self) -> str:
        return f"HHHWorld(seed={self.seed})"

    def load(self, kind: RowKind) -> DatasetDict:
        """Make the rows of this kind.

        Args:
            kind: "demonstrations" (prompt, completion), "preferences" (prompt, chosen, rejected, annotator, group,
                kind, gold_chosen, gold_rejected), "unpaired" (prompt, completion, label, annotator, group, kind, gold),
                "rankings" (prompt, completions, ranks, annotator, kind, gold) or "prompts" (prompt,
                kind). Texts are lists of messages.

        Returns:
            "train", "validation" and "ood", the same rows in every process.

        Raises:
            UserError: If the kind is another.
        """
        makers = {
            "demonstrations": self._demonstration,
            "preferences": self._preference,
            "rankings": self._ranking,
            "prompts": self._prompt,
            "unpaired": self._unpaired,
        }
        if kind not in makers:
            raise UserError(f"HHHWorld has no {kind!r}; it has {', '.join(makers)}")
        splits: tuple[SplitName, ...] = ("train", "validation", "ood")
        made = DatasetDict()
        for split in splits:
            rng = random.Random(f"{kind} {split} {self.seed}")  # row by row, so fewer rows are the first of more
            count = self.rows[kind] if split == "train" else self.held_out
            pool = QuestionPool(self.seed, self.facts, split)
            made[split] = columns_to_dataset(makers[kind](rng, pool.draw(rng)) for _ in range(count))
        return made

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The world's own word-level tokenizer, the same for every seed."""
        return world_tokenizer()

    def gold(self, prompt: Prompt, response: str, truncated: bool = False) -> GoldScore:
        """The true reward of a response.

        Args:
            prompt: The user's text, or messages, of which the last one by the user counts.
            response: The assistant's text.
            truncated: Whether generation was cut off before EOS.

        Returns:
            ``reward`` in [-1, 1] and its parts; see ``gold_score``.

        Raises:
            UserError: If the prompt is not one of the world's.
        """
        return gold_score(prompt_text(prompt), response, self.facts, truncated=truncated)

    def kind(self, prompt: Prompt) -> Kind:
        """What a prompt puts to the test."""
        return kind_of(parse_prompt(prompt_text(prompt)), self.facts)

    def best_response(self, prompt: Prompt) -> str:
        """A response whose gold reward is 1: the right act and one polite closing."""
        act = right_act(parse_prompt(prompt_text(prompt)), self.facts)
        return f"{render_act(act)} {CLOSINGS[0]}"

    def bayes_accuracy(self, preferences: Iterable[Mapping[str, Any]]) -> float:
        """The accuracy that no reward model can beat in expectation on these rows, labelled by this world's annotators.

        Args:
            preferences: Rows as ``load("preferences")`` makes them.

        Returns:
            The mean probability of the likelier label, in [.5, 1].
        """
        pairs = (
            (
                self.gold(row["prompt"], message_text(row["chosen"])),
                self.gold(row["prompt"], message_text(row["rejected"])),
            )
            for row in preferences
        )
        return bayes_accuracy(pairs, self.annotators)

    def _demonstration(self, rng: random.Random, question: Question) -> dict[str, Any]:
        completion = compose_demonstration(rng, question, self.facts)
        return {"prompt": message("user", question.prompt), "completion": message("assistant", completion)}

    def _preference(self, rng: random.Random, question: Question) -> dict[str, Any]:
        texts = compose_candidates(rng, question, self.facts)
        first, second = (gold_score(question.prompt, text, self.facts) for text in texts)
        annotator = rng.choice(self.annotators)
        chosen = 0 if rng.random() < annotator.prefers_first(first, second) else 1
        rewards = (first.reward, second.reward)
        return {
            "prompt": message("user", question.prompt),
            "chosen": message("assistant", texts[chosen]),
            "rejected": message("assistant", texts[1 - chosen]),
            "annotator": annotator.name,
            "group": annotator.group,
            "kind": question.kind,
            "gold_chosen": rewards[chosen],
            "gold_rejected": rewards[1 - chosen],
        }

    def _unpaired(self, rng: random.Random, question: Question) -> dict[str, Any]:
        """One of the two responses that a pair would have, liked or not."""
        text = rng.choice(compose_candidates(rng, question, self.facts))
        score, annotator = gold_score(question.prompt, text, self.facts), rng.choice(self.annotators)
        return {
            "prompt": message("user", question.prompt),
            "completion": message("assistant", text),
            "label": rng.random() < annotator.likes(score),
            "annotator": annotator.name,
            "group": annotator.group,
            "kind": question.kind,
            "gold": score.reward,
        }

    def _ranking(self, rng: random.Random, question: Question) -> dict[str, Any]:
        texts = [text for _ in range(RANKED // 2) for text in compose_candidates(rng, question, self.facts)]
        while len(set(texts)) < RANKED:
            texts = [*dict.fromkeys(texts), *compose_candidates(rng, question, self.facts)][:RANKED]
        scores = [gold_score(question.prompt, text, self.facts) for text in texts]
        annotator = rng.choice(self.annotators)
        return {
            "prompt": message("user", question.prompt),
            "completions": [message("assistant", text) for text in texts],
            "ranks": noisy_ranks(rng, annotator, scores),
            "annotator": annotator.name,
            "kind": question.kind,
            "gold": [score.reward for score in scores],
        }

    def _prompt(self, rng: random.Random, question: Question) -> dict[str, Any]:
        return {"prompt": message("user", question.prompt), "kind": question.kind}


def message(role: str, text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def message_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation's last message."""
    return str(messages[-1]["content"])


def prompt_text(prompt: Prompt) -> str:
    """The text of a prompt, or of the last message that the user wrote.

    Raises:
        UserError: If the user wrote none.
    """
    if isinstance(prompt, str):
        return prompt
    by_user = [message for message in prompt if message["role"] == "user"]
    if not by_user:
        raise UserError("the prompt holds no message of the user's")
    return message_text(by_user)


def columns_to_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    """A Dataset of rows that all have the same keys."""
    listed = list(rows)
    return Dataset.from_dict({name: [row[name] for row in listed] for name in listed[0]})
