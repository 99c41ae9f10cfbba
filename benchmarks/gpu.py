"""Utilisation of one GPU: model FLOPs of SFT, DPO and PPO updates, and generation against memory bandwidth, in bfloat16.

python benchmarks/gpu.py --size 0.5b
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measure import Meter  # noqa: E402
from benchmarks.problem import SIZES, Size, Spec, sequences, write  # noqa: E402

Rows = list[dict[str, list[int]]]


class Peak(NamedTuple):
    """What the maker states: dense bfloat16 TFLOP/s and TB/s of memory."""

    tflops: float
    terabytes: float


PEAKS = {
    "H200": Peak(989, 4.8),
    "H100 PCIe": Peak(756, 2.0),
    "H100": Peak(989, 3.35),
    "A100-SXM4-80GB": Peak(312, 2.04),
    "A100-SXM4-40GB": Peak(312, 1.56),
    "A100": Peak(312, 1.94),
}


def peak_of(name: str, tflops: float | None, terabytes: float | None) -> Peak:
    """Of the device of that name; what is given on the command line wins.

    Raises:
        SystemExit: If the device is not known and nothing is given.
    """
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    if known is None and (tflops is None or terabytes is None):
        raise SystemExit(f"{name} is not in the list of peaks; give --tflops and --terabytes from its data sheet")
    known = known or Peak(0, 0)
    return Peak(tflops or known.tflops, terabytes or known.terabytes)


# ---------------------------------------------------------------- what has to be computed


def trunk_parameters(size: Size) -> int:
    """Weights of the linear layers of the trunk."""
    head = size.hidden // size.heads
    attention = size.hidden * head * (2 * size.heads + 2 * size.kv_heads)
    return size.layers * (attention + 3 * size.hidden * size.intermediate)


def forward_flops(size: Size, pairs: list[tuple[list[int], list[int]]], head: bool) -> float:
    """Of one forward over real tokens: linear layers, causal attention, and the head on response positions."""
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    linear = 2.0 * trunk_parameters(size) * sum(lengths)
    attention = sum(2.0 * size.layers * size.hidden * length**2 for length in lengths)  # half of 4 L^2: causal
    logits = 2.0 * size.vocabulary * size.hidden * sum(len(response) for _, response in pairs)
    return linear + attention + logits * head


def step_flops(method: str, size: Size, rows: Rows) -> float:
    """Of one training step (PPO: the epochs of updates); a backward pass is two forwards."""
    pairs = [pair for row in rows for pair in sequences(method, row)]
    policy, critic = forward_flops(size, pairs, True), forward_flops(size, pairs, False)
    return {"sft": 3 * policy, "dpo": 4 * policy, "ppo": 3 * size.epochs * (policy + critic)}[method]


def decode_bytes(size: Size, rows: Rows) -> float:
    """What the memory has to give in bfloat16: at each step the weights, and keys and values of the rows still drawn."""
    weights = trunk_parameters(size) + size.vocabulary * size.hidden
    stored = 2.0 * size.layers * size.kv_heads * (size.hidden // size.heads)
    total = 0.0
    for step in range(1, max(len(row["chosen_ids"]) for row in rows)):
        active = [len(row["prompt_ids"]) + step for row in rows if len(row["chosen_ids"]) > step]
        total += weights + stored * sum(active)
    return 2 * total


# ---------------------------------------------------------------- runs


def measure(spec: Spec, peak: Peak) -> dict[str, Any]:
    """The line of one method."""
    from benchmarks import side_ours

    meter = Meter(spec, time.time())
    if spec.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    side_ours.run(spec, meter)
    line, timed = meter.result(), spec.batches()[spec.warmup :]
    seconds = line["update_s"] if spec.method == "ppo" else line["step_s"]
    flops = sum(step_flops(spec.method, spec.shape, rows) for rows in timed) / len(timed)
    line |= {"tflops": flops / seconds / 1e12, "mfu": flops / seconds / 1e12 / peak.tflops}
    if spec.method == "ppo":
        tokens = sum(len(row["chosen_ids"]) for rows in timed for row in rows) / len(timed)
        bound = sum(decode_bytes(spec.shape, rows) for rows in timed) / len(timed) / (peak.terabytes * 1e12)
        line |= {"generated_s": tokens / line["generation_s"], "bandwidth_share": bound / line["generation_s"]}
    if spec.device != "cpu":
        line["peak_device_mb"] = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.empty_cache()
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """One row a method."""
    names = "| step | tokens | s | TFLOP/s | MFU | device MB | generated tokens/s | of bandwidth bound |"
    rows = [names, "| --- " * 8 + "|"]
    for line in lines:
        drawn = ["-", "-"]
        if "generated_s" in line:
            drawn = [f"{line['generated_s']:.0f}", f"{line['bandwidth_share']:.1%}"]
        seconds = line["update_s"] if line["method"] == "ppo" else line["step_s"]
        cells = [line["method"], f"{line['tokens']:.0f}", f"{seconds:.3f}", f"{line['tflops']:.3g}", f"{line['mfu']:.1%}",
                 f"{line.get('peak_device_mb', 0):.0f}", *drawn]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=["0.5b", "1b", "1.5b"], default="0.5b")
    parser.add_argument("--methods", default="sft,dpo,ppo")
    parser.add_argument("--precision", choices=["bf16-true", "bf16"], default="bf16-true", help="bf16: float32 weights")
    parser.add_argument("--tflops", type=float, help="dense bfloat16 peak of the device, if it is not known")
    parser.add_argument("--terabytes", type=float, help="its memory bandwidth a second")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="a toy network: whether the script runs at all")
    return parser.parse_args()


def main() -> None:
    """All methods in one process."""
    asked = arguments()
    if asked.device == "cpu" and not asked.toy:
        raise SystemExit("these networks are for a GPU; try the script on a CPU with: --device cpu --toy")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; benchmarks/compare.py measures CPUs")
    name = "CPU" if asked.device == "cpu" else torch.cuda.get_device_name()
    peak = Peak(0.1, 0.01) if asked.device == "cpu" else peak_of(name, asked.tflops, asked.terabytes)
    print(f"{name}, torch {torch.__version__}, peak {peak.tflops} TFLOP/s, {peak.terabytes} TB/s", flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        specs = [spec_of(asked, method, folder) for method in asked.methods.split(",")]
        count = max(spec.batch_size * (spec.warmup + spec.steps) for spec in specs)
        write(specs[0].shape, Path(folder), count, dtype="bfloat16")
        for spec in specs:
            lines.append(measure(spec, peak))
            print(json.dumps(lines[-1]), flush=True)
    print(f"\n{table(lines)}")


def spec_of(asked: argparse.Namespace, method: str, folder: str) -> Spec:
    size = "toy" if asked.toy else asked.size
    warmup, steps = SIZES[size].ppo_steps if method == "ppo" else SIZES[size].steps
    return Spec(method, size, "ours", asked.precision, 1, warmup, steps, folder, device=asked.device)


if __name__ == "__main__":
    main()
