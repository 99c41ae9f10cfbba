"""The report made from fabricated results: what it says first, which columns it has, what it names and explains."""

import json
import re
from html.parser import HTMLParser

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.charts import line_chart, stage_curves
from rlhf_lightning.evaluation.glossary import GLOSSARY
from rlhf_lightning.evaluation.headline import headline, number
from rlhf_lightning.evaluation.report import ReportSettings, write_report
from rlhf_lightning.evaluation.tables import BEHAVIOURS, condition_title, policy_table, terminal_table
from rlhf_lightning.evaluation.thresholds import Threshold, check_names, check_thresholds
from rlhf_lightning.evaluation.world import THRESHOLDS

WHERE = "held_out/sampled"
TITLED = ReportSettings("x")  # without a title it is the folder's name, which pytest makes from that of the test
COMMANDS = {
    "sft": "python -m rlhf_lightning fit --config a.yaml",
    "ppo": "python -m rlhf_lightning fit --config b.yaml",
}


def around(mean, half=0.05):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def own(gain=None, **rewards):
    """What RewardEvaluation returns for policies with these mean rewards; the first is what the others start from."""
    base, *others = rewards
    policies = {
        name: {WHERE: {"score": around(reward), "kl": float(i), "length": 20.0 + i, "truncated": 0.25}}
        for i, (name, reward) in enumerate(rewards.items())
    }
    compared = {
        name: {WHERE: {"gain": gain or around(rewards[name] - rewards[base]), "win_rate": around(0.75, 0.125)}}
        for name in others
    }
    return {
        "seed": 3,
        "seconds": {"sft": 1.0, "training": 1.0},
        "reward": {"figure": "score", "name": "politeness"},
        "conditions": {WHERE: {"prompts": 1200, "samples": 2, "sampling": "sampled at temperature 0.7"}},
        "policies": policies,
        "comparisons": compared,
        "samples": [{"prompt": "hello", "answers": {name: {"text": f"i am {name}", "score": 0.5} for name in rewards}}],
    }


def world():
    """What WorldEvaluation adds."""
    report = own(sft=0.0, ppo=0.8)
    for name, parts in report["policies"].items():
        part = parts[WHERE]
        part["gold"] = part.pop("score")
        part |= {"proxy": 1.5, "by_kind": {"harm": around(0.1)}, **dict.fromkeys(BEHAVIOURS, 0.125)}
        report["policies"][name] = {WHERE: part, "ood/sampled": part}
    report["comparisons"]["ppo"][WHERE]["gap_closed"] = 0.8
    report["reward_model"] = {"held_out": {"accuracy": 0.8, "bayes_accuracy": 0.85, "gold_order_accuracy": 0.9}}
    report["best_of_n"] = {"1": around(0.0), "2": around(0.3)}
    return report | {"reward": {"figure": "gold", "name": "gold reward"}}


class Tags(HTMLParser):
    """Tags in order, each with its attributes and its text up to the next tag."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.parents, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), ""))
        self.parents.append([name for name, _ in self.open])
        if tag not in ("meta", "br", "use", "path", "circle", "rect", "line"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in [name for name, _ in self.open]:
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        if self.tags:
            tag, attrs, text = self.tags[-1]
            self.tags[-1] = (tag, attrs, text + data)

    def texts(self, wanted):
        return [" ".join(text.split()) for tag, _, text in self.tags if tag == wanted]


def page_of(report, tmp_path, settings=ReportSettings(), usual=()):  # noqa: B008  (frozen)
    written = write_report(report, tmp_path, COMMANDS, settings, usual)
    assert json.loads((tmp_path / "report.json").read_text()) == written
    return (tmp_path / "report" / "index.html").read_text()


# ---------------------------------------------------------------- the sentence


def test_the_sentence_says_what_was_compared_and_the_result_with_its_interval():
    assert headline(own(sft=-0.05, ppo=0.8)) == (
        "ppo raised the politeness from −0.05 (sft) to 0.80 (95 % interval 0.75 to 0.85) at a KL of 1.0 nats, winning "
        "75 % (62 to 88 %) of comparisons with sft, on 1,200 held-out prompts."
    )


def test_of_several_policies_the_sentence_is_about_the_best_and_says_so():
    sentence = headline(own(sft=0.0, dpo=0.9, ppo=0.8))
    assert sentence.startswith("dpo raised the politeness from 0.00 (sft) to 0.90")
    assert sentence.endswith("It has the highest mean of the 2 policies compared with sft.")


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ({"mean": 0.1, "low": 0.01, "high": 0.2}, "ppo raised the"),
        ({"mean": -0.1, "low": -0.2, "high": -0.01}, "ppo lowered the"),
        ({"mean": 0.1, "low": -0.1, "high": 0.3}, "ppo did not change the politeness measurably"),
    ],
    ids=["above", "below", "around zero"],
)
def test_the_interval_of_the_gain_decides_what_is_claimed(gain, said):
    assert headline(own(sft=0.0, ppo=0.1, gain=gain)).startswith(said)


def test_a_single_policy_is_not_compared_and_no_policy_has_no_sentence():
    assert (
        headline(own(sft=0.5)) == "sft has a politeness of 0.50 (95 % interval 0.45 to 0.55) on 1,200 held-out prompts."
    )
    assert headline({"seed": 0, "seconds": {}}) is None


def test_numbers_are_printed_without_a_negative_zero():
    assert [number(-0.001), number(-0.5), number(1234.5, 1)] == ["0.00", "−0.50", "1,234.5"]


# ---------------------------------------------------------------- the page


def test_the_page_opens_with_title_sentence_and_figure_then_curves_then_tables_then_answers(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.0\n")
    page = page_of(own(sft=0.0, ppo=0.8), tmp_path, ReportSettings(title="Polite answers"))
    order = [
        "<h1>Polite answers</h1>",
        'class="lead">ppo raised the politeness',
        '<figure class="main">',
        "Training curves",
    ]
    order += [
        "loss over optimizer steps",
        "Figures in detail",
        "Answers side by side",
        "i am ppo",
        "How it was made",
        "Terms",
    ]
    found = [page.index(text) for text in order]
    assert found == sorted(found)
    assert page.index("<table") > page.index("Figures in detail")


def test_the_figure_has_a_labelled_point_a_policy_and_tells_its_values_to_a_screen_reader(tmp_path):
    report = own(sft=0.0, ppo=0.8)
    report["policies"]["ppo"][WHERE] |= {"kl": 2.5, "kl_interval": {"low": 2.25, "high": 2.75}}
    tags = Tags(page_of(report, tmp_path))
    figure = next(attrs for tag, attrs, _ in tags.tags if tag == "svg")
    assert figure["role"] == "img"
    assert figure["aria-label"] == (
        "politeness against KL, with 95 % intervals; sft: 0.00 (-0.05 to 0.05) at 0.00 nats; ppo: 0.80 (0.75 to 0.85) "
        "at 2.50 nats"
    )
    assert {"sft", "ppo", "politeness", "KL from the first policy, nats a response"} <= set(tags.texts("text"))


def test_every_table_scrolls_in_a_box_that_the_keyboard_reaches(tmp_path):
    source = page_of(world(), tmp_path, usual=THRESHOLDS)
    tables, boxes = (
        re.findall(r"<table", source),
        re.findall(r'<div class="scroll[^"]*" role="region" tabindex="0" ', source),
    )
    assert len(tables) == len(boxes) >= 7
    tags = Tags(source)
    parents = [above[-1] for (tag, *_), above in zip(tags.tags, tags.parents, strict=True) if tag == "table"]
    assert set(parents) == {"div"}
    assert re.search(r"\.scroll \{ overflow-x: auto", source)


def test_the_page_needs_nothing_beside_it_and_no_id_comes_twice(tmp_path):
    source = page_of(world(), tmp_path)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script""", source)
    tags = Tags(source)
    ids = [attrs["id"] for _, attrs, _ in tags.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for tag, attrs, _ in tags.tags if tag == "a"}
    assert len(targets) > 5
    assert targets <= set(ids)
    assert [text for _, attrs, text in tags.tags if attrs.get("aria-label") == ""] == []


def test_a_chart_takes_its_colours_from_the_page():
    svg = line_chart("loss", {"train/loss": ([1, 2], [1.0, 0.5])})
    assert "currentColor" in svg
    assert "#ffffff" not in svg
    assert "#010203" not in svg


# ---------------------------------------------------------------- names and columns


def titles(report, where=WHERE):
    return [column.title for column in policy_table(report, where).columns]


def test_a_pipeline_without_a_gold_reward_has_no_column_about_one():
    assert titles(own(sft=0.0, ppo=0.8)) == [
        "politeness",
        "gain",
        "win rate",
        "KL, nats",
        "length, tokens",
        "truncated",
    ]
    assert titles(own(sft=0.0)) == ["politeness", "KL, nats", "length, tokens", "truncated"]


def test_the_page_of_own_data_never_speaks_of_gold_of_other_distributions_or_of_a_proxy(tmp_path, capsys):
    page = page_of(own(sft=0.0, ppo=0.8), tmp_path, TITLED)
    for text in (page, capsys.readouterr().out):
        assert not re.search(r"gold|proxy|out of distribution|\bOOD\b|gap closed|best of n", text, re.IGNORECASE)
        assert "politeness" in text


def test_the_page_of_the_world_has_all_of_them(tmp_path, capsys):
    page = page_of(world(), tmp_path)
    assert titles(world())[3:6] == ["gap closed", "KL, nats", "proxy"]
    assert titles(world(), "ood/sampled") == ["gold reward", "KL, nats", "proxy", "length, tokens", "truncated"]
    for text in ("gold reward", "Out of distribution prompts", "Reward model", "Best of n", "harmful compliance"):
        assert text in page, text
    shown = capsys.readouterr().out
    assert "gap closed" in shown
    assert "OOD" in shown


def test_the_name_of_the_reward_is_the_users(tmp_path):
    page = page_of(own(sft=0.0, ppo=0.8), tmp_path, ReportSettings(reward="kindness"))
    assert "politeness" not in page
    assert "raised the kindness" in page
    assert json.loads((tmp_path / "report.json").read_text())["reward"]["name"] == "kindness"


def test_an_evaluation_that_names_no_reward_has_scores():
    report = own(sft=0.0, ppo=0.8)
    del report["reward"]
    assert titles(report)[0] == "reward"
    gold = world()
    del gold["reward"]
    assert titles(gold)[0] == "gold reward"


def test_headings_say_how_many_prompts_were_answered_how():
    report = own(sft=0.0, ppo=0.8)
    assert (
        condition_title(report, WHERE) == "Held-out prompts, sampled at temperature 0.7 (1,200 prompts, 2 answers each)"
    )
    assert condition_title({}, "ood/greedy") == "Out of distribution prompts, greedy"


def test_the_terminals_table_fits_into_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = world()
    for parts in report["policies"].values():
        parts["held_out/greedy"] = parts[WHERE]
    page_of(report, tmp_path)
    shown = capsys.readouterr().out
    assert [column.title for column in terminal_table(report).columns] == [
        "reward",
        "greedy",
        "OOD",
        "win rate",
        "gap closed",
        "KL, nats",
    ]
    assert "│ ppo    │ 0.80 ± 0.05 │   0.80 │ 0.80 │ 0.75 ± 0.12 │       80 % │     1.00 │" in shown


# ---------------------------------------------------------------- explanations


def test_the_terms_that_occur_are_explained_and_no_others(tmp_path):
    tags = Tags(page_of(own(sft=0.0, ppo=0.8), tmp_path))
    explained = set(tags.texts("dt"))
    assert {"KL", "win rate", "reward", "95 % interval", "held-out", "truncated"} <= explained
    assert not {"gold reward", "proxy", "gap closed", "out of distribution", "greedy", "best of n"} & explained


def test_every_term_of_a_column_has_an_entry(tmp_path):
    tags = Tags(page_of(world(), tmp_path))
    linked = {
        text
        for (tag, _, text), parents in zip(tags.tags, tags.parents, strict=True)
        if tag == "a" and "thead" in parents
    }
    assert {"proxy", "gap closed", "win rate", "gain", "best attainable", "harmful compliance"} <= linked
    assert {"proxy", "gap closed", "win rate", "gain", "best attainable", "out of distribution"} <= set(
        tags.texts("dt")
    )
    assert set(tags.texts("dt")) <= set(GLOSSARY)


# ---------------------------------------------------------------- how it was made


def test_command_config_seed_versions_and_hardware_are_shown(tmp_path):
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "config.yaml").write_text("model:\n  beta: <0.125>\n")
    page = page_of(own(sft=0.0, ppo=0.8) | {"evaluation": {"class": "RewardEvaluation"}}, tmp_path)
    assert page.count("command and config</summary>") == 2
    for text in (*COMMANDS.values(), "beta: &lt;0.125&gt;", "Seed 3.", "torch ", " processors, ", "RewardEvaluation"):
        assert text in page, text
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["stages"] == [{"name": name, "command": command} for name, command in COMMANDS.items()]
    assert {"processors", "threads", "gpus"} <= set(written["hardware"])


def test_a_pipeline_without_evaluation_has_a_report_all_the_same(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.0\n")
    page = page_of({"seed": 0, "seconds": {"sft": 1.0}}, tmp_path)
    assert f"<h1>Pipeline {tmp_path.name}</h1>" in page
    assert "Training curves" in page
    assert "<table" not in page
    assert "Terms" not in page


def test_a_chart_tells_where_each_curve_begins_and_ends(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss,eval/loss,train/objective/kl\n1,2.0,,\n2,1.0,1.5,\n9,.5,,\n")
    (chart,) = stage_curves(file)  # no chart of a column without values
    label = Tags(chart).tags[0][1]["aria-label"]
    assert label == (
        "loss over optimizer steps: train/loss from 2 at step 1 to 0.5 at step 9; eval/loss from 1.5 at step 2 to 1.5 at step 2"
    )


# ---------------------------------------------------------------- thresholds

WINS = "comparisons:ppo:held_out/sampled:win_rate:mean"


@pytest.mark.parametrize(
    ("bounds", "met"),
    [({"low": 0.75}, True), ({"low": 0.76}, False), ({"high": 0.75}, True), ({"high": 0.74}, False)],
    ids=lambda value: str(value),
)
def test_the_users_thresholds_are_marked_on_both_sides_and_at_the_bound(tmp_path, bounds, met):
    page = page_of(own(sft=0.0, ppo=0.8), tmp_path, ReportSettings(thresholds=[Threshold(WINS, name="wins", **bounds)]))
    (check,) = json.loads((tmp_path / "report.json").read_text())["thresholds"]
    assert check == {"name": "wins", "value": 0.75, "met": met, **bounds}
    assert ("All thresholds met (1)" in page) == met
    assert ("1 of 1 thresholds missed" in page) != met


def test_the_users_thresholds_replace_the_usual_ones_and_an_empty_list_removes_them(tmp_path):
    usual = [Threshold(WINS, 0.5, name="usual"), Threshold("policies:dpo:x", 0.5)]
    page_of(own(sft=0.0, ppo=0.8), tmp_path, usual=usual)
    assert [c["name"] for c in json.loads((tmp_path / "report.json").read_text())["thresholds"]] == ["usual"]
    page = page_of(own(sft=0.0, ppo=0.8), tmp_path, ReportSettings("x", thresholds=[]), usual)
    assert json.loads((tmp_path / "report.json").read_text())["thresholds"] == []
    assert "hreshold" not in page


def test_a_threshold_of_the_user_without_its_figure_is_missed_and_not_dropped():
    (check,) = check_thresholds([Threshold("policies:ppo:nothing", 0.5)], own(sft=0.0, ppo=0.8), skip_missing=False)
    assert check == {"name": "policies:ppo:nothing", "value": None, "met": False, "low": 0.5}


def test_thresholds_that_can_not_be_are_refused():
    with pytest.raises(UserError, match="has no bound: give low, high, or both"):
        Threshold(WINS)
    with pytest.raises(UserError, match="low 2 is above high 1"):
        Threshold(WINS, 2.0, 1.0)
    with pytest.raises(UserError, match=r"comparisons:ppo.* names no stage; after comparisons: comes one of sft, dpo"):
        check_names([Threshold(WINS, 0.5)], ["sft", "dpo"])
    check_names([Threshold(WINS, 0.5), Threshold("reward_model:held_out:accuracy", 0.5)], ["sft", "ppo"])
