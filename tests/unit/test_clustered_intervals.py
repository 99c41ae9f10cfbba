"""Intervals over prompts that come more than once: every evaluation against the cluster-robust error and an exact bootstrap."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from rlhf_lightning.commands import sample
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.evaluation.answers import Answers
from rlhf_lightning.evaluation.best_of_n import best_of_n_curve
from rlhf_lightning.evaluation.evaluation import RewardEvaluation
from rlhf_lightning.evaluation.leaderboard import spread
from rlhf_lightning.evaluation.statistics import estimate, win_rate
from rlhf_lightning.evaluation.world import best_of, comparisons, judge, summary
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

WORLD = HHHWorld(seed=0, held_out=400)
DISTINCT = list({str(p): p for p in WORLD.load("prompts")["validation"]["prompt"]}.values())
TOLERANCE = (
    0.1  # of a half-width: 2,000 resamples give one of their percentiles to about 4 %, the normal is an approximation
)


def robust_half_width(rows, clusters):
    """1.96 standard errors of a mean over clusters of unequal size: Liang and Zeger 1986, an intercept alone."""
    rows, clusters = np.asarray(rows), np.asarray(clusters)
    sums = [(rows[clusters == name] - rows.mean()).sum() for name in set(clusters.tolist())]
    return 1.96 * float(np.sqrt(np.square(sums).sum())) / len(rows)


def half_width(interval):
    return (interval["high"] - interval["low"]) / 2


def independent_half_width(rows):
    return 1.96 * float(np.std(rows)) / len(rows) ** 0.5


def repeated_unequally(items, rng):
    """Each item one to nine times, in a random order."""
    indices = np.repeat(np.arange(len(items)), rng.integers(1, 10, len(items)))
    rng.shuffle(indices)
    return [items[index] for index in indices]


def correlated(prompts, rng, samples):
    """Scores of which nine tenths of the variance are their prompt's."""
    of_prompt = {json.dumps(prompt): rng.normal() for prompt in prompts}
    own = rng.normal(size=(len(prompts), samples))
    return 3 * np.array([[of_prompt[json.dumps(prompt)]] for prompt in prompts]) + own


@pytest.fixture(scope="module")
def asked():
    """Prompts of which each comes one to nine times, as text, and scores of three samples each."""
    rng = np.random.default_rng(3)
    prompts = repeated_unequally([f"question {number}" for number in range(300)], rng)
    return prompts, correlated(prompts, rng, samples=3), correlated(prompts, rng, samples=3)


def test_the_interval_of_a_mean_is_the_cluster_robust_one(asked):
    prompts, scores, _ = asked
    rows = scores.mean(axis=1)
    found = half_width(estimate(scores, prompts)._asdict())
    assert found == pytest.approx(robust_half_width(rows, prompts), rel=TOLERANCE)
    assert found > 2 * independent_half_width(rows)  # the data can tell the two apart


def test_the_interval_of_a_win_rate_is_the_cluster_robust_one(asked):
    prompts, ours, theirs = asked
    wins = (ours > theirs).mean(axis=1)
    found = half_width(win_rate(ours, theirs, prompts)._asdict())
    assert found == pytest.approx(robust_half_width(wins, prompts), rel=TOLERANCE)
    assert found > 2 * independent_half_width(wins)


def test_the_intervals_of_best_of_n_are_the_cluster_robust_ones(asked):
    prompts, scores, values = asked
    pairs = [(a, b) for a in range(3) for b in range(3) if a < b]
    of_two = np.mean([np.where(scores[:, a] > scores[:, b], values[:, a], values[:, b]) for a, b in pairs], axis=0)
    curve = best_of_n_curve(scores, values, prompts)
    for n, rows in ((1, values.mean(axis=1)), (2, of_two)):
        assert curve[n].mean == pytest.approx(rows.mean())
        assert half_width(curve[n]._asdict()) == pytest.approx(robust_half_width(rows, prompts), rel=TOLERANCE)


def intervals(figures, path=()):
    """Every interval in nested figures, with where it is."""
    if isinstance(figures, dict) and {"mean", "low", "high"} <= figures.keys():
        return {path: figures}
    items = enumerate(figures) if isinstance(figures, list) else figures.items() if isinstance(figures, dict) else ()
    return {where: found for key, part in items for where, found in intervals(part, (*path, key)).items()}


def candidates(asked):
    """What the command `sample` keeps of them, with two rewards."""
    return [
        {
            "prompt": prompt,
            "samples": [
                {"text": "x", "truncated": False, "tokens": 1, "score": float(a), "gold": float(b)}
                for a, b in zip(scores, gold, strict=True)
            ],
        }
        for prompt, scores, gold in zip(*asked, strict=True)
    ]


def test_the_command_sample_clusters_by_prompt(asked):
    kept = [{"prompt_index": 0, "score": 1.0, "weight": 1.0}]
    found = intervals(sample.summary(candidates(asked), kept))
    prompts, scores, gold = asked
    for name, table in (("reward", scores), ("gold", gold)):
        expected = robust_half_width(table.mean(axis=1), prompts)
        assert half_width(found["best_of_n", 0, name]) == pytest.approx(expected, rel=TOLERANCE)
    assert len(found) == 4  # of n 1 and 2
    assert intervals(sample.summary(2 * candidates(asked), kept)) == as_before(found)


def as_before(found):
    """The same intervals, up to rounding."""
    return {where: pytest.approx(interval, rel=1e-9) for where, interval in found.items()}


def judged(prompts, good):
    """Two samples a prompt: both the best answer where ``good``, else one of the two says nothing."""
    shape = (len(prompts), 2)
    texts = [
        [WORLD.best_response(prompt), WORLD.best_response(prompt) if good[str(prompt)] else ""] for prompt in prompts
    ]
    return judge(WORLD, Answers(prompts, texts, np.zeros(shape, bool), np.full(shape, 9.0), np.full(shape, 2.5)))


@pytest.fixture(scope="module")
def answered():
    """Two policies' answers to world prompts that come one to nine times, right or wrong by the prompt."""
    rng = np.random.default_rng(5)
    prompts = repeated_unequally(DISTINCT, rng)
    good = {str(prompt): bool(rng.random() < 0.5) for prompt in DISTINCT}
    other = {str(prompt): bool(rng.random() < 0.5) for prompt in DISTINCT}
    return prompts, good, other


def world_figures(prompts, good, other):
    ours, theirs = judged(prompts, good), judged(prompts, other)
    proxy = np.tile([0.0, 1.0], (len(prompts), 1))
    return {
        "summary": summary(ours, proxy=None),
        "comparison": comparisons({"x": theirs}, {"x": ours})["x"],
        "best_of": best_of(ours, proxy),
    }


def test_the_evaluation_of_a_world_clusters_by_prompt(answered):
    prompts, good, other = answered
    names, mine = [str(prompt) for prompt in prompts], np.array([good[str(prompt)] for prompt in prompts])
    theirs = np.array([other[str(prompt)] for prompt in prompts])
    gold = np.where(mine, 1.0, 0.1)  # the mean of a right answer and of -0.8, nothing said
    found = intervals(world_figures(prompts, good, other))
    gain = gold - np.where(theirs, 1.0, 0.1)
    wins = 0.5 + 0.25 * (mine.astype(int) - theirs.astype(int))  # the first samples tie
    rows = {
        ("summary", "gold"): gold,
        ("comparison", "gain"): gain,
        ("comparison", "win_rate"): wins,
        ("best_of", "1"): gold,
        ("best_of", "2"): np.where(mine, 1.0, -0.8),
    }
    for where, values in rows.items():
        assert found[where]["mean"] == pytest.approx(values.mean())
        assert half_width(found[where]) == pytest.approx(robust_half_width(values, names), rel=TOLERANCE)
        assert half_width(found[where]) > 1.8 * independent_half_width(values)
    kinds = np.array([WORLD.kind(prompt) for prompt in prompts])
    for kind in set(kinds.tolist()):
        own, chosen = gold[kinds == kind], np.array(names)[kinds == kind]
        wide = half_width(found["summary", "by_kind", kind])
        assert wide == pytest.approx(robust_half_width(own, chosen), rel=0.2)  # a few dozen prompts each
    assert len(found) == len(rows) + len(set(kinds.tolist()))


def test_every_row_twice_narrows_no_interval_of_a_world(answered):
    prompts, good, other = answered
    once, twice = (intervals(world_figures(times * prompts, good, other)) for times in (1, 2))
    assert twice == as_before(once)


COUNTS = {"who owns the kite ?": 1, "who owns the dog ?": 2, "who owns the boat ?": 5}
SCORES = {"who owns the kite ?": 0.0, "who owns the dog ?": 1.0, "who owns the boat ?": 2.0}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """One policy ends at once, the other says "kite" until it is cut off."""
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    spec = ModelSpec(architecture={"model_type": "llama", "tie_word_embeddings": False, **fields})
    folder, tokenizer, exports = tmp_path_factory.mktemp("policies"), world_tokenizer(), {}
    for name, token in (("sft", tokenizer.eos_token_id), ("ppo", tokenizer.convert_tokens_to_ids("kite"))):
        network = load_causal_lm(spec, tokenizer)
        with torch.no_grad():
            network.model.embed_tokens.weight.fill_(1.0)
            for layer in network.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            network.lm_head.weight.zero_()
            network.lm_head.weight[token] = 50.0 / 16
        exports[name] = export_folder(network, tokenizer, folder / name)
    return exports


def by_prompt(prompts, completions):
    """0, 1 or 2 for saying nothing, by the prompt; 1 for saying something: a win, a tie and a loss of the second policy."""
    return [
        1.0 if said[-1]["content"] else SCORES[prompt[-1]["content"]]
        for prompt, said in zip(prompts, completions, strict=True)
    ]


def evaluated(policies, folder, times):
    """The report on prompts that come once, twice and five times, each row ``times`` times."""
    rows = [{"prompt": [{"role": "user", "content": text}]} for text, count in COUNTS.items() for _ in range(count)]
    train, held_out = folder / "train.jsonl", folder / f"held_out{times}.jsonl"
    train.write_text(json.dumps({"prompt": [{"role": "user", "content": "hello ?"}]}) + "\n")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in times * rows))
    source = FileSource(str(train), str(held_out))
    evaluation = RewardEvaluation(source, FunctionReward(by_prompt), samples=2, max_new_tokens=3)
    return intervals(evaluation.run(policies, seed=0))


def exact_bootstrap(of_prompt):
    """Mean, and 2.5 % and 97.5 % points of the 27 equally likely draws of three prompts, of which all rows come along."""
    of = [(of_prompt[text] * count, count) for text, count in COUNTS.items()]
    draws = [sum(total for total, _ in drawn) / sum(count for _, count in drawn) for drawn in product(of, repeat=3)]
    low, high = np.percentile(draws, [2.5, 97.5], method="inverted_cdf")
    return {"mean": sum(total for total, _ in of) / sum(count for _, count in of), "low": low, "high": high}


def test_a_reward_evaluation_clusters_by_prompt(policies, tmp_path):
    found = evaluated(policies, tmp_path, times=1)
    wins = {text: {0.0: 1.0, 1.0: 0.5, 2.0: 0.0}[score] for text, score in SCORES.items()}
    assert found == {
        ("policies", "sft", "held_out/sampled", "score"): pytest.approx(exact_bootstrap(SCORES)),
        ("policies", "ppo", "held_out/sampled", "score"): {"mean": 1.0, "low": 1.0, "high": 1.0},
        ("comparisons", "ppo", "held_out/sampled", "win_rate"): pytest.approx(exact_bootstrap(wins)),
        ("comparisons", "ppo", "held_out/sampled", "gain"): pytest.approx(
            exact_bootstrap({text: 1.0 - score for text, score in SCORES.items()})
        ),
    }
    assert evaluated(policies, tmp_path, times=2) == as_before(found)


@pytest.mark.parametrize(("seeds", "t"), [(10, 2.262), (11, 2.228), (21, 2.086), (31, 2.042), (121, 1.980)])
def test_the_interval_over_seeds_is_students(seeds, t):
    """Quantiles of a printed table: Abramowitz and Stegun, table 26.10."""
    values = np.random.default_rng(seeds).normal(size=seeds)
    expected = t * values.std(ddof=1) / seeds**0.5
    assert spread(values.tolist())["half"] == pytest.approx(expected, rel=5e-4)
