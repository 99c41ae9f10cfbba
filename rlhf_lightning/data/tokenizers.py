"""Tokenizers: load one, tell two apart, see that padding is not EOS, and encode text that continues other text."""

import copy
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError, missing_model

log = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"
# How special tokens are written, and what the names say of those that nothing uses.
BRACKETED = re.compile(r"<\|?[^<>]+\|?>|\[[^\[\]]+\]")
PADDING = re.compile(r"(?<![a-z])pad(ding)?(?![a-z])", re.IGNORECASE)
MEDIA = re.compile(r"image|vision|video|audio|speech|fim", re.IGNORECASE)
RESERVED = re.compile(r"reserved|unused|dummy|placeholder|extra(_id)?_?\d|(special|control)_\d", re.IGNORECASE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; code that comes with it is never run.

    Raises:
        UserError: If nothing is there, or no tokenizer is in it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer in this folder (looked for {', '.join(TOKENIZER_FILES)})")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(missing_model(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of {path} brings code of its own, which is not run; save it again with a tokenizer_class of "
                "transformers, PreTrainedTokenizerFast for one"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer could be loaded from '{path}': {reason}; give a folder or a hub id") from error
    take_ends(tokenizer)
    return tokenizer


def take_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let sequences begin and end with [CLS] and [SEP] where the tokenizer is an encoder's, which has no BOS and EOS."""
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.bos_token is None and tokenizer.cls_token is not None:
            tokenizer.bos_token = tokenizer.cls_token


def repair_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Choose a pad token where there is none, or where it is EOS: else what masks padding would mask EOS too.

    Padding is masked by the lengths of rows, so no model ever learns from it and any token but EOS can serve. First choice is
    a token that the vocabulary has to spare (:func:`spare_token`), then ``unk``; only where both are missing one is added.

    Returns:
        True if the vocabulary grew. Models that are trained completely then get a row for it; those with an adapter do not,
        and neither does what they export.

    Raises:
        UserError: If a token must be added and would get the id of another one.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    was = "EOS" if tokenizer.pad_token_id is not None else "missing"
    unk = tokenizer.unk_token if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) else None
    known, vocabulary = spare_token(tokenizer) or unk, tokenizer.get_vocab()
    if known is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    else:
        tokenizer.pad_token = known
    if known is None and PAD_TOKEN not in vocabulary and tokenizer.pad_token_id in vocabulary.values():
        raise UserError(
            "the tokenizer has no pad token, and one that is added gets the id of another token, for its ids have holes; set "
            "pad_token in its tokenizer_config.json to a token that it has"
        )
    log.warning("pad token is %s; using '%s' instead", was, tokenizer.pad_token)
    return max(token_ids(tokenizer)) > max(vocabulary.values())


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token of the vocabulary that is meant for padding, or reserved; None if there is none.

    Of several reserved ones it is the last: later versions of a model give meanings to the first.
    """
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    template = str(tokenizer.chat_template or "")
    free = [
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if BRACKETED.fullmatch(token) and token not in named and token not in template
    ]
    padding = [(-index, token) for index, token in free if PADDING.search(token) and not MEDIA.search(token)]
    reserved = [(index, token) for index, token in free if RESERVED.search(token)]
    return max(padding or reserved, default=(0, None))[1]


def token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens. They may have holes: the largest is not always the number of tokens less one."""
    vocabulary = getattr(tokenizer, "get_vocab", None)  # a tokenizer of one's own may have a size and no more
    return set(range(len(tokenizer))) if vocabulary is None else set(vocabulary().values())


def without_added_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy without the pad token that :func:`repair_pad_token` has added, and without any other."""
    plain: Any = copy.deepcopy(tokenizer)
    plain.pad_token = None
    if (backend := getattr(plain, "backend_tokenizer", None)) is not None:
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != PAD_TOKEN]
        plain._tokenizer = Tokenizer.from_str(json.dumps(spec))
    else:
        plain._added_tokens_decoder.pop(plain._added_tokens_encoder.pop(PAD_TOKEN, None), None)
    return plain


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether sequences begin with BOS: the tokenizer puts it there itself, or its chat template does."""
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a").input_ids[0] == tokenizer.bos_token_id or "bos_token" in str(tokenizer.chat_template or "")


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides which ids a text gets, by name; neither file paths nor padding."""
    parts: dict[str, Any] = {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        model = parts.pop("model")
        parts |= {f"model {name}": value for name, value in model.items() if name != "vocab"}
        for state in ("truncation", "padding", "version"):
            parts.pop(state, None)
    parts["class"] = None if backend is not None else type(tokenizer).__name__
    parts["vocabulary"] = tokenizer.get_vocab()
    parts["special tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts["chat template"] = tokenizer.chat_template
    return parts


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary, merges, special tokens and chat template: equal for equal tokenizers, wherever they lie."""
    text = json.dumps(tokenizer_parts(tokenizer), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """None when both give the same ids; otherwise what differs, in one line.

    Where one of the two has no chat template, it contradicts none.
    """
    left, right = tokenizer_parts(a), tokenizer_parts(b)
    if not (a.chat_template and b.chat_template):
        del left["chat template"], right["chat template"]
    if len(left["vocabulary"]) != len(right["vocabulary"]):
        return f"vocabularies have {len(left['vocabulary'])} and {len(right['vocabulary'])} entries"
    for name in ("vocabulary", "special tokens"):
        for key in sorted(set(left[name]) | set(right[name])):
            if left[name].get(key) != right[name].get(key):
                return f"{name} differ: '{key}' is {left[name].get(key)!r} and {right[name].get(key)!r}"
    for name in sorted(set(left) | set(right)):
        if left.get(name) != right.get(name):
            return f"{name} differs"
    return None


def encode_beginnings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts that begin a sequence, without special tokens of the tokenizer's own."""
    if not texts:
        return []
    if not is_stock(tokenizer):
        return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    # The call puts the backend into the state that every call does. Then the backend alone gives the same ids in half the time:
    # the tokenizer makes masks, types and offsets beside them.
    tokenizer("", add_special_tokens=False)
    backend: Tokenizer = tokenizer.backend_tokenizer
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def is_stock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether calling the tokenizer is calling its backend; some classes do more in Python."""
    own, stock = type(tokenizer), PreTrainedTokenizerFast
    return issubclass(own, stock) and all(
        getattr(own, name) is getattr(stock, name) for name in ("__call__", "_encode_plus")
    )


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts that follow others, so that decoding both together gives the joined text.

    Tokenizers of SentencePiece's kind put a space before whatever they encode; here they don't.
    """
    continuing = continuing_tokenizer(tokenizer)
    if continuing is None:
        return encode_beginnings(tokenizer, texts)
    return [encoding.ids for encoding in continuing.encode_batch_fast(texts, add_special_tokens=False)]


_CONTINUING: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer | None]] = WeakKeyDictionary()


def continuing_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer without its leading space; None where it has none."""
    size, continuing = _CONTINUING.get(tokenizer, (None, None))
    if size != len(tokenizer):  # tokens added since
        backend = getattr(tokenizer, "backend_tokenizer", None)
        continuing = None if backend is None else without_leading_space(backend)
        _CONTINUING[tokenizer] = (len(tokenizer), continuing)
    return continuing


def without_leading_space(backend: Tokenizer) -> Tokenizer | None:
    """A copy that does not put a space before a text; None where the original does not either."""
    spec = json.loads(backend.to_str())
    changed = False
    for part in (spec["normalizer"], spec["pre_tokenizer"]):
        for step in [part, *((part or {}).get("normalizers") or (part or {}).get("pretokenizers") or [])]:
            kind = (step or {}).get("type")
            if kind == "Prepend":
                changed, step["prepend"] = True, ""
            elif kind == "Metaspace" and step.get("prepend_scheme") != "never":
                changed, step["prepend_scheme"] = True, "never"
            elif kind == "ByteLevel" and step.get("add_prefix_space"):
                changed, step["add_prefix_space"] = True, False
    spec["truncation"] = spec["padding"] = None
    return Tokenizer.from_str(json.dumps(spec)) if changed else None
