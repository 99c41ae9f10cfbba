"""Open Assistant's message trees: conversations that branch, in which people have ranked the replies to one message."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from rlhf_lightning.data.messages import Message
from rlhf_lightning.data.paths import existing
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sources import Kind, Source
from rlhf_lightning.errors import UserError

ROLES = {"prompter": "user", "assistant": "assistant"}


class MessageTreeSource(Source):
    """A .jsonl of message trees, as oasst1 and oasst2 have them: a ranking for each message with two ranked replies or more."""

    def __init__(self, path: str) -> None:
        """Remember where to look.

        Args:
            path: The file, such as ``2023-04-12_oasst_ready.trees.jsonl``, not compressed.
        """
        self.path = path

    def __str__(self) -> str:
        return self.path

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`.Source`; columns ``prompt`` (messages), ``completions`` and ``ranks``.

        Raises:
            UserError: If the file is missing, a line is no message tree, or none has ranked replies.
        """
        rows = [row for tree in read_trees(existing(self.path)) for row in rankings_below(tree, [])]
        if not rows:
            raise UserError(f"{self.path}: no message has two ranked replies by the assistant")
        return DatasetDict({"train": Dataset.from_list(rows)})


def read_trees(path: Path) -> Iterator[dict[str, Any]]:
    """The first message of each tree, with its replies below it."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                message = json.loads(line)["prompt"]
                check_message(message)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is no message tree: {type(error).__name__} {error}") from error
            yield message


def check_message(message: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless a message and all below it have role, text and replies."""
    if message["role"] not in ROLES:
        raise ValueError(f"a message has the role {message['role']!r}")
    if not isinstance(message["text"], str):
        raise TypeError("a message has no text")
    for reply in message.get("replies", []):
        check_message(reply)


def rankings_below(message: dict[str, Any], before: list[Message]) -> Iterator[Row]:
    """A row for this message, if its replies are ranked, and those for the messages below it.

    Args:
        message: Of a tree.
        before: The conversation up to it.
    """
    prompt: list[Message] = [*before, {"role": ROLES[message["role"]], "content": message["text"]}]
    replies = message.get("replies", [])
    ranked = [reply for reply in replies if reply.get("rank") is not None and reply["role"] == "assistant"]
    if len(ranked) >= 2:
        texts, ranks = ([reply[name] for reply in ranked] for name in ("text", "rank"))
        yield {"prompt": prompt, "completions": texts, "ranks": ranks}
    for reply in replies:
        yield from rankings_below(reply, prompt)
