"""Solutions step by step: where one step ends and the next begins, in text and in tokens.

Steps and separators are tokenized apart and joined, so that no token spans both and every step ends with the same tokens.
What comes later changes nothing that stands before: a beginning of a solution is scored as it is within the whole.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.encoding import Encoder
from rlhf_lightning.data.limits import longest
from rlhf_lightning.data.literal import literal, turn_markers
from rlhf_lightning.data.messages import Prompt
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.template_inputs import NOTHING, TemplateInputs, inputs_of
from rlhf_lightning.data.tokenization import IDS, Tokenization
from rlhf_lightning.data.tokenizers import encode_continuations
from rlhf_lightning.data.turns import Piece
from rlhf_lightning.errors import UserError


class EncodedSteps(NamedTuple):
    """A prompt and the steps after it.

    Attributes:
        ids: Token ids; the last separator ends them.
        prompt_length: So many of them are the prompt.
        ends: Place of the last token of the separator behind each step.
    """

    ids: list[int]
    prompt_length: int
    ends: list[int]


class StepEncoder:
    """A tokenizer and what stands behind every step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        """Look the separator up.

        Raises:
            UserError: If it is empty, or the tokenizer does not keep it apart from what stands beside it.
        """
        if not separator:
            raise UserError("the step separator is empty: nothing would tell where a step ends; give one such as '\\n'")
        self.encoder, self.separator = Encoder(tokenizer), separator
        before, ids, after = encode_continuations(tokenizer, ["a", separator, "a"])
        if not ids or tokenizer.unk_token_id in ids:
            raise UserError(f"the tokenizer has no token for the step separator {separator!r}; choose another")
        read = tokenizer.decode([*before, *ids, *after], clean_up_tokenization_spaces=False)
        if separator not in read:
            raise UserError(
                f"the step separator {separator!r} merges with its neighbours in this tokenizer: between two steps it reads "
                f"{read!r}; choose another"
            )

    def pieces(self, prompt: Prompt, steps: list[str], inputs: TemplateInputs = NOTHING) -> list[Piece]:
        """A solution before tokenization: the pieces of the prompt, then each step and its separator."""
        markers = [self.encoder.eos_text] if isinstance(prompt, str) else turn_markers(self.encoder.tokenizer)
        pieces = self.encoder.prompt_pieces(prompt, inputs)
        for step in steps:
            pieces += [Piece(literal(step, markers), True, True), Piece(self.separator, True, True)]
        return pieces

    def check(self, steps: list[str]) -> None:
        """See that each step is one.

        Raises:
            UserError: If one holds the separator.
        """
        for number, step in enumerate(steps, start=1):
            if (step + self.separator).find(self.separator) != len(step):
                raise UserError(
                    f"step {number} holds the separator {self.separator!r}: {step!r:.60}; take it out, or choose another"
                )

    def join(self, ids: list[list[int]], steps: int) -> EncodedSteps:
        """The whole from the ids of its pieces, of which the last ``2 * steps`` are steps and separators."""
        prompt, parts = self.encoder.join_prompt(ids[: -2 * steps]), ids[-2 * steps :]
        reached = list(accumulate(map(len, parts), initial=len(prompt)))
        return EncodedSteps([*prompt, *chain.from_iterable(parts)], len(prompt), [end - 1 for end in reached[2::2]])

    def encode(
        self, prompts: list[Prompt], solutions: list[list[str]], inputs: Sequence[TemplateInputs] | None = None
    ) -> list[EncodedSteps]:
        """Many solutions in two calls of the tokenizer; ``inputs`` are of each row's chat template."""
        rows = zip(prompts, solutions, inputs or [NOTHING] * len(prompts), strict=True)
        plans = [self.pieces(prompt, steps, own) for prompt, steps, own in rows]
        ids = self.encoder.encode_rows(plans)
        return [self.join(row, len(steps)) for row, steps in zip(ids, solutions, strict=True)]


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a response, blank ones left out; a response that says nothing is one empty step."""
    return [step for step in text.split(separator) if step.strip()] or [""]


def solutions(
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    max_length: int = 1024,
    long_rows: Literal["drop", "error"] = "drop",
    last_step_only: bool = False,
) -> Tokenization:
    """Of solutions with a label a step: ``label_at`` are the places of the labelled separators, ``labels`` what stands there.

    Nothing is ever cut: a solution without its end would lose labels.

    Args:
        tokenizer: Must have EOS, and for messages a chat template.
        separator: What stands behind every step.
        max_length: Longest solution with its prompt, in tokens.
        long_rows: Whether longer ones are left out and counted, or end the run.
        last_step_only: Of the labels of a solution, the last one counts alone.
    """
    encoder = StepEncoder(tokenizer, separator)

    def plan(row: Row) -> list[Piece]:
        encoder.check(row["completions"])
        return encoder.pieces(row["prompt"], row["completions"], inputs_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        whole = encoder.join(ids, len(row["completions"]))
        labelled = [pair for pair in zip(whole.ends, row["labels"], strict=True) if pair[1] is not None]
        labelled = labelled[-1:] if last_step_only else labelled
        return {
            "input_ids": whole.ids,
            "prompt_length": whole.prompt_length,
            "label_at": [place for place, _ in labelled],
            "labels": [label for _, label in labelled],
            "length": len(whole.ids),
            "labelled": len(labelled),
        }

    numbers = {name: Value("int32") for name in ("prompt_length", "length", "labelled")}
    return Tokenization(
        "solutions",
        encoder.encoder,
        plan,
        join,
        Features({"input_ids": IDS, "label_at": IDS, "labels": List(Value("float32")), **numbers}),
        (longest("length", "solution", max_length, long_rows),),
        {"separator": separator, "last_step_only": last_step_only},
        weight="labelled",
    )
