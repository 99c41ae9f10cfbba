"""What a validation counts of every method: the training's numbers on the same rows, or those of the scripted responses."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.ground_truth.plain_loops import Loop, response_logps, score_of
from tests.invariance.rearrangements import EOS, PLAIN, STEP
from tests.invariance.subjects import ANSWERS, PROMPTS, SUBJECTS, Memory, batches, configured, scalar_folder
from tests.methods import METHODS, methods_for

NAMES = methods_for("validation")


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    return scalar_folder(tmp_path_factory.mktemp("scalar"), "rotary")


def logged(name, scalar, command):
    """One optimizer step at learning rate 0 and a validation of its rows, or that validation alone."""
    pl.seed_everything(0, verbose=False)
    module = configured(SUBJECTS[name], "rotary", scalar, PLAIN)
    module.configure_model = lambda: None
    module.optimizer_factory = lambda params: torch.optim.SGD(params, lr=0.0)
    memory = Memory()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=memory,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches(SUBJECTS[name], PLAIN)[:1], batch_size=None, collate_fn=lambda batch: batch)
    if command == "fit":
        trainer.fit(module, loader, loader)
    else:
        trainer.validate(module, loader, verbose=False)
    rows = {key: value for row in memory.rows for key, value in row.items()}
    return {
        stage: {k.removeprefix(stage): v for k, v in rows.items() if k.startswith(stage)}
        for stage in ("train/", "eval/")
    }


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].samples])
def test_a_validation_of_the_rows_of_a_step_has_its_numbers(name, scalar):
    found = logged(name, scalar, "fit")
    common = (found["train/"].keys() & found["eval/"].keys()) - {"epoch"}
    assert {"loss", "num_tokens"} <= common
    assert {k: found["eval/"][k] for k in common} == pytest.approx({k: found["train/"][k] for k in common}, rel=1e-6)
    alone = logged(name, scalar, "validate")["eval/"]
    assert {k: v for k, v in alone.items() if k != "epoch"} == {k: v for k, v in found["eval/"].items() if k != "epoch"}


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].samples])
def test_a_validation_of_a_sampling_method_counts_the_responses(name, scalar):
    """Each prompt is asked once and answered by the scripted engine: scores, lengths and ends are known."""
    answers = ANSWERS[:STEP]
    expected = {
        "score": sum(score_of(row, ids) for row, ids in enumerate(answers)) / STEP,
        "length": sum(map(len, answers)) / STEP,
        "truncated": sum(ids[-1] != EOS for ids in answers) / STEP,
    }
    for command in ("fit", "validate"):
        found = logged(name, scalar, command)["eval/"]
        for mode in ("sampled", "greedy"):
            for key, value in expected.items():
                assert found[f"{mode}/{key}"] == pytest.approx(value, rel=1e-6), (command, mode, key)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].module.__name__ == "OnlineDPOModule"])
def test_the_kl_of_a_validation_is_that_of_whole_responses(name, scalar):
    loop = Loop(name, scalar)
    if loop.reference is None:
        assert not any("kl" in key for key in logged(name, scalar, "validate")["eval/"])
        return
    temperature = 0.7
    with torch.no_grad():
        kl = sum(
            float((response_logps(loop.network, PROMPTS[row], ids, temperature)
                   - response_logps(loop.reference, PROMPTS[row], ids, temperature)).sum())
            for row, ids in enumerate(ANSWERS[:STEP])
        ) / STEP  # fmt: skip
    assert logged(name, scalar, "validate")["eval/"]["sampled/kl"] == pytest.approx(kl, rel=1e-4)
