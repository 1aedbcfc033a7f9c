"""Data of downstream tasks: local copies, the user's files and the hub, whole and broken."""

import copy
import dataclasses
import json
import logging
import types
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from conftest import REPOSITORY
from datasets import Dataset
from omegaconf import OmegaConf
from pyarrow import parquet

from minilm_exp.errors import ExperimentError
from minilm_exp.hub import hub_commit
from minilm_exp.task_settings import Files, parse_tasks
from minilm_exp.tasks import splits as splits_module
from minilm_exp.tasks import tables as tables_module
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.splits import find_splits

NO_DATA = {"none", "glue", "next_passage", "next_passage_smoke", "teacher_labels",
           "text_classification"}  # fmt: skip
TASKS = sorted({path.stem for path in (REPOSITORY / "conf" / "task").glob("*.yaml")} - NO_DATA)
ANSWER = {"text": ["b"], "answer_start": [2]}
SQUAD = {"id": ["1"], "question": ["which?"], "context": ["a b c"], "answers": [ANSWER]}


@pytest.fixture(scope="module")
def all_tasks(compose_config):
    config = compose_config(f"task=[{','.join([*TASKS, 'text_classification'])}]")
    config.tasks.text_classification.files.train = "none"
    config.teacher.pooling = "mean"  # as read of a teacher
    return parse_tasks(OmegaConf.to_container(config.tasks, resolve=True))


@pytest.fixture
def task_of(all_tasks):
    """A task of conf/task, with changes."""
    return lambda name, **changes: dataclasses.replace(copy.deepcopy(all_tasks[name]), **changes)


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def load(task_of, root):
    """Reads a task of conf/task from the local copies."""

    def loaded(name, with_test=False, **changes):
        task = task_of(name, **changes)
        return load_task(name, task, find_splits(name, task, str(root), with_test))

    return loaded


@pytest.fixture
def load_mine(task_of, tmp_path):
    """Reads files of the user's, whose content is given; "train.csv" is the name of one."""

    def loaded(train, suffix="csv", validation=None, test=None, **changes):
        files = {}
        for split, content in (("train", train), ("validation", validation), ("test", test)):
            if content is not None:
                path = tmp_path / f"{split}.{suffix}"
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
                files[split] = str(path)
        # A share of so few rows may be none.
        files.setdefault("validation", files["train"].replace("train", "copy"))
        if validation is None:
            Path(files["validation"]).write_bytes(Path(files["train"]).read_bytes())
        task = task_of("text_classification", files=Files(**files), **changes)
        return load_task("mine", task, find_splits("mine", task, None, test is not None))

    return loaded


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_sst2(root, labels=(0, 1, 1), split="train", **columns):
    texts = [f"{split} {number}" for number in range(len(labels))]
    return write(
        root / "glue" / "sst2" / f"{split}.parquet",
        **{"sentence": texts, "label": list(labels), **columns},
    )


def write_both(root, **columns):
    """SST-2 with a good validation split."""
    write_sst2(root, split="validation")
    return write_sst2(root, **columns)


def write_squad(root, name="squad/train", **columns):
    return write(root / f"{name}.parquet", **(SQUAD | columns))


def raises(*parts):
    """An error in one line that says all of it."""
    return pytest.raises(ExperimentError, check=lambda error: is_one_line_with(error, parts))


def is_one_line_with(error, parts):
    assert "\n" not in str(error)
    missing = [part for part in parts if str(part) not in str(error)]
    assert not missing, f"{missing} not in: {error}"
    return True


def texts_of(examples):
    return examples.rows["first"][:]


def labels_of(examples):
    return examples.rows["label"][:]


# Local copies


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_folder(name, task_of, load, root):
    """A column, folder or split whose name is misspelt in conf, found by whoever has the data."""
    task = task_of(name)
    languages = task.all_languages or [""]
    hub_data = [(task.data, split) for split in (*task.validation, *task.test)]
    for data, split in [(task.train_data or task.data, task.train), *hub_data]:
        for language in languages:
            if task.kind == "spans":
                columns = SQUAD | {"title": ["about a"]}
            elif task.kind == "generation":
                columns = {task.text_columns[0]: ["one"], task.target_column: ["two"], "id": ["1"]}
            else:
                values = [0.5, 4.25] if task.num_labels is None else [0, task.num_labels - 1]
                columns = {column: ["one", "two"] for column in task.text_columns}
                columns |= {"label": values, "idx": [0, 1]}
            folder = data.folder.replace("{language}", language)
            if name == "ag_news" and split == "train":
                columns = {"text": [str(n) for n in range(60)], "label": [0, 3] * 30}
            write(root / folder / f"{split}.parquet", **columns)
    loaded = load(name, with_test=bool(task.test))
    expected = task.all_languages or [""]
    if name == "mnli":
        expected = ["matched", "mismatched"]
    assert list(loaded.validation) == expected
    assert list(loaded.test) == (expected if task.test else [])
    assert loaded.label_names is None
    rows = (loaded.train if task.is_trained else loaded.validation[""]).rows
    if task.kind == "spans":
        assert rows[0] == {key: column[0] for key, column in SQUAD.items()}
        return
    if task.kind == "generation":
        assert rows.to_list() == [{"source": "one", "target": "two"}]
        return
    names = ["first", "second"][: len(task.text_columns)]
    assert rows.column_names == [*names, "label"]
    assert loaded.num_labels == (task.num_labels or 1)
    is_number = name.startswith("stsb")
    assert set(rows["label"][:]) == ({0.5, 4.25} if is_number else {0, values[1]})


def test_texts_and_labels_stay_in_their_rows(load, root):
    """Labels that slip against the texts, or a first and second text that change places."""
    for split in ("train", "validation"):
        write(
            root / "glue" / "qnli" / f"{split}.parquet",
            idx=[7, 8, 9],
            label=[1, 0, 1],
            sentence=["a", "b", "c"],
            question=["A?", "B?", "C?"],
        )
    assert load("qnli").train.rows.to_dict() == {
        "first": ["A?", "B?", "C?"],
        "second": ["a", "b", "c"],
        "label": [1, 0, 1],
    }


def test_data_root_that_is_no_folder(task_of, tmp_path):
    """Every task is said to be missing, one after the other."""
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "absent"):
        with raises(f"data_root={path} is no folder"):
            find_splits("sst2", task_of("sst2"), str(path), False)


def test_folder_that_is_missing(load, root):
    """The user does not learn which folder of which data set is to be copied."""
    (root / "glue" / "cola").mkdir(parents=True)
    with raises(f"data_root={root}", "glue/sst2", "nyu-mll/glue", "data_root=null"):
        load("sst2")


def test_split_that_is_missing(load, root):
    """A misspelt file, of which the message does not show that it is there."""
    write_sst2(root)
    write_sst2(root, split="dev")
    with raises("has no validation.parquet", "task=sst2", "there is dev.parquet, train.parquet"):
        load("sst2")


def test_folder_that_is_empty(load, root):
    """An empty list of what is there."""
    (root / "glue" / "sst2").mkdir(parents=True)
    with raises("has no train.parquet", "there is nothing"):
        load("sst2")


def test_columns_of_other_names(load, root):
    """A KeyError from deep inside."""
    path = write_both(root)
    write(path, review=["a"], stars=[1])
    with raises(
        f"{path} has no column sentence, label; it has review, stars",
        "tasks.sst2.text_columns and .label_column",
    ):
        load("sst2")


def test_the_same_column_for_two_purposes(load, root):
    """A column that is asked for twice is read twice as long as the others."""
    write_both(root)
    loaded = load("sst2", text_columns=["sentence", "sentence"])
    assert loaded.train.rows[2] == {"first": "train 2", "second": "train 2", "label": 1}


@pytest.mark.parametrize("value", [2, -2, 2**40])
def test_label_out_of_range(value, load, root):
    """A label without a logit, which stops training with an assertion of the loss."""
    path = write_both(root, labels=[0, 1, value])
    with raises(f"{path}, row 3: label={value} is not one of 0..1; see tasks.sst2") as caught:
        load("sst2")
    assert "hub hides" not in str(caught.value)


def test_hidden_label(load, root):
    """Scores against labels of which the hub says -1."""
    write_both(root)
    path = write_sst2(root, labels=[-1, -1], split="test")
    assert load("sst2").test == {}
    with raises(f"{path}, row 1: label=-1 is not one of 0..1", "the hub hides the labels"):
        load("sst2", with_test=True)


@pytest.mark.parametrize("labels", [[0, 1.5], ["0", "1"], ["no", "yes"], [0.0, 1.0]])
def test_label_of_another_type(labels, load, root):
    """0.0 is taken for the class 0, and 0.7 too."""
    write_both(root, labels=labels)
    with raises("row 1: label=", "is not one of 0..1"):
        load("sst2")


def test_yes_and_no_as_labels(load, root):
    """A column of truth values, which the loss cannot take for numbers of classes."""
    write_both(root, labels=[True, False])
    assert [type(label) for label in labels_of(load("sst2").train)] == [int, int]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_label_that_is_missing(value, load, root):
    """A missing label becomes a class of its own, or the class 0."""
    path = write_both(root, labels=[0.0, value])
    with raises(f"{path}, row 2: label"):
        load("sst2")
    with raises(f"{path}, row 2: label"):
        load("sst2", kind="regression", metrics=["pearson"])


def test_one_class_only(load, root):
    """The head of a sorted file is trained on, and predicts one class."""
    path = write_both(root, labels=[1, 1, 1])
    with raises(f"{path}: label has one label only (1); tasks.sst2 needs at least 2"):
        load("sst2")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_split_without_rows(split, load, root):
    """A score over nothing."""
    write_both(root)
    path = write_sst2(root, split=split, labels=[])
    with raises(f"{path} is empty: tasks.sst2 needs examples"):
        load("sst2")


@pytest.mark.parametrize("text", ["", " \t\n"])
def test_text_that_is_empty(text, load, root):
    """An example of special tokens alone is learnt as if it said something."""
    path = write_both(root, sentence=["a", text, "c"])
    with raises(f"{path}, row 2: sentence: the text is empty"):
        load("sst2")


def test_one_text_of_a_pair_may_be_empty(load, root):
    """QQP, which has empty questions, cannot be used; or pairs of nothing are learnt."""
    for split in ("train", "validation"):
        write(
            root / "glue" / "qqp" / f"{split}.parquet",
            question1=["a", "b"],
            question2=["", "c"],
            label=[0, 1],
        )
    assert load("qqp").train.rows["second"][:] == ["", "c"]
    path = write(
        root / "glue" / "qqp" / "train.parquet",
        question1=["a", ""],
        question2=["b", ""],
        label=[0, 1],
    )
    with raises(f"{path}, row 2: question1 and question2: the text is empty"):
        load("qqp")


@pytest.mark.parametrize("value", [None, 1.5, True, b"b", ["b"]])
def test_text_that_is_none(value, load, root):
    """What is missing is learnt as None or nan, and bytes as b'...'."""
    path = write_both(root, sentence=[value, value, value])
    with raises(f"{path}, row 1: sentence"):
        load("sst2")


@pytest.mark.parametrize("damage", ["cut", "emptied", "pointer", "middle"])
def test_damaged_parquet(damage, load, root):
    """A copy that broke off ends in a traceback, or is read in part."""
    path = write_both(root, labels=[0, 1] * 5000)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:half],
            "emptied": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
            "middle": content[: half - 500] + b"\xff" * 1000 + content[half + 500 :],
        }[damage]
    )
    with raises("tasks.sst2", f"{path} cannot be read: "):
        load("sst2")


def test_text_in_parquet_that_is_not_utf8(load, root):
    """A byte that Arrow lets through and Python does not."""
    column = pyarrow.array([b"a", b"b\xff", b"c"]).view(pyarrow.string())
    path = write_both(root, sentence=column)
    with raises("tasks.sst2", f"{path} cannot be read: "):
        load("sst2")


def test_folder_in_place_of_a_file(load, root):
    """A traceback that does not name it."""
    write_sst2(root, split="validation")
    path = root / "glue" / "sst2" / "train.parquet"
    path.mkdir()
    with raises(f"{path} cannot be read"):
        load("sst2")


def test_files_of_a_split_in_parts(load, root):
    """Parts in the order of the directory, or the row of an error counted over all of them."""
    write_sst2(root, split="validation")
    for number in (2, 0, 1):
        path = write_sst2(
            root,
            split=f"train-0000{number}-of-00003",
            sentence=[f"{number} {row}" for row in range(2)],
            labels=[0, 1],
        )
    assert texts_of(load("sst2").train) == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]
    write_sst2(root, split="train-00001-of-00003", labels=[1, 9])
    with raises(f"{path}, row 2: label=9"):
        load("sst2")


@pytest.mark.parametrize(
    ("numbers", "expected"), [(["0-of-2"], "2"), (["0-of-1", "0-of-2", "1-of-2"], "2")]
)
def test_files_of_a_split_that_are_not_all_there(numbers, expected, load, root):
    """Half of the training data, or the data of two versions, without a word."""
    write_sst2(root, split="validation")
    for number in numbers:
        write_sst2(root, split=f"train-{number}")
    with raises(f"has {len(numbers)} files train-*.parquet", f"say {expected}", "nyu-mll/glue"):
        load("sst2")


def test_test_split_is_read_with_test_only(load, root):
    """Test labels that are looked at on the way, or test=true without an effect."""
    for split in ("train", "validation"):
        write(
            root / "glue" / "stsb" / f"{split}.parquet",
            sentence1=["a", "b"],
            sentence2=["c", "d"],
            label=[0.0, 5.0],
        )
    (root / "glue" / "stsb" / "test.parquet").write_bytes(b"no parquet")
    loaded = load("stsb")
    assert loaded.test == {}
    assert labels_of(loaded.train) == [0.0, 5.0]
    with raises("test.parquet cannot be read"):
        load("stsb", with_test=True)


def test_test_split_that_is_not_there(load, root):
    """test=true without a test score."""
    write_both(root)
    with raises("has no test.parquet", "there is train.parquet, validation.parquet"):
        load("sst2", with_test=True)
    write_squad(root)
    write_squad(root, "squad/validation")
    with raises("task_training.test=true: tasks.squad has no test split"):
        load("squad", with_test=True)


def test_mismatched_may_be_absent_but_not_matched(load, root, caplog):
    """MNLI scored on the wrong genres, or not at all where only one of both is there."""
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]}
    folder = root / "glue" / "mnli"
    write(folder / "train.parquet", **columns)
    write(folder / "validation_matched.parquet", **columns)
    with caplog.at_level(logging.WARNING):
        assert list(load("mnli").validation) == ["matched"]
    assert "task=mnli" in caplog.text and "mismatched" in caplog.text
    (folder / "validation_matched.parquet").rename(folder / "validation_mismatched.parquet")
    with raises("has no validation_matched.parquet"):
        load("mnli")


def test_half_of_a_split_is_not_taken_for_its_absence(load, root):
    """A part that is broken is left out with a warning, as if it had never been there."""
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]}
    folder = root / "glue" / "mnli"
    for split in ("train", "validation_matched", "validation_mismatched-0-of-2"):
        write(folder / f"{split}.parquet", **columns)
    with raises("validation_mismatched-*.parquet"):
        load("mnli")


def test_two_splits_of_one_name(load, root):
    """The second one hides the first."""
    write_both(root)
    for split in ("a_x", "b_x"):
        write_sst2(root, split=split)
    with raises("tasks.sst2", "['a_x', 'b_x']", "'x'"):
        load("sst2", validation=["a_x", "b_x"])


def test_splits_without_a_suffix(load, root):
    """An index that is out of range where the names have no underscore."""
    write_both(root)
    write_sst2(root, split="dev")
    assert list(load("sst2", validation=["validation", "dev"]).validation) == ["validation", "dev"]


@pytest.mark.parametrize("value", ["high", "", None, float("nan"), float("inf"), True])
def test_regression_on_what_is_no_number(value, load, root):
    """A loss that is nan from the first step."""
    write(
        root / "glue" / "stsb" / "validation.parquet",
        sentence1=["a"],
        sentence2=["b"],
        label=[1.0],
    )
    path = write(
        root / "glue" / "stsb" / "train.parquet", sentence1=["a"], sentence2=["b"], label=[value]
    )
    with raises(f"{path}, row 1: label"):
        load("stsb")


def test_f1_of_more_than_two_classes(load, root):
    """scikit-learn refuses it after the first epoch."""
    write_both(root, labels=[0, 1, 2])
    with raises("tasks.sst2.metrics", "there are 3", "macro_f1"):
        load("sst2", metrics=["f1"], num_labels=3)


# The user's files


@pytest.mark.parametrize(
    "text",
    ["007", "1.50", "2020-01-02", "2020-01-02 10:00:00", "12:30", "1e5", "true", "NA", "null",
     "None", "nan", "N/A", "#N/A", "-", " 1", "it's", "a;b\tc"],
)  # fmt: skip
def test_csv_text_stays_as_it_stands(text, load_mine):
    """A text that looks like a number, a date or nothing is learnt as another one."""
    loaded = load_mine(f"text,label\n{text},a\n{text},b\n")
    assert texts_of(loaded.train) == [text, text]


@pytest.mark.parametrize("text", ["2020-01-02 10:00:00", "2020-01-02T10:00:00Z", "1.50", "NA"])
def test_jsonl_text_stays_as_it_stands(text, load_mine):
    """The same in jsonl, whose reader in Arrow takes dates for dates."""
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for label in "ab")
    assert texts_of(load_mine(lines, "jsonl").train) == [text, text]


CSV = {
    "comma": ('text,label\n"a, b",x\nc,y\n', ["a, b", "c"]),
    "quote": ('text,label\n"a ""b""",x\nc,y\n', ['a "b"', "c"]),
    "line break": ('text,label\n"a\nb\r\nc",x\nd,y\n', ["a\nb\r\nc", "d"]),
    "CRLF": ('text,label\r\n"a\r\nb",x\r\nc,y\r\n', ["a\r\nb", "c"]),
    "CR": ("text,label\ra,x\rb,y\r", ["a", "b"]),
    "mark": ("\ufefftext,label\na,x\nb,y\n", ["a", "b"]),
    "mark before a quote": ('\ufeff"text","label"\na,x\nb,y', ["a", "b"]),
    "other columns": ("label,extra,text\nx,1,a\ny,,b\n", ["a", "b"]),
    "blank lines": ("text,label\n\na,x\n\n\nb,y\n\n", ["a", "b"]),
    "letters": ("text,label\nß 中 😀,x\nb,y\n", ["ß 中 😀", "b"]),
    "long": ("text,label\n" + "long " * 100_000 + ",x\nb,y\n", ["long " * 100_000, "b"]),
    "separators": ("text,label\na\u2028b\x0bc\x1cd,x\nb,y\n", ["a\u2028b\x0bc\x1cd", "b"]),
}


@pytest.mark.parametrize("kind", list(CSV))
def test_csv_as_programs_write_it(kind, load_mine):
    """Byte order marks in a name, lines of a text taken for rows, long texts cut or refused."""
    content, texts = CSV[kind]
    assert texts_of(load_mine(content).train) == texts


def test_empty_text_in_csv(load_mine):
    """A row that was meant to be filled in later is learnt."""
    for empty in ("", '""', " "):
        with raises("train.csv, row 2: text: the text is empty; leave this row out"):
            load_mine(f"text,label\na,x\n{empty},y\n")


def test_second_text_in_csv_may_be_empty(load_mine):
    """A body that is not there makes the whole row unusable."""
    content = "title,body,label\na,,x\n,b,y\n"
    loaded = load_mine(content, text_columns=["title", "body"])
    assert loaded.train.rows[:] == {"first": ["a", ""], "second": ["", "b"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text,label\na,x\nb\n", ["line 3 has 1 values where the header has 2"]),
        ("text,label\na, b,x\nc,y\n", ["line 2 has 3 values", "double quotes"]),
        ('text,label\n"a\nb",x\nc,d,y\n', ["line 4 has 3 values"]),
        ('text,label\na,x\n"b,y\nc,y\n', ["begins in line 3", "unexpected end"]),
        ('text,label\n"a"b,x\nc,y\n', ["begins in line 2", "expected after"]),
        ("text,label\na,x\nb ä,y\n".encode("latin-1"), ["line 3 is not UTF-8"]),
        ("text,label\na,x\n".encode("utf-16"), ["line 1 is not UTF-8"]),
    ],
)
def test_broken_csv(content, parts, load_mine, tmp_path):
    """Rows are lost, joined or shifted; or the line is not named."""
    where = "tasks.mine.files.train"
    with raises(where, f"{tmp_path / 'train.csv'} cannot be read: ", *parts):
        load_mine(content)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["train.csv is empty", "tasks.mine.files.train"]),
        ("\n\n", ["train.csv is empty"]),
        ("text,label\n", ["train.csv is empty"]),
        ("text;label\na;x\n", ["has no column text, label; it has text;label"]),
        ("text, label\na,x\n", ["has no column label; it has text,  label", ".label_column"]),
        ("a,x\nb,y\n", ["has no column text, label; it has a, x", "tasks.mine.text_columns"]),
        ("text,text,label\na,b,x\n", ["has more than one column text"]),
        ("text,label\na,x\nb,\n", ["train.csv, row 2: label is missing"]),
        ("text,label\na,x\nb,x\n", ["one label only (x)", "tasks.mine needs at least 2"]),
        ("text,label\na,1\nb,1\n", ["one label only (1)"]),
    ],
)
def test_csv_with_the_wrong_content(content, parts, load_mine):
    """A traceback, or training on nothing."""
    with raises(*parts):
        load_mine(content)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b", "la', ["line 2 is not JSON: Unterminated"]),
        ('{"text": "a", "label": 1}\n\n{text: 1}\n', ["line 3 is not JSON"]),
        ('[{"text": "a", "label": 1}]', ["line 1 is no JSON object"]),
        ('"a"\n', ["line 1 is no JSON object"]),
        ("[" * 100_000, ["line 1 is not JSON: it is too deep"]),
        ('{"text": "\xe4"}'.encode("latin-1"), ["line 1 is not UTF-8"]),
        ("", ["train.jsonl is empty"]),
    ],
)
def test_broken_jsonl(content, parts, load_mine):
    """A line that is skipped, or an error without its number."""
    with raises("tasks.mine.files.train", "train.jsonl", *parts):
        load_mine(content, "jsonl")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "b"}, ["row 2: label is missing"]),
        ({"text": "b", "label": None}, ["row 2: label is missing"]),
        ({"text": "b", "label": " "}, ["row 2: label is missing"]),
        ({"text": "b", "label": float("nan")}, ["row 2: label=nan is no name or number"]),
        ({"text": "b", "label": ["x"]}, ["row 2: label=['x'] is no name or number"]),
        ({"text": "b", "label": {"x": 1}}, ["row 2: label={'x': 1} is no name"]),
        ({"text": "b", "label": "x"}, ["label has values of several kinds (1, 'x')"]),
        ({"text": "b", "label": True}, ["label has values of several kinds (1, True)"]),
        ({"text": "b", "label": 1.0}, ["label has values of several kinds (1, 1.0)"]),
        ({"label": 0}, ["row 2: text is missing"]),
        ({"text": None, "label": 0}, ["row 2: text is missing"]),
        ({"text": 6.5, "label": 0}, ["row 2: text=6.5 is no text"]),
        ({"text": ["b"], "label": 0}, ["row 2: text=['b'] is no text"]),
        ({"text": "\ud800", "label": 0}, ["row 2: text='\\ud800' is no Unicode text"]),
    ],
)
def test_jsonl_with_the_wrong_content(row, parts, load_mine):
    """Labels of two kinds made into one, or half a character that ends in a traceback."""
    lines = "".join(json.dumps(line) + "\n" for line in ({"text": "a", "label": 1}, row))
    with raises("train.jsonl", *parts):
        load_mine(lines, "jsonl")


def test_jsonl_as_programs_write_it(load_mine):
    """Byte order mark, CRLF, other columns, separators of lines within a text."""
    content = (
        '\ufeff{"text": "a\u2028b\\u2029", "label": "x", "more": {"deep": [1]}}\r\n\r\n'
        '{"label": "y", "text": 12}\r\n'
    )
    assert texts_of(load_mine(content, "jsonl").train) == ["a\u2028b\u2029", "12"]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["neg", "pos", "neg"], ["neg", "pos"], [0, 1, 0]),
        ([0, 1, 0], ["0", "1"], [0, 1, 0]),
        ([1, 5, 3], ["1", "3", "5"], [0, 2, 1]),
        ([1, -1, 1], ["-1", "1"], [1, 0, 1]),
        ([10, 9, 100], ["9", "10", "100"], [1, 0, 2]),
        ([2.0, 0.5, 2.0], ["0.5", "2.0"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["007", "10", "2"], ["007", "10", "2"], [0, 1, 2]),
        (["ja", "Ja", "nein"], ["Ja", "ja", "nein"], [1, 0, 2]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_labels_of_every_kind(suffix, labels, names, numbers, load_mine, tmp_path):
    """Another order of the classes in each format, or classes that do not occur."""
    texts = ["a", "b", "c"]
    if suffix == "csv":
        rows = [f"{text},{label}" for text, label in zip(texts, labels)]
        content = "\n".join(["text,label", *rows])
    elif suffix == "jsonl":
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels)]
        content = "\n".join(json.dumps(row) for row in rows)
    else:
        content = write(tmp_path / "made", text=texts, label=labels).read_bytes()
    loaded = load_mine(content, suffix)
    assert (loaded.label_names, loaded.num_labels) == (names, len(names))
    assert labels_of(loaded.train) == labels_of(loaded.validation[""]) == numbers


def test_missing_number_among_labels_in_csv(load_mine):
    """NA, which a program wrote for a label that it did not have, becomes a class."""
    with raises("label has values of several kinds ('1', 'NA')"):
        load_mine("text,label\na,1\nb,0\nc,NA\n")


def test_number_of_labels_that_is_given(load_mine):
    """A class that the training file does not have shifts those behind it."""
    content = "text,label\na,0\nb,2\n"
    loaded = load_mine(content, num_labels=4)
    assert (loaded.label_names, loaded.num_labels) == (["0", "1", "2", "3"], 4)
    assert labels_of(loaded.train) == [0, 2]
    with raises("row 2: label=2 is not one of 0..1", "tasks.mine.num_labels"):
        load_mine(content, num_labels=2)
    with raises("label has 2 labels (x, y)", "tasks.mine.num_labels=3"):
        load_mine("text,label\na,x\nb,y\n", num_labels=3)


@pytest.mark.parametrize(("label", "train"), [("z", "x,y"), ("2", "0,1"), ("-1", "0,1")])
def test_validation_label_that_training_does_not_have(label, train, load_mine):
    """A class that nothing was trained on, counted as one that was."""
    content = "text,label\n" + "".join(f"a,{name}\n" for name in train.split(","))
    parts = ["validation.csv, row 2", f"label='{label}' is none of the training file's labels"]
    with raises(*parts, train.replace(",", ", "), "tasks.mine") as caught:
        load_mine(content, validation=f"text,label\na,{train[0]}\nb,{label}\n")
    assert "hub" not in str(caught.value)


def test_regression_from_csv(load_mine):
    """Numbers that stay text, or text that becomes one."""
    regression = {"kind": "regression", "metrics": ["pearson"], "score": "pearson"}
    loaded = load_mine("text,label\na,1\nb,-2.5e1\nc, 3 \n", **regression)
    assert labels_of(loaded.train) == [1.0, -25.0, 3.0]
    assert (loaded.num_labels, loaded.label_names) == (1, None)
    for value in ("abc", "nan", "inf", "1,5", "--"):
        with raises("train.csv", "label" if value != "1,5" else "line 3"):
            load_mine(f"text,label\na,1\nb,{value}\n", **regression)


def test_files_of_several_names(task_of, tmp_path):
    """Only the first file of a glob is read, or rows are counted over all files."""
    for number in (1, 0):
        path = tmp_path / f"part{number}.csv"
        path.write_text(f"label,text\nx,{number} a\ny,{number} b\n")
    (tmp_path / "part2.csv").write_text("text,label\n")
    (tmp_path / "validation.CSV").write_text("text,label\na,y\n")
    files = Files(str(tmp_path / "part*.csv"), str(tmp_path / "validation.CSV"))
    task = task_of("text_classification", files=files)
    loaded = load_task("mine", task, find_splits("mine", task, None, False))
    assert texts_of(loaded.train) == ["0 a", "0 b", "1 a", "1 b"]
    (tmp_path / "part1.csv").write_text("text,label\na,x\nb,\n")
    with raises(f"{tmp_path / 'part1.csv'}, row 2: label is missing"):
        load_task("mine", task, find_splits("mine", task, None, False))


def test_pattern_that_matches_nothing(task_of, tmp_path):
    """A misspelt file: a validation split that is silently held out of training."""
    train = tmp_path / "train.csv"
    train.write_text("text,label\na,x\nb,y\n")
    for split in ("train", "validation", "test"):
        files = dataclasses.replace(Files(str(train)), **{split: "no/such*.csv"})
        with raises(f"tasks.mine.files.{split}: no file matches no/such*.csv"):
            find_splits("mine", task_of("text_classification", files=files), None, True)


def test_file_of_another_kind(task_of, tmp_path):
    """A table that is read as something else."""
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\na\tx\n")
    task = task_of("text_classification", files=Files(str(path)))
    with raises("tasks.mine.files.train", "neither .csv nor .jsonl nor .parquet"):
        load_task("mine", task, find_splits("mine", task, None, False))


def test_file_that_trains_and_scores(task_of, tmp_path):
    """A glob for training that takes in the validation file."""
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,x\nb,y\n")
    files = Files(str(tmp_path / "*.csv"), str(tmp_path / "." / "dev.csv"))
    with raises("tasks.mine.files.validation", "tasks.mine.files.train", tmp_path / "dev.csv"):
        find_splits("mine", task_of("text_classification", files=files), None, False)


def test_test_file_is_read_with_test_only(load_mine, task_of, tmp_path):
    """The test file is looked at, or test=true without a test file says nothing."""
    content = "text,label\na,x\nb,y\n"
    loaded = load_mine(content, test="text,label\nc,y\n")
    assert texts_of(loaded.test[""]) == ["c"]
    files = Files(str(tmp_path / "train.csv"), test=str(tmp_path / "absent.csv"))
    task = task_of("text_classification", files=files)
    assert find_splits("mine", task, None, False).test == {}
    task = task_of("text_classification", files=Files(files.train))
    with raises("task_training.test=true needs tasks.mine.files.test=FILE"):
        find_splits("mine", task, None, True)


# A share of the training split


def write_news(root, texts, labels=None, split="train"):
    labels = labels or [number % 4 for number in range(len(texts))]
    return write(root / "ag_news" / f"{split}.parquet", text=texts, label=labels)


def test_held_out_share(load, root):
    """A share of another size, examples on both sides, or on none."""
    texts = [f"news {number}" for number in range(2000)]
    write_news(root, texts)
    loaded = load("ag_news")
    train, validation = texts_of(loaded.train), texts_of(loaded.validation[""])
    assert 150 < len(validation) < 250
    assert sorted(train + validation) == sorted(texts)
    labels = dict(zip(texts, [number % 4 for number in range(2000)]))
    assert labels_of(loaded.validation[""]) == [labels[text] for text in validation]
    assert len(load("ag_news", held_out_fraction=0.5).train) == pytest.approx(1000, abs=100)


def test_equal_texts_are_held_out_together(load, root):
    """A text that is trained on is scored on too."""
    write_news(root, [f"news {number % 300}" for number in range(1200)], [0, 1, 2] * 400)
    loaded = load("ag_news")
    train, validation = set(texts_of(loaded.train)), set(texts_of(loaded.validation[""]))
    assert train | validation == {f"news {number}" for number in range(300)}
    assert not train & validation


def test_held_out_share_does_not_hang_on_the_order(load, root):
    """Rows that are added or moved change what is held out of the rest."""
    texts = [f"news {number}" for number in range(500)]
    write_news(root, texts)
    before = set(texts_of(load("ag_news").validation[""]))
    write_news(root, [*texts[::-1], "one more", "and one"])
    after = set(texts_of(load("ag_news").validation[""]))
    assert after - {"one more", "and one"} == before


def test_share_of_questions_goes_by_context(load, root):
    """Questions about one paragraph are trained and scored on."""
    count = 400
    write_squad(
        root,
        id=[str(number) for number in range(count)],
        question=[f"which {number}?" for number in range(count)],
        context=[f"a b {number % 40}" for number in range(count)],
        answers=[ANSWER] * count,
    )
    loaded = load("squad", validation=[])
    train, validation = (
        set(examples.rows["context"][:]) for examples in (loaded.train, loaded.validation[""])
    )
    assert train and validation and not train & validation


def test_too_few_to_hold_out(load, root):
    """A score over no examples."""
    write_news(root, ["a", "b"])
    with raises("tasks.ag_news: 2 training examples are too few", "tasks.ag_news.held_out_frac"):
        load("ag_news")


def test_test_split_does_not_validate(load, root):
    """The best epoch is chosen on the test split, because there is no other."""
    write_news(root, [f"news {number}" for number in range(200)])
    write_news(root, ["test a", "test b"], split="test")
    assert load("ag_news").test == {}
    loaded = load("ag_news", with_test=True)
    assert texts_of(loaded.test[""]) == ["test a", "test b"]
    assert all(text.startswith("news") for text in texts_of(loaded.validation[""]))


# Answers cut from a text


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"text": ["b"]},
        {"text": ["b", "c"], "answer_start": [2]},
        {"text": ["b"], "answer_start": []},
        {"text": "b", "answer_start": 2},
        {"text": [None], "answer_start": [2]},
        {"text": ["b"], "answer_start": [None]},
        {"text": ["b"], "answer_start": ["2"]},
        [{"text": "b", "answer_start": 2}],
        "b",
    ],
)
def test_malformed_answers(answer, load, root):
    """A TypeError while windows are made, long after."""
    write_squad(root, "squad/validation")
    path = write_squad(root, answers=[answer])
    with raises(f"{path}, row 1: answers=", "must be {text, answer_start}"):
        load("squad")


def test_columns_of_another_data_set(load, root):
    """Advice to set columns that a question does not have."""
    write_squad(root, "squad/validation")
    path = write(root / "squad" / "train.parquet", question=["which?"], passage=["a"])
    with raises(f"{path} has no column id, context, answers", "answers{text,answer_start}") as e:
        load("squad")
    assert "text_columns" not in str(e.value)


def test_ids_that_repeat(load, root):
    """Predictions of one question overwrite those of another."""
    write_squad(root)
    path = write_squad(
        root,
        "squad/validation",
        **{name: column * 2 for name, column in SQUAD.items()},
    )
    with raises(f"{path}, row 2: the id 1 stood there before"):
        load("squad")


@pytest.mark.parametrize("name", ["squad", "mlqa", "xquad"])
@pytest.mark.parametrize("texts", [[], None, [""], [" ", ""]])
def test_question_without_an_answer(name, texts, load, root):
    """Training towards no answer, and a score that no prediction can reach."""
    empty = {"text": texts, "answer_start": texts and [0] * len(texts)}
    schema = pyarrow.struct(
        {"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())}
    )
    answers = pyarrow.array([empty], schema)
    path = "squad/validation" if name == "squad" else f"{name}/en/validation"
    write_squad(root)
    write_squad(root, path, answers=answers)
    with raises(f"{path}.parquet, row 1: the question has no answer", "task=squad_v2"):
        load(name)


def test_squad_v2_has_questions_without_answers(load, root):
    """Where they belong, they are refused; or missing lists are no lists."""
    type_ = pyarrow.struct(
        {"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())}
    )
    columns = {name: column * 3 for name, column in SQUAD.items()} | {"id": ["1", "2", "3"]}
    no_answers = [{"text": [], "answer_start": []}, {"text": None, "answer_start": None}]
    columns["answers"] = pyarrow.array([ANSWER, *no_answers], type_)
    for split in ("train", "validation"):
        write_squad(root, f"squad_v2/{split}", **columns)
    answers = load("squad_v2").validation[""].rows["answers"][:]
    assert answers == [ANSWER, no_answers[0], no_answers[0]]


def test_context_that_is_empty(load, root):
    """A question about nothing, which has no window."""
    write_squad(root)
    path = write_squad(root, "squad/validation", context=[" "])
    with raises(f"{path}, row 1: context is empty"):
        load("squad")


def test_numbers_as_ids(load, root):
    """Predictions under 1 where the data have "1"."""
    write_squad(root)
    write_squad(root, "squad/validation", id=[12])
    assert load("squad").validation[""].rows["id"][:] == ["12"]


# Languages


def write_xnli(root, *languages, splits=("train", "validation")):
    for language in languages:
        for split in splits:
            write(
                root / "xnli" / language / f"{split}.parquet",
                premise=[f"{language} {split}", "b"],
                hypothesis=["c", "d"],
                label=[0, 2],
            )


def test_languages_that_are_there(load, root, caplog):
    """A language left out without a word, or one that is not there ends the run."""
    write_xnli(root, "tr", "en", "bg", "sw")
    with caplog.at_level(logging.WARNING):
        loaded = load("xnli")
    assert list(loaded.validation) == ["bg", "en", "sw", "tr"]
    assert texts_of(loaded.train) == ["en train", "b"]
    assert all(
        texts_of(part)[0] == f"{name} validation" for name, part in loaded.validation.items()
    )
    assert "has no ar, de, el, es, fr, hi, ru, th, ur, vi, zh: not scored" in caplog.text


def test_languages_of_a_list_must_be_there(load, root):
    """A mean over fewer languages than were asked for."""
    write_xnli(root, "en", "de", "fr")
    assert list(load("xnli", languages=["fr", "en"]).validation) == ["fr", "en"]
    with raises("xnli/sw", "task=xnli"):
        load("xnli", languages=["en", "sw"])
    for name in ("xnli", "mlqa"):
        with raises(f"tasks.{name}.languages: xx is not among tasks.{name}.all_languages=["):
            load(name, languages=["en", "xx"])


def test_languages_of_a_task_without_languages(load, root):
    """The list is passed over."""
    write_both(root)
    with raises("tasks.sst2.languages: de is not among tasks.sst2.all_languages=[]"):
        load("sst2", languages=["de"])


def test_language_without_its_split(load, root):
    """A folder was copied in part, and the mean is over fewer languages."""
    write_xnli(root, "en", "de")
    write_xnli(root, "fr", splits=["train"])
    with raises("xnli/fr has no validation.parquet", "there is train.parquet"):
        load("xnli")


def test_language_that_is_trained_on(load, root):
    """Training on the first language that is there."""
    write_xnli(root, "de", "fr")
    with raises("xnli/en", "task=xnli"):
        load("xnli")
    assert texts_of(load("xnli", train_language="de").train) == ["de train", "b"]


@pytest.mark.parametrize("changes", [{}, {"score": "f1_zh", "select": "f1_mean"}])
def test_language_that_the_score_needs(changes, load, root):
    """The best epoch is chosen by a value that is never measured."""
    write_squad(root)
    needed = changes.get("score", "f1_en").removeprefix("f1_")
    for language in {"en", "de", "zh"} - {needed}:
        write_squad(root, f"mlqa/{language}/validation")
    with raises(f"mlqa/{needed}"):
        load("mlqa", **changes)
    write_squad(root, f"mlqa/{needed}/validation")
    assert set(load("mlqa", **changes).validation) == {"en", "de", "zh"}


def test_no_language_is_there(load, root):
    """A mean over no languages."""
    write_squad(root)
    with raises("tasks.xquad", "xquad/{language} has none of the splits or languages"):
        load("xquad", select="f1_mean")


def test_mlqa_trains_on_squad(load, root):
    """Training on the first language of MLQA, which has no training split."""
    write_squad(root, context=["squad a b"])
    for language in ("en", "es", "de", "ar", "hi", "vi", "zh"):
        write_squad(root, f"mlqa/{language}/validation", context=[f"{language} b"])
    loaded = load("mlqa")
    assert loaded.train.rows["context"][:] == ["squad a b"]
    assert {name: part.rows["context"][0] for name, part in loaded.validation.items()} == {
        language: f"{language} b" for language in ("en", "es", "de", "ar", "hi", "vi", "zh")
    }


def test_other_languages_of_xquad(load, root):
    """Languages that XQuAD has and MLQA has not are left out."""
    write_squad(root)
    for language in ("en", "ru", "tr", "el", "ro", "th"):
        write_squad(root, f"xquad/{language}/validation")
    assert list(load("xquad").validation) == ["en", "el", "ro", "ru", "th", "tr"]


# The hub


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sst2", ["nyu-mll/glue", "DIR/glue/sst2/"]),
        ("mlqa", ["rajpurkar/squad", "DIR/squad/"]),
        ("xnli", ["facebook/xnli", "DIR/xnli/en/"]),
    ],
)
def test_hub_that_cannot_be_reached(name, parts, task_of):
    """A traceback of the hub client, which does not know of data_root."""
    with raises(f"task={name}: the data set", "cannot be had", "set data_root=DIR", *parts):
        find_splits(name, task_of(name), None, False)


@pytest.fixture
def hub(monkeypatch):
    """A hub in which every data set has the same rows; what was asked of it."""
    asked = []
    columns = {
        "premise": ["a", "b"],
        "hypothesis": ["c", "d"],
        "label": [0, 2],
        **{name: column * 2 for name, column in SQUAD.items()},
        "id": ["1", "2"],
    }

    def load_dataset(*arguments, **named):
        asked.append((*arguments, *named.values()))
        assert list(named) == ["data_dir", "split", "revision"]
        return Dataset.from_dict(columns)

    monkeypatch.setattr(
        splits_module, "hub_commit", lambda hub_id, revision, _: f"commit of {hub_id, revision}"
    )
    monkeypatch.setattr(tables_module, "load_dataset", load_dataset)
    return asked


def test_what_is_asked_of_the_hub(hub, task_of):
    """Another config, split, folder or revision than the task names."""
    task = task_of("xnli", languages=["de", "en"])
    loaded = load_task("xnli", task, find_splits("xnli", task, None, True))
    commit = "commit of ('facebook/xnli', None)"
    assert hub == [
        ("facebook/xnli", "en", None, "train", commit),
        ("facebook/xnli", "de", None, "validation", commit),
        ("facebook/xnli", "en", None, "validation", commit),
        ("facebook/xnli", "de", None, "test", commit),
        ("facebook/xnli", "en", None, "test", commit),
    ]
    assert loaded.test["de"].rows[:] == {"first": ["a", "b"], "second": ["c", "d"], "label": [0, 2]}
    hub.clear()
    task = task_of("mlqa", languages=["vi", "en"])
    load_task("mlqa", task, find_splits("mlqa", task, None, False))
    commit = "commit of ('facebook/mlqa', 'refs/convert/parquet')"
    assert hub == [
        ("rajpurkar/squad", "plain_text", None, "train", "commit of ('rajpurkar/squad', None)"),
        ("facebook/mlqa", None, "mlqa.vi.vi", "validation", commit),
        ("facebook/mlqa", None, "mlqa.en.en", "validation", commit),
    ]


def test_checks_of_hub_data(hub, task_of):
    """Data of the hub are taken as they come."""
    task = task_of("xnli", num_labels=2)
    with raises("facebook/xnli, train, row 2: label=2 is not one of 0..1; see tasks.xnli"):
        load_task("xnli", task, find_splits("xnli", task, None, False))
    task = task_of("sst2")
    with raises("nyu-mll/glue, train has no column sentence; it has premise, hypothesis"):
        load_task("sst2", task, find_splits("sst2", task, None, False))


def test_hub_data_that_do_not_load(hub, task_of, monkeypatch):
    """A traceback of the loader, where a config or split is not there or the network ends."""

    def load_dataset(*_, **__):
        raise ValueError("Couldn't find cache\nfor this config")

    monkeypatch.setattr(tables_module, "load_dataset", load_dataset)
    task = task_of("sst2")
    splits = find_splits("sst2", task, None, False)
    with raises("task=sst2", "nyu-mll/glue cannot", "DIR/glue/sst2/", "(Couldn't find cache)"):
        load_task("sst2", task, splits)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """The folder of glue in an empty cache of the hub's client; commits are asked for anew."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_commit.cache_clear()
    yield tmp_path / "datasets--nyu-mll--glue"
    hub_commit.cache_clear()


def test_commit_of_an_earlier_download(hub_cache, task_of):
    """Without network, data that were downloaded before are said to be missing."""
    for name, commit in (("main", "a" * 40), ("some/branch", "b" * 40)):
        reference = hub_cache / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        (hub_cache / "snapshots" / commit).mkdir(parents=True)
        (hub_cache / "snapshots" / commit / "README.md").touch()
    task = task_of("sst2")
    assert find_splits("sst2", task, None, False).train.commit == "a" * 40
    task.data.revision = "some/branch"
    assert find_splits("sst2", task, None, False).train.commit == "b" * 40


def test_download_leaves_its_commit_behind(hub_cache, task_of, monkeypatch):
    """The commit is asked for in a way that leaves nothing for a later run without network."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "repo_info",
        lambda *_, revision, **__: types.SimpleNamespace(sha=f"commit of {revision}"),
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *given, **named: asked.append((given, named))
    )
    task = task_of("sst2")
    assert find_splits("sst2", task, None, True).test[""].commit == "commit of None"
    readme = {"filename": "README.md", "revision": None, "repo_type": "dataset"}
    assert asked == [(("nyu-mll/glue",), readme)]


# What names the content


def test_same_rows_have_the_same_name(load, load_mine, root):
    """An encoding or a result is made anew because a file lies elsewhere."""
    write_both(root)
    one = load("sst2")
    content = "text,label\n" + "".join(f"train {n},{label}\n" for n, label in enumerate((0, 1, 1)))
    two = load_mine(content)
    assert one.train.fingerprint == two.train.fingerprint
    assert one.train.fingerprint != one.validation[""].fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"text_columns": ["body"]},
        {"text_columns": ["title", "body"]},
        {"text_columns": ["body", "title"]},
        {"label_column": "mood"},
        {"kind": "regression", "metrics": ["pearson"]},
    ],
)
def test_other_columns_of_a_file_have_another_name(changes, load_mine):
    """A run on other columns takes the tokens or labels that an earlier run has kept."""
    content = "title,body,label,mood\na,b,0,1\nc,d,1,0\n"
    seen = [load_mine(content, text_columns=["title"])]
    seen.append(load_mine(content, **({"text_columns": ["title"]} | changes)))
    one, two = (data.train.fingerprint for data in seen)
    assert one != two


def test_other_content_has_another_name(load, root, task_of):
    """A changed file, a text that moved to its neighbour, or another language goes unseen."""

    def names():
        splits = find_splits("sst2", task_of("sst2"), str(root), False)
        return splits.fingerprint(), load("sst2").fingerprint

    write_both(root, sentence=["ab", "c", "d"])
    seen = [names()]
    for columns in ({"sentence": ["a", "bc", "d"]}, {"labels": [1, 0, 1]}):
        write_both(root, **columns)
        seen.append(names())
    assert len({name for name, _ in seen}) == len({name for _, name in seen}) == 3
    write_xnli(root, "en", "de")
    task = task_of("xnli", score="accuracy_en", select="accuracy_en")
    german = find_splits("xnli", task, str(root), False).fingerprint()
    (root / "xnli" / "de").rename(root / "xnli" / "fr")
    assert find_splits("xnli", task, str(root), False).fingerprint() != german


def test_parts_of_the_examples_have_names_of_their_own(load, root):
    """Half of the examples, or those held out, are taken for all of them."""
    write_news(root, [f"news {number}" for number in range(100)])
    loaded = load("ag_news")
    parts = [loaded.train, loaded.validation[""], loaded.train.at_most(10), loaded.train.at_most(9)]
    parts.append(load("ag_news", held_out_fraction=0.2).train)
    assert len({part.fingerprint for part in parts}) == 5
    assert loaded.train.at_most(10**6) is loaded.train


def test_so_many_examples_at_even_distances(load, root):
    """The first rows of a file that is sorted by label."""
    write_both(root, labels=[0] * 50 + [1] * 50)
    few = load("sst2").train.at_most(8)
    assert texts_of(few) == [f"train {number}" for number in (0, 12, 25, 37, 50, 62, 75, 87)]
    assert labels_of(few) == [0] * 4 + [1] * 4


PAIRS = {"sentence1": ["a", "b"], "sentence2": ["a", "c"], "label": [5.0, 1.0]}


def test_similarity_reads_no_training_split(load, root, tmp_path, task_of):
    """A training file asked for, or read, where nothing is trained."""
    write(root / "glue" / "stsb" / "validation.parquet", **PAIRS)
    data = load("stsb_similarity")
    assert len(data.train) == 0 and data.validation[""].rows["label"][:] == [5.0, 1.0]
    write(tmp_path / "mine.parquet", **PAIRS)
    files = Files(train=str(tmp_path / "none.csv"), validation=str(tmp_path / "mine.parquet"))
    task = task_of("stsb_similarity", data=None, files=files)
    assert find_splits("mine", task, None, False).train is None
