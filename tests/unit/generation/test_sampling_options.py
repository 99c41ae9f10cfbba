"""Min-p, repetition penalty, minimum length and stop strings: as transformers has them, in every engine of this process."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import StopStringCriteria

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.sampling import LogitsRules
from rlhf_lightning.generation.stop_strings import StopStrings
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.modules.online import check_sampling
from rlhf_lightning.rollouts.collect import generate_responses
from tests.unit.generation.test_native import EOS, PAD, VOCABULARY, left_padded, llama

PROMPTS = [[4, 5, 6, 7], [8, 9], [10, 3, 3], [11]]
ENGINES = [NativeEngine, TransformersEngine]
OPTIONS = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"min_new_tokens": 7},
    {"repetition_penalty": 1.4, "min_new_tokens": 5},
    {"min_p": 0.3},
    {},
]


def drawn(engine, network, sampling, prompts, ends=(EOS,), tokenizer=None):
    more = {} if tokenizer is None else {"tokenizer": tokenizer}
    return engine.generate(network, *left_padded(prompts), sampling, eos_ids=list(ends), pad_id=PAD, **more).tokens


def by_transformers(network, prompt, end, **fields):
    """Plain ``generate`` on one row without padding, with transformers' own logits processors."""
    config = GenerationConfig(max_new_tokens=12, eos_token_id=end, pad_token_id=PAD, **fields)
    network.generation_config = GenerationConfig()
    return network.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_responses_are_those_of_transformers_whatever_the_padding(engine, options):
    network = llama()
    greedy = SamplingParameters(max_new_tokens=12, temperature=0)
    end = int(
        drawn(NativeEngine(), network, greedy, PROMPTS, ends=[99])[0, 2]
    )  # so that responses end at several lengths
    tokens = drawn(engine(), network, replace(greedy, **options), PROMPTS, ends=[end])
    plain = drawn(NativeEngine(), network, greedy, PROMPTS, ends=[end])
    allowed = {name: value for name, value in options.items() if name != "min_p"}
    for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
        expected = by_transformers(network, prompt, end, do_sample=False, **allowed)
        assert row == expected + [PAD] * (len(row) - len(expected))
    same = tokens.shape == plain.shape and torch.equal(tokens, plain)
    assert same == (not allowed)  # else the option has shown nothing


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.15},
        {"min_p": 0.2, "top_p": 0.8, "temperature": 1.5},
        {"repetition_penalty": 1.5, "top_k": 6},
        {"min_new_tokens": 1},
        {"repetition_penalty": 0.7, "min_p": 0.1, "min_new_tokens": 1},
    ],
    ids=str,
)
def test_first_tokens_are_as_frequent_as_the_processors_of_transformers_say(engine, options):
    network, prompt, draws = llama(), [4, 5, 4], 5000
    config = GenerationConfig(
        max_new_tokens=1, do_sample=True, eos_token_id=EOS, pad_token_id=PAD, **{"top_k": 0, **options}
    )
    network.generation_config = GenerationConfig()
    torch.manual_seed(0)
    output = network.generate(
        torch.tensor([prompt]), generation_config=config, output_scores=True, return_dict_in_generate=True
    )
    p = output.scores[0][0].softmax(-1)
    torch.manual_seed(1)
    tokens = drawn(engine(), network, SamplingParameters(max_new_tokens=1, **options), [prompt] * draws)
    share = torch.bincount(tokens[:, 0], minlength=VOCABULARY) / draws
    assert not share[p == 0].any()
    spread = (p * (1 - p) / draws).sqrt()
    assert ((share - p).abs() / spread)[p > 0.005].max() < 3.5
    with torch.no_grad():
        plain = network(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert ((plain - p).abs() / spread.clamp(min=1e-3)).max() > 6  # the plain softmax would be told apart


def test_eos_is_possible_from_the_minimum_length_on_as_in_transformers():
    ids, logits = torch.tensor([[4, 5]]), torch.arange(12.0)[None]
    rules = LogitsRules(SamplingParameters(min_new_tokens=2), ids, torch.ones_like(ids).bool(), 12, [EOS, 7, 99])
    theirs = MinNewTokensLengthLogitsProcessor(2, min_new_tokens=2, eos_token_id=[EOS, 7])
    for step in range(4):
        so_far = torch.cat([ids, torch.full((1, step), 9)], dim=1)
        assert torch.equal(rules.apply(logits, step), theirs(so_far, logits))
        assert bool(rules.apply(logits, step)[0, EOS].isinf()) == (step < 2)


def test_responses_are_identical_in_both_engines_when_all_options_are_off():
    network = llama()
    off = {"min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "stop_strings": []}
    greedy = SamplingParameters(max_new_tokens=16, temperature=0, **off)
    native, theirs = (drawn(engine(), network, greedy, PROMPTS) for engine in ENGINES)
    assert torch.equal(native, theirs)
    torch.manual_seed(5)
    stated = drawn(NativeEngine(), network, SamplingParameters(max_new_tokens=16, **off), PROMPTS)
    torch.manual_seed(5)
    assert torch.equal(stated, drawn(NativeEngine(), network, SamplingParameters(max_new_tokens=16), PROMPTS))


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.2}, {"min_new_tokens": 2}], ids=str)
def test_what_continuous_batching_would_drop_is_refused(setting):
    engine = TransformersEngine(continuous_batching=True)
    with pytest.raises(UserError, match=f"continuous batching ignores {next(iter(setting))}"):
        drawn(engine, llama(), SamplingParameters(max_new_tokens=4, **setting), PROMPTS)


# ---------------------------------------------------------------- stop strings


@pytest.fixture
def tokenizer():
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, then a to h: text has a space between tokens."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


BYTES = bytes_to_unicode()
PIECES = [*"abcdxy<>/", ".\n", "ab", " a", "d>", "x</a", "\n"]
EURO = [bytes([byte]) for byte in "€".encode()]


def spelled(*pieces):
    """Pieces of text, or single bytes, as names of byte-level tokens."""
    return ["".join(BYTES[byte] for byte in (p if isinstance(p, bytes) else p.encode())) for p in pieces]


@pytest.fixture(scope="module")
def byte_level():
    """Tokens of one and of several letters; a euro sign needs three."""
    names = ["<pad>", "<bos>", "<eos>", *spelled(*PIECES, *EURO)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("strings", "pieces", "end"),
    [
        (["b"], ["a", "b", "c"], 2),
        (["b"], ["a", "ab", "c"], 2),
        (["bc"], ["a", "ab", "c", "d"], 3),
        (["</a>"], ["a", "x</a", ">", "b"], 3),
        ([".\n"], ["a", ".\n", "b"], 2),
        (["."], ["a", ".\n", "b"], 2),
        ([" a"], [" a", "b"], 1),
        (["d", "b"], ["a", "b", "d"], 2),
        (["zz"], ["a", "b"], None),
        (["aa"], ["a", "b", "a"], None),
    ],
)
def test_a_stop_string_ends_with_the_token_that_completes_it(byte_level, strings, pieces, end):
    ids, stops = byte_level.convert_tokens_to_ids(spelled(*pieces)), StopStrings(byte_level, strings)
    assert stops.end(ids) == end
    prefixes = [torch.tensor([ids[: n + 1]]) for n in range(len(ids))]
    first = next((n + 1 for n, prefix in enumerate(prefixes) if bool(stops.completed(prefix))), None)
    assert first == end
    if all(character in "".join(PIECES) for string in strings for character in string if character != "z"):
        criterion = StopStringCriteria(byte_level, [string for string in strings if "z" not in string] or ["xx"])
        theirs = next((n + 1 for n, prefix in enumerate(prefixes) if bool(criterion(prefix, None))), None)
        assert theirs == end


def test_a_character_of_several_tokens_completes_a_stop_string_with_its_last(byte_level):
    a, *euro = byte_level.convert_tokens_to_ids(spelled("a", *EURO))
    assert byte_level.decode([a, *euro]) == "a€"
    assert StopStrings(byte_level, ["€"]).end([a, *euro, a]) == 4
    assert StopStrings(byte_level, ["€"]).end([a, *euro[:2]]) is None
    assert StopStrings(byte_level, ["a€a"]).end([a, *euro, a, a]) == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_stop_there_row_by_row_and_not_at_what_the_prompt_says(engine, tokenizer):
    network = llama()
    free = drawn(NativeEngine(), network, SamplingParameters(max_new_tokens=12, temperature=0), PROMPTS, ends=[99])
    words = [tokenizer.decode(row) for row in free]
    stop = words[0].split()[2]
    sampling = SamplingParameters(max_new_tokens=12, temperature=0, stop_strings=stop)
    tokens = drawn(engine(), network, sampling, PROMPTS, ends=[99], tokenizer=tokenizer)
    lengths = []
    for row, whole in zip(tokens.tolist(), free.tolist(), strict=True):
        end = next((n for n in range(1, 13) if stop in tokenizer.decode(whole[:n])), 12)
        assert row == whole[:end] + [PAD] * (len(row) - end)
        lengths.append(end)
    assert min(lengths) < max(lengths)
    assert tokens.shape[1] == max(lengths)
    assert any(stop in tokenizer.decode(prompt).split() for prompt in PROMPTS)


class Overrun(GenerationEngine):
    """Does not know stop strings, nor the argument that comes with them."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def generate(self, network, input_ids, attention_mask, sampling, *, eos_ids, pad_id, **_):
        return Generation(self.tokens, torch.full(self.tokens.shape, -1.0), torch.ones(self.tokens.shape))


BATCH = PromptBatch(
    torch.tensor([[4, 5]] * 4), torch.ones(4, 2, dtype=torch.bool), prompts=["a b"] * 4, columns={"n": list("wxyz")}
)


def test_a_response_that_ends_with_a_stop_string_is_finished_and_keeps_it(tokenizer):
    tokens = [[5, 6, 7, 8, 9], [6, 7, 2, 9, 9], [5, 5, 5, 5, 5], [6, 2, 6, 7, 2]]
    sampling = SamplingParameters(5, stop_strings=["c d"])
    responses = generate_responses(BATCH, llama(), tokenizer, Overrun(tokens), sampling)
    assert responses.response_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert responses.truncated.tolist() == [False, False, True, False]
    assert responses.samples.completions == ["b c d", "c d", "b b b b b", "c"]
    assert responses.samples.completion_ids == [[5, 6, 7], [6, 7], [5] * 5, [6, 2]]
    assert responses.samples.truncated == [False, False, True, False]
    assert responses.input_ids[:, 2:].tolist() == [[5, 6, 7, 0, 0], [6, 7, 0, 0, 0], [5] * 5, [6, 2, 0, 0, 0]]


@pytest.mark.parametrize("engine", ENGINES)
def test_sampled_responses_end_at_their_first_stop_string_and_keep_their_logprobs(engine, tokenizer):
    torch.manual_seed(0)
    network = llama()
    sampling = SamplingParameters(max_new_tokens=20, stop_strings=["h", "e f"])
    batch = PromptBatch(*left_padded(PROMPTS * 8), prompts=["?"] * 32, columns={})
    responses = generate_responses(batch, network, tokenizer, engine(), sampling)
    ends = {"stop": 0, "eos": 0}
    samples = responses.samples
    for ids, text, cut in zip(samples.completion_ids, samples.completions, samples.truncated, strict=True):
        words = tokenizer.decode(ids[:-1])
        assert "h" not in words
        assert "e f" not in words
        stopped = text.endswith("h") or text.endswith("e f")
        assert stopped or ids[-1] == EOS or (cut and len(ids) == 20)
        assert not (stopped and cut)
        ends["stop" if stopped else "eos"] += 1
    assert min(ends.values()) > 2
    if responses.drawn.logprobs is not None:
        assert sampling.samples_the_policy
        assert torch.equal(responses.drawn.logprobs != 0, responses.response_mask)


def test_stop_strings_without_a_tokenizer_are_refused():
    for engine in ENGINES:
        with pytest.raises(UserError, match="give generate\\(\\) the tokenizer"):
            drawn(engine(), llama(), SamplingParameters(max_new_tokens=4, stop_strings="a"), PROMPTS)


# ---------------------------------------------------------------- what training accepts


def test_training_accepts_stop_strings_and_names_every_setting_that_samples_otherwise():
    check_sampling(SamplingParameters(temperature=0.7, stop_strings=["\n"]))
    for setting, reason in [
        ({"temperature": 0.0}, "temperature 0.0 is greedy"),
        ({"top_p": 0.9}, "top_p 0.9 drops unlikely tokens"),
        ({"top_k": 5}, "top_k 5 drops"),
        ({"min_p": 0.1}, "min_p 0.1 drops"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1 changes the logits"),
        ({"min_new_tokens": 4}, "min_new_tokens 4 makes EOS impossible"),
    ]:
        sampling = SamplingParameters(**setting)
        assert not sampling.samples_the_policy
        with pytest.raises(UserError, match=reason):
            check_sampling(sampling)
    with pytest.raises(UserError, match=r"top_k 5 drops unlikely tokens, min_p 0.1"):
        check_sampling(SamplingParameters(top_k=5, min_p=0.1))


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"temperature": float("inf")},
        {"min_new_tokens": -1},
        {"min_new_tokens": 65},
        {"stop_strings": ["a", ""]},
        {"stop_strings": ""},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"sampling: {name} must be"):
        SamplingParameters(**fields)


def test_one_stop_string_is_a_list_of_one_and_the_parameters_stay_hashable():
    assert SamplingParameters(stop_strings="ab") == SamplingParameters(stop_strings=["ab"])
    assert hash(SamplingParameters(stop_strings=["ab"])) != hash(SamplingParameters(stop_strings=["a", "b"]))
