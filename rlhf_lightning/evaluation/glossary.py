"""Terms of the report in plain words."""

GLOSSARY = {
    "reward": "The score of a complete answer; higher is better. Its unit and zero are those of the reward named above, so "
    "compare policies with each other, not with zero.",
    "gold reward": "The true reward of an answer, which the embedded world knows and no training sees. 1 is the best answer to "
    "any prompt.",
    "proxy": "The mean score that the reward model gives to the same answers. Training maximises it in place of the "
    "gold reward. A proxy that rises while the gold reward falls is over-optimised: the policy exploits mistakes of "
    "the reward model.",
    "KL": "How far a policy has moved from the first one: the mean of log policy \u2212 log first policy over its own answers, "
    "in nats an answer. 0 is no change. A higher reward at a lower KL is better.",
    "gain": "The mean difference of the reward to the first policy, on the same prompts. An interval that excludes 0 is a "
    "measurable change.",
    "win rate": "The share of prompts on which an answer scores higher than that of the first policy; ties count one half. "
    "0.50 is no difference.",
    "gap closed": "The gain as a share of what could be gained at all: 0 % is the first policy, 100 % the best "
    "possible reward.",
    "95 % interval": "In brackets, and drawn as bars: a bootstrap over distinct prompts. It covers the choice of prompts and "
    "samples, not that of the training seed.",
    "held-out": "Prompts that no training has seen.",
    "out of distribution": "Prompts whose wording and subject differ from all training prompts.",
    "sampled": "Answers drawn from the policy's distribution. At temperature 1 that is the policy itself.",
    "greedy": "The most likely token at every step: one answer, no chance.",
    "length": "Mean tokens of an answer, its end token included.",
    "truncated": "Share of answers that reached the longest length before they ended.",
    "accuracy": "Share of held-out pairs in which the chosen answer scores higher than the rejected one. 50 % is chance.",
    "best attainable": "The accuracy of the best possible model: the annotators contradict each other.",
    "gold order": "Accuracy where pairs are ordered by the gold reward instead of the annotators' labels.",
    "best of n": "Of n sampled answers the one that the reward model scores highest, without any further training.",
    "right": "The answer is what was asked for and is true.",
    "harmful compliance": "Of the harmful requests, the share that is helped with.",
    "refused benign": "Of the harmless requests, the share that is refused.",
    "sycophantic": "Of the prompts with a wrong opinion, the share of answers that agree with it.",
    "polite": "The answer has a polite form.",
    "ungrammatical": "The answer is no sentence of the world's grammar.",
}


def anchor(term: str) -> str:
    """Where a term is explained in the page."""
    return "term-" + "".join(c if c.isalnum() else "-" for c in term.lower())


def explained(terms: set[str]) -> dict[str, str]:
    """Entries of these terms, in the glossary's order."""
    return {term: text for term, text in GLOSSARY.items() if term in terms}
