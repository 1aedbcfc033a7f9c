"""Tokenizers cut down to a text, of every kind of model."""

import random
from collections import Counter

import numpy
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.vocabulary import count_tokens, match_vocabularies, prune_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = [
    "ba",
    "ke",
    "lo",
    "mi",
    "nu",
    "ra",
    "se",
    "to",
    "vi",
    "zu",
    "schw",
    "über",
    "ñan",
    "語",
]
NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
         "mask_token": "[MASK]"}  # fmt: skip


def make_words(number, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(number)]


def make_texts(number, seed, words=None):
    draw = random.Random(seed)
    words = words or make_words(300, seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 12))) + "." for _ in range(number)]


def make_tokenizer(kind):
    """Trained on many words, of which a corpus will have few."""
    texts = make_texts(400, 0) + make_texts(400, 1)
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL)
    elif kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="[UNK]")
    backend.train_from_iterator(texts, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    if kind == "bpe":
        backend.post_processor = processors.BertProcessing(ids[1], ids[0])
    else:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    tokenizer.add_tokens(["<quantity>"])
    return tokenizer


KINDS = ["wordpiece", "bpe", "unigram"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


CORPUS = make_texts(60, 3, make_words(25, 0))


def counts_of(tokenizer, texts):
    ids = [index for text in texts for index in tokenizer(text)["input_ids"]]
    counts = count_tokens(numpy.array(ids, dtype=numpy.uint16), len(tokenizer))
    assert dict(Counter(ids)) == {i: count for i, count in enumerate(counts) if count}
    return counts


@pytest.fixture(scope="module")
def pruned(tokenizer):
    return prune_tokenizer(tokenizer, counts_of(tokenizer, CORPUS), 1)


def test_the_text_has_the_same_tokens(tokenizer, pruned):
    """A merge or piece that is missing, so that teacher and student read something else."""
    assert len(pruned) < 0.9 * len(tokenizer)
    ids = match_vocabularies(pruned, tokenizer)
    for text in CORPUS:
        assert pruned.tokenize(text) == tokenizer.tokenize(text)
        assert ids[pruned(text)["input_ids"]].tolist() == tokenizer(text)["input_ids"]
    pair = [CORPUS[0], CORPUS[1]]
    assert ids[pruned(*pair)["input_ids"]].tolist() == tokenizer(*pair)["input_ids"]


def test_only_what_is_needed_stays(tokenizer, pruned):
    """A vocabulary that is hardly smaller, or holes in its numbers."""
    counts = counts_of(tokenizer, CORPUS)
    used = {tokenizer.convert_ids_to_tokens(int(i)) for i in numpy.flatnonzero(counts)}
    vocabulary = pruned.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(pruned)))
    assert used <= set(vocabulary)
    extra = set(vocabulary) - used - set(SPECIAL) - {"<quantity>"}
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "BPE":
        assert all(len(token.removeprefix("##").removeprefix("▁")) <= 1 for token in extra)
    order = sorted(vocabulary, key=vocabulary.get)
    assert order == sorted(order, key=tokenizer.get_vocab().get)


def test_special_and_added_tokens_stay(tokenizer, pruned):
    """A padding token with the number of a word, or a mask token that is spelt out."""
    for name, token in NAMES.items():
        assert getattr(pruned, name) == token
        index = getattr(pruned, f"{name}_id")
        assert pruned.convert_ids_to_tokens(index) == token
        assert index < len(pruned)
    assert pruned.tokenize("<quantity>") == ["<quantity>"]
    padded = pruned([CORPUS[0], "a"], padding=True)["input_ids"]
    assert padded[1][-1] == pruned.pad_token_id


def test_saved_tokenizer_loads(pruned, tmp_path):
    """A folder that only our code can read, or whose tokenizer is the whole one again."""
    pruned.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == pruned.get_vocab()
    other = make_texts(20, 4)
    for text in [*CORPUS, *other]:
        assert loaded(text)["input_ids"] == pruned(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == pruned.decode(pruned(text)["input_ids"])


def test_other_words_can_be_spelt(tokenizer, pruned):
    """Every new word unknown, although its letters are there."""
    spelt = {token.removeprefix("##") for token in tokenizer.get_vocab()}
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        spelt = {character for word in make_words(200, 9) for character in word}  # by bytes
    letters = {character for text in CORPUS for character in text} & spelt
    words = [word for word in make_words(200, 9) if set(word) <= letters]
    assert len(words) > 20
    for word in words:
        if tokenizer.unk_token_id not in tokenizer(word)["input_ids"]:
            assert pruned.unk_token_id not in pruned(word)["input_ids"], word


def test_rare_tokens_go(tokenizer):
    """A threshold that is not applied, or off by one."""
    counts = counts_of(tokenizer, CORPUS)
    sizes = []
    for threshold in (1, 10, 60):
        smaller = prune_tokenizer(tokenizer, counts, threshold)
        sizes.append(len(smaller))
        for index in numpy.flatnonzero(counts >= threshold):
            assert tokenizer.convert_ids_to_tokens(int(index)) in smaller.get_vocab()
    assert sizes[0] >= sizes[1] >= sizes[2] and sizes[0] > sizes[2]


def test_original_is_left_alone(tokenizer):
    """The teacher reads with the student's vocabulary."""
    before = tokenizer.get_vocab(), tokenizer(CORPUS[0])["input_ids"]
    prune_tokenizer(tokenizer, counts_of(tokenizer, CORPUS[:3]), 1)
    assert (tokenizer.get_vocab(), tokenizer(CORPUS[0])["input_ids"]) == before


def test_other_kinds_are_refused():
    """A tokenizer of whole words cut in a way that nobody checked."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    with pytest.raises(ExperimentError, match=r"WordLevel.*student\.vocabulary=full"):
        prune_tokenizer(tokenizer, numpy.ones(7, dtype=int), 1)


def test_marked_parts_of_words_are_refused():
    """Words whose last letter is lost with its mark."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    backend.train_from_iterator(make_texts(50, 0), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    with pytest.raises(ExperimentError, match=r"student\.vocabulary=full"):
        prune_tokenizer(tokenizer, numpy.ones(len(tokenizer), dtype=int), 1)


def test_vocabularies_that_differ_are_refused(tokenizer):
    """Relations of sequences that are not the same tokens."""
    assert match_vocabularies(tokenizer, tokenizer) is None
    other = make_tokenizer("wordpiece")
    other.add_tokens(["something else"])
    with pytest.raises(ExperimentError, match="something else"):
        match_vocabularies(other, make_tokenizer("wordpiece"))


def test_counting_a_large_text():
    """Counts of the last part only, or a narrow type that overflows."""
    ids = numpy.tile(numpy.arange(5, dtype=numpy.uint16), 2**21)
    assert count_tokens(ids, 6).tolist() == [2**21] * 5 + [0]
    assert torch.tensor(count_tokens(ids[:0], 3)).tolist() == [0, 0, 0]
