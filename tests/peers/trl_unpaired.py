"""Runs TRL's own KTO trainer for one optimizer step and writes down what it computed."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from tests.peers.problem import tokenizer
from tests.peers.trl_offline import QUIET, watched
from tests.peers.unpaired_cases import ROWS, Unpaired, roles


def run(case: Unpaired, paths: dict[str, str], scratch: Path) -> dict[str, Any]:
    """One step of the case. What its forwards put out is left out: there are two of them."""
    args = KTOConfig(
        **QUIET,
        output_dir=str(scratch),
        per_device_train_batch_size=len(ROWS) // case.micro_batches,
        gradient_accumulation_steps=case.micro_batches,
        **case.trl,
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(paths[role]) for role in roles(case))
    trainer = KTOTrainer(
        model, reference, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer()
    )
    found = watched(trainer)
    del found["outputs"]
    return found
