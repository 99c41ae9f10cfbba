"""What people write, and rows of every known format around it, with the canonical rows that they must become."""

from typing import Any, NamedTuple

from hypothesis import strategies as st

from rlhf_lightning.data.messages import is_hh

# What has been mistaken for something else: markers, dates, numbers, templates, separators, escapes, odd unicode.
TRICKY = [
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", "[INST]", "<unk>", "<pad>", "<eos>", "</think>"),
    *("\n\nHuman:", "\n\nAssistant:", "User:\n", "## user\n", "{{ 1 }}", "{% generation %}", "{# #}", "\\n", "%s"),
    *("2020-01-01", "12:30", "007", "1e5", "True", "null", "None", "NaN", "[]", '{"role": "user"}', "a,b", '"', "'"),
    *("\x00", "\x1b[31m", "\x7f", "\x85", "\xa0", "\r", "\r\n", "\n", "\t", " ", "\u2028", "\u200b", "\u202e"),
    *("\ufeff", "\ufdd0", "\ufdd0\ufdd1\ufdd1", "\uffff", "e\u0301", "Å", "İ", "ß", "漢字", "🙂", "👩‍👩‍👧", "𝕏"),
    *("\U0010ffff", "<|im_end", "|>", "<", "im_end|>"),
]
PLAIN = st.characters(exclude_categories=["Cs"])
WORDS = st.one_of(
    st.sampled_from(TRICKY), st.text(PLAIN, min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=9)
)
LONG = st.sampled_from(["x" * 5000, "é " * 3000, "<|im_end|>" * 400, "\n" * 4000 + "."])
RARELY_LONG = st.one_of(*[st.lists(WORDS, min_size=1, max_size=4).map("".join)] * 30, LONG)
SAID = RARELY_LONG.filter(lambda text: text.strip())


class Case(NamedTuple):
    """A row, and what it must become for each kind; None where it can't serve that kind."""

    format: str
    row: dict[str, Any]
    demonstration: dict[str, Any] | None
    preference: dict[str, Any] | None
    prompt: dict[str, Any] | None
    disliked: bool = False

    def expected(self, kind):
        return {"demonstrations": self.demonstration, "preferences": self.preference, "prompts": self.prompt}[kind]


def message(role, content):
    return {"role": role, "content": content}


@st.composite
def prompts(draw, said=SAID):
    """Messages up to where the assistant is to answer."""
    system = [message("system", draw(said))] if draw(st.booleans()) else []
    turns = [message(role, draw(said)) for _ in range(draw(st.integers(0, 2))) for role in ("user", "assistant")]
    return [*system, *turns, message("user", draw(said))]


def pair(good, bad, **prompt):
    return {**prompt, "chosen": good, "rejected": bad}


@st.composite
def text_rows(draw):
    """Formats whose columns are text throughout."""
    prompt, good, bad = draw(SAID), draw(SAID), draw(SAID)
    liked = draw(st.booleans())
    shown = {"prompt": prompt, "completion": good}
    asked = {"prompt": prompt}
    return draw(
        st.sampled_from(
            [
                Case("text", {"text": "t " + prompt}, {"text": "t " + prompt}, None, None),
                Case("prompt-only", asked, None, None, asked),
                Case("prompt-completion", shown, shown, None, asked),
                Case("unpaired-preference", {**shown, "label": liked}, shown, None, asked, disliked=not liked),
                Case("preference", pair(good, bad, prompt=prompt), shown, pair(good, bad, prompt=prompt), asked),
            ]
        )
    )


def steps_case(prompt, good, bad, liked):
    joined = f"{good}\n{bad}"
    if isinstance(prompt, list):
        answer = [message("assistant", joined)]
        row = {
            "prompt": prompt,
            "completions": [[message("assistant", s)] for s in (good, bad)],
            "labels": [True, liked],
        }
    else:
        answer, row = joined, {"prompt": prompt, "completions": [good, bad], "labels": [True, liked]}
    return Case("stepwise", row, {"prompt": prompt, "completion": answer}, None, {"prompt": prompt}, disliked=not liked)


SPELT = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(messages):
    return [{"from": SPELT[m["role"]], "value": m["content"]} for m in messages]


def in_parts(messages):
    """Content as lists of two text parts."""
    halves = [(m["content"][: len(m["content"]) // 2], m["content"][len(m["content"]) // 2 :]) for m in messages]
    parts = [[{"type": "text", "text": half} for half in both] for both in halves]
    return [{"role": m["role"], "content": part} for m, part in zip(messages, parts, strict=True)]


@st.composite
def chat_rows(draw):
    """Formats that give messages."""
    prompt, good, bad, liked = draw(prompts()), draw(SAID), draw(SAID), draw(st.booleans())
    chosen, rejected = [message("assistant", good)], [message("assistant", bad)]
    whole, lost = [*prompt, *chosen], [*prompt, *rejected]
    shown, asked = {"prompt": prompt, "completion": chosen}, {"prompt": prompt}
    compared = pair(chosen, rejected, prompt=prompt)
    head, system = prompt, {}
    if prompt[0]["role"] == "system":
        head, system = prompt[1:], {"system": prompt[0]["content"]}
    told = {"messages": whole}
    says = draw(st.sampled_from([lambda messages: messages, in_parts]))
    cases = [
        Case("messages", {"messages": says(whole)}, told, None, asked),
        Case("messages", {"messages": says([*head, *chosen]), **system}, told, None, asked),
        Case("sharegpt", {"conversations": sharegpt([*head, *chosen]), **system}, told, None, asked),
        Case("labelled-messages", {"messages": whole, "label": int(liked)}, shown, None, asked, disliked=not liked),
        Case("labelled-sharegpt", {"conversations": sharegpt(whole), "kto_tag": liked}, shown, None, asked, not liked),
        Case("prompt-only", {"prompt": says(prompt)}, None, None, asked),
        Case("prompt-completion", {"prompt": says(prompt), "completion": says(chosen)}, shown, None, asked),
        Case("prompt-completion", {"prompt": prompt, "completion": good}, shown, None, asked),
        Case("unpaired-preference", {**shown, "label": liked}, shown, None, asked, disliked=not liked),
        Case("preference", pair(says(chosen), says(rejected), prompt=says(prompt)), shown, compared, asked),
        Case("preference", pair(says(whole), says(lost), prompt=prompt[-1]["content"]), shown, compared, asked),
        Case("implicit-preference", pair(says(whole), says(lost)), shown, compared, asked),
        Case(
            "swift-preference",
            {"messages": [*head, *chosen], "rejected_response": bad, **system},
            shown,
            compared,
            asked,
        ),
        Case(
            "sharegpt-preference",
            {
                "conversations": sharegpt(head),
                "chosen": sharegpt(chosen)[0],
                "rejected": sharegpt(rejected)[0],
                **system,
            },
            shown,
            compared,
            asked,
        ),
        steps_case(prompt, good, bad, liked),
    ]
    return draw(st.sampled_from(cases))


@st.composite
def alpaca_rows(draw):
    system, given, good, bad = draw(st.none() | SAID), draw(st.none() | SAID), draw(SAID), draw(SAID)
    history, instruction = draw(st.lists(st.tuples(SAID, SAID).map(list), max_size=2)), draw(SAID)
    prompt = [message("system", system)] if system else []
    prompt += [m for q, a in history for m in (message("user", q), message("assistant", a))]
    prompt.append(message("user", f"{instruction}\n{given}" if given else instruction))
    row = {"instruction": instruction, "input": given, "output": good, "system": system, "history": history}
    chosen, rejected = [message("assistant", good)], [message("assistant", bad)]
    shown = {"prompt": prompt, "completion": chosen}
    if draw(st.booleans()):
        return Case("alpaca", row, shown, None, {"prompt": prompt})
    compared = pair(chosen, rejected, prompt=prompt)
    return Case("alpaca-preference", {**row, **pair(good, bad)}, shown, compared, {"prompt": prompt})


HH_SAID = SAID.map(str.strip).filter(lambda t: "\n\nHuman:" not in t and "\n\nAssistant:" not in t)


@st.composite
def hh_rows(draw):
    turns = [m for m in draw(prompts(HH_SAID)) if m["role"] != "system"]
    good, bad = draw(HH_SAID), draw(HH_SAID)
    names = {"user": "Human", "assistant": "Assistant"}
    start = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in turns)
    texts = [f"{start}\n\nAssistant: {answer}" for answer in (good, bad)]
    chosen, rejected = [message("assistant", good)], [message("assistant", bad)]
    if draw(st.booleans()):
        return Case("hh-rlhf-text", {"text": texts[0]}, {"messages": [*turns, *chosen]}, None, {"prompt": turns})
    shown, compared = {"prompt": turns, "completion": chosen}, pair(chosen, rejected, prompt=turns)
    return Case("hh-rlhf", pair(*texts), shown, compared, {"prompt": turns})


CASES = st.one_of(text_rows(), chat_rows(), alpaca_rows(), hh_rows()).filter(
    lambda case: case.format != "text" or not is_hh(case.row["text"])
)

JUNK_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    SAID,
    st.sampled_from(["", " ", "user", "\x00"]),
)
JUNK_KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "prompt", "name", ""]) | st.text(
    PLAIN, max_size=3
)
JUNK = st.recursive(
    JUNK_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JUNK_KEYS, inner, max_size=3), max_leaves=8
)
COLUMNS = sorted(
    {
        *(
            "text",
            "messages",
            "conversations",
            "prompt",
            "completion",
            "chosen",
            "rejected",
            "label",
            "kto_tag",
            "tools",
        ),
        *(
            "instruction",
            "input",
            "output",
            "system",
            "history",
            "completions",
            "labels",
            "rejected_response",
            "margin",
        ),
        *("length", "prompt_ids", "name\n", ""),
    }
)


def spoilt(draw, value):
    """A value with something in it replaced by junk: itself, one of its elements, or deeper."""
    if isinstance(value, list) and value and draw(st.booleans()):
        position = draw(st.integers(0, len(value) - 1))
        return [*value[:position], spoilt(draw, value[position]), *value[position + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: spoilt(draw, value[key])}
    return draw(JUNK)


@st.composite
def junk_tables(draw):
    """Rows of which some are as they should be, some spoilt, some without or with other columns, some of another format."""
    first = draw(CASES)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = dict(draw(st.one_of(st.just(first), CASES)).row)
        for _ in range(draw(st.integers(0, 2))):
            column = draw(st.sampled_from(sorted(row)) if row and draw(st.booleans()) else st.sampled_from(COLUMNS))
            if column in row and draw(st.booleans()) and draw(st.booleans()):
                del row[column]
            else:
                row[column] = spoilt(draw, row.get(column))
        rows.append(row)
    return rows
