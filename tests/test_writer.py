"""Decoding of tiny random models: by hand, with and without cache, alone and in batches."""

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_prefix_lm import make_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import WRITERS
from minilm_exp.writer import WRITING_FILE, NoRepeatedNgrams, Writer, Writing, encode_sources

SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, ".", *(f"w{number}" for number in range(30))]
WRITING = Writing(max_source_length=12, max_length=8)
SEARCHES = [replace(WRITING, num_beams=1), replace(WRITING, num_beams=4, length_penalty=0.9),
            replace(WRITING, num_beams=3, no_repeat_ngram_size=2, min_length=3)]  # fmt: skip


def make_tokenizer():
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_writer(architecture="bert", writing=WRITING, seed=0):
    return Writer(make_model(architecture, seed), make_tokenizer(), writing)


def make_texts(number=7, seed=0):
    """Sources of many lengths."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(TOKENS[5:], k=draw.randint(1, 9))) for _ in range(number)]


def ids_of(writer, texts):
    return [source.ids for source in encode_sources(texts, writer.tokenizer, 12)]


@torch.no_grad()
def greedily(writer, source):
    """Token by token from the whole model, without `generate` and without a cache."""
    never = [0, 1, 2, 4, *range(len(TOKENS), writer.model.config.vocab_size)]
    written = []
    while len(written) < writer.writing.max_length:
        ids = torch.tensor([[*source, *written]])
        is_source = torch.tensor([[1] * len(source)])
        scores = writer.model(ids, is_source).logits[0, -1]
        scores[never] = -torch.inf
        if len(written) < writer.writing.min_length:
            scores[3] = -torch.inf
        token = int(scores.argmax())
        if token == 3:
            break
        written.append(token)
    return written


@torch.no_grad()
def log_probability(writer, source, target):
    """Of a target with its closing token, if it is closed, in one pass."""
    ids = torch.tensor([[*source, *target]])
    logits = writer.model(ids, torch.tensor([[1] * len(source)])).logits[0]
    scores = logits[len(source) - 1 : -1].log_softmax(-1)
    return float(sum(scores[place, token] for place, token in enumerate(target)))


@pytest.mark.parametrize("architecture", WRITERS)
@pytest.mark.parametrize("min_length", [0, 5])
def test_greedy_targets_are_those_of_a_loop(architecture, min_length):
    """A first token that is predicted elsewhere than it was learnt, or a target without its end."""
    writer = make_writer(architecture, replace(WRITING, min_length=min_length))
    for source in ids_of(writer, make_texts()):
        assert writer.decode([source]) == [greedily(writer, source)]


@pytest.mark.parametrize("architecture", WRITERS)
@pytest.mark.parametrize("writing", SEARCHES)
def test_cache_changes_nothing(architecture, writing):
    """A cache whose beams are mixed up, or which is seen through another mask."""
    writer = make_writer(architecture, writing)
    sources = ids_of(writer, make_texts())
    assert writer.decode(sources, use_cache=True) == writer.decode(sources, use_cache=False)


@pytest.mark.parametrize("architecture", WRITERS)
@pytest.mark.parametrize("writing", SEARCHES)
def test_batch_changes_nothing(architecture, writing):
    """A target that hangs on what it is written beside."""
    writer = make_writer(architecture, writing)
    texts = make_texts()
    alone = [writer.write([text])[0] for text in texts]
    assert len(set(alone)) > 2
    for batch_size in (2, 3, 16):
        assert writer.write(texts, batch_size=batch_size) == alone


def test_more_beams_find_what_is_more_likely():
    """Beams that are started but not compared."""
    found = {}
    for num_beams in (1, 8):
        writing = replace(WRITING, num_beams=num_beams, length_penalty=0.0)
        writer = make_writer(writing=writing)
        sources = ids_of(writer, make_texts(20))
        total = 0.0
        for source, target in zip(sources, writer.decode(sources)):
            closed = target if len(target) == WRITING.max_length else [*target, 3]
            total += log_probability(writer, source, closed)
        found[num_beams] = total
    assert found[8] > found[1]


def test_length_penalty_favours_longer_targets():
    """A penalty that is not handed on, or works the other way round."""
    lengths = []
    for penalty in (-2.0, 0.0, 3.0):
        writing = replace(WRITING, num_beams=6, length_penalty=penalty)
        writer = make_writer(writing=writing, seed=3)
        lengths.append(sum(map(len, writer.decode(ids_of(writer, make_texts(20))))))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_lengths_are_kept(num_beams):
    """A minimum that counts the source, or a target that runs on."""
    for least, most in ((0, 2), (4, 5), (7, 8)):
        writing = Writing(12, most, min_length=least, num_beams=num_beams)
        writer = make_writer(writing=writing)
        lengths = {len(target) for target in writer.decode(ids_of(writer, make_texts(20)))}
        assert least <= min(lengths) and max(lengths) <= most


def test_special_tokens_are_never_written():
    """[MASK], padding or a row of the embeddings without a token in the middle of a summary."""
    for seed in range(4):
        writer = make_writer(writing=replace(WRITING, num_beams=2), seed=seed)
        for target in writer.decode(ids_of(writer, make_texts(10))):
            assert all(5 <= token < len(TOKENS) for token in target)


def forbidden(target, size, ignored=frozenset()):
    """The tokens whose n-gram stands in the target already, from its words in words."""
    seen = {tuple(target[start : start + size]) for start in range(len(target) - size + 1)}
    found = set()
    for token in range(10):
        ngram = (*target[len(target) - size + 1 :], token)
        if ngram in seen and not ignored & set(ngram):
            found.add(token)
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ignored", [frozenset(), frozenset({7})])
def test_repeated_ngrams_are_those_of_the_target_alone(size, ignored):
    """n-grams of the source that may not be copied, or sentences that may end once only."""
    draw = random.Random(size)
    rows = [[draw.choice([5, 6, 7]) for _ in range(9)] for _ in range(30)]
    source = [5, 5, 5, 6, 6]
    for length in range(10):
        ids = torch.tensor([[*source, *row[:length]] for row in rows])
        scores = NoRepeatedNgrams(size, len(source), set(ignored))(ids, torch.zeros(30, 10))
        for row, found in zip(rows, scores):
            assert set((found == -torch.inf).nonzero().flatten().tolist()) == forbidden(
                row[:length], size, ignored
            )


def test_what_is_written_has_no_ngram_twice():
    """A rule that never reaches the search."""
    plain = make_writer(writing=Writing(12, 20, min_length=19))
    sources = ids_of(plain, make_texts(10))

    def repeats(writer):
        counts = 0
        for target in writer.decode(sources):
            pairs = [pair for pair in itertools.pairwise(target) if 5 not in pair]
            counts += len(pairs) - len(set(pairs))
        return counts

    assert repeats(plain) > 0
    for num_beams in (1, 3):
        writing = replace(plain.writing, no_repeat_ngram_size=2, num_beams=num_beams)
        assert repeats(make_writer(writing=writing)) == 0


def test_full_stops_of_every_tokenizer():
    """A rule about full stops that knows one spelling of them only."""
    writer = make_writer()
    assert writer._full_stops == {5}
    vocabulary = {"Ġ.": 1, "▁.": 2, "##.": 3, ".": 4, "a.": 5, "..": 6}
    writer.tokenizer.get_vocab = lambda: vocabulary
    del writer.__dict__["_full_stops"]
    assert writer._full_stops == {1, 2, 3, 4}


def test_long_sources_are_cut_and_said_to_be():
    """A source that is cut without its closing token, or in silence."""
    tokenizer = make_tokenizer()
    short, exact, long = encode_sources(["w1", "w1 " * 10, "w1 " * 11], tokenizer, 12)
    assert (len(short.ids), short.is_cut) == (3, False)
    assert (len(exact.ids), exact.is_cut) == (12, False)
    assert (len(long.ids), long.is_cut) == (12, True)
    assert long.ids[-1] == 3
    assert len(tokenizer("w1 " * 50).input_ids) == 52  # the tokenizer is left as it was


def test_empty_sources_are_refused():
    """A summary of nothing."""
    writer = make_writer()
    assert encode_sources(["  "], writer.tokenizer, 12)[0].ids == []
    with pytest.raises(ExperimentError, match="is empty"):
        writer.write(["w1", " \n"])


def test_nothing_gives_nothing():
    """A maximum over no sources."""
    assert make_writer().write([]) == []


def test_dropout_comes_back_after_writing():
    """A training that goes on without dropout after its first evaluation, or writes with it."""
    writer = make_writer()
    writer.model.train()
    first = writer.write(make_texts())
    assert writer.model.training
    assert first == writer.write(make_texts()) == make_writer().write(make_texts())


@pytest.mark.parametrize(
    "writing, message",
    [
        (Writing(40, 8), "more than the 40 positions"),
        (Writing(12, 8, min_length=8), "min_length=8 must be below max_length=8"),
    ],
)
def test_lengths_that_cannot_be(writing, message):
    """An index error in the last step of a long decoding."""
    with pytest.raises(ExperimentError, match=message):
        make_writer(writing=writing)


@pytest.mark.parametrize("architecture", WRITERS)
def test_saved_writer_writes_the_same_in_a_new_process(architecture, tmp_path):
    """A head, tie or setting that is not saved."""
    writer = make_writer(architecture, SEARCHES[2], seed=5)
    writer.model.float()
    texts = make_texts()
    expected = writer.write(texts)
    writer.save(tmp_path / "model")
    assert Writer.load(tmp_path / "model").write(texts) == expected
    if architecture != "bert":  # a process takes seconds
        return
    code = (
        "from minilm_exp.writer import Writer\n"
        f"writer = Writer.load({str(tmp_path / 'model')!r})\n"
        f"print(__import__('json').dumps(writer.write({texts!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_folder_that_is_no_generator(tmp_path):
    """An encoder whose head would be drawn at random."""
    with pytest.raises(ExperimentError, match="is no fine-tuned generator"):
        Writer.load(tmp_path)
    writer = make_writer()
    writer.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExperimentError, match="cannot be loaded"):
        Writer.load(tmp_path)
    writer.model.base_model.save_pretrained(tmp_path)
    with pytest.raises(ExperimentError, match="lacks weights"):
        Writer.load(tmp_path)
    (tmp_path / WRITING_FILE).write_text("{}")
    with pytest.raises(ExperimentError, match="cannot be loaded"):
        Writer.load(tmp_path)


def test_tokenizer_without_a_closing_token():
    """A decoding that never ends."""
    writer = make_writer()
    writer.tokenizer.sep_token = None
    with pytest.raises(ExperimentError, match="no \\[SEP\\]"):
        writer.write(["w1"])
