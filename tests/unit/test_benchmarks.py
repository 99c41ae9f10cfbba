"""The benchmark's own sums: medians, ratios, the equality check, the counters, and that it runs at all."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, group_losses
from benchmarks.counters import RowCounter
from benchmarks.problem import EOS, KL_COEF, SIZES, Lengths, Size, Spec, draw_rows, odd_share, text, tokenizer
from benchmarks.table import agreement, disturbed, medians, rate_of, table

ROOT = Path(__file__).parents[2]


def line(side, tok_s, *, cpu_over_wall=1.0, loss=2.0, grad_norm=0.5, memory=100.0):
    return {
        "method": "sft",
        "size": "tiny",
        "side": side,
        "precision": "32",
        "threads": 1,
        "tok_s": tok_s,
        "tok_cpu_s": 10 * tok_s,
        "cpu_over_wall": cpu_over_wall,
        "step_s": 1.0,
        "peak_rss_mb": memory,
        "startup_s": 1.0,
        "real_fraction": 1.0,
        "matmul_tokens_per_real_token": 1.0,
        "head_positions_per_response_token": 1.0,
        "loss": loss,
        "grad_norm": grad_norm,
    }


def cells(lines):
    """Rows of the table by side, cells by column."""
    rows = [row.strip("| ").split(" | ") for row in table(lines).splitlines() if row.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_medians_are_of_each_side_alone():
    lines = [line("ours", x) for x in (5, 1, 9)] + [line("trl", x) for x in (2, 4, 1)]
    found = medians(lines)
    assert (found["ours"]["tok_s"], found["trl"]["tok_s"]) == (5, 2)
    assert (found["ours"]["runs"], found["trl"]["runs"]) == (3, 3)


def test_ratios_are_of_medians():
    lines = [line("ours", x, memory=50) for x in (30, 10, 50)] + [line("trl", x, memory=200) for x in (10, 12, 1)]
    assert cells(lines)["trl"]["ours is"] == "3.00x"
    assert cells(lines)["trl"]["our memory"] == "0.25x"
    assert cells(lines)["ours"]["ours is"] == "1.00x"


def test_one_disturbed_run_makes_every_ratio_one_of_cpu_seconds():
    quiet = [line("ours", 30, cpu_over_wall=0.951), line("trl", 10)]
    assert rate_of(quiet) == "tok_s"
    noisy = [*quiet, {**line("trl", 10, cpu_over_wall=0.949), "tok_cpu_s": 50}]
    assert [disturbed(x) for x in noisy] == [False, False, True]
    assert rate_of(noisy) == "tok_cpu_s"
    assert cells(noisy)["trl"]["ours is"] == "4.00x"  # 300 over the median of 100 and 50
    assert "disturbed" in table(noisy).splitlines()[0]


def test_equality_is_held_against_the_naive_side_or_the_bare_one():
    judge = line("naive", 1, loss=8.0, grad_norm=0.5)
    assert agreement(line("x", 1, loss=8.0 * (1 + 9e-5), grad_norm=0.5), judge, 1e-4) == "equal"
    assert agreement(line("x", 1, loss=8.0, grad_norm=0.5 * (1 - 2e-4)), judge, 1e-4) == "grad_norm off by 2.0e-04"
    both = agreement(line("x", 1, loss=8.16, grad_norm=math.nan), judge, 1e-4)
    assert both == "loss off by 2.0e-02, grad_norm off by nan"
    rows = cells([judge, line("ours", 1, loss=8.16)])
    assert rows["ours"]["first step"].endswith("loss off by 2.0e-02")
    assert "not compared" in cells([line("ours", 1)])["ours"]["first step"]
    without = cells([line("bare", 1, loss=8.0), line("ours", 1, loss=8.16)])
    assert without["ours"]["first step"].endswith("loss off by 2.0e-02")


def test_a_table_holds_one_kind_of_run():
    with pytest.raises(ValueError, match="one kind of run"):
        table([line("ours", 1), {**line("trl", 1), "precision": "bf16"}])


def test_rows_come_from_the_seed_and_their_text_means_their_ids():
    size = SIZES["toy"]
    rows = draw_rows(size, 40)
    assert rows == draw_rows(size, 40)
    words = tokenizer(size.vocabulary)
    for row in rows:
        assert words(text(row["prompt_ids"]))["input_ids"] == row["prompt_ids"]
        assert words(f"{text(row['chosen_ids'])}<eos>")["input_ids"] == row["chosen_ids"]
        assert row["chosen_ids"].index(EOS) == len(row["chosen_ids"]) - 1 <= size.response.most - 1


def test_counter_counts_rows_of_forward_products_and_nothing_else():
    weight = torch.randn(8, 8, requires_grad=True)  # square: shapes alone would not tell forward from backward
    other = torch.randn(8, 8)
    counter = RowCounter({"head": weight})
    with counter:
        hidden = torch.randn(5, 8, requires_grad=True)
        torch.nn.functional.linear(torch.nn.functional.linear(hidden, weight), other).sum().backward()
        assert counter.rows["", "head"] == 5
        counter.phase = "later"
        with torch.inference_mode():
            torch.nn.functional.linear(hidden, weight)
        hidden @ weight[:2].T  # a quarter of the columns
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.functional.linear(hidden[:3], weight)
    assert counter.rows == {("", "head"): 5, ("later", "head"): 5 + 5 / 4 + 3}


HAND = Size(10, 4, 3, 2, 1, 6, prompt=Lengths(2, 0, 2, 2), response=Lengths(3, 0, 3, 3))


def test_model_flops_against_a_count_by_hand():
    # Per layer: q 4x4, k and v 4x2 each, o 4x4, three of 4x6; three layers.
    assert gpu.trunk_parameters(HAND) == 3 * (16 + 8 + 8 + 16 + 72)
    pairs = [([1, 1], [1, 1, 1]), ([1], [1])]
    linear, logits = 2 * 360 * (5 + 2), 2 * 10 * 4 * (3 + 1)
    attention = 3 * 4 * 4 * (25 + 4) / 2  # scores and mixing, each 2 L^2 d a layer, of which half is masked
    assert gpu.forward_flops(HAND, pairs, head=False) == linear + attention
    assert gpu.forward_flops(HAND, pairs, head=True) == linear + attention + logits


def test_bytes_of_decoding_against_a_count_by_hand():
    rows = [{"prompt_ids": [1, 1], "chosen_ids": [5, 5, EOS]}, {"prompt_ids": [1], "chosen_ids": [5, EOS]}]
    token = 3 * 2 * 2  # keys and values: layers x 2 x one head of size 2
    # The first tokens come of the prompts; then two rows see 3 and 2 tokens, then one sees 4.
    assert gpu.decode_bytes(HAND, rows) == 2 * (2 * (360 + 40) + token * (3 + 2) + token * 4)


PEAKS = [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989)]


@pytest.mark.parametrize(("name", "tflops"), PEAKS)
def test_peaks_by_device_name(name, tflops):
    assert gpu.peak_of(name, None, None).tflops == tflops
    assert gpu.peak_of("some device", 5, 1) == (5, 1)
    with pytest.raises(SystemExit, match="--tflops"):
        gpu.peak_of("some device", None, None)


def group_spec(method):
    return Spec(method, "tiny", "bare", "32", 1, 1, 1, "/x")


def test_methods_that_sample_groups_have_whole_ones():
    spec = group_spec("grpo")
    assert (spec.batch_size, spec.shape.group, spec.shape.epochs) == (32, 4, 1)
    prompts = [row["prompt_ids"] for row in draw_rows(spec.shape, 8)]
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    assert odd_share([[3, 4, 5, EOS], [4, 4]]) == [0.75, 0.0]


def test_advantages_of_groups_by_hand():
    scores, kl = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 0.0, 0.0, 4.0])
    grpo = group_losses.advantages(group_spec("grpo"), scores, kl)
    assert grpo.tolist() == pytest.approx([-0.925777, -0.462889, 0, 1.388666], abs=1e-6)
    rloo = group_losses.advantages(group_spec("rloo"), scores, 0 * kl)
    assert rloo.tolist() == pytest.approx([-2.666667, -1.333333, 0, 4], abs=1e-6)
    penalised = group_losses.advantages(group_spec("rloo"), scores, kl) - rloo
    assert penalised.tolist() == pytest.approx([4 * KL_COEF / 3] * 3 + [-4 * KL_COEF], abs=1e-6)


def test_losses_of_groups_by_hand():
    old, lengths, advantages = torch.zeros(3), torch.tensor([2, 1]), torch.tensor([1.0, -1.0])
    now = torch.tensor([1.5, 0.5, 0.5]).log()
    rloo = group_losses.loss(group_spec("rloo"), now, old, now, advantages, lengths)
    assert float(rloo) == pytest.approx((-0.75 + 0.8) / 2)  # ratios .75 and .5, the second clipped
    grpo = group_losses.loss(group_spec("grpo"), now, old, now, advantages, lengths)
    assert float(grpo) == pytest.approx((-(1.2 + 0.5) / 2 + 0.8) / 2)
    far = group_losses.loss(group_spec("grpo"), now, old, now + 1, advantages, lengths)
    assert float(far - grpo) == pytest.approx(KL_COEF * (math.e - 2), abs=1e-6)


def compare(*arguments):
    command = [sys.executable, "benchmarks/compare.py", *arguments, "--size", "toy", "--rounds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


@pytest.mark.parametrize(
    "method", ["sft", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("reward", "dpo", "ppo"))]
)
def test_the_bare_loop_computes_what_the_naive_one_does(method):
    done, lines = compare(method, "--sides", "naive,bare")
    assert done.returncode == 0, done.stderr
    naive, bare = lines
    assert (naive["side"], bare["side"]) == ("naive", "bare")
    for key in ("loss", "grad_norm"):
        assert bare[key] == pytest.approx(naive[key], rel=1e-5)
    assert bare["matmul_tokens_per_real_token"] == bare["real_fraction"] == 1
    assert naive["matmul_tokens_per_real_token"] == pytest.approx(1 / naive["real_fraction"])
    assert naive["real_fraction"] < 1
    assert method == "reward" or bare["head_positions_per_response_token"] == 1
    assert method != "ppo" or bare["decode_row_steps_per_token"] == 1 < naive["decode_row_steps_per_token"]
    assert done.stdout.rstrip().endswith("equal |")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["dpo", "ppo", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("sft", "reward"))]
)
def test_our_counters_and_our_first_step(method):
    done, lines = compare(method, "--sides", "ours,naive")
    assert done.returncode == 0, done.stderr
    ours, naive = lines
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(naive[key], rel=1e-4)
    assert ours["matmul_tokens_per_real_token"] <= 1.05
    assert method == "reward" or ours["head_positions_per_response_token"] == 1
    assert method != "ppo" or ours["decode_row_steps_per_token"] <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", pytest.param("rloo", marks=pytest.mark.exhaustive)])
def test_groups_are_computed_alike_by_all_sides(method):
    done, lines = compare(method, "--sides", "ours,naive,bare")
    assert done.returncode == 0, done.stderr
    ours, naive, bare = lines
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(naive[key], rel=1e-4)
        assert bare[key] == pytest.approx(naive[key], rel=1e-5)
    assert bare["matmul_tokens_per_real_token"] == bare["decode_row_steps_per_token"] == 1
    assert ours["matmul_tokens_per_real_token"] < 1  # a prompt is read once a group
    assert ours["head_positions_per_response_token"] == bare["head_positions_per_response_token"] == 1
    assert ours["decode_row_steps_per_token"] <= 1
    assert naive["decode_row_steps_per_token"] > 1


def test_a_side_that_a_method_lacks_is_named():
    done, _ = compare("reward", "--sides", "trl-compact")
    assert done.returncode == 1
    assert done.stderr.strip() == "reward has no side trl-compact; it has ours, trl, naive, bare"


def test_gpu_script_refuses_without_a_gpu():
    command = [sys.executable, "benchmarks/gpu.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_gpu_script_runs_on_a_toy(precision):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--toy", "--precision", precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = {x["method"]: x for x in (json.loads(row) for row in done.stdout.splitlines() if row.startswith("{"))}
    assert set(lines) == {"sft", "dpo", "ppo"}
    assert all(0 < x["mfu"] < 1 for x in lines.values())
    assert 0 < lines["ppo"]["bandwidth_share"] < 1


def test_a_spec_survives_its_way_to_another_process():
    spec = Spec("sft", "toy", "ours", "32", 1, 1, 2, "/x", changes={"rows": 7, "response": [4, 0, 4, 4]})
    again = Spec(**json.loads(spec.json()))
    assert again == spec
    assert again.shape.rows == 7
    assert [len(row["chosen_ids"]) for row in draw_rows(again.shape, 3)] == [4, 4, 4]
