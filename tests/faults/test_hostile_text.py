"""Text that would command a page, a terminal or a reader of lines: shown harmlessly wherever the project shows text."""

import io
import json
import logging
from html.parser import HTMLParser

import pytest
from rich.console import Console
from rich.panel import Panel

from rlhf_lightning.callbacks.loggers import Tolerant, log_samples
from rlhf_lightning.callbacks.predictions import PredictionLines, json_line
from rlhf_lightning.callbacks.samples import COLUMNS, SampleTable, plain, sample_panel
from rlhf_lightning.cli import main
from rlhf_lightning.commands import chat
from rlhf_lightning.commands.quiet import HarmlessFormatter
from rlhf_lightning.errors import UserError, harmless
from rlhf_lightning.evaluation.charts import line_chart
from rlhf_lightning.evaluation.report import print_report, render, write_report
from rlhf_lightning.modules.showing import Sample

TEXTS = {
    "script": "<script>alert(1)</script>",
    "an image": "<img src=x onerror=alert(1)>",
    "out of an attribute": '" onmouseover="alert(1)" x=\'',
    "out of a script": "</script><!--",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "colour": "\x1b[31mred\x1b[0m",
    "clears the screen": "\x1b[2J\x1b[H\x1bc",
    "names the window": "\x1b]0;owned\x07",
    "a link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "eight-bit escape": "\x9b31mred",
    "overwrites the line": "good\rbad!",
    "erases": "secret\b\b\b\b\b\b",
    "null and bell": "a\x00b\x07c\x7f",
    "reversed": "user\u202etxt.exe\u202c \u2066x\u2069",
    "invisible": "a\u200bb\ufeffc\u00ad",
    "line separators": "a\u2028b\u2029c\x85d",
    "rich markup": "[red]danger[/red] [/] [link=http://evil]x[/link]",
    "half a pair": "a\ud800b",
    "long": "x" * 20_000,
    "many lines": "\n".join("line" for _ in range(300)),
    "plain": "Grüße, 你好, naïve 😀 & <3",
}
DANGEROUS = set(map(chr, [*range(0, 9), *range(11, 32), *range(127, 160)])) | set(
    "\u202e\u202c\u2066\u2069\u200b\ufeff\u2028\u2029\ud800"
)
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def printed(*what, width=100) -> str:
    """What rich writes to a terminal, without the codes of its own styles."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(*what)
    return file.getvalue()


def squeezed(text: str) -> str:
    """Without white space and the lines of boxes: what is left when text is wrapped into a table."""
    return "".join(c for c in text if not c.isspace() and not "\u2500" <= c <= "\u257f")


@every_text
def test_harmless_text_holds_nothing_dangerous_and_stays_itself_otherwise(text):
    shown = harmless(text)
    assert not set(shown) & DANGEROUS
    shown.encode("utf-8")
    safe = [c for c in text if c not in DANGEROUS and c != "\u00ad"]
    position = 0
    for character in safe:  # every other character is still there, in order
        position = shown.index(character, position) + 1
    assert harmless(shown) == shown


def test_codes_are_those_that_python_writes():
    assert harmless("a\x1b[0m\u202e\ud800\U000e0041\x9b\r\n\tz") == "a\\x1b[0m\\u202e\\ud800\\U000e0041\\x9b\\r\n\tz"


@every_text
@pytest.mark.parametrize("place", ["panel", "chat"])
def test_the_terminal_shows_text_and_obeys_none_of_it(text, place):
    shown = printed(sample_panel([Sample(text, text, 1.0)], "SFT, step 1") if place == "panel" else Panel(plain(text)))
    assert not set(shown) & DANGEROUS
    wanted = squeezed(harmless(text))
    if place == "chat":
        assert squeezed(shown) == wanted
    else:  # two columns side by side: each line of the text is in some line
        assert all(word[:5] in squeezed(shown) for word in harmless(text).split()[:3])


def test_the_name_of_a_model_in_chat_is_text_too(monkeypatch, tmp_path):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)

    class Said:
        path = "runs/[red]a\x1b[2J"

        def answer(self, said):
            yield from ("one \x1b[31m", "[/] two")

    chat.show_answers(console, [Said()], "hello")
    shown = file.getvalue()
    assert "[red]a\\x1b[2J" in shown
    assert "one \\x1b[31m[/] two" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b[31m" not in shown


@every_text
def test_predictions_are_one_line_each_for_every_reader(text, tmp_path):
    class Trainer:
        default_root_dir, global_rank = str(tmp_path), 0

    writer = PredictionLines()
    writer.on_predict_start(Trainer, None)
    for _ in range(2):
        writer.write_on_batch_end(Trainer, None, [Sample(text, text, 0.5)], None, None, 0, 0)
    written = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert not set(written) & DANGEROUS
    assert len(written.splitlines()) == 2
    line = {"row": None, "side": None, "prompt": text, "response": text, "score": 0.5}
    assert [json.loads(line) for line in written.splitlines()] == [line] * 2


def test_what_is_printable_stays_readable_in_predictions():
    assert json_line({"a": "Grüße 你好 😀"}) == '{"a": "Grüße 你好 😀"}'


@every_text
def test_tables_for_wandb_hold_what_a_file_can_hold(text, monkeypatch):
    from rlhf_lightning.callbacks.loggers import WandbRun

    sent = []
    logger = WandbRun(offline=True, save_dir=".")
    monkeypatch.setattr(
        WandbRun, "log_text", lambda self, key, columns, data, step: sent.append((key, columns, data, step))
    )
    log_samples(Tolerant(logger), COLUMNS, [[3, text, text, 0.5]], 7)
    assert sent == [("completions", COLUMNS, [[3, harmless(text), harmless(text), 0.5]], 7)]
    json.dumps(sent, ensure_ascii=False).encode("utf-8")


def test_the_sample_callback_shows_what_a_module_says(capsys):
    table = SampleTable()
    table._print([Sample("p\x1b[2J", "[red]r", 0.1)], "t")
    shown = capsys.readouterr().out
    assert "p\\x1b[2J" in shown
    assert "[red]r" in shown


# ---------------------------------------------------------------- the report


class Page(HTMLParser):
    """Elements, attributes and text of a page as a browser reads them."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.cells, self.open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.open.append(tag)
        if tag in ("td", "th", "h3", "p"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, data):
        if {"td", "th", "h3", "p"} & set(self.open):
            self.cells[-1] += data


def report_of(text: str) -> dict:
    """A report with a text wherever one can stand."""
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    figures = {"score": interval, "kl": 1.0, "length": 3.0, "truncated": 0.0, "by_kind": {text: interval}}
    figures |= dict.fromkeys(
        ("right", "harmful_compliance", "refused_benign", "sycophantic", "polite", "ungrammatical"), 0.1
    )
    return {
        "seed": 0,
        "seconds": {text: 1.0, "training": 1.0},
        "versions": {"rlhf_lightning": "1", "torch": "2", "transformers": text},
        "hardware": {"machine": text, "threads": 1, "cuda": False},
        "policies": {text: {"held_out/sampled": figures}, "b": {"held_out/sampled": figures}},
        "comparisons": {"b": {"held_out/sampled": {"win_rate": interval}}},
        "reward_model": {text: {"accuracy": 0.5, "bayes_accuracy": 0.5, "gold_order_accuracy": 0.5}},
        "thresholds": [{"name": text, "met": True, "value": 0.5, "low": 0.1}],
        "samples": [{"prompt": text, "kind": text, "answers": {text: {"text": text, "score": 0.5}}}],
    }


CHARTS = {"x": [line_chart("x", {"x": ([1, 2], [0.0, 1.0])})]}
ELEMENTS = ("table", "tr", "td", "th", "h3", "a", "style")


@every_text
def test_the_report_shows_text_as_text(text):
    source = render(report_of(text), {text: CHARTS["x"]})
    assert not set(source) & DANGEROUS
    source.encode("utf-8")
    page, innocent = Page(source), Page(render(report_of("x"), CHARTS))
    assert "script" not in page.elements
    assert "img" not in page.elements
    assert not any(name.startswith("on") for name in page.attributes)
    ours, expected = ([e for e in p.elements if e in ELEMENTS] for p in (page, innocent))
    assert ours == expected
    shown = harmless(text)
    assert sum(cell.strip() == shown.strip() for cell in page.cells) >= 4  # names of policy, threshold, column, stage
    assert any(cell.startswith(shown) and cell.endswith("0.50") for cell in page.cells)  # the answer and its score


def test_charts_draw_text_as_text():
    every = " ".join(text[:60] for text in TEXTS.values() if "\n" not in text)
    svg = line_chart("t", {every: ([1, 2], [0.0, 1.0])}) + line_chart(every, {"x": ([1, 2], [0.0, 1.0])})
    assert not set(svg) & DANGEROUS
    assert not {"script", "img"} & set(Page(svg).elements)


@pytest.mark.parametrize("name", ["script", "clears the screen", "half a pair", "rich markup", "overwrites the line"])
def test_the_report_is_written_and_its_table_printed(name, tmp_path, capsys):
    text = TEXTS[name]
    write_report(report_of(text), tmp_path, {})
    assert json.loads((tmp_path / "report.json").read_text())["samples"][0]["prompt"] == text
    assert harmless(text)[:3] in (tmp_path / "report" / "index.html").read_text().replace("&lt;", "<")
    shown = capsys.readouterr().out
    assert not set(shown) & DANGEROUS
    assert squeezed(harmless(text))[:5] in squeezed(shown)


def test_rich_markup_in_a_name_is_neither_obeyed_nor_lost(capsys):
    print_report(report_of("[b]x[/b]"))
    assert capsys.readouterr().out.count("[b]x[/b]") == 3  # as the name of a policy, of a threshold and of a time


# ---------------------------------------------------------------- messages


@every_text
def test_errors_and_log_lines_quote_data_harmlessly(text):
    assert not set(str(UserError(f"row 3: {text}"))) & DANGEROUS
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "saw %s", (text,), None)
    shown = HarmlessFormatter("%(message)s").format(record)
    assert shown == harmless(f"saw {text}")


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "a\x1b[2J', '{"prompt": "a", "completion": {"x\x1b[31m": 1}}', '"\x1b]0;x\x07"', '\x9b{"a": 1}'],
)
def test_a_bad_row_does_not_reach_the_terminal_through_its_error(base, tmp_path, capsys, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    args = [
        "fit",
        "--model",
        "SFTModule",
        "--model.policy.path",
        str(base / "policy"),
        "--data",
        "DemonstrationDataModule",
    ]
    with pytest.raises(SystemExit):
        main(
            [
                *args,
                "--data.source",
                str(path),
                "--wandb",
                "disabled",
                "--trainer.default_root_dir",
                str(tmp_path / "run"),
            ]
        )
    said = capsys.readouterr().err
    assert "rows.jsonl" in said.strip().splitlines()[-1]
    assert not set(said) & DANGEROUS


@pytest.mark.parametrize("name", ["../outside", "a/b", "", "x\x1b[2J", "[red]", ".."])
def test_a_stage_is_named_like_a_folder(tmp_path, capsys, name):
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"stages": [{"name": name, "config": [str(plan)]}], "output": str(tmp_path / "out")}))
    with pytest.raises(SystemExit):
        main(["pipeline", "--config", str(plan)])
    said = capsys.readouterr().err
    assert "stage's name" in said
    assert not set(said) & DANGEROUS
