"""The loop of ``chat``: whatever goes wrong, the conversation continues."""

import io
import sys
import threading

import pytest
import torch
from rich.console import Console

from rlhf_lightning.cli import run_command
from rlhf_lightning.commands import chat
from rlhf_lightning.commands.speaker import Speaker, continued
from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.data.prompt_format import record_format
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer
from tests.terminal import Terminal

FIELDS = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FIELDS |= {"intermediate_size": 32, "tie_word_embeddings": True}
LONG = "who owns the kite ? " * 60
QUESTION = "who owns the kite ?"


def make(path, *, context=128, template=True, record=None):
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    if not template:
        tokenizer.chat_template = None
    if record is not None:
        record_format(tokenizer, record, "rows")
    network = load_causal_lm(ModelSpec(architecture=FIELDS | {"max_position_embeddings": context}), tokenizer)
    return str(export_folder(network, tokenizer, path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("messages") / "export")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "export", template=False, record="text")


@pytest.fixture
def talk(folder, monkeypatch):
    """Run the command on what is typed; return what it shows."""

    def run(typed, *flags, model=folder):
        shown = io.StringIO()
        monkeypatch.setattr(chat, "Console", lambda: Console(file=shown, width=400))
        given = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        run_command("chat", ["--model", model, "--seed", "0", *flags])
        return shown.getvalue()

    return run


def panels(shown):
    """The answers, a text each."""
    return [part.split("╰")[0].replace("│", " ").split("\n", 1)[1].split() for part in shown.split("╭")[1:]]


def test_the_default_budget_is_more_than_the_context_and_no_matter(talk):
    shown = talk(QUESTION + "\n", "--min_new_tokens", "256")
    (answer,) = panels(shown)
    assert 50 < len(answer) < 128
    assert "reads 128 tokens" in shown
    assert "max_new_tokens 256" in shown


def test_a_context_that_is_full_does_not_end_the_loop(talk):
    shown = talk(f"{QUESTION}\n{QUESTION}\n/new\n{QUESTION}\n", "--min_new_tokens", "256")
    first, second = panels(shown)  # of the first line, and of the one after /new
    assert len(first) > 50
    assert len(second) > 50
    assert "reads 128 tokens, the conversation has" in shown
    assert shown.count("begin a new one with /new") == 1


def test_a_line_that_is_too_long_by_itself_is_not_answered_by_the_advice_to_begin_anew(talk):
    shown = talk(f"{LONG}\n{QUESTION}\n", "--max_new_tokens", "8")
    assert "what you typed has" in shown
    assert "say it in fewer words" in shown
    assert "begin a new one" not in shown
    assert len(panels(shown)) == 1


@pytest.mark.parametrize("typed", ["/nonsense", "   ", b"\xff\xfe ?"], ids=["command", "blank", "no UTF-8"])
def test_a_bad_line_is_not_sent(talk, typed):
    typed = typed if isinstance(typed, bytes) else typed.encode()
    shown = talk(typed + f"\n{QUESTION}\n".encode(), "--max_new_tokens", "8")
    assert len(panels(shown)) == 1
    told = {b"/nonsense": "unknown command /nonsense; there are /new, /exit", b"   ": ""}.get(
        typed, "not text in UTF-8"
    )
    assert told in shown


def test_exit_ends_the_loop(talk):
    assert panels(talk(f"/exit\n{QUESTION}\n")) == []


def failing_once(function, error):
    left = [error]

    def call(*args, **kwargs):
        if left:
            raise left.pop()
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("part", ["model", "decoding", "template"])
def test_an_error_leaves_the_conversation_as_it_was(folder, part, monkeypatch):
    speaker = Speaker(folder, SamplingParameters(max_new_tokens=8), None)
    list(speaker.answer(QUESTION))
    before = list(speaker.messages)
    assert [message["role"] for message in before] == ["user", "assistant"]
    error = RuntimeError("CUDA error: no kernel\nfor this device")
    if part == "model":
        monkeypatch.setattr(speaker.network, "forward", failing_once(speaker.network.forward, error))
    elif part == "decoding":
        monkeypatch.setattr(speaker.tokenizer, "decode", failing_once(speaker.tokenizer.decode, error))
    else:
        good = speaker.tokenizer.chat_template
        speaker.tokenizer.chat_template = "{{ raise_exception('CUDA error: no kernel') }}"
    shown = io.StringIO()
    console = Console(file=shown, width=400)
    chat.respond(console, [speaker], QUESTION)
    assert "CUDA error: no kernel" in shown.getvalue()
    assert folder in shown.getvalue()
    assert speaker.messages == before
    if part == "template":
        speaker.tokenizer.chat_template = good
    chat.respond(console, [speaker], QUESTION)
    assert len(speaker.messages) == len(before) + 2


def test_of_two_models_one_may_fail(folder, monkeypatch):
    speakers = [Speaker(folder, SamplingParameters(max_new_tokens=8), None) for _ in range(2)]
    monkeypatch.setattr(speakers[0].network, "forward", failing_once(None, RuntimeError("out of memory")))
    shown = io.StringIO()
    chat.respond(Console(file=shown, width=400), speakers, QUESTION)
    assert "RuntimeError: out of memory" in shown.getvalue()
    assert [len(speaker.messages) for speaker in speakers] == [0, 2]


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(folder):
    speaker = Speaker(folder, SamplingParameters(max_new_tokens=100, min_new_tokens=100), None)
    stream = speaker.answer(QUESTION)
    text = next(stream)
    while not text.strip():
        text += next(stream)
    stream.close()
    assert speaker.messages[-1] == {"role": "assistant", "content": text.strip()}
    assert not any(thread.daemon and "_run" in thread.name for thread in threading.enumerate())
    list(speaker.answer("and the ball ?"))  # what is left of the context is enough for an answer
    assert len(speaker.messages) == 4


# ---------------------------------------------------------------- plain text


def test_a_model_of_plain_text_continues_the_text(plain_folder, talk, monkeypatch):
    speaker = Speaker(plain_folder, SamplingParameters(max_new_tokens=4), None)
    asked = []
    generate = speaker.network.generate
    monkeypatch.setattr(speaker.network, "generate", lambda **given: asked.append(given["inputs"]) or generate(**given))
    first = "".join(speaker.answer(QUESTION))
    second = "".join(speaker.answer("and the ball ?"))
    assert asked[0][0].tolist() == encode_prompt(speaker.tokenizer, QUESTION)
    both = continued(QUESTION + first, "and the ball ?")
    assert asked[1][0].tolist() == encode_prompt(speaker.tokenizer, both)
    assert speaker.text == both + second
    speaker.forget()
    assert speaker.text == ""
    shown = talk(QUESTION + "\n", model=plain_folder)
    assert f"{plain_folder} was trained on plain text: it continues what you type" in shown
    with pytest.raises(UserError, match="no chat template renders; leave chat_template_kwargs out"):
        Speaker(plain_folder, SamplingParameters(), None, {"enable_thinking": True})


@pytest.mark.parametrize(
    ("template", "record", "found", "note"),
    [
        (True, None, "messages", ""),
        (False, None, "text", "has no chat template: it continues"),
        (True, "text", "text", "was trained on plain text: it continues"),  # the template is of its base
        (True, "messages", "messages", ""),
    ],
)
def test_the_record_decides_and_without_one_the_template(tmp_path, template, record, found, note):
    speaker = Speaker(make(tmp_path / "export", template=template, record=record), SamplingParameters(8), None)
    assert speaker.format == found
    assert [note in said for said in speaker.notes] == ([True] if note else [])


def test_texts_are_joined_by_one_space():
    assert continued("", "a") == "a"
    assert continued("a", "b") == "a b"
    assert continued("a ", "b") == "a b"
    assert continued("a", " b") == "a b"


# ---------------------------------------------------------------- a terminal


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(tmp_path):
    """An answer of 20,000 tokens would take minutes: that the next prompt comes shows that it was stopped."""
    model = make(tmp_path / "export", context=40_000)
    command = [sys.executable, "-m", "rlhf_lightning", "chat", "--model", model, "--max_new_tokens", "20000"]
    command += ["--min_new_tokens", "20000"]
    with Terminal(command) as terminal:
        terminal.until("you")
        terminal.until("you", press="\x03")  # at the prompt it stops nothing, and ends nothing
        terminal.type(QUESTION + "\n")
        terminal.until("╭")
        terminal.until("╭")  # drawn again: the answer has begun
        terminal.until("you", press="\x03")
        terminal.type("/nonsense\n")
        terminal.until("unknown command /nonsense")
        terminal.until("you")
        terminal.type("\x04")
        assert terminal.end() == 0
