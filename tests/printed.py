"""The commands that the documentation prints: in Markdown, notebooks, the headers of configs and the Makefile."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SKIPPED = (".venv", "runs", "build", ".git", "shared")  # folders that are not the repository's own text
OURS = re.compile(r"^(?:\.venv/bin/)?python -m rlhf_lightning (?=\S)")
FIRST_WORDS = r"(?:\.venv/bin/\S+|python|pip|make|pre-commit|pytest|docker|bash|uv)"
COMMAND = re.compile(rf"^(?:[A-Z_]+=\S+ )*{FIRST_WORDS} [\w.\-']")
SHORT = re.compile(r"^(?:fit|validate|test|predict|pipeline|export|chat|average|sample|fixed-points|ground-truth) -")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"(?:^|: )(make [\w-]+(?: ARGS=\"[^\"]*\")?)")
INLINE = re.compile(r"`([^`]+)`")


class Printed(NamedTuple):
    """A command, and where it is printed."""

    text: str
    file: str

    @property
    def arguments(self):
        """The arguments of a command of ours, the name of the command first; None for other programs."""
        if not (OURS.match(self.text) or SHORT.match(self.text)):
            return None
        return shlex.split(OURS.sub("", self.text))


def own_files(pattern):
    return [
        file
        for file in sorted(ROOT.rglob(pattern))
        if not any(part in SKIPPED or part.startswith(".venv") for part in file.relative_to(ROOT).parts)
    ]


def without_comment(line):
    return re.sub(r"\s+#\s.*$", "", line).strip()


def of_markdown(text):
    """Lines of code blocks of shell or of no language, and code within sentences."""
    for language, block in FENCE.findall(text):
        if language in ("", "bash", "sh", "shell", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(FENCE.sub("", text).replace("\n", " "))


def of_notebook(text):
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "markdown":
            yield from of_markdown("".join(cell["source"]))


def of_header(text):
    """Comments of a config or script: a line that is a command, alone or after ``Then:``, and code in backticks."""
    for line in text.splitlines():
        if line.startswith("#"):
            comment = line.lstrip("# ")
            if comment.startswith("make "):  # in the Makefile what it does follows
                yield from TARGET.findall(comment)
            else:
                yield re.sub(r"^Then: ", "", comment)
            yield from INLINE.findall(comment)


def printed_commands():
    """Every command that is printed anywhere, once, with the first file that prints it."""
    sources = [(file, of_markdown) for file in own_files("*.md") if file.name != "CHANGELOG.md"]
    sources += [(file, of_notebook) for file in own_files("*.ipynb")]
    configs = [file for file in own_files("*") if file.is_file() and file.relative_to(ROOT).parts[0] == "configs"]
    sources += [(file, of_header) for file in [*configs, ROOT / "Makefile"] if file.suffix != ".md"]
    sources.sort(key=lambda source: source[0] != ROOT / "README.md")
    found = {}
    for file, read in sources:
        for line in read(file.read_text()):
            text = without_comment(line)
            if COMMAND.match(text) or SHORT.match(text):
                found.setdefault(text, Printed(text, str(file.relative_to(ROOT))))
    return list(found.values())
