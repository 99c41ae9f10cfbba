"""Talk to exported models in the terminal."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from transformers import PreTrainedModel, TextIteratorStreamer

from rlhf_lightning.callbacks.samples import plain
from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.data.template_inputs import set_default_variables
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.transformers_engine import generation_rules, generation_settings, suppress_missing
from rlhf_lightning.models.export import eos_ids, recommendations
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.handoff import ready_tokenizer

Messages = list[dict[str, str]]
HELP = "an empty line or ctrl-d ends, /new forgets what was said"


def chat(
    model: str,
    against: str | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    system: str | None = None,
    seed: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop_strings: list[str] | str = [],  # noqa: B006  (only read)
) -> None:
    """Talk to an exported model in the terminal, or to two of them side by side.

    The settings of sampling are those of ``SamplingParameters``. Recommendations in the model's ``generation_config.json``
    are printed and not applied: what is not set here is off.

    Args:
        model: Folder in Hugging Face format, or hub id.
        against: A second one, which gets the same words.
        temperature: Of the sampling; 0 for the most likely answer.
        max_new_tokens: Longest answer; less where the conversation leaves less of the model's context.
        system: What is said before the conversation begins.
        seed: For the same answers again; None draws anew.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``; None for those that the
            model was trained with, which its tokenizer remembers.
        top_p: Smallest set of tokens with at least this probability; 1 keeps all.
        top_k: The k most likely tokens; 0 keeps all.
        min_p: Drops tokens less likely than this share of the most likely one; 0 keeps all.
        repetition_penalty: Above 1 makes tokens of the conversation less likely; 1 changes nothing.
        min_new_tokens: Shortest answer, stop strings aside.
        stop_strings: Texts that end an answer, one or a list.
    """
    if seed is not None:
        torch.manual_seed(seed)
    console = Console()
    sampling = SamplingParameters(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        stop_strings=stop_strings,
    )
    speakers = [Speaker(path, sampling, system, chat_template_kwargs) for path in (model, against) if path is not None]
    for speaker in speakers:
        if speaker.not_applied:
            said = f"{speaker.path} recommends {speaker.not_applied}; not applied unless set here"
            console.print(plain(said), style="dim")
    console.print(HELP, style="dim")
    for said in user_lines(console):
        if said == "/new":
            for speaker in speakers:
                speaker.forget()
            continue
        show_answers(console, speakers, said)


def user_lines(console: Console) -> Iterator[str]:
    """What the user types, until an empty line or the end of the input."""
    while True:
        try:
            said = console.input("[bold]you[/] ") if sys.stdin.isatty() else sys.stdin.readline().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not said.strip():
            return
        yield said.strip()


def show_answers(console: Console, speakers: list["Speaker"], said: str) -> None:
    """Stream the answers of all speakers into panels side by side."""
    texts = ["" for _ in speakers]
    streams = [speaker.answer(said) for speaker in speakers]
    with Live(console=console, refresh_per_second=12) as live:
        open_streams = dict(enumerate(streams))
        while open_streams:
            for i in list(open_streams):
                piece = next(open_streams[i], None)
                if piece is None:
                    del open_streams[i]
                else:
                    texts[i] += piece
            panels = [
                Panel(plain(text), title=plain(s.path), title_align="left")
                for s, text in zip(speakers, texts, strict=True)
            ]
            live.update(Columns(panels, expand=True, equal=True) if len(panels) > 1 else panels[0])


class Speaker:
    """One model and its side of the conversation."""

    def __init__(
        self, path: str, sampling: SamplingParameters, system: str | None, variables: dict[str, Any] | None = None
    ) -> None:
        self.path, self.sampling, self.system = path, sampling, system
        self.tokenizer = ready_tokenizer(path)
        set_default_variables(self.tokenizer, variables)
        self.network: PreTrainedModel = load_causal_lm(ModelSpec(path=path), self.tokenizer).eval()
        self.ends = eos_ids(self.network, self.tokenizer)
        self.not_applied = recommendations(self.network)
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages: Messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, said: str) -> Iterator[str]:
        """The answer, piece by piece as it is generated; remembered when it is complete.

        Raises:
            UserError: If the conversation has become longer than the model can read.
        """
        self.messages.append({"role": "user", "content": said})
        ids = torch.tensor([encode_prompt(self.tokenizer, self.messages)])
        sampling = self._within_context(ids.shape[1])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        config = generation_settings(sampling, eos_ids=self.ends, pad_id=int(self.tokenizer.pad_token_id))
        suppress_missing(config, self.network)
        mask = torch.ones_like(ids)
        settings = {
            "inputs": ids,
            "attention_mask": mask,
            "generation_config": config,
            "streamer": streamer,
            **generation_rules(sampling, mask, self.tokenizer),
        }
        # generate() fills the unset fields of what it is given from the network's own config.
        self.network.generation_config = config
        generate: Any = self.network.generate
        thread = Thread(target=generate, kwargs=settings, daemon=True)
        thread.start()
        return self._pieces(streamer, thread)

    def _within_context(self, prompt_length: int) -> SamplingParameters:
        """The sampling, with at most as many new tokens as the model can still read.

        Raises:
            UserError: If none are left.
        """
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        left = self.sampling.max_new_tokens if limit is None else limit - prompt_length
        if left < 1:
            raise UserError(
                f"{self.path} reads {limit} tokens, the conversation has {prompt_length}; begin a new one with /new"
            )
        most = min(left, self.sampling.max_new_tokens)
        return replace(self.sampling, max_new_tokens=most, min_new_tokens=min(most, self.sampling.min_new_tokens))

    def _pieces(self, streamer: TextIteratorStreamer, thread: Thread) -> Iterator[str]:
        text = ""
        for piece in streamer:
            text += piece
            yield piece
        thread.join()
        self.messages.append({"role": "assistant", "content": text.strip()})
