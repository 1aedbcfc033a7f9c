"""Reports: what they show, what they leave out and say so, and that they fetch and run nothing."""

import json
import os
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from mlflow import MlflowClient
from running import client_of, run
from test_tables import Outputs

from minilm_exp import delivery, run_report
from minilm_exp.disagreement import NUM_EXAMPLES, disagreements
from minilm_exp.errors import ExperimentError
from minilm_exp.heat_maps import heat_maps, mean_relation
from minilm_exp.parsing import parse, read_settings
from minilm_exp.pipeline import run_experiment
from minilm_exp.plots import Point, loss_panels, speed_and_quality, svg
from minilm_exp.relations import relation_losses
from minilm_exp.report import main
from minilm_exp.report_page import Details, Entry, Page, Section, Table, Text, Words, render
from minilm_exp.result import Result, read_result
from minilm_exp.run_report import write_run_report
from minilm_exp.summary import print_summary
from minilm_exp.sweep_record import open_record

pytestmark = pytest.mark.usefixtures("quick_collection")

HOSTILE = 'the <script>alert("1")</script> \u202eof\u2066 ' + "w" * 300
LABELS = ["<b>no</b>", "yes"]
VOID = {"meta", "br", "image", "link", "img", "input"}


class Read(HTMLParser):
    """Elements, the text of each section by its heading, and whether all is closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.sections, self.addresses = [], [], {}, []
        self.ids = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.elements.append(tag)
        self.addresses += [v for n, v in attributes if n in ("src", "href", "xlink:href", "data")]
        self.ids += [v for n, v in attributes if n == "id"]
        assert not any(name.startswith("on") for name in named), named
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "h2" in self.open:
            self.last = data
            self.sections[data] = ""
        elif self.sections:
            self.sections[self.last] += data


def read(file):
    page = Read(file.read_text("utf-8"))
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.elements)
    for address in page.addresses:
        parts = urlsplit(address)
        is_here = parts.scheme == "" and not parts.netloc
        assert is_here or address.startswith("data:image/png;base64,"), address
    assert len(page.ids) == len(set(page.ids))
    return page


@pytest.fixture(scope="module")
def made(compose_config, tiny_teacher_folder, tmp_path_factory):
    """Gives settings of tiny runs on hostile text, below one folder."""
    root = tmp_path_factory.mktemp("report")
    passages = [HOSTILE.replace(".", ""), *(f"the model {i} and the teacher" for i in range(300))]
    (root / "text.txt").write_text("\n\n".join(passages), "utf-8")
    rows = [{"text": f"{HOSTILE} {i}", "label": LABELS[i * 7 % 3 % 2]} for i in range(60)]
    for part in ("train", "validation", "test"):
        lines = [json.dumps(row | {"text": f"{part} {row['text']}"}) for row in rows]
        (root / f"{part}.jsonl").write_text("\n".join(lines), "utf-8")
    files = "tasks.text_classification.files"
    task = [f"{files}.{part}={root}/{part}.jsonl" for part in ("train", "validation")]

    def settings(*overrides, with_task=False):
        config = compose_config(
            "experiment=smoke", "teacher=custom", f"teacher.path={tiny_teacher_folder}",
            "student.hidden_size=32", "student.num_attention_heads=4",
            "relation_set.num_relation_heads=4", "corpus=text_files",
            f"corpus.files=[{root}/text.txt]", f"outputs_dir={root}/outputs",
            "training.max_steps=3",
            *(["task=text_classification", *task] if with_task else ["task=none"]),
            *overrides,
        )  # fmt: skip
        return parse(config)

    settings.root = root
    return settings


ASKED = {"overrides": ["seed=1", "teacher=<i>mine</i>"], "groups": {"teacher": "custom"}}


@pytest.fixture(scope="module")
def whole(made):
    """A run with all of it, test split included."""
    test = f"tasks.text_classification.files.test={made.root}/test.jsonl"
    settings = made(test, "task_training.test=true", with_task=True)
    return settings, run_experiment(settings, asked=ASKED)


def report_of(result):
    return Path(result.folder) / "report.html"


# A run


def test_every_section_is_there(whole):
    """A part of the report that is lost, or wrong numbers in it."""
    settings, result = whole
    page = read(report_of(result))
    sections = page.sections
    assert list(sections) == [
        "What was asked", "Result", "Speed and quality", "Loss", "Attention relations",
        "Where teacher and student disagree", "Settings and versions",
    ]  # fmt: skip
    assert "teacher=<i>mine</i>" in sections["What was asked"]
    for role in ("student", "undistilled", "teacher"):
        score = result.scores_of(role)["text_classification"]
        assert f"{score:.3f}" in sections["Result"]
    assert f"x{result.speedup:.1f}" in sections["Result"]
    assert f"{result.validation_losses['query-query']:.4f}" in sections["Result"]
    assert "not distilled" in sections["Speed and quality"]
    for term in ("query-query", "value-value", "total", "held-out text", "training"):
        assert term in sections["Loss"]
    for words in ("teacher, layer 4", "student, layer 2", "Q-Q", "K-K", "V-V", "nats"):
        assert words in sections["Attention relations"]
    assert page.elements.count("image") == 6
    assert result.run_key in sections["Settings and versions"]
    assert f"{torch.__version__}" in sections["Settings and versions"]
    assert "corpus:" in sections["Settings and versions"]
    client = MlflowClient(tracking_uri=settings.tracking.uri)
    assert "report.html" in {file.path for file in client.list_artifacts(result.run_id)}


def test_page_forbids_the_network(whole):
    """A page that a later change of the template lets fetch something."""
    html = report_of(whole[1]).read_text("utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert html.isascii() or 'charset="utf-8"' in html[:300]


@pytest.fixture
def differing(whole, tmp_path):
    """The report of a copy of the run whose teacher says the other label each time."""
    settings, result = whole
    copied = read_result(Path(shutil.copytree(result.folder, tmp_path / "run")))
    for part in ("validation", "test"):
        (file,) = tmp_path.glob(f"run/predictions/*-teacher-*/{part}.jsonl")
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        student = Path(str(file).replace("-teacher-", "-student-")).read_text("utf-8")
        for row, line in zip(rows, student.splitlines()):
            row["prediction"] = LABELS[1 - LABELS.index(json.loads(line)["prediction"])]
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return write_run_report(settings, copied, None)


def test_hostile_text_is_shown_as_text(differing):
    """Text of a corpus or task that runs in the reader's browser, or turns the page around."""
    html = differing.read_text("utf-8")
    assert "<script" not in html and "<b>no</b>" not in html
    said = read(differing).sections["Where teacher and student disagree"]
    assert 'validation the <script>alert("1")</script>' in said and "<b>no</b>" in said
    # What would turn around the rest stands in an element of its own.
    turning = [line for line in html.splitlines() if "\u202e" in line]
    assert turning and all("<bdi>" in line for line in turning)


def test_test_splits_are_not_shown(differing, whole):
    """Examples of a test split that somebody looks at."""
    said = read(differing).sections["Where teacher and student disagree"]
    assert "validation the" in said and "test the" not in said
    (one,) = disagreements(*whole, "text_classification")
    assert one.part == ""


def test_maps_are_the_relations_that_are_distilled(whole):
    """Maps of other layers, heads or models than those whose divergence is said."""
    settings, result = whole
    found = heat_maps(settings, result)
    again = heat_maps(settings, result)
    assert found.tokens == again.tokens and 8 <= len(found.tokens) <= 16
    assert [one.pair for one in found.compared] == [(n, n) for n in ("query", "key", "value")]
    for one, other in zip(found.compared, again.compared):
        assert (one.teacher_layer, one.student_layer) == (4, 2)
        assert torch.equal(one.student, other.student)
        for relation in (one.teacher, one.student):
            torch.testing.assert_close(relation.sum(dim=-1), torch.ones(len(found.tokens)))
        assert 0 < one.divergence < 10 and 0 < one.difference < 1


def test_mean_relation_is_what_the_loss_compares():
    """A relation that is scaled or split otherwise than in the loss."""
    torch.manual_seed(3)
    teacher, student = (
        {name: torch.randn(1, 7, size) for name in ("query", "key")} for size in (24, 12)
    )
    for number in (1, 2, 4):
        size, divergences = {"t": 24 // number, "s": 12 // number}, []
        for head in range(number):
            parts = []
            for states, width in ((teacher, size["t"]), (student, size["s"])):
                cut = slice(head * width, (head + 1) * width)
                parts.append(mean_relation(states["query"][..., cut], states["key"][..., cut], 1))
            divergences.append((parts[0] * (parts[0].log() - parts[1].log())).sum(-1).mean())
        loss, _ = relation_losses(teacher, student, [("query", "key")], number)
        torch.testing.assert_close(torch.stack(divergences).mean(), loss)


def test_finished_run_gets_its_report_without_training(whole, monkeypatch):
    """A missing report that costs hours, or one that is made again each time."""
    settings, result = whole
    file = report_of(result)
    trained = []
    monkeypatch.setattr("minilm_exp.stages.distil", lambda *_: trained.append(1))
    file.unlink()
    assert run_experiment(settings).run_id == result.run_id
    assert file.is_file() and not trained
    made = file.stat().st_mtime_ns
    run_experiment(settings)
    assert file.stat().st_mtime_ns == made
    # Of a result that has changed since, as by an export.
    os.utime(Path(result.folder) / "result.json")
    run_experiment(settings)
    assert file.stat().st_mtime_ns > made
    settings.report = False
    file.unlink()
    run_experiment(settings)
    assert not file.is_file()
    settings.report = True
    run_experiment(settings)


def test_summary_names_the_report(whole, capsys):
    """A report that nobody finds."""
    print_summary(*whole)
    assert f"report      {report_of(whole[1])}" in capsys.readouterr().out


def test_report_is_quick(whole):
    """Seconds for each cell of a sweep."""
    settings, result = whole
    start = time.process_time()
    write_run_report(settings, result, delivery.open_run(settings.tracking.uri, result))
    assert time.process_time() - start < 3


def test_written_again_by_its_folder(whole, capsys, tmp_path):
    """A command line that needs the config of the run to be composed anew, or its old place."""
    _, result = whole
    main([result.folder])
    before = read(report_of(result)).sections
    assert f"written: {report_of(result)}" in capsys.readouterr().out
    assert "None" not in before["Attention relations"]
    outputs = Path(shutil.copytree(Path(result.folder).parents[1], tmp_path / "moved"))
    folder = outputs / "runs" / Path(result.folder).name
    main([str(folder)])
    after = read(folder / "report.html").sections
    assert "teacher, layer 4" in after["Attention relations"]
    assert after["Result"] == before["Result"]
    with pytest.raises(SystemExit, match="no run folder"):
        main([str(tmp_path)])


def test_failed_run(whole, tmp_path):
    """A report of a failed run that fails too, or hides that it has failed."""
    _, result = whole
    folder = Path(shutil.copytree(result.folder, tmp_path / "runs" / "run"))
    shutil.rmtree(folder / "student")
    stored = json.loads((folder / "result.json").read_text())
    stored |= {"status": "FAILED", "error": "Oops: lost", "validation_loss": None, "run_id": "0"}
    stored |= {"validation_losses": {}, "scores": {}, "speedup": None, "parameters": {}}
    (folder / "result.json").write_text(json.dumps(stored))
    main([str(folder)])
    page = read(folder / "report.html")
    assert "FAILED: Oops: lost" in (folder / "report.html").read_text()
    assert "None: there is no student" in page.sections["Attention relations"]
    assert "the student was not scored" in page.sections["Where teacher and student disagree"]


def test_settings_are_read_back(whole, made):
    """Settings that the run folder keeps and that mean another run."""
    settings, result = whole
    stored = read_settings(Path(result.folder) / "config.yaml")
    for name in ("teacher", "student", "objective", "tasks", "recipe", "training", "corpus"):
        assert getattr(stored, name) == getattr(settings, name), name
    assert stored.student_name == settings.student_name


def test_another_student_is_not_drawn(whole, tmp_path):
    """Maps of files that the run did not write, under its name."""
    settings, result = whole
    folder = shutil.copytree(result.folder, tmp_path / "run")
    copied = read_result(folder)
    config = json.loads((folder / "student" / "config.json").read_text())
    (folder / "student" / "config.json").write_text(json.dumps(config | {"note": 1}))
    with pytest.raises(ExperimentError, match="not those that the run wrote"):
        heat_maps(settings, copied)


# What is absent


@pytest.fixture(scope="module")
def bare(made):
    """Without a task, by an objective without relations."""
    settings = made("objective=tinybert", "seed=2")
    return settings, run_experiment(settings)


def test_what_is_absent_is_said(bare):
    """An empty figure, or a number that nobody measured."""
    sections = read(report_of(bare[1])).sections
    assert "The command line is not known" in sections["What was asked"]
    assert "No model was scored on a task" in sections["Result"]
    assert "without a task there is no score" in sections["Speed and quality"]
    assert "objective=tinybert compares no relations" in sections["Attention relations"]
    assert "No task was asked for" in sections["Where teacher and student disagree"]


def test_run_that_distils_nothing(made, tiny_teacher_folder):
    """Loss curves of a fine-tuning, or a report that fails without a teacher."""
    given = ("recipe=finetune", f"student.path={tiny_teacher_folder}", "seed=3")
    result = run_experiment(made(*given, with_task=True))
    sections = read(report_of(result)).sections
    assert "nothing was distilled" in sections["Loss"]
    assert "nothing was distilled" in sections["Attention relations"]
    assert "the teacher was not scored" in sections["Where teacher and student disagree"]
    assert "No speed was measured" in sections["Speed and quality"]


def test_store_that_is_gone(whole, tmp_path):
    """A report that fails, or shows no word of it, where MLflow has lost the run."""
    settings, result = whole
    copied = read_result(shutil.copytree(result.folder, tmp_path / "run"))
    sections = read(write_run_report(settings, copied, None)).sections
    assert "has lost this run" in sections["Loss"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"meaningful": False}, "NOT MEANINGFUL"),
        ({"status": "FAILED", "error": "Oops: <lost>"}, "FAILED: Oops: <lost>"),
        ({"status": "RUNNING"}, "NOT FINISHED"),
    ],
)
def test_marked_at_the_top(changes, said):
    """Numbers of a run that failed or means nothing, without a word."""
    result = Result("id", "key", "FINISHED", "folder", True)
    for name, value in changes.items():
        setattr(result, name, value)
    assert said in " ".join(run_report._warnings(result))
    page = render(Page("a title", "", run_report._warnings(result)))
    assert page.index("NOT" if "NOT" in said else "FAILED") < page.index("</main>")
    assert "<lost>" not in page


def test_stages_have_their_own_losses_and_teacher(made):
    """The losses of the last stage for all, or the run's teacher where an assistant taught."""
    settings = made("recipe=teacher_assistant", "seed=4")
    result = run_experiment(settings)
    sections = read(report_of(result)).sections
    assert "Stage assistant" in sections["Loss"] and "Stage student" in sections["Loss"]
    assert "Teacher: assistant" in sections["Attention relations"]
    main([result.folder])
    again = read(report_of(result)).sections
    assert again["Attention relations"] == sections["Attention relations"]


def test_student_with_fewer_tokens(made):
    """Ids of the student that the teacher takes for other words."""
    settings = made("student.vocabulary=prune_to_corpus", "seed=5")
    result = run_experiment(settings)
    found = heat_maps(settings, result)
    whole = heat_maps(made("seed=5"), run_experiment(made("seed=5")))
    assert found.tokens == whole.tokens
    for one, other in zip(found.compared, whole.compared):
        torch.testing.assert_close(one.teacher, other.teacher)


# Disagreement of other kinds


def predictions(folder, lines, role, task="mrpc", name="validation.jsonl"):
    place = folder / "predictions" / f"{task}-{role}-seed1"
    place.mkdir(parents=True)
    (place / name).write_text(lines)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def compared(settings_for, tmp_path):
    def made(task, name, teacher, student):
        settings = settings_for(f"task={task}", "data_root=/nowhere")
        task = next(iter(settings.tasks))
        result = Result("id", "key", "FINISHED", str(tmp_path), True, scores={task: 0.5})
        result.teacher_scores = {task: 0.5}
        for role, rows in (("teacher", teacher), ("student", student)):
            lines = json.dumps(rows) if name.endswith("json") else jsonl(rows)
            predictions(tmp_path, lines, role, task, name)
        (one,) = disagreements(settings, result, task)
        return one

    return made


def said(labels, answers):
    return [
        {"first": f"text {i}", "second": "b", "label": label, "prediction": answer}
        for i, (label, answer) in enumerate(zip(labels, answers))
    ]


def test_classes(compared):
    """Counts that are wrong, or ten examples of one kind."""
    labels = [0] * 30
    teacher, student = [0] * 10 + [0] * 15 + [1, 2, 1, 2, 1], [0] * 10 + [1] * 15 + [0, 0, 2, 2, 2]
    one = compared("mnli", "validation.jsonl", said(labels, teacher), said(labels, student))
    assert list(one.counts.values()) == [10, 15, 2, 2, 1]
    assert len(one.examples) == NUM_EXAMPLES
    assert {dict(e.facts)["teacher"] for e in one.examples} == {"0", "1", "2"}
    for example in one.examples:
        facts = dict(example.facts)
        assert facts["teacher"] != facts["student"] and len(example.texts) == 2


def test_numbers(compared):
    """The first differences instead of the largest."""
    labels = [2.0] * 30
    teacher, student = [2.0] * 30, [2.0 + i / 30 for i in range(30)]
    one = compared("stsb", "validation.jsonl", said(labels, teacher), said(labels, student))
    assert [e.texts[0] for e in one.examples] == [f"text {i}" for i in range(29, 19, -1)]


def test_answers(compared):
    """Answers of two questions beside each other."""
    teacher, student = {"a": "x", "b": "", "c": "z"}, {"c": "z", "b": "y", "a": "x"}
    one = compared("squad_v2", "validation.json", teacher, student)
    assert one.counts == {"the same answer": 2, "different answers": 1}
    (example,) = one.examples
    assert example.facts == [("teacher", "(no answer)"), ("student", "y")]


def test_outputs(compared):
    """Texts of the models without what they were made from."""
    rows = [{"source": f"s{i}", "target": "t", "prediction": "same"} for i in range(3)]
    other = [rows[0], rows[1] | {"prediction": "other"}, rows[2]]
    one = compared("xsum", "validation.jsonl", rows, other)
    assert one.counts == {"the same text": 2, "different texts": 1}
    assert one.examples[0].texts == ["s1"]
    assert one.examples[0].facts == [("target", "t"), ("teacher", "same"), ("student", "other")]


def test_other_examples_are_not_compared(compared):
    """Two predictions of different examples counted as a disagreement."""
    with pytest.raises(ExperimentError, match="different examples"):
        compared("mnli", "validation.jsonl", said([0, 0], [0, 0]), said([0, 0, 0], [0, 0, 0]))


# The page


def test_page_escapes_and_redacts(monkeypatch):
    """A secret in a table, a picture of a name, or a name that ends an attribute."""
    monkeypatch.setenv("MY_TOKEN", "sesame-open<you>")
    nasty = '"><script>sesame-open<you> postgresql://me:letmein@host/db'
    table = Table([nasty], [[nasty, Entry(nasty, nasty, f"../a b/{nasty}")]], nasty)
    blocks = [Text(nasty), Words(nasty), table, Details(nasty, [Text("x\0\x1b")])]
    html = render(Page(nasty, nasty, [nasty], [Section(nasty, blocks)]))
    page = Read(html)
    assert "script" not in page.elements
    assert "letmein" not in html and "sesame" not in html.replace("%3C", "<")
    assert "\0" not in html and "\x1b" not in html
    assert [unquote(address)[:7] for address in page.addresses] == ["../a b/"]


def test_figures_take_any_name():
    """A name with a $ that is read as mathematics, or in a script that the font lacks."""
    names = ["a$b$\\frac", "語<b>", "total", "\x07"]

    def history(name):
        return [(1, 2.0), (2, 1.0)]

    panels = loss_panels(dict.fromkeys(names, (history, "x")), "loss")
    text = "".join(svg(panel, f"panel{i}") for i, panel in enumerate(panels))
    assert "語&lt;b&gt;" in text and "a$b$\\frac" in text and "<metadata" not in text
    page = Read(text)
    assert len(page.ids) == len(set(page.ids))
    points = [Point("teacher", None, 0.5), Point("$s$", 2.0, 0.4), Point("baseline", 1.0, None)]
    assert "$s$" in svg(speed_and_quality(points, "語", "score"), "speed")


def test_measured_exports_and_candidates_are_shown(whole, tmp_path):
    """Figures of exports that nobody sees, or that are needed for a report."""
    settings, result = whole
    copied = read_result(shutil.copytree(result.folder, tmp_path / "run"))
    both = {"milliseconds": {"1": 3.25, "16": 31.5}, "speedup": {"1": 4.5, "16": 4.0}}
    rest = {"differences": {"logits": 0.25}, "scores": {"text_classification": {"accuracy": 0.5}}}
    models = {
        name: {"megabytes": 7.0} | both | rest for name in ("teacher", "student", "onnx_int8")
    }
    copied.exports = {"text_classification": {"threads": 2, "models": models}}
    copied.candidates = [
        {"num_layers": 2, "parameters": 1234567, "meets_budget": True, "chosen": False},
        {"num_layers": 3, "speedup": 1.5, "meets_budget": False, "chosen": True},
    ]
    sections = read(write_run_report(settings, copied, None)).sections
    for words in ("onnx_int8", "3.25", "x4.50", "0.25 (logits)", "2 threads"):
        assert words in sections["Speed and quality"]
    for words in ("1,234,567", "meets budget", "yes"):
        assert words in sections["Result"]


# A sweep


@pytest.fixture
def swept(tmp_path):
    made = Outputs(tmp_path)
    for relations, score in (("qq_kk_vv", 0.8), ("kk_vv", 0.7)):
        for seed in (1, 2):
            both = {"mnli": score + seed / 100, "qnli": score / 2}
            made.add({"relations": relations, "seed": str(seed)}, both, validation_loss=0.25)
    return made


def test_report_of_a_sweep(swept, capsys):
    """A table without the paper's numbers, or links that lead nowhere."""
    (folder, *_) = sorted((swept.root / "runs").iterdir())
    (folder / "report.html").write_text("a report")
    main(["relation_set", "--outputs", str(swept.root)])
    file = swept.root / "sweeps" / swept.name / "report.html"
    assert f"written: {file}" in capsys.readouterr().out
    page = read(file)
    assert list(page.sections) == [
        "What was asked", "Table", "Figure", "Losses", "Runs", "Settings and versions"
    ]  # fmt: skip
    assert "sweeps=relation_set" in page.sections["What was asked"]
    for words in ("MNLI-m, paper", "82.2", "81.5 ± 0.7", "Speedup", "MiniLMv2 Table 7"):
        assert words in page.sections["Table"] or words == "Speedup"
    (address,) = page.addresses
    assert (file.parent / unquote(address)).resolve() == (folder / "report.html").resolve()
    assert "4 of 4 cells" in file.read_text("utf-8")
    # Nothing has them without MLflow.
    assert "None: " in page.sections["Losses"]
    assert "c0ffee" in page.sections["Settings and versions"]
    assert "num_layers: 12" in page.sections["Settings and versions"]


def test_refused_table_is_told(swept):
    """A table of a sweep whose cells failed, or a report that says nothing of why."""
    with open_record(swept.root, "relation_set", swept.name) as record:
        record.cells[1].error = "Oops: <no> layer"
        record.cells[2].values["relations"] = "<i>mine</i>"
    main(["relation_set", "--outputs", str(swept.root)])
    page = read(swept.root / "sweeps" / swept.name / "report.html")
    assert "no table of" in page.sections["Table"] and "Oops: <no> layer" in page.sections["Table"]
    assert "None: it is drawn of the table" in page.sections["Figure"]
    assert "Failed: " in page.sections["Runs"] and "Oops: <no> layer" in page.sections["Runs"]
    assert "relations=<i>mine</i>" in page.sections["Runs"]
    assert "table" in page.elements
    with pytest.raises(SystemExit, match="no sweep nothing"):
        main(["nothing", "--outputs", str(swept.root)])


@pytest.mark.integration
def test_sweep_writes_its_report(tmp_path):
    """A sweep whose report has to be asked for, or that is not with its MLflow run."""
    outputs = tmp_path / "outputs"
    sweep = ["-m", "sweeps=relation_set", "experiment=smoke", "recipe.models=[student]"]
    done = run(outputs, "report=true", *sweep, "relations=choice(kk,vv)")
    assert done.status == 0, done.both
    (file,) = outputs.glob("sweeps/*/report.html")
    assert f"report      {file}" in done.stdout
    page = read(file)
    files = [address for address in page.addresses if not address.startswith("#")]
    linked = [(file.parent / unquote(address)).resolve() for address in files]
    assert sorted(linked) == sorted(outputs.resolve().glob("runs/*/report.html"))
    assert len(linked) == 2 and all(f"report      {path}" in done.stdout for path in linked)
    assert "relations=kk" in page.sections["Losses"]
    assert "experimentsmoke" in page.sections["What was asked"]
    own = read(linked[0]).sections["What was asked"]
    assert "recipe.models=[student]" in own and "tiny_random" in own
    record = next(outputs.glob("sweeps/*.json"))
    client = client_of(outputs)
    run_id = json.loads(record.read_text())["run_id"]
    assert [found.path for found in client.list_artifacts(run_id)] == ["report.html"]
