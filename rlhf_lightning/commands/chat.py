"""Talk to exported models in the terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel

from rlhf_lightning.callbacks.samples import plain
from rlhf_lightning.commands.speaker import Speaker
from rlhf_lightning.errors import UserError, harmless
from rlhf_lightning.generation.engine import SamplingParameters

HELP = "/new forgets what was said; ctrl-c stops an answer; /exit or ctrl-d ends"
COMMANDS = ("/new", "/exit")


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
    are printed and not applied: what is not set here is off. A model that was trained on conversations gets messages through
    its chat template; one that was trained on plain text continues what is typed.

    Args:
        model: Folder in Hugging Face format, or hub id.
        against: A second one, which gets the same words.
        temperature: Of the sampling; 0 for the most likely answer.
        max_new_tokens: Longest answer in tokens; less where the conversation leaves less of the model's context.
        system: The system message; of a model that was trained on plain text, how the text begins.
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
    for note in dict.fromkeys(note for speaker in speakers for note in speaker.notes):
        console.print(plain(note), style="dim")
    console.print(HELP, style="dim")
    converse(console, speakers)


def converse(console: Console, speakers: list[Speaker]) -> None:
    """Answer what the user types until ``/exit`` or the end of the input, whatever goes wrong in between."""
    read = line_reader(console)
    while True:
        try:
            said = read()
            if said is None or said.strip() == "/exit":
                return
            respond(console, speakers, said)
        except KeyboardInterrupt:
            console.print("\n" + HELP, style="dim")
        except UnicodeError:
            complain(console, "the line is not text in UTF-8, and was not sent")


def line_reader(console: Console) -> Callable[[], str | None]:
    """Return a function that reads one line; it returns None at the end of the input.

    The line ends without its line break. UnicodeError is raised for one that is not UTF-8, and the next one can be read.
    """
    with suppress(AttributeError):  # a stream that is not a file's
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

    def read() -> str | None:
        if sys.stdin.isatty():
            try:
                line = console.input("[bold]you[/] ")
            except EOFError:
                return None
        elif not (line := sys.stdin.readline()):
            return None
        line.encode()  # fails where a byte was no UTF-8
        return line.rstrip("\r\n")

    return read


def respond(console: Console, speakers: list[Speaker], said: str) -> None:
    """Obey a command, or answer; an error is shown, and the conversation is what it was before."""
    word = said.strip()
    if not word:
        return
    if word == "/new":
        for speaker in speakers:
            speaker.forget()
        console.print("a new conversation", style="dim")
    elif word[0] == "/" and word[1:].isalpha():
        complain(console, f"unknown command {word}; there are {', '.join(COMMANDS)}")
    else:
        show_answers(console, speakers, said)


def complain(console: Console, text: str) -> None:
    """Show an error; the loop continues."""
    console.print(plain(harmless(text)), style="red")


def show_answers(console: Console, speakers: list[Speaker], said: str) -> None:
    """Stream the answers of all speakers into panels side by side; of one that fails, show why."""
    texts, errors = ["" for _ in speakers], {}
    streams: dict[int, Iterator[str]] = {}

    def failed(index: int, error: Exception) -> None:
        streams.pop(index, None)
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        errors[index] = name + next(iter(str(error).splitlines()), "")

    with Live(console=console, refresh_per_second=12) as live:
        try:
            for index, speaker in enumerate(speakers):
                try:
                    streams[index] = speaker.answer(said)
                except Exception as error:  # noqa: BLE001  (whatever a model or template raises, the loop continues)
                    failed(index, error)
            while streams:
                for index in list(streams):
                    try:
                        texts[index] += next(streams[index])
                    except StopIteration:
                        del streams[index]
                    except Exception as error:  # noqa: BLE001
                        failed(index, error)
                live.update(panels(speakers, texts))
        finally:  # ctrl-c
            for stream in streams.values():
                stream.close()  # type: ignore[attr-defined]
    for index, text in errors.items():
        complain(console, text if text.startswith(speakers[index].path) else f"{speakers[index].path}: {text}")


def panels(speakers: list[Speaker], texts: list[str]) -> Panel | Columns:
    """The answers so far, side by side."""
    made = [
        Panel(plain(text), title=plain(speaker.path), title_align="left")
        for speaker, text in zip(speakers, texts, strict=True)
    ]
    return Columns(made, expand=True, equal=True) if len(made) > 1 else made[0]
