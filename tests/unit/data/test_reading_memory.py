"""What a run holds in memory does not grow with its files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MIB = 2**20


def write_large(path, size):
    """Rows of 5.6 kB, most of it in a column that nobody asks for; returns how many they are."""
    generator, rows = random.Random(0), 0
    with path.open("w") as file:
        file.write("[" if path.suffix == ".json" else "")
        while file.tell() < size:
            said = [" ".join(generator.choices("abcdef", k=generator.randint(5, 20))) for _ in range(2)]
            row = json.dumps(
                {"prompt": f"{rows} {said[0]}", "completion": said[1], "note": generator.randbytes(2700).hex()}
            )
            file.write((",\n" if rows and path.suffix == ".json" else "") + row + "\n" * (path.suffix == ".jsonl"))
            rows += 1
        file.write("]" if path.suffix == ".json" else "")
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("r.jsonl", []),
        pytest.param("r.json", [], marks=pytest.mark.exhaustive),
        pytest.param("r.jsonl", ["stream"], marks=pytest.mark.exhaustive),
    ],
)
def test_350_megabytes_are_read_in_a_tenth_of_that(tmp_path, word, name, how):
    """Blocks of rows and of tokens, the order of an epoch, and what is held before anything is written to disk: 32 MiB."""
    word.save_pretrained(tmp_path / "word")
    rows = write_large(tmp_path / name, 350 * MIB)
    command = [
        sys.executable,
        str(Path(__file__).parent / "reading_large.py"),
        str(tmp_path / name),
        str(tmp_path / "word"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *how], env=environment, check=True, stdout=subprocess.PIPE)
    told = json.loads(done.stdout)
    print(told)
    assert told["rows"] == rows
    assert told["mib"] < 120
