"""A small enumerable world (57 responses to each of 4 prompts), its reference as a folder, and one real step of a module."""

import lightning.pytorch as pl
import pytest
import torch
from enumeration import Recorder

from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.worlds import EnumerableWorld

torch.set_num_threads(1)  # threads that wait for each other cost more than they give


@pytest.fixture(scope="session")
def world():
    return EnumerableWorld(seed=0, max_new_tokens=2, preferences=256, prompt_rows=8, held_out=4)


@pytest.fixture(scope="session")
def folder(world, tmp_path_factory):
    """The reference policy, exported."""
    return str(export_folder(world.reference(), world.tokenizer(), tmp_path_factory.mktemp("world") / "reference"))


@pytest.fixture
def one_step(world, tmp_path):
    """Run one optimizer step under a real Trainer; the gradient of every weight of the policy, flat, and the module."""

    def run(module, batches=None):
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        settings |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "limit_val_batches": 0}
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, **settings)
        if batches is None:
            trainer.fit(module, datamodule=PromptDataModule(world, batch_size=8))
        else:
            trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        recorder = trainer.optimizers[0]
        assert isinstance(recorder, Recorder)
        return recorder.seen

    return run
