"""A row of each known format, read into an :class:`Example`. Each raises UserError naming the column at fault."""

from collections.abc import Callable

from rlhf_lightning.data.implicit_prompt import split_conversations, split_texts
from rlhf_lightning.data.messages import (
    Message,
    Prompt,
    is_conversation,
    parse_hh,
    read_messages,
    read_role,
    split_at_answer,
)
from rlhf_lightning.data.rows import (
    Example,
    NoSignalError,
    Row,
    UnusedColumnError,
    read_answer,
    read_label,
    read_optional,
    read_prompt,
    read_rating,
    read_step_label,
    read_string,
    with_system,
)
from rlhf_lightning.errors import UserError


def text(row: Row) -> Example:
    return Example(text=read_string(row, "text"))


def hh_dialogue(row: Row, column: str, *, may_be_empty: bool = False) -> list[Message]:
    """Some of the real hh-rlhf dialogues end with an assistant who says nothing; unless rejected, those teach nothing."""
    messages = parse_hh(read_string(row, column))
    if not messages[-1]["content"] and not may_be_empty:
        raise NoSignalError("an empty answer")
    return messages


def hh_text(row: Row) -> Example:
    return Example(messages=hh_dialogue(row, "text"))


def system_message(row: Row) -> list[Message]:
    """The system prompt where it has a column of its own."""
    given = read_optional(row, "system")
    return [{"role": "system", "content": given}] if given else []


def whole_conversation(row: Row, column: str, *, may_be_empty: bool = False) -> list[Message]:
    """The messages of a column, after the system prompt; ``may_be_empty`` as in :func:`.read_message`."""
    return with_system(row, read_messages(row.get(column), column, may_be_empty=may_be_empty))


def messages(row: Row) -> Example:
    return Example(messages=whole_conversation(row, "messages"))


def sharegpt(row: Row) -> Example:
    return Example(messages=whole_conversation(row, "conversations"))


def labelled_conversation(row: Row, column: str, label: str) -> Example:
    """A conversation whose last answer was liked or disliked; what was disliked may be empty."""
    liked = read_label(row, label)
    prompt, completion = split_at_answer(whole_conversation(row, column, may_be_empty=not liked), column)
    return Example(prompt=prompt, completion=completion, label=liked)


def labelled_messages(row: Row) -> Example:
    return labelled_conversation(row, "messages", "label")


def labelled_sharegpt(row: Row) -> Example:
    return labelled_conversation(row, "conversations", "kto_tag")


def prompt_only(row: Row) -> Example:
    return Example(prompt=read_prompt(row))


def prompt_completion(row: Row) -> Example:
    prompt = read_prompt(row)
    return Example(prompt=prompt, completion=read_answer(row, "completion", prompt))


def unpaired(row: Row) -> Example:
    prompt, liked = read_prompt(row), read_label(row, "label")
    return Example(
        prompt=prompt, completion=read_answer(row, "completion", prompt, may_be_empty=not liked), label=liked
    )


def stepwise(row: Row) -> Example:
    """Steps with a label each: true or false, the probability that the step is right, or null where nobody said."""
    return solution(row, read_steps(row, "labels", read_step_label))


def stepwise_ratings(row: Row) -> Example:
    """Steps rated -1, 0 or 1, as in PRM800K: neutral is right enough; of what follows the first error nothing is known."""
    ratings = read_steps(row, "ratings", read_rating)
    known = ratings.index(-1) + 1 if -1 in ratings else len(ratings)
    return solution(row, [None if r is None or n >= known else float(r >= 0) for n, r in enumerate(ratings)])


def prm800k(row: Row) -> Example:
    """PRM800K as released: the steps that the labeler went along, and where nothing went on from there, a wrong one."""
    taken = []
    try:
        for step in row["label"]["steps"]:
            chosen, human, offered = step.get("chosen_completion"), step.get("human_completion"), step["completions"]
            if chosen is None and human is None:
                taken += [(step["text"], -1) for step in offered if step["rating"] == -1][:1]
                break
            written = human["text"] if isinstance(human, dict) else human
            taken.append((written, 1) if chosen is None else (offered[chosen]["text"], offered[chosen]["rating"]))
        problem = row["question"]["problem"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"columns 'question' and 'label' are not as in PRM800K: {error!r:.60}") from error
    if not taken:
        raise NoSignalError("no step that was judged")
    steps, ratings = zip(*taken, strict=True)
    prompt = [{"role": "user", "content": problem}]
    return stepwise_ratings({"prompt": prompt, "completions": list(steps), "ratings": list(ratings)})


def read_steps(row: Row, column: str, read: Callable[[object, str], float | None]) -> list[float | None]:
    """The column with a verdict for each of the column "completions"."""
    steps, verdicts = row.get("completions"), row.get(column)
    lists = isinstance(steps, list) and isinstance(verdicts, list)
    if not lists or not steps or not verdicts or len(steps) != len(verdicts):
        raise UserError(f"columns 'completions' and '{column}' must be lists of the same length, not empty")
    return [read(verdict, column) for verdict in verdicts]


def solution(row: Row, labels: list[float | None]) -> Example:
    """Steps with their labels; as a whole they are joined by newlines, and liked when every one is known to be right."""
    prompt = read_prompt(row)
    answers = [read_answer({"completions": step}, "completions", prompt) for step in row["completions"]]
    if any(isinstance(answer, list) and len(answer) > 1 for answer in answers):
        raise UserError("column 'completions' has a step of several messages; a step is one")
    steps = [answer if isinstance(answer, str) else str(answer[0]["content"]) for answer in answers]
    joined = "\n".join(steps)
    completion: Prompt = joined if isinstance(prompt, str) else [{"role": "assistant", "content": joined}]
    liked = all(label is not None and label > 0.5 for label in labels)
    return Example(prompt=prompt, completion=completion, label=liked, steps=steps, step_labels=labels)


def explicit_pair(row: Row, prompt: Prompt) -> Example:
    """The two answers to a prompt that is known."""
    chosen, rejected = (
        read_answer(row, name, prompt, may_be_empty=name == "rejected") for name in ("chosen", "rejected")
    )
    return Example(prompt=prompt, chosen=chosen, rejected=rejected)


def conversation_pair(chosen: list[Message], rejected: list[Message]) -> Example:
    """A pair of whole conversations."""
    for column, conversation in (("chosen", chosen), ("rejected", rejected)):
        split_at_answer(conversation, column)
    prompt, good, bad = split_conversations(chosen, rejected)
    return Example(prompt=prompt, chosen=good, rejected=bad)


def implicit_preference(row: Row) -> Example:
    """A pair of whole texts or conversations."""
    if is_conversation(row.get("chosen")):
        rejected_messages = read_messages(row.get("rejected"), "rejected", may_be_empty=True)
        return conversation_pair(
            with_system(row, read_messages(row["chosen"], "chosen")), with_system(row, rejected_messages)
        )
    if read_optional(row, "system"):
        raise UnusedColumnError("system")
    chosen, rejected = read_string(row, "chosen"), read_string(row, "rejected")
    if chosen == rejected:  # where the prompt ends can't be told
        raise NoSignalError("the same text as chosen and rejected")
    prompt, good, bad = split_texts(chosen, rejected)
    return Example(prompt=prompt, chosen=good, rejected=bad)


def hh_preference(row: Row) -> Example:
    return conversation_pair(hh_dialogue(row, "chosen"), hh_dialogue(row, "rejected", may_be_empty=True))


def preference(row: Row) -> Example:
    """A pair with its prompt; UltraFeedback gives the prompt as text and repeats it in conversations."""
    given = row.get("prompt")
    if isinstance(given, str) and is_conversation(row.get("chosen")):
        repeated = implicit_preference(row)
        contents = [message["content"].strip() for message in repeated.prompt or [] if isinstance(message, dict)]
        if read_string(row, "prompt").strip() not in contents:
            raise UserError(
                "column 'prompt' is text that the messages of 'chosen' do not repeat; give it as messages too"
            )
        return repeated
    return explicit_pair(row, read_prompt(row))


def messages_preference(row: Row) -> Example:
    """Two answers to a conversation that ends where they begin."""
    prompt: Prompt = whole_conversation(row, "messages")
    return explicit_pair(row, prompt)


def ends_with_question(row: Row) -> bool:
    """Whether the messages end where the assistant is to answer."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and read_role(last.get("role") or last.get("from")) != "assistant"


def sharegpt_preference(row: Row) -> Example:
    prompt: Prompt = whole_conversation(row, "conversations")
    return explicit_pair(row, prompt)


def swift_preference(row: Row) -> Example:
    """ms-swift: a conversation with the good answer, and the bad answer beside it."""
    prompt, chosen = split_at_answer(whole_conversation(row, "messages"), "messages")
    return Example(
        prompt=prompt, chosen=chosen, rejected=read_answer(row, "rejected_response", prompt, may_be_empty=True)
    )


def swift_messages_preference(row: Row) -> Example:
    """ms-swift: two whole conversations."""
    chosen = whole_conversation(row, "messages")
    return conversation_pair(chosen, whole_conversation(row, "rejected_messages", may_be_empty=True))


def openai_preference(row: Row) -> Example:
    """OpenAI's fine-tuning on preferences: ``input`` holds the messages of the prompt."""
    given = row.get("input")
    if not isinstance(given, dict):
        raise UserError("column 'input' must be an object with 'messages'")
    if given.get("tools"):
        raise UserError("column 'input' holds tools; write them as a column 'tools' of their own")
    prompt: Prompt = read_messages(given.get("messages"), "input")
    answers = {"chosen": row.get("preferred_output"), "rejected": row.get("non_preferred_output")}
    return explicit_pair(answers, prompt)


def alpaca_prompt(row: Row) -> list[Message]:
    """System prompt, earlier turns, and the instruction with its input as the user's turn."""
    given = read_optional(row, "input")
    instruction = read_string(row, "instruction") + (f"\n{given}" if given else "")
    return [*system_message(row), *alpaca_history(row), {"role": "user", "content": instruction}]


def alpaca_history(row: Row) -> list[Message]:
    """Earlier turns, given as pairs of a question and its answer."""
    turns: list[Message] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(s, str) and s.strip() for s in pair)):
            raise UserError(f"column 'history' holds {pair!r:.60} where a pair [question, answer] of texts belongs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def alpaca(row: Row) -> Example:
    prompt = alpaca_prompt(row)
    return Example(prompt=prompt, completion=read_answer(row, "output", prompt))


def alpaca_question(row: Row) -> Example:
    return Example(prompt=alpaca_prompt(row))


def labelled_alpaca(row: Row) -> Example:
    prompt, liked = alpaca_prompt(row), read_label(row, "kto_tag")
    return Example(prompt=prompt, completion=read_answer(row, "output", prompt, may_be_empty=not liked), label=liked)


def alpaca_preference(row: Row) -> Example:
    prompt: Prompt = alpaca_prompt(row)
    return explicit_pair(row, prompt)
