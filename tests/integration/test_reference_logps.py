"""Reference log-probabilities before training: the numbers of a run that computes them each step, from disk if need be."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, reference_logps
from tests.integration.test_modules_learn import adam, base, eight, fit  # noqa: F401

STEPS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(folder))
    return folder


def rows(count=8):
    return PreferenceDataModule(eight("preferences"), batch_size=3, split=Split(validation=0.25, limit=count))


def run(base, data, **settings):  # noqa: F811
    module = DPOModule(ModelSpec(path=str(base / "policy")), optimizer=adam(1e-3), **settings)
    trainer = fit(module, data, base, max_steps=STEPS)
    return module, {name: value.clone() for name, value in module.policy.state_dict().items()}, trainer


def written(cache):
    return sorted(cache.glob("reference-*.safetensors"))


def test_the_run_is_the_one_that_computes_them_each_step(base, cache):  # noqa: F811
    _, expected, _ = run(base, rows())
    module, weights, _ = run(base, rows(), precompute_reference=True)
    assert module.reference is None  # its memory is free
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)
    assert len(written(cache)) == 2  # of training and validation rows
    assert all((load_file(file)["logps"] < -1).all() for file in written(cache))


def test_a_second_run_reads_them(base, cache, monkeypatch):  # noqa: F811
    _, first, _ = run(base, rows(), precompute_reference=True)

    def never(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_logps, "compute", never)
    _, again, _ = run(base, rows(), precompute_reference=True)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_rows_and_another_reference_are_computed_anew(base, cache):  # noqa: F811
    run(base, rows(), precompute_reference=True)
    run(base, rows(4), precompute_reference=True)
    assert len(written(cache)) in (3, 4)
    before = len(written(cache))
    model = base / "policy" / "model.safetensors"
    weights = load_file(model)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, model, metadata={"format": "pt"})
    run(base, rows(), precompute_reference=True)
    assert len(written(cache)) == before + 2


@pytest.mark.parametrize("damage", ["rows", "bytes"])
def test_a_cache_that_is_not_of_these_rows_stops_the_run(base, cache, damage):  # noqa: F811
    run(base, rows(), precompute_reference=True)
    for file in written(cache):
        if damage == "rows":
            save_file({"logps": torch.zeros(5, 2)}, file)
        else:
            file.write_bytes(b"no such thing")
    with pytest.raises(
        UserError, match="are of 5 rows, the data has" if damage == "rows" else r"can't be read .* delete"
    ):
        run(base, rows(), precompute_reference=True)


def test_samples_are_scored_by_the_policy_alone_then(base):  # noqa: F811
    data = rows()
    module, _, _ = run(base, data, precompute_reference=True)
    samples = module.show(next(iter(data.train_dataloader())), 2)
    assert len(samples) == 2
    assert all(sample.score < 0 for sample in samples)
