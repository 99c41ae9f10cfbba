"""What a stage of a pipeline was made from, as one short hash: a stage with the same hash is skipped."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SMALL = (
    256 * 2**20
)  # bytes; larger files are compared by size and time, for reading them would take longer than the user likes


def stage_fingerprint(configs: list[str], arguments: list[str], options: dict[str, Any], upstream: list[str]) -> str:
    """Hash of the settings of a stage, of the files that they name, and of the stages before it.

    Args:
        configs: YAML files of the stage.
        arguments: Its command line, without paths that depend on where the pipeline is.
        options: Values of that command line that may name files.
        upstream: Fingerprints of the stages that it builds on.

    Returns:
        16 hexadecimal digits. They change with each argument, the text of each config, and the content of each row file and
        model folder that a config or an option names.
    """
    texts = [Path(config).read_text() for config in configs]
    values = [value for text in texts for value in strings_in(yaml.safe_load(text))]
    values += strings_in(options)
    contents = {value: content for value in sorted(set(values)) if (content := content_of(value))}
    return hashlib.sha256(json.dumps([arguments, texts, upstream, contents]).encode()).hexdigest()[:16]


def strings_in(node: Any) -> Iterator[str]:
    """Every string among the values of nested dicts and lists."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings_in(value)
    elif isinstance(node, str):
        yield node


def content_of(value: str) -> str:
    """Hash of the file or the model folder of that name; empty if it names neither."""
    if not value or len(value) > 1000 or "\n" in value:
        return ""
    path = Path(value).expanduser()
    try:
        if path.is_file():
            return file_content(path)
        if not (path / "config.json").is_file():
            return ""
        files = sorted(file for file in path.iterdir() if file.is_file())
    except OSError:  # a name that no file can have, or a folder that is not ours to read
        return ""
    return hashlib.sha256(json.dumps([[file.name, file_content(file)] for file in files]).encode()).hexdigest()


def file_content(path: Path) -> str:
    """Hash of a file's content; size and time of modification of a large one."""
    status = path.stat()
    if status.st_size > SMALL:
        return f"{status.st_size} {status.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
