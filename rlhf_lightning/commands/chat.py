"""Talk to exported models in the terminal."""

import sys
from collections.abc import Iterator
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
from rlhf_lightning.generation.transformers_engine import generation_settings
from rlhf_lightning.models.export import eos_ids
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
) -> None:
    """Talk to an exported model in the terminal, or to two of them side by side.

    Args:
        model: Folder in Hugging Face format, or hub id.
        against: A second one, which gets the same words.
        temperature: Of the sampling; 0 for the most likely answer.
        max_new_tokens: Longest answer.
        system: What is said before the conversation begins.
        seed: For the same answers again; None draws anew.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``; None for those that the
            model was trained with, which its tokenizer remembers.
    """
    if seed is not None:
        torch.manual_seed(seed)
    console = Console()
    sampling = SamplingParameters(max_new_tokens, temperature)
    speakers = [Speaker(path, sampling, system, chat_template_kwargs) for path in (model, against) if path is not None]
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
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] + self.sampling.max_new_tokens > limit:
            raise UserError(
                f"{self.path} reads {limit} tokens, the conversation with its answer is longer; begin anew with /new"
            )
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        config = generation_settings(
            self.sampling, eos_ids=eos_ids(self.network, self.tokenizer), pad_id=int(self.tokenizer.pad_token_id)
        )
        settings = {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "generation_config": config,
            "streamer": streamer,
        }
        generate: Any = self.network.generate
        thread = Thread(target=generate, kwargs=settings, daemon=True)
        thread.start()
        return self._pieces(streamer, thread)

    def _pieces(self, streamer: TextIteratorStreamer, thread: Thread) -> Iterator[str]:
        text = ""
        for piece in streamer:
            text += piece
            yield piece
        thread.join()
        self.messages.append({"role": "assistant", "content": text.strip()})
