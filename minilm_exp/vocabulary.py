"""Vocabularies: cut down to what a corpus needs, and matched between teacher and student.

Of a multilingual teacher most weights are embeddings of tokens that the user's text never has.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError


def count_tokens(ids: numpy.ndarray, vocab_size: int) -> numpy.ndarray:
    """How often each token stands in token ids, which may be larger than memory."""
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for start in range(0, len(ids), 2**22):
        counts += numpy.bincount(ids[start : start + 2**22], minlength=vocab_size)
    return counts


def prune_tokenizer(
    tokenizer: PreTrainedTokenizerFast, counts: numpy.ndarray, min_count: int
) -> PreTrainedTokenizerFast:
    """The tokenizer with the tokens only that stand in a text at least so often.

    Special and added tokens stay, the single characters of those that stay, so that other words of
    the same script can still be spelt, and what BPE's merges and bytes make them from. All keep
    their order. With min_count=1 the text that was counted has the same tokens as
    before: WordPiece takes the longest piece, Unigram the likeliest pieces and BPE the earliest
    merge, and what they took is still there.

    Args:
        tokenizer: With a WordPiece, BPE or Unigram model.
        counts: Of each token id.
        min_count: At least 1.

    Raises:
        ExperimentError: The tokenizer has another model, or BPE with marks on the parts of words.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise ExperimentError(
            f"student.vocabulary=prune_to_corpus: a tokenizer of kind {kind} cannot be cut down;"
            " set student.vocabulary=full"
        )
    if kind == "BPE" and (
        model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    ):
        raise ExperimentError(
            "student.vocabulary=prune_to_corpus: a BPE tokenizer that marks the parts of words"
            " cannot be cut down; set student.vocabulary=full"
        )
    names = _names(model)
    frequent = [int(index) for index in numpy.flatnonzero(counts >= min_count)]
    needed = {names[index] for index in frequent if index in names}
    needed |= {added["content"] for added in described["added_tokens"]}
    needed |= {str(token) for token in tokenizer.all_special_tokens}
    if model.get("unk_token"):
        needed.add(model["unk_token"])
    if kind == "Unigram" and model.get("unk_id") is not None:
        needed.add(names[model["unk_id"]])
    needed |= _characters(needed, names.values(), model)
    if kind == "BPE":
        needed |= _made_from(needed, model)
    if model.get("byte_fallback"):
        needed |= {f"<0x{byte:02X}>" for byte in range(256)}
    _cut(described, model, names, needed)
    return _rebuilt(tokenizer, described)


def match_vocabularies(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> Tensor | None:
    """The teacher's id of each token of the student; None where both have the same ids.

    Raises:
        ExperimentError: The student has tokens that the teacher has not.
    """
    own, of_teacher = student.get_vocab(), teacher.get_vocab()
    if own == of_teacher:
        return None
    missing = sorted(own.keys() - of_teacher.keys())
    if missing:
        raise ExperimentError(
            f"the student's vocabulary has {len(missing)} tokens that the teacher's lacks"
            f" ({', '.join(map(repr, missing[:3]))}, ...): both must read the same tokens; a"
            " student may have fewer (student.vocabulary=prune_to_corpus), not others"
        )
    ids = torch.empty(max(own.values()) + 1, dtype=torch.long)
    for token, index in own.items():
        ids[index] = of_teacher[token]
    return ids


def _names(model: dict[str, Any]) -> dict[int, str]:
    if model["type"] == "Unigram":
        return {index: token for index, (token, _) in enumerate(model["vocab"])}
    return {index: token for token, index in model["vocab"].items()}


def _characters(needed: set[str], tokens: Iterable[str], model: dict[str, Any]) -> set[str]:
    """Tokens of one character that stands in a needed token, as the word's begin or inside it."""
    marks = tuple(mark for mark in (model.get("continuing_subword_prefix"), "\u2581") if mark)

    def bare(token: str) -> str:
        for mark in marks:
            if token.startswith(mark) and len(token) > len(mark):
                return token[len(mark) :]
        return token

    characters = {*marks, *(character for token in needed for character in bare(token))}
    return {token for token in tokens if len(bare(token)) == 1 and bare(token) in characters}


def _pairs(merges: list[Any]) -> Iterable[tuple[str, str]]:
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _made_from(tokens: set[str], model: dict[str, Any]) -> set[str]:
    """What BPE's merges make the tokens from, and all tokens of one character: the bytes."""
    first_made = {a + b: (a, b) for a, b in reversed(list(_pairs(model["merges"])))}
    found = {token for token in model["vocab"] if len(token) == 1}
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model["merges"]))}
    for token in tokens:
        if token not in first_made:
            continue
        # The path of the token itself, as the tokenizer goes it.
        pieces = list(token)
        while len(pieces) > 1:
            candidates = [
                (ranks[pair], place)
                for place, pair in enumerate(itertools.pairwise(pieces))
                if pair in ranks
            ]
            if not candidates:
                break
            _, place = min(candidates)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            found.add(pieces[place])
    return found


def _cut(
    described: dict[str, Any], model: dict[str, Any], names: dict[int, str], needed: set[str]
) -> None:
    """Leaves the needed tokens in the description, numbered anew."""
    special = {added["content"]: added["id"] for added in described["added_tokens"]}
    old = {index: token for index, token in names.items() if token in needed}
    old |= {index: token for token, index in special.items()}
    new = {token: number for number, (_, token) in enumerate(sorted(old.items()))}
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        kept = [token for token in new if token in scores]
        model["vocab"] = [[token, scores[token]] for token in kept]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[names[model["unk_id"]]]
    else:
        model["vocab"] = {token: new[token] for token in model["vocab"] if token in new}
    if model["type"] == "BPE":
        model["merges"] = [
            merge
            for merge, (a, b) in zip(model["merges"], _pairs(model["merges"]))
            if a in new and b in new and a + b in new
        ]
    for added in described["added_tokens"]:
        added["id"] = new[added["content"]]
    if described.get("padding"):
        described["padding"]["pad_id"] = new[described["padding"]["pad_token"]]
    _renumber(described.get("post_processor"), new)


def _renumber(node: Any, new: dict[str, int]) -> None:
    """Ids of special tokens, wherever a post-processor has them."""
    if isinstance(node, list):
        for inner in node:
            _renumber(inner, new)
    elif isinstance(node, dict):
        for key in ("sep", "cls"):  # [token, id]
            if isinstance(node.get(key), list) and len(node[key]) == 2:
                node[key][1] = new[node[key][0]]
        for inner in node.values():
            _renumber(inner, new)
        if "ids" in node and "tokens" in node:
            node["ids"] = [new[token] for token in node["tokens"]]


def _rebuilt(
    tokenizer: PreTrainedTokenizerFast, described: dict[str, Any]
) -> PreTrainedTokenizerFast:
    pruned = copy.deepcopy(tokenizer)
    # The library has no public way to put another backend under a tokenizer's settings.
    vars(pruned)["_tokenizer"] = Tokenizer.from_str(json.dumps(described))
    return pruned
