"""The sequences that a demonstration is learnt as: one, or one an answer where the chat template rewrites earlier turns."""

from rlhf_lightning.data.encoding import Encoder, Mask, Masked, message_plans
from rlhf_lightning.data.literal import literal
from rlhf_lightning.data.loss_flags import is_learnt
from rlhf_lightning.data.messages import answer_start
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.template_inputs import inputs_of
from rlhf_lightning.data.turns import Piece, answers, everything, joined, pair_pieces


def demonstration_plans(encoder: Encoder, row: Row, mask: Mask) -> list[list[Piece]]:
    """The sequences that a demonstration is learnt as, each in pieces."""
    if "text" in row:
        return [[Piece(literal(row["text"], []), True, True)]]
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        pieces = encoder.pair_pieces(prompt, [row["completion"]], inputs_of(row))
        return [[piece._replace(scored=True) for piece in pieces] if mask == "all" else pieces]
    renderer = encoder.renderer(inputs_of(row))
    if prompt is None:
        return message_plans(renderer, row["messages"], mask)
    messages, unfinished = joined(prompt, row["completion"]), prompt[-1]["role"] == "assistant"
    if mask == "all" and not all(map(is_learnt, messages)):
        return [everything(renderer, messages)]
    if mask == "assistant" and not unfinished:
        return message_plans(renderer, messages, mask)
    last = pair_pieces(renderer, prompt, [row["completion"]])
    if mask == "all":
        return [[piece._replace(scored=True) for piece in last]]
    if mask == "completion":
        return [last]
    # The message that is continued is the prompt's; those before it are learnt for themselves.
    before = [run for run in answers(prompt)[:-1] if any(is_learnt(prompt[index]) for index in run)]
    return [*(pair_pieces(renderer, prompt[: run.start], [prompt[run.start : run.stop]]) for run in before), last]


def join_demonstration(encoder: Encoder, row: Row, pieces: list[Piece], ids: list[list[int]]) -> Masked:
    """Ids and mask of a sequence that :func:`demonstration_plans` cut."""
    if row.get("prompt"):
        encoder.join_prompt([own for piece, own in zip(pieces, ids, strict=True) if not piece.response][:1])
    return encoder.join_sequence(pieces, ids, truncated=bool(row.get("completion_truncated")))


def earlier_answers(row: Row) -> int:
    """Number of assistant messages before the last answer of a dialogue."""
    messages = row.get("messages") or []
    return sum(message["role"] == "assistant" and is_learnt(message) for message in messages[: answer_start(messages)])
