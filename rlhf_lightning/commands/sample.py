"""Answer prompts many times, keep what a reward likes, and write it as data to learn from."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlhf_lightning.data.cache import dataset_hash
from rlhf_lightning.data.rows import LEVEL
from rlhf_lightning.data.seeds import mixed_seed
from rlhf_lightning.data.splits import level_of
from rlhf_lightning.data.template_inputs import TEMPLATE_COLUMNS, set_default_variables
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import best_of_n_table
from rlhf_lightning.evaluation.candidates import CandidateFile, PromptRows, Scorer, described
from rlhf_lightning.evaluation.statistics import prompt_clusters
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.export import replace_file
from rlhf_lightning.models.spec import Model, ModelSpec, as_spec
from rlhf_lightning.rewards.reward import Reward
from rlhf_lightning.rollouts.selection import BestOfN, SamplingMethod, ranked

ROWS, MANIFEST = "samples.jsonl", "manifest.json"
console = Console(markup=False)


def sample(
    policy: Model,
    prompts: PromptRows,
    reward: Reward,
    output: str,
    method: SamplingMethod = BestOfN(),  # noqa: B008  (frozen)
    n: int = 16,
    sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
    gold: Reward | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Answer prompts many times, keep what a reward likes, and write it as data to learn from.

    ``samples.jsonl`` is read by a DemonstrationDataModule, ``candidates.jsonl`` beside it holds all answers with their scores:
    another method on the same answers is the same command with another ``method``, and draws nothing. A run that was killed
    goes on.

    Args:
        policy: What answers: a folder or hub id, or a description that has a ``path``.
        prompts: What it answers.
        reward: What answers are chosen by.
        output: Folder of the result.
        method: How they are chosen, and what each weighs.
        n: Answers to each prompt.
        sampling: How they are drawn.
        gold: Another reward, which is only looked at: what the choice is really worth.
        batch_size: Answers drawn together.
        seed: Of the answers, and of methods that draw.
        device: Where to compute.
        overwrite: Begin anew where the folder holds answers drawn otherwise.
    """
    policy = as_spec(policy)
    require_interface("method", method, SamplingMethod)
    require_interface("reward", reward, Reward)
    check_request(policy, n, batch_size, sampling)
    started, folder, rows = time.perf_counter(), Path(output), prompts.load()
    batch = max(1, batch_size // n)
    settings = {"policy": described(policy), "prompts": described(prompts), "rows": dataset_hash(rows)}
    settings |= {"reward": described(reward), "gold": described(gold), "sampling": described(sampling)}
    settings |= {"n": n, "prompts_a_batch": batch, "seed": seed}
    file = CandidateFile(folder, settings, overwrite)
    if (there := len(file.read())) < len(rows):
        rewards = {"score": reward} if gold is None else {"score": reward, "gold": gold}
        scorer = Scorer(policy, sampling, rewards, device)
        set_default_variables(scorer.tokenizer, prompts.chat_template_kwargs)
        drawn = file.fill(rows, scorer, n, batch, seed)
        for _ in track(drawn, f"{n} answers to each of {len(rows)} prompts", -(-len(rows) // batch), console=console):
            pass
        scorer.engine.rest()
    else:
        console.print(f"all {there} prompts have their answers already: nothing is drawn")
    candidates = file.read()
    provenance = {"policy": policy.path, "reward": reward.name, "method": type(method).__name__, "n": n, "seed": seed}
    # The same hash would send every prompt to the training rows again where these rows are divided.
    provenance[LEVEL] = level_of(rows) + 1
    kept = select(candidates, method, provenance)
    if not kept:
        raise UserError(f"{type(method).__name__} keeps no answer to any of {len(rows)} prompts; loosen it, or raise n")
    manifest = summary(candidates, kept) | {"method": described(method), "settings": settings}
    replace_file(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=2))
    show(manifest)
    console.print(f"{len(kept)} rows in {folder / ROWS}, {time.perf_counter() - started:.0f} s", soft_wrap=True)


def check_request(policy: ModelSpec, n: int, batch_size: int, sampling: SamplingParameters) -> None:
    """Refuse what could not end well, before anything is loaded."""
    if policy.path is None:
        raise UserError("the policy is not trained yet: give policy.path, a folder or a hub id")
    if n < 1 or batch_size < 1:
        raise UserError(f"n and batch_size are at least 1, not {n} and {batch_size}")
    if n > 1 and sampling.temperature == 0:
        raise UserError(f"at temperature 0 all {n} answers to a prompt are the same; set sampling.temperature")


def select(
    candidates: list[dict[str, Any]], method: SamplingMethod, provenance: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows that a method keeps of the answers that say something, each with where it came from.

    Args:
        candidates: One a prompt, with its samples.
        method: Chooses.
        provenance: What all rows have in common.
    """
    kept = []
    for index, candidate in enumerate(candidates):
        # An answer that says nothing teaches nothing, and no data module reads it.
        samples = [answer | {"sample": i} for i, answer in enumerate(candidate["samples"]) if answer["text"].strip()]
        if not samples:
            continue
        scores = torch.tensor([answer["score"] for answer in samples], dtype=torch.float64)
        # Not the seeds that the answers were drawn from: whether one is accepted must not depend on how it was drawn.
        generator = torch.Generator().manual_seed(mixed_seed("select", provenance["seed"], index))
        chosen = method.select(scores, [answer["text"] for answer in samples], generator)
        order, prompt = ranked(scores), candidate["prompt"]
        inputs = {name: candidate[name] for name in TEMPLATE_COLUMNS if name in candidate}
        for number, weight in chosen.items():
            answer = samples[number]
            said = answer["text"] if isinstance(prompt, str) else [{"role": "assistant", "content": answer["text"]}]
            kept.append(
                {
                    "prompt": prompt,
                    "completion": said,
                    "completion_truncated": answer["truncated"],
                    **inputs,
                    "weight": weight,
                    "score": answer["score"],
                    "rank": order.index(number) + 1,
                    "prompt_index": index,
                    "sample": answer["sample"],
                    **provenance,
                }
            )
    return kept


def summary(candidates: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the manifest: of all samples, of those that were kept, and the best of n for every n."""

    def table(name: str) -> Any:
        return np.array([[float(answer[name]) for answer in candidate["samples"]] for candidate in candidates])

    scores, weights = table("score"), np.array([row["weight"] for row in kept])
    gold = table("gold") if "gold" in candidates[0]["samples"][0] else None
    clusters = prompt_clusters(candidate["prompt"] for candidate in candidates)
    return {
        "prompts": len(candidates),
        "prompts_without_rows": len(candidates) - len({row["prompt_index"] for row in kept}),
        "rows": len(kept),
        "score": float(scores.mean()),
        "score_of_rows": float(np.average([row["score"] for row in kept], weights=weights)),
        "effective_rows": float(weights.sum() ** 2 / np.square(weights).sum()),
        "blank": sum(not answer["text"].strip() for candidate in candidates for answer in candidate["samples"]),
        "truncated": float(table("truncated").mean()),
        "tokens": float(table("tokens").mean()),
        "best_of_n": best_of_n_table(scores, gold, clusters),
    }


def show(manifest: dict[str, Any]) -> None:
    """The curve in the terminal."""
    table = Table(title="best of n, by all subsets of the samples")
    golden = "gold" in manifest["best_of_n"][0]
    for column in ("n", "reward", *(["gold"] if golden else []), "KL ≤", "win rate ≤"):
        table.add_column(column, justify="right")
    for row in manifest["best_of_n"]:
        means = ["{mean:.3f} [{low:.2f}, {high:.2f}]".format(**row[name]) for name in ("reward", "gold") if name in row]
        table.add_row(str(row["n"]), *means, f"{row['kl_bound']:.3f}", f"{row['win_rate_bound']:.3f}")
    console.print(table)
