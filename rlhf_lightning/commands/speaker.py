"""One model and its side of a conversation in the terminal."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.data.messages import Message, Prompt
from rlhf_lightning.data.prompt_format import PromptFormat, trained_format
from rlhf_lightning.data.template_inputs import set_default_variables
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.context import context_of, within_context
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.transformers_engine import generation_rules, generation_settings, suppress_missing
from rlhf_lightning.models.export import eos_ids, recommendations
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.handoff import ready_tokenizer


class Speaker:
    """One model and its side of the conversation.

    Attributes:
        format: Whether the conversation is rendered by the chat template, or continued as plain text: as the rows were that
            the model was trained on, which its export records. Without a record, a model with a chat template gets messages.
        messages: The conversation so far, where the format is "messages".
        text: The text so far, where the format is "text".
        notes: What the user should know before the first answer.
    """

    messages: list[Message]
    text: str

    def __init__(
        self, path: str, sampling: SamplingParameters, system: str | None, variables: dict[str, Any] | None = None
    ) -> None:
        self.path, self.sampling, self.system = path, sampling, system
        self.tokenizer = ready_tokenizer(path)
        recorded = trained_format(self.tokenizer)
        self.format: PromptFormat = recorded or ("messages" if self.tokenizer.chat_template else "text")
        if self.format == "messages":
            ensure_chat_template(self.tokenizer)
        elif variables is not None:
            raise UserError(
                f"{path} continues plain text, which no chat template renders; leave chat_template_kwargs out"
            )
        set_default_variables(self.tokenizer, variables)
        self.network: PreTrainedModel = load_causal_lm(ModelSpec(path=path), self.tokenizer).eval()
        self.ends = eos_ids(self.network, self.tokenizer)
        self.notes = self._notes(recorded)
        self.forget()

    def _notes(self, recorded: PromptFormat | None) -> list[str]:
        notes = []
        if self.format == "text":
            reason = "was trained on plain text" if recorded else "has no chat template"
            notes.append(f"{self.path} {reason}: it continues what you type, and each new line is appended to the text")
        if (not_applied := recommendations(self.network)) != "":
            notes.append(f"{self.path} recommends {not_applied}; not applied unless set here")
        limit = context_of(self.network)
        if limit is not None and self.sampling.max_new_tokens >= limit:
            notes.append(
                f"{self.path} reads {limit} tokens, the conversation and its answer together: answers may end before "
                f"max_new_tokens {self.sampling.max_new_tokens}"
            )
        return notes

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.text = self.system or ""

    def answer(self, said: str) -> Iterator[str]:
        """The answer, piece by piece as it is generated.

        What was said and answered is remembered when the answer is complete, or when the caller closes the iterator. After an
        error the conversation is what it was before.

        Raises:
            UserError: If the conversation has become longer than the model can read, or its template refuses it.
        """
        asked: Prompt = (
            continued(self.text, said)
            if self.format == "text"
            else [*self.messages, {"role": "user", "content": said.strip()}]
        )
        ids = torch.tensor([encode_prompt(self.tokenizer, asked)])
        sampling = self._within_context(ids.shape[1])
        config = generation_settings(sampling, eos_ids=self.ends, pad_id=int(self.tokenizer.pad_token_id))
        suppress_missing(config, self.network)
        mask = torch.ones_like(ids)
        # generate() fills the unset fields of what it is given from the network's own config.
        self.network.generation_config = config
        settings = {"inputs": ids, "attention_mask": mask, "generation_config": config}
        settings |= generation_rules(sampling, mask, self.tokenizer)
        generate: Any = self.network.generate
        return self._pieces(asked, partial(GeneratedText, generate, self.tokenizer, settings))

    def _within_context(self, prompt_length: int) -> SamplingParameters:
        """The sampling parameters, with at most as many new tokens as the model can still read.

        Raises:
            UserError: If none are left.
        """
        try:
            return within_context(self.sampling, self.network, prompt_length)
        except UserError as error:
            limit, begun = context_of(self.network), bool(self.text if self.format == "text" else self.messages)
            advice = "begin a new one with /new" if begun else "say it in fewer words"
            what = "the conversation" if begun else "what you typed"
            raise UserError(f"{self.path} reads {limit} tokens, {what} has {prompt_length}; {advice}") from error

    def _pieces(self, asked: Prompt, start: Callable[[], "GeneratedText"]) -> Iterator[str]:
        text, generated = "", start()
        try:
            for piece in generated:
                text += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            generated.stop()
            if text.strip():
                self._remember(asked, text)
            raise
        self._remember(asked, text)

    def _remember(self, asked: Prompt, answer: str) -> None:
        if isinstance(asked, str):
            self.text = asked + answer
        else:
            self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]


def continued(text: str, said: str) -> str:
    """Text with further text appended, after a space where neither has one there."""
    between = "" if not text or text[-1].isspace() or said[:1].isspace() else " "
    return text + between + said


class GeneratedText:
    """The text that a thread generates, piece by piece; raises what generation raises."""

    def __init__(
        self, generate: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
    ) -> None:
        """Start to generate.

        Args:
            generate: That of a network.
            tokenizer: Its tokenizer.
            settings: Arguments of ``generate``.
        """
        self._stopped = Event()
        self._error: BaseException | None = None
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        criteria = StoppingCriteriaList([*settings.get("stopping_criteria", []), StoppedByUser(self._stopped)])
        self._generate, self._settings = generate, settings | {"stopping_criteria": criteria}
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._generate(streamer=self._streamer, **self._settings)
        except BaseException as error:  # noqa: BLE001  (the thread that reads the text raises it)
            self._error = error
        finally:  # also where generation failed: the reader would wait for ever
            self._streamer.text_queue.put(self._streamer.stop_signal)

    def __iter__(self) -> Iterator[str]:
        yield from self._streamer
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End generation after the token that is being generated."""
        self._stopped.set()
        self._thread.join()


class StoppedByUser(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, stopped: Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), dtype=torch.bool)  # type: ignore[return-value]
