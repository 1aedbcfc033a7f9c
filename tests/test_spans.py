"""Question answering: windows, labels and answers, against slow readings of the same rules."""

import functools
import json
import math
import random
import unicodedata

import numpy
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.tasks.spans import (
    MAX_QUESTION_TOKENS,
    best_answers,
    encode_evaluation_windows,
    encode_training_windows,
)

WORDS = {
    "ascii": ["apple", "don't", "U.S.", "3,000", "a", "running", "well-known", "(see", "below)"],
    "arabic": ["مدينة", "جداً", "النهر", "سابقاً", "٣٠٨", "كتابٍ", "،", "في", "ألف"],
    "hindi": ["जॉन", "एलवे", "समस्याओं", "होटलों", "के", "दिल्ली", "।", "में", "७"],
    "chinese": ["黑豹队", "的防守", "只丢了", "308", "分", "，", "拉里", "·", "。"],
    "emoji": ["😀", "👩‍🚀", "🇩🇪", "ok", "👍🏽", "❤️", "go!", "🎉🎉", "1️⃣"],
}
BLANK = {"chinese": ""}
KINDS = ["wordpiece", "unigram", "bytes"]
MAX_LENGTH = {"wordpiece": 48, "unigram": 48, "bytes": 80}
STRIDE = 16
every_kind = pytest.mark.parametrize("kind", KINDS)
every_script = pytest.mark.parametrize("script", list(WORDS))


@functools.cache
def make_tokenizer(kind):
    """One that spells everything in WORDS, mostly letter by letter.

    wordpiece is like uncased BERT's and drops accents and vowel signs; unigram is like XLM-R's,
    with blanks inside its tokens; bytes is like RoBERTa's, with several tokens to a character.
    """
    words = [word for group in WORDS.values() for word in group]
    letters = sorted(set("".join(words) + "abcdefghijklmnopqrstuvwxyz0123456789,.?"))
    if kind == "wordpiece":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        normalizer = normalizers.BertNormalizer(lowercase=True)
        letters = sorted(set(normalizer.normalize_str("".join(letters))))
        tokens = dict.fromkeys([*special, *letters, *(f"##{c}" for c in letters), "app", "##ning"])
        model = models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
        backend = Tokenizer(model)
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        special = ["<pad>", "<unk>", "<s>", "</s>"]
        if kind == "unigram":
            pieces = [*special, "▁", *letters]
            scores = [(piece, -9.0) for piece in pieces] + [("▁apple", -2.0), ("黑豹", -3.0)]
            backend = Tokenizer(models.Unigram(scores, unk_id=1))
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Metaspace()
        else:
            pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ap", "app"]
            model = models.BPE({p: i for i, p in enumerate(pieces)}, [("a", "p"), ("ap", "p")])
            backend = Tokenizer(model)
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        backend.post_processor = (
            processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
            if kind == "bytes"
            else processors.TemplateProcessing(
                single="<s> $A </s>",
                pair="<s> $A </s> </s> $B </s>",
                special_tokens=[("<s>", 2), ("</s>", 3)],
            )
        )
        names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[0],
        unk_token=special[1],
        cls_token=special[2],
        sep_token=special[3],
        model_input_names=names,
    )


def make_batch(script, num_words=48, longest=3):
    """Every run of words of a few contexts is once the answer."""
    draw = random.Random(f"spans {script}")
    blank = BLANK.get(script, " ")
    batch = {"question": [], "context": [], "answers": []}
    for number in (num_words, num_words // 3, 1):
        words = draw.choices(WORDS[script], k=number)
        for first in range(number):
            for last in range(first, min(first + longest, number)):
                before = "".join(word + blank for word in words[:first])
                text = blank.join(words[first : last + 1])
                batch["question"].append(" ".join(draw.choices(WORDS[script], k=2)))
                batch["context"].append(blank.join(words))
                batch["answers"].append({"text": [text], "answer_start": [len(before)]})
    return batch


def one(question, context, *golds):
    """A batch of one example; golds are pairs of text and answer_start."""
    answers = {"text": [text for text, _ in golds], "answer_start": [start for _, start in golds]}
    return {"question": [question], "context": [context], "answers": [answers]}


def slow_windows(question, context, text, answer_start, kind):
    """Ids, token types, label and offsets of each window, from both texts tokenised apart."""
    tokenizer = make_tokenizer(kind)
    first, second, third = ([2], [3] if kind == "wordpiece" else [3, 3], [3])
    question_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context, return_offsets_mapping=True)
    tokens = list(zip(whole["input_ids"], whole["offset_mapping"]))[1:-1]
    room = MAX_LENGTH[kind] - len([*first, *question_ids, *second, *third])
    covered = {c for _, (begin, end) in tokens for c in range(begin, end)}
    marks = {c for c, character in enumerate(context) if unicodedata.category(character)[0] == "M"}
    answer = {*range(answer_start, answer_start + len(text))}
    wanted = answer & covered - marks  # a letter that is held brings its marks
    windows = []
    for begin in range(0, len(tokens), room - STRIDE):
        part = tokens[begin : begin + room]
        lead = [*first, *question_ids, *second]
        inside = [(i, {*range(*offsets)}) for i, (_, offsets) in enumerate(part, len(lead))]
        touched = [i for i, characters in inside if characters & answer]
        is_whole = wanted <= set().union(*(characters for _, characters in inside))
        windows.append(
            {
                "input_ids": [*lead, *(i for i, _ in part), *third],
                "token_type_ids": [0] * len(lead) + [1] * (len(part) + len(third)),
                "label": (touched[0], touched[-1]) if is_whole else (0, 0),
                "offsets": [
                    *[-1, -1] * len(lead),
                    *(c for _, offsets in part for c in offsets),
                    *[-1, -1] * len(third),
                ],
            }
        )
        if begin + room >= len(tokens):
            break
    return windows


@every_kind
@every_script
def test_windows_are_those_of_a_slow_reading(kind, script):
    """Windows one token off, a window too many at the end, the overlap taken for the step, labels
    one token off or left on a window that cuts the answer, bytes taken for characters.
    """
    batch = make_batch(script)
    tokenizer = make_tokenizer(kind)
    indices = list(range(100, 100 + len(batch["question"])))
    train = encode_training_windows(batch, tokenizer, MAX_LENGTH[kind], STRIDE)
    evaluation = encode_evaluation_windows(batch, indices, tokenizer, MAX_LENGTH[kind], STRIDE)
    expected, numbers = [], []
    for index, question, context, golds in zip(indices, *batch.values()):
        windows = slow_windows(question, context, golds["text"][0], golds["answer_start"][0], kind)
        expected += windows
        numbers += [index] * len(windows)
    columns = {
        name: [window[name] for window in expected]
        for name in ("input_ids", "token_type_ids", "offsets")
    }
    if kind != "wordpiece":
        del columns["token_type_ids"]
    offsets = columns.pop("offsets")
    starts, ends = zip(*(window["label"] for window in expected))
    assert train == columns | {"start_positions": list(starts), "end_positions": list(ends)}
    assert evaluation == columns | {"example": numbers, "offsets": offsets}
    assert numbers.count(100) > 2 and numbers.count(indices[-1]) == 1


@every_kind
@every_script
def test_labelled_tokens_spell_the_answer(kind, script):
    """Labels and offsets that are wrong in the same way, so that they agree with each other."""
    batch = make_batch(script)
    tokenizer = make_tokenizer(kind)
    train = encode_training_windows(batch, tokenizer, 1000, STRIDE)
    rows = zip(train["input_ids"], train["start_positions"], train["end_positions"])
    for golds, (ids, start, end) in zip(batch["answers"], rows, strict=True):
        text = golds["text"][0]
        if kind == "wordpiece":
            text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert tokenizer.decode(ids[start : end + 1]).replace(" ", "") == text.replace(" ", "")


@every_kind
@every_script
def test_from_label_to_text_and_back(kind, script):
    """Text that is not the gold answer for logits that are right: without its last vowel sign, with
    a blank, half an emoji; or an answer that no window holds although it fits the overlap.
    """
    batch = make_batch(script)
    tokenizer = make_tokenizer(kind)
    numbers = list(range(len(batch["question"])))
    train = encode_training_windows(batch, tokenizer, MAX_LENGTH[kind], STRIDE)
    windows = encode_evaluation_windows(batch, numbers, tokenizer, MAX_LENGTH[kind], STRIDE)
    labels = list(zip(train["start_positions"], train["end_positions"]))
    one_hot = [numpy.eye(len(ids), dtype=numpy.float32) for ids in train["input_ids"]]
    found = best_answers(
        batch["context"],
        windows["example"],
        windows["offsets"],
        [rows[start] for rows, (start, _) in zip(one_hot, labels)],
        [rows[end] for rows, (_, end) in zip(one_hot, labels)],
        may_be_empty=True,
        max_answer_tokens=1000,
    )
    held = {number for number, label in zip(windows["example"], labels) if label != (0, 0)}
    for number, answer in enumerate(found):
        text = batch["answers"][number]["text"][0]
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert number in held or num_tokens > STRIDE
        assert answer.text == (text if number in held else "")
    assert len(held) > 0.6 * len(numbers)


def labelled(batch, kind="wordpiece"):
    """Characters of the context that each window is labelled with; None for its CLS token."""
    tokenizer = make_tokenizer(kind)
    numbers = list(range(len(batch["question"])))
    train = encode_training_windows(batch, tokenizer, 60, STRIDE)
    windows = encode_evaluation_windows(batch, numbers, tokenizer, 60, STRIDE)
    return [
        (offsets[2 * start], offsets[2 * end + 1]) if start else None
        for start, end, offsets in zip(
            train["start_positions"], train["end_positions"], windows["offsets"], strict=True
        )
    ]


@pytest.mark.parametrize(
    "text, answer_start, expected",
    [
        ("b", 2, 2),
        ("b", 1, 2),
        ("b", 3, 2),
        ("b", 7, 2),  # as near as the next one
        ("b", 8, 12),
        ("b", 13, 12),
        ("b", 500, 16),
        ("b", -1, 2),
        ("b", -6, 2),  # where a Python string would count from its end
        (" b ", 11, 12),
        ("  b", 13, 16),
        ("c d", 9, 4),
        ("zz", 18, 18),
        ("zz", 19, 19),  # overlaps the one before
        ("zz", 20, 19),
    ],
)
def test_wrong_answer_start(text, answer_start, expected):
    """A label as far off as its answer_start, or the first occurrence of a text that was meant
    elsewhere.
    """
    batch = one("q", "a b c d e f b g b zzz", (text, answer_start))
    assert labelled(batch) == [(expected, expected + len(text.strip()))]


def test_answers_that_are_not_there():
    """An example trained as unanswerable, or with any label, because its gold answer is spelt in
    another way; or labels that slip to the next example when one is left out.
    """
    parts = [
        one("q", "a b c", ("b", 2)),
        one("q", "a b c " * 40, ("B", 2)),
        one("q", "a b c", ("abc", 0)),
        one("q", "a b c d", ("d", 6)),
    ]
    batch = {name: [part[name][0] for part in parts] for name in parts[0]}
    kept = {name: [column[0], column[3]] for name, column in batch.items()}
    encoded = [
        encode_training_windows(each, make_tokenizer("wordpiece"), 60, STRIDE)
        for each in (batch, kept)
    ]
    assert encoded[0] == encoded[1]
    assert encoded[0]["start_positions"] == [4, 6]


@pytest.mark.parametrize("golds", [[], [("", 0)], [(" ", 1)]], ids=["none", "empty", "blank"])
def test_no_gold_answer(golds):
    """A question without an answer that is left out of training, or labelled in some windows."""
    assert labelled(one("q", "a b c", *golds)) == [None]
    assert labelled(one("q", "", *golds)) == [None]
    labels = labelled(one("q", "a b c " * 60, *golds))
    assert len(labels) > 2 and set(labels) == {None}


def test_only_the_first_gold_answer_counts():
    """A label drawn from the last of several annotators' answers."""
    assert labelled(one("q", "a b c d", ("c", 4), ("d", 6))) == [(4, 5)]


def test_answers_inside_tokens_take_whole_tokens():
    """No label, or one token too few, for an answer that begins or ends within a word."""
    assert labelled(one("q", "an apple.", ("ppl", 4))) == [(3, 7)]  # app ##l
    assert labelled(one("q", "an apple.", ("pple", 4)), "unigram") == [(2, 8)]  # its blank too
    assert labelled(one("q", "a 🎉", ("🎉", 2)), "bytes") == [(2, 3)]


def test_an_answer_longer_than_every_window():
    """A label that is cut at the window's border, and trains the encoder to stop there."""
    context = "a b c " * 60
    labels = labelled(one("q", context, (context.strip(), 0)))
    assert len(labels) > 2 and set(labels) == {None}


@pytest.mark.parametrize("cls_token, expected", [("[SEP]", 2), ("[UNK]", 0), (None, 0)])
def test_the_label_of_no_answer_is_where_the_cls_token_is(cls_token, expected):
    """Unanswerable questions labelled with the first token of the question, or a failing search
    for a token that the tokenizer does not put there.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer("wordpiece").backend_tokenizer, cls_token=cls_token
    )
    encoded = encode_training_windows(one("q", "a b"), tokenizer, 60, STRIDE)
    assert encoded["start_positions"] == encoded["end_positions"] == [expected]


@every_kind
def test_long_questions_are_cut(kind):
    """A question that leaves no room for the context, or is cut by characters or from its front."""
    tokenizer = make_tokenizer(kind)
    draw = random.Random(5)
    words = [word for group in ("ascii", "emoji") for word in WORDS[group]]
    # Cut anywhere: within words, behind blanks, inside an emoji.
    questions = [" ".join(draw.choices(words, k=100)) for _ in range(40)]
    batch = {"question": [f"  {q}" for q in questions], "context": ["a b"] * 40}
    windows = encode_evaluation_windows(batch, list(range(40)), tokenizer, 100, STRIDE)
    for question, ids, offsets in zip(
        questions, windows["input_ids"], windows["offsets"], strict=True
    ):
        whole = tokenizer(question, add_special_tokens=False)["input_ids"]
        # Behind its CLS token, up to its separator.
        kept = ids[1 : ids.index(tokenizer.sep_token_id)]
        assert len(whole) > 200 and kept == whole[: len(kept)]
        # An emoji of several tokens is taken whole or not at all, and a blank is no last token.
        assert len(kept) == MAX_QUESTION_TOKENS or (
            kind != "wordpiece" and MAX_QUESTION_TOKENS - 4 <= len(kept) < MAX_QUESTION_TOKENS
        )
        assert [c for c in offsets if c >= 0][-1] == 3
    at_limit = " ".join("a" * MAX_QUESTION_TOKENS)
    same = [
        encode_evaluation_windows(one(question, "a b"), [0], tokenizer, 200, STRIDE)
        for question in (at_limit, f" \n{at_limit}")
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize("encode", ["train", "evaluate"])
@pytest.mark.parametrize("context", ["a b", "a b " * 100], ids=["short", "long"])
def test_windows_shorter_than_their_overlap(encode, context):
    """A crash inside the tokenizer in the middle of the data, that names no setting."""

    def encoded(max_length):
        batch, tokenizer = one("q " * 10, context, ("b", 2)), make_tokenizer("wordpiece")
        if encode == "train":
            return encode_training_windows(batch, tokenizer, max_length, 5)
        return encode_evaluation_windows(batch, [0], tokenizer, max_length, 5)

    assert max(map(len, encoded(13 + 6)["input_ids"])) == (19 if len(context) > 5 else 15)
    with pytest.raises(ExperimentError) as caught:
        encoded(13 + 5)
    for part in ("task_training.max_length=18", "task_training.doc_stride=5", "question of 10"):
        assert part in str(caught.value)


def test_padding_that_a_tokenizer_file_asks_for_is_not_made():
    """Windows filled up with padding tokens that nothing masks, since the collator sees no need."""
    padding = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(make_tokenizer("wordpiece").backend_tokenizer.to_str()),
        pad_token="[PAD]",
        cls_token="[CLS]",
    )
    padding.backend_tokenizer.enable_padding(length=30)
    batch = one("q", "a b", ("b", 2))
    assert encode_training_windows(batch, padding, 60, STRIDE)["input_ids"] == [
        encode_training_windows(batch, make_tokenizer("wordpiece"), 60, STRIDE)["input_ids"][0]
    ]


def test_in_a_map_over_a_data_set():
    """Columns that the data set library cannot write: of unequal lengths, or without a type where a
    whole batch is left out.
    """
    batch = make_batch("ascii", num_words=10)
    batch["answers"][:3] = [{"text": ["not there"], "answer_start": [0]}] * 3
    batch["answers"][3] = {"text": [], "answer_start": []}
    data = Dataset.from_dict(batch)
    arguments = {
        "tokenizer": make_tokenizer("wordpiece"),
        "max_length": 60,
        "stride": STRIDE,
    }
    options = {
        "batched": True,
        "batch_size": 3,
        "remove_columns": data.column_names,
        "fn_kwargs": arguments,
    }
    train = data.map(encode_training_windows, **options)
    assert train.to_dict() == encode_training_windows(batch, **arguments)
    windows = data.map(encode_evaluation_windows, with_indices=True, **options)
    numbers = list(range(len(data)))
    assert windows.to_dict() == encode_evaluation_windows(batch, numbers, **arguments)


def make_windows(draw, num_contexts=4, is_rounded=False):
    """Made-up windows of several contexts, mixed, with random logits on all of their tokens."""
    contexts, windows = [], []
    for number in range(num_contexts):
        words = [f"w{number}x{i}" for i in range(draw.randint(1, 14))]
        contexts.append(" ".join(words))
        spans, begin = [], 0
        for word in words:
            spans.append((begin, begin + len(word)))
            begin += len(word) + 1
        for _ in range(draw.randint(1, 3)):
            first = draw.randrange(len(spans))
            part = spans[first : first + draw.randint(1, 9)]
            lead = draw.randint(1, 5)
            offsets = [(-1, -1)] * lead + part + [(-1, -1)]
            logits = [
                [float(draw.randint(-2, 2)) if is_rounded else draw.gauss(0, 3) for _ in offsets]
                for _ in range(2)
            ]
            windows.append((number, offsets, *logits))
    draw.shuffle(windows)
    return contexts, windows


def read(contexts, windows, dtype=numpy.float64, **options):
    """`best_answers` on windows as `make_windows` gives them."""
    options = {"may_be_empty": True, "max_answer_tokens": 4, "num_best": 100} | options
    return best_answers(
        contexts,
        [number for number, *_ in windows],
        [[c for pair in offsets for c in pair] for _, offsets, *_ in windows],
        [numpy.array(start, dtype) for *_, start, _ in windows],
        [numpy.array(end, dtype) for *_, end in windows],
        **options,
    )


def slow_answer(context, windows, num_best, max_answer_tokens):
    """Score of no answer, text and score of the best span, by trying every pair of tokens."""
    best = None
    for _, offsets, start, end in windows:
        inside = [i for i, (begin, _) in enumerate(offsets) if begin >= 0]
        starts, ends = (
            sorted(inside, key=lambda i, values=values: (-values[i], i))[:num_best]
            for values in (start, end)
        )
        for i in inside:
            for j in inside:
                if i in starts and j in ends and i <= j < i + max_answer_tokens:
                    score = start[i] + end[j]
                    if best is None or score > best[1]:
                        best = context[offsets[i][0] : offsets[j][1]], score
    return min(start[0] + end[0] for *_, start, end in windows), *best


@pytest.mark.parametrize("is_rounded", [False, True], ids=["gauss", "ties"])
@pytest.mark.parametrize("num_best", [100, 3, 1])
@pytest.mark.parametrize("max_answer_tokens", [100, 3, 1])
def test_answers_are_those_of_a_slow_search(num_best, max_answer_tokens, is_rounded):
    """A span that is not the best one, that ends before it starts, that is too long or runs into
    the question; a tie that falls the other way on another machine; the null score of another
    window.
    """
    draw = random.Random(f"{num_best} {max_answer_tokens} {is_rounded}")
    options = {"num_best": num_best, "max_answer_tokens": max_answer_tokens}
    num_compared = 0
    for _ in range(60):
        contexts, windows = make_windows(draw, is_rounded=is_rounded)
        found = read(contexts, windows, **options, null_threshold=0.5)
        forced = read(contexts, windows, **options, may_be_empty=False, null_threshold=-99.0)
        for number, context in enumerate(contexts):
            own = [window for window in windows if window[0] == number]
            try:
                null, text, score = slow_answer(context, own, **options)
            except TypeError:  # no start is left with an end behind it
                assert found[number].text == forced[number].text == ""
                continue
            num_compared += 1
            assert found[number].null_score == forced[number].null_score == null - score
            assert forced[number].text == text
            assert found[number].text == ("" if null - score > 0.5 else text)
    assert num_compared > 100


def test_the_threshold_itself_still_answers():
    """Answers that go lost where a threshold is tuned to a null score that occurs."""
    windows = [(0, [(-1, -1), (0, 1)], [3.0, 1.0], [0.0, 1.0])]
    assert read(["a"], windows)[0].null_score == 1.0
    assert [read(["a"], windows, null_threshold=t)[0].text for t in (0.99, 1.0)] == ["", "a"]


def test_the_question_does_not_crowd_out_the_context():
    """No answer at all where the question's tokens have the best logits."""
    offsets = [(-1, -1)] * 30 + [(0, 1), (2, 3)]
    windows = [(0, offsets, [9.0] * 30 + [0.0, 0.0], [9.0] * 30 + [0.0, 1.0])]
    assert read(["a b"], windows, may_be_empty=False, num_best=20)[0].text == "a b"


def test_half_precision_makes_no_ties():
    """Another answer from the same logits in half precision, where 2048 + 1 is 2048."""
    windows = [(0, [(-1, -1), (0, 1), (2, 3)], [0.0, 2048.0, 0.0], [0.0, 0.0, 1.0])]
    for dtype in (numpy.float16, numpy.float32):
        assert read(["a b"], windows, dtype)[0].text == "a b"


def test_blanks_are_no_answer_and_not_part_of_one():
    """A token of nothing but a blank that is taken for an answer, and scored as no answer."""
    windows = [(0, [(-1, -1), (0, 1), (1, 2), (2, 4)], [0.0, 1.0, 9.0, 2.0], [0.0, 1.0, 9.0, 2.0])]
    assert read(["a  b"], windows, max_answer_tokens=1)[0].text == "b"
    assert read(["a  b"], windows, max_answer_tokens=2)[0].text == "b"  # 9 + 2, and 1 + 9 for a
    only_blank = read(["a  b"], windows, max_answer_tokens=1, num_best=1)[0]
    assert only_blank.text == "" and math.isfinite(only_blank.null_score)


def test_accents_that_a_tokenizer_drops_are_in_the_text():
    """Answers in Hindi without their last vowel sign, which no gold answer equals."""
    context = "समस्याओं के"
    tokenizer = make_tokenizer("wordpiece")
    windows = encode_evaluation_windows(one("q", context), [0], tokenizer, 60, STRIDE)
    [offsets] = windows["offsets"]
    last = max(i for i, end in enumerate(offsets[1::2]) if 0 < end <= context.index(" "))
    assert offsets[2 * last + 1] < context.index(" ")
    start, end = numpy.zeros(len(offsets) // 2), numpy.zeros(len(offsets) // 2)
    start[offsets[::2].index(0)] = end[last] = 1.0
    [answer] = best_answers([context], [0], [offsets], [start], [end], may_be_empty=True)
    assert answer.text == "समस्याओं"


def test_a_context_without_a_span():
    """An infinite null score, which is no JSON, or a crash, for an empty context."""
    tokenizer = make_tokenizer("wordpiece")
    [offsets] = encode_evaluation_windows(one("q", ""), [7], tokenizer, 60, STRIDE)["offsets"]
    assert offsets == [-1, -1] * 4
    logits = numpy.array([1.0, -2.0, 0.0, 0.0])
    for may_be_empty in (True, False):
        [answer] = best_answers([""], [0], [offsets], [logits], [logits], may_be_empty=may_be_empty)
        assert (answer.text, answer.null_score) == ("", 2.0 - -4.0)
        json.dumps(answer.null_score, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [2, 3], ids=["start", "end"])
def test_logits_that_are_not_finite(value, place):
    """A score for a model that diverged: NaN compares as false, so every answer would be empty."""
    contexts, windows = make_windows(random.Random(1))
    windows[-1][place][-1] = value  # on a separator, which is no candidate
    with pytest.raises(ExperimentError, match=r"task_training\.learning_rate"):
        read(contexts, windows)


def test_logits_that_do_not_fit_their_windows():
    """Scores of padding, of another window, or a context whose windows were lost."""
    contexts, windows = make_windows(random.Random(2))
    assert len(read(contexts, windows)) == len(contexts)
    number, offsets, start, end = windows[0]
    for wrong in (([*start, 0.0], [*end, 0.0]), (start, end[:-1]), ([start], [end])):
        with pytest.raises(ValueError, match="padding"):
            read(contexts, [(number, offsets, *wrong), *windows[1:]])
    with pytest.raises(ValueError, match="context 0 has no window"):
        read(contexts, [window for window in windows if window[0] != 0])
    with pytest.raises(ValueError, match="shorter"):
        best_answers(["a"], [0, 0], [[-1, -1]], [[0.0]], [[0.0]], may_be_empty=True)
