"""What every test may use: quiet libraries, a private cache, and tiny models built on the spot."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait do not spin
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores; what tests start inherits it
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Tokenized rows are cached by content; tests must neither profit from nor leave anything in the user's cache."""
    os.environ["RLHF_LIGHTNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny():
    """Fields of a Llama that learns in seconds."""
    return dict(TINY)


@pytest.fixture
def short_prompts_are_shared(monkeypatch):
    """Prompts of a few tokens are treated as long ones are, which are read once."""
    from rlhf_lightning.models import trunk

    monkeypatch.setitem(trunk.SHORTEST_SHARED, "cpu", 1)
