"""Distillation in this process: tiny random models, a tiny corpus, every promise of `distil`.

Weights are drawn wide (initializer_range 0.2), so that the relations are far from uniform and a
wrong layer, pair or batch moves the loss. Nothing here asserts that training helps.
"""

import copy
import dataclasses
import gzip
import json
import os
import random
import shutil
import signal

import pytest
import torch
from hostile import Touch
from reference import relation_loss_reference
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Subset
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from minilm_exp import distil as distil_module
from minilm_exp.checkpoints import last_whole_checkpoint
from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.distil import distil
from minilm_exp.errors import ExperimentError, Interrupted
from minilm_exp.objectives import build_objective
from minilm_exp.parsing import parse
from minilm_exp.provenance import fingerprint_files
from minilm_exp.states import StateTap, qkv_states
from minilm_exp.student import build_student, untrained_parameters

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
BLOCK_LENGTH = 12
BATCH_SIZE = 8
TEACHER_LAYER = 2
RELATION_HEADS = 4
PAIRS = ["qq", "kv"]
STATE = {"q": "query", "k": "key", "v": "value"}


class Stopped(Exception):
    """What stands for a crash in the middle of training."""


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="module")
def corpora(base_settings, tmp_path_factory, tokenizer):
    """Prepared corpora by `packing`; documents are of 2 to 14 words."""
    folder = tmp_path_factory.mktemp("corpora")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(2, 14))) for _ in range(60)]
    text = folder / "text.txt"
    text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    prepared = {}
    for packing in (True, False):
        settings = change(
            base_settings,
            packing=packing,
            files=[str(text)],
            held_out_fraction=0.3,
            outputs_dir=str(folder),
        )
        prepared[packing] = prepare_corpus(settings, tokenizer, fingerprint_corpus(settings.corpus))
    return prepared


@pytest.fixture(scope="module")
def base_settings(compose_config, tmp_path_factory):
    """The smoke experiment, with sizes and numbers of steps for milliseconds."""
    folder = tmp_path_factory.mktemp("unused")
    config = compose_config("experiment=smoke", f"outputs_dir={folder}")
    return change(
        parse(config),
        pairs=PAIRS,
        num_relation_heads=RELATION_HEADS,
        teacher_layer=TEACHER_LAYER,
        block_length=BLOCK_LENGTH,
        batch_size=BATCH_SIZE,
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        precision="fp32",
        logging_steps=1,
        evaluation_steps=100,
        evaluation_sequences=10,
        checkpoint_steps=100,
        keep_checkpoints=5,
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=None,
        init="random",
        seed=3,
    )


def change(settings, **changes):
    """A copy with fields changed, wherever among the groups that matter here they are."""
    settings = copy.deepcopy(settings)
    groups = (
        settings,
        settings.training,
        settings.runtime,
        settings.corpus,
        settings.objective.terms["relations"],
        settings.layer_selection,
        settings.student,
    )
    for name, value in changes.items():
        owner = next(group for group in groups if name in vars(group))
        setattr(owner, name, value)
    return settings


def make_teacher():
    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return BertModel(config).eval().requires_grad_(False)


def make_student(settings, teacher, tokenizer):
    training = settings.training
    dropout = (training.hidden_dropout, training.attention_dropout)
    return build_student(settings.student, teacher, tokenizer, TEACHER_LAYER, dropout, seed=5)


@dataclasses.dataclass
class Outcome:
    teacher: BertModel
    student: BertModel
    first_student: BertModel
    losses: dict
    logged: list
    checkpoints: object


class Distillation:
    """Everything that `distil` needs; called, it runs it with some settings changed."""

    def __init__(self, base_settings, corpora, tokenizer, folder):
        self.base_settings, self.corpora = base_settings, corpora
        self.tokenizer, self.folder = tokenizer, folder

    def __call__(
        self,
        *,
        name="run",
        num_train=None,
        double=False,
        student=None,
        stop_at=None,
        signal_at=None,
        packing=True,
        watch=None,
        profile_folder=None,
        **changes,
    ):
        settings = change(
            self.base_settings, outputs_dir=str(self.folder), packing=packing, **changes
        )
        corpus = self.corpora[packing]
        if num_train is not None:
            corpus = dataclasses.replace(corpus, train=Subset(corpus.train, range(num_train)))
        teacher = make_teacher()
        if student is None:
            student = make_student(settings, teacher, self.tokenizer)
        if double:
            teacher, student = teacher.double(), student.double()
        first_student = copy.deepcopy(student)
        logged = []

        def log_metrics(metrics, step):
            logged.append((step, dict(metrics)))
            if watch is not None:
                watch(teacher, student)
            if step == stop_at:
                raise Stopped
            if signal_at is not None and step == signal_at[0]:
                os.kill(os.getpid(), signal_at[1])

        checkpoints = self.folder / name
        try:
            losses = distil(
                settings,
                teacher,
                student,
                build_objective(settings, teacher, student),
                self.tokenizer,
                corpus,
                settings.training.precision,
                checkpoints,
                log_metrics,
                profile_folder=profile_folder,
            )
        except (Stopped, Interrupted) as error:
            losses, self.said = None, str(error)
        return Outcome(teacher, student, first_student, losses, logged, checkpoints)


@pytest.fixture
def run(base_settings, corpora, tokenizer, tmp_path):
    return Distillation(base_settings, corpora, tokenizer, tmp_path)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def are_equal(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def relative_difference(first, second, start):
    """Distance of two updates of the same start, divided by the length of the second."""
    changes = [
        torch.cat([(model.state_dict()[n] - t).flatten() for n, t in start.state_dict().items()])
        for model in (first, second)
    ]
    assert changes[1].norm() > 0
    return float((changes[0] - changes[1]).norm() / changes[1].norm())


def states_by_hand(model, layer, input_ids):
    """Query, key and value of a BERT layer, from the library's own hidden states."""
    hidden = model.eval()(input_ids=input_ids, output_hidden_states=True).hidden_states[layer - 1]
    attention = model.encoder.layer[layer - 1].attention.self
    return {name: getattr(attention, name)(hidden) for name in ("query", "key", "value")}


@torch.no_grad()
def losses_by_hand(teacher, student, examples):
    """Mean over examples of the loss of each pair, one example at a time and so unpadded."""
    sums = dict.fromkeys(PAIRS, 0.0)
    for example in examples:
        ids = example["input_ids"][None]
        teacher_states = states_by_hand(teacher, TEACHER_LAYER, ids)
        student_states = states_by_hand(student, student.config.num_hidden_layers, ids)
        for pair in PAIRS:
            names = (STATE[pair[0]], STATE[pair[1]])
            loss = relation_loss_reference(teacher_states, student_states, [names], RELATION_HEADS)
            sums[pair] += loss.item() / len(examples)
    return {f"{STATE[pair[0]]}-{STATE[pair[1]]}": loss for pair, loss in sums.items()}


def spread(examples, number):
    number = min(number, len(examples))
    return [examples[index * len(examples) // number] for index in range(number)]


# What is trained


def test_teacher_is_left_alone(run):
    """The teacher learns too, or has dropout on because model.train() reaches it."""
    modes = []
    before = make_teacher()
    outcome = run(
        hidden_dropout=0.1,
        evaluation_steps=2,
        watch=lambda teacher, _: modes.append(any(m.training for m in teacher.modules())),
    )
    assert modes and not any(modes)
    assert are_equal(outcome.teacher, before)
    assert all(parameter.grad is None for parameter in outcome.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in outcome.teacher.parameters())


def test_exactly_the_untrained_parameters_keep_their_weights(run):
    """Weight decay shrinks what has no gradient, or a trained weight is frozen by mistake."""
    outcome = run(weight_decay=0.5)
    tap = StateTap(copy.deepcopy(outcome.first_student), qkv_states(2))
    untrained = set(untrained_parameters(tap))
    assert untrained  # the last layer's feed-forward and the pooler at least
    before = outcome.first_student.state_dict()
    same = {n for n, p in outcome.student.named_parameters() if torch.equal(p, before[n])}
    assert same == untrained
    assert all(parameter.requires_grad for parameter in outcome.student.parameters())


def test_checkpoint_holds_the_student_and_the_state_of_what_is_trained(run):
    """The teacher, or moments of untrained weights, fill checkpoint and memory."""
    outcome = run(checkpoint_steps=3)
    folder = outcome.checkpoints / "checkpoint-3"
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert {name.removeprefix("student.encoder.") for name in saved} == {
        name for name, _ in outcome.student.named_parameters()
    }
    tap = StateTap(copy.deepcopy(outcome.student), qkv_states(2))
    untrained = set(untrained_parameters(tap))
    optimiser = torch.load(folder / "optimizer.pt", weights_only=True)
    shapes = sorted(tuple(state["exp_avg"].shape) for state in optimiser["state"].values())
    expected = sorted(
        tuple(p.shape) for n, p in outcome.student.named_parameters() if n not in untrained
    )
    assert shapes == expected
    assert sum(len(group["params"]) for group in optimiser["param_groups"]) == len(expected)
    # Two moments of what is trained, and nothing else that is large.
    num_moments = sum(2 * torch.Size(shape).numel() for shape in expected)
    assert (folder / "optimizer.pt").stat().st_size < 4 * num_moments + 50_000


def test_encoders_come_back_usable(run):
    """A tap stays on, and the student's next full forward pass ends in the middle."""
    outcome = run()
    ids = torch.tensor([[2, 5, 6, 3]])
    for encoder in (outcome.teacher, outcome.student):
        copied = type(encoder)(encoder.config).eval()
        copied.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            found = encoder.eval()(input_ids=ids).last_hidden_state
            expected = copied(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, expected)


# What is logged


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_first_logged_loss_is_the_relation_loss_by_hand(run, corpora, microbatch_size):
    """Wrong layer or pair, dropout left on, or a sum over micro-batches instead of a mean."""
    # As many blocks as a batch: whatever their order, a step sees all of them.
    outcome = run(num_train=BATCH_SIZE, microbatch_size=microbatch_size)
    examples = [corpora[True].train[index] for index in range(BATCH_SIZE)]
    expected = losses_by_hand(outcome.teacher, outcome.first_student, examples)
    step, metrics = outcome.logged[0]
    assert step == 1
    for name, loss in expected.items():
        assert metrics[f"distill/loss/{name}"] == pytest.approx(loss, rel=1e-4)
    assert metrics["distill/loss/total"] == pytest.approx(sum(expected.values()), rel=1e-4)


def test_relations_sum_to_the_total(run):
    """A relation is left out of the sum, or its mean is taken over another number of steps."""
    outcome = run(max_steps=5, logging_steps=2, evaluation_steps=2, microbatch_size=4)
    kinds = set()
    for _, metrics in outcome.logged:
        group = "loss" if "distill/loss/total" in metrics else "validation"
        kinds.add(group)
        parts = [metrics[f"distill/{group}/{name}"] for name in ("query-query", "key-value")]
        assert metrics[f"distill/{group}/total"] == pytest.approx(sum(parts), rel=1e-6)
    assert kinds == {"loss", "validation"}
    assert set(outcome.losses) == {"query-query", "key-value", "total"}


def test_logged_loss_is_the_mean_since_the_last_log(run):
    """Losses of before the last log, or of evaluation, get into the mean."""
    each = run(max_steps=6, name="each", logging_steps=1).logged
    pairs = run(max_steps=6, name="pairs", logging_steps=2, evaluation_steps=3).logged
    single = [
        metrics["distill/loss/total"] for _, metrics in each if "distill/loss/total" in metrics
    ]
    means = {s: m["distill/loss/total"] for s, m in pairs if "distill/loss/total" in m}
    assert sorted(means) == [2, 4, 6]
    for step, mean in means.items():
        assert mean == pytest.approx(sum(single[step - 2 : step]) / 2, rel=1e-6)


def test_validation_loss_is_the_one_by_hand_on_spread_examples(run, corpora):
    """Validation looks at training blocks, at the first ones only, or with dropout on."""
    outcome = run(hidden_dropout=0.3)
    examples = spread(corpora[True].validation, 10)
    expected = losses_by_hand(outcome.teacher, outcome.student, examples)
    for name, loss in expected.items():
        assert outcome.losses[name] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("max_steps", [3, 4])
def test_each_step_is_validated_once(run, max_steps):
    """The library asks for it at the end of a step and again at the end of the epoch."""
    # An epoch is two steps: training ends within one and with one.
    outcome = run(num_train=16, max_steps=max_steps, evaluation_steps=2)
    steps = [step for step, m in outcome.logged if "distill/validation/total" in m]
    assert steps == sorted({2, max_steps})


# What must not matter

# Everything in float64: Adam divides by the root of the second moment, so in float32 the rounding
# of a gradient near zero would become a whole step, and nothing could be said to 1e-6.


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_does_not_change_the_updates(run, packing):
    """Micro-batch losses are summed, or weighted by their tokens, instead of averaged."""
    outcomes = [
        run(name=f"m{size}", num_train=16, double=True, packing=packing, microbatch_size=size)
        for size in (None, 4, 1)
    ]
    for outcome in outcomes[1:]:
        start = outcomes[0].first_student
        assert relative_difference(outcome.student, outcomes[0].student, start) < 1e-6
        for (_, metrics), (_, expected) in zip(outcome.logged, outcomes[0].logged, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-6)


def test_accumulation_does_not_change_the_updates_over_epochs(run):
    """The end of an epoch that fills no batch makes a short step only where one accumulates."""
    outcomes = [
        run(name=f"m{size}", num_train=20, double=True, max_steps=6, microbatch_size=size)
        for size in (None, 4, 1)
    ]
    for outcome in outcomes[1:]:
        start = outcomes[0].first_student
        assert relative_difference(outcome.student, outcomes[0].student, start) < 1e-6


def test_data_workers_change_nothing(run):
    """Batches come in another order, or worker seeds shift the dropout (bitwise)."""
    alone = run(name="alone", max_steps=4, hidden_dropout=0.1)
    helped = run(name="helped", max_steps=4, hidden_dropout=0.1, num_workers=2)
    assert are_equal(alone.student, helped.student)
    assert alone.logged == helped.logged


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize("max_steps", [1, 2, 8])
def test_profiling_changes_nothing_and_says_where_time_goes(run, tmp_path, capsys, max_steps):
    """A trace of no step, a share above the whole, or a part that is not found in it."""
    plain = run(name="plain", max_steps=max_steps, hidden_dropout=0.1)
    folder = tmp_path / "profile"
    profiled = run(name="profiled", max_steps=max_steps, hidden_dropout=0.1, profile_folder=folder)
    assert are_equal(plain.student, profiled.student)
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"minilm_exp: loss", "aten::baddbmm_"} <= names
    table = (folder / "table.txt").read_text()
    assert table.splitlines()[0] in capsys.readouterr().out
    milliseconds = {
        line[:36].strip(): float(line[36:46]) for line in table.splitlines()[1:9] if line.strip()
    }
    whole = milliseconds.pop("whole step")
    assert len(milliseconds) == 7
    assert sum(milliseconds.values()) == pytest.approx(whole, abs=0.5)
    for part in ("teacher, forward or cache", "loss", "optimiser"):
        assert 0 < milliseconds[part] < whole


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_change_nothing_beyond_rounding(run):
    """States of the wrong layer, other units dropped, or an encoder that stays compiled."""
    plain = run(name="plain", num_layers=3, hidden_dropout=0.1)
    compiled = run(name="compiled", num_layers=3, hidden_dropout=0.1, compile=True)
    assert relative_difference(compiled.student, plain.student, plain.first_student) < 1e-3
    for name, loss in plain.losses.items():
        assert compiled.losses[name] == pytest.approx(loss, rel=1e-4)
    for encoder in (compiled.teacher, compiled.student):
        assert not any(module._compiled_call_impl for module in encoder.modules())


def test_threads_change_nothing_beyond_rounding(run):
    """Results hang on the number of processor threads (1e-6 of the update, in float64)."""
    one = run(name="one", double=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = run(name="two", double=True)
    finally:
        torch.set_num_threads(threads)
    assert relative_difference(two.student, one.student, one.first_student) < 1e-6


@pytest.mark.parametrize(
    "change", [{"evaluation_steps": 1}, {"checkpoint_steps": 1}, {"logging_steps": 3}]
)
def test_how_often_one_looks_changes_nothing(run, change):
    """Evaluation draws random numbers and so shifts the dropout; the run key leaves these out."""
    plain = run(name="plain", max_steps=4, hidden_dropout=0.1)
    watched = run(name="watched", max_steps=4, hidden_dropout=0.1, **change)
    assert are_equal(plain.student, watched.student)


def test_same_seed_same_weights(run):
    """Something draws from a generator that the seed does not set (bitwise)."""
    outcomes = [run(name=f"{i}", max_steps=5, hidden_dropout=0.1) for i in range(2)]
    assert are_equal(outcomes[0].student, outcomes[1].student)
    assert outcomes[0].logged == outcomes[1].logged


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_other_seed_other_weights(run, dropout):
    """The seed reaches neither the order of the blocks (dropout 0) nor the dropout."""
    outcomes = [run(name=f"{s}", seed=s, hidden_dropout=dropout) for s in (1, 2)]
    assert are_equal(outcomes[0].first_student, outcomes[1].first_student)
    assert not are_equal(outcomes[0].student, outcomes[1].student)


# Resuming


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"microbatch_size": 4}, id="accumulation"),
        pytest.param({"logging_steps": 2}, id="log between checkpoints"),
        pytest.param({"num_workers": 1}, id="worker"),
        pytest.param({"packing": False}, id="padding"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(run, changes):
    """Optimiser, schedule, data order, dropout or a half-full log window is lost on the way."""
    # 20 blocks make an epoch of 2 steps, so both the checkpoint and the end are in later epochs.
    settings = {
        "num_train": 20,
        "max_steps": 8,
        "warmup_steps": 2,
        "checkpoint_steps": 3,
        "evaluation_steps": 4,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    } | changes
    whole = run(name="whole", **settings)
    stopped = run(name="stopped", stop_at=5 if "logging_steps" not in changes else 4, **settings)
    assert stopped.losses is None
    assert last_whole_checkpoint(stopped.checkpoints).name == "checkpoint-3"
    resumed = run(name="stopped", resume=True, **settings)
    assert are_equal(resumed.student, whole.student)
    assert resumed.losses == whole.losses
    assert resumed.logged == [entry for entry in whole.logged if entry[0] > 3]


def test_run_that_was_killed_after_its_last_step_trains_no_further(run):
    """A step more than there are, which the library takes there, and the same loss again."""
    settings = {"num_train": 20, "max_steps": 4, "checkpoint_steps": 2, "hidden_dropout": 0.1}
    whole = run(name="run", **settings)
    resumed = run(name="run", resume=True, **settings)
    assert resumed.logged == []
    assert resumed.losses == whole.losses and are_equal(resumed.student, whole.student)


def damage_model(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_a_bit(folder):
    file = folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_optimiser(folder):
    (folder / "optimizer.pt").write_bytes(b"")


def damage_random_state(folder):
    (folder / "rng_state.pth").unlink()


def damage_mark(folder):
    (folder / "whole.json").write_text('{"model.safe')


def remove_mark(folder):
    (folder / "whole.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_model, damage_a_bit, damage_optimiser, damage_random_state, damage_mark, remove_mark],
    ids=lambda function: function.__name__,
)
def test_cut_off_checkpoint_is_skipped_for_the_one_before(run, damage):
    """A checkpoint that the crash cut off is gone on from, or ends the resumed run."""
    settings = {"num_train": 20, "max_steps": 5, "checkpoint_steps": 2, "hidden_dropout": 0.1}
    whole = run(name="run", **settings)
    shutil.rmtree(whole.checkpoints / "checkpoint-5")  # the one at the end
    damage(whole.checkpoints / "checkpoint-4")
    assert last_whole_checkpoint(whole.checkpoints).name == "checkpoint-2"
    resumed = run(name="run", resume=True, **settings)
    assert resumed.logged == [entry for entry in whole.logged if entry[0] > 2]
    assert are_equal(resumed.student, whole.student)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"logging_steps": 4, "evaluation_steps": 3}, id="within a log window"),
        pytest.param({"logging_steps": 4, "evaluation_steps": 3, "microbatch_size": 4}, id="micro"),
    ],
)
def test_signal_ends_after_its_step_with_a_checkpoint(run, number, changes):
    """Half a step is lost, or the window of the log that the signal cut in two logs other means."""
    settings = {"num_train": 20, "max_steps": 8, "checkpoint_steps": 100, "hidden_dropout": 0.1}
    settings |= changes
    whole = run(name="whole", **settings)
    before = signal.getsignal(number)
    stopped = run(name="stopped", signal_at=(3, number), **settings)
    assert signal.getsignal(number) is before
    assert stopped.losses is None and signal.Signals(number).name in run.said
    last = last_whole_checkpoint(stopped.checkpoints)
    # A metric of step 3 is logged when the step is over or, of an evaluation, before that.
    assert last.name in ("checkpoint-3", "checkpoint-4") and last.name.split("-")[1] in run.said
    resumed = run(name="stopped", resume=True, **settings)
    assert are_equal(resumed.student, whole.student)
    assert resumed.losses == whole.losses
    assert stopped.logged + resumed.logged == whole.logged


def test_signal_of_a_scheduler_is_passed_on_after_the_checkpoint(run):
    """Submitit puts the job into the queue again in the middle of a step."""
    seen = []

    def requeue(number, frame):
        seen.append([path.name for path in (run.folder / "run").glob("checkpoint-*")])
        raise SystemExit

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            run(max_steps=8, signal_at=(3, signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(seen) == 1 and len(seen[0]) == 1


def test_a_second_signal_ends_at_once(run, monkeypatch):
    """A user who presses Ctrl-C again waits for the end of a step that takes minutes."""
    monkeypatch.setattr("minilm_exp.checkpoints._SAME_SIGNAL_SECONDS", -1)
    signals = []

    def watch(*_):
        signals.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    outcome = run(max_steps=8, watch=watch)
    assert "within a step" in run.said and len(signals) == 1
    assert not list(outcome.checkpoints.glob("checkpoint-*"))


def test_what_a_kill_left_of_a_checkpoint_is_no_checkpoint(run):
    """A folder of half of the files has the name of a checkpoint, or is in the way of the next."""
    settings = {"num_train": 20, "max_steps": 4, "checkpoint_steps": 2, "hidden_dropout": 0.1}
    whole = run(name="whole", **settings)
    stopped = run(name="stopped", stop_at=3, **settings)
    half = stopped.checkpoints / ".partial" / "checkpoint-4"
    shutil.copytree(stopped.checkpoints / "checkpoint-2", half)
    assert last_whole_checkpoint(stopped.checkpoints).name == "checkpoint-2"
    resumed = run(name="stopped", resume=True, **settings)
    assert are_equal(resumed.student, whole.student)
    assert not half.exists()


def test_a_clock_that_went_back_keeps_the_newest_checkpoint(run, tmp_path):
    """The oldest by time is deleted, which is the one that has just been written."""
    old = tmp_path / "run" / "checkpoint-0"
    old.mkdir(parents=True)
    os.utime(old, (2**32, 2**32))
    outcome = run(name="run", max_steps=2, checkpoint_steps=1, keep_checkpoints=2)
    names = {path.name for path in outcome.checkpoints.glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-2"}


def test_no_whole_checkpoint_is_a_fresh_start(run, tmp_path):
    """Resuming before the first checkpoint fails instead of starting."""
    fresh = run(name="fresh")
    (tmp_path / "other" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-2" / "model.safetensors").write_bytes(b"cut")
    resumed = run(name="other", resume=True)
    assert are_equal(resumed.student, fresh.student)


def test_without_resume_old_checkpoints_are_not_used(run):
    """A fresh run silently goes on from what lies in its folder."""
    first = run(name="run", checkpoint_steps=1)
    second = run(name="run", checkpoint_steps=1)
    assert first.logged == second.logged


def test_marks_list_every_file(run):
    """A file that was written after the mark, or is not in it, can be cut off unseen."""
    outcome = run(checkpoint_steps=2)
    folder = outcome.checkpoints / "checkpoint-2"
    marked = json.loads((folder / "whole.json").read_text())
    assert set(marked) == {path.name for path in folder.iterdir()} - {"whole.json"}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= set(marked)


def test_only_the_newest_checkpoints_are_kept(run):
    """The disk fills with all of them, or the newest is the one that goes."""
    outcome = run(max_steps=4, checkpoint_steps=1, keep_checkpoints=2)
    names = {path.name for path in outcome.checkpoints.glob("checkpoint-*")}
    assert names == {"checkpoint-3", "checkpoint-4"}


# Refusals


def test_diverged_training_is_refused(run):
    """A loss of NaN is trained on and logged for hours."""
    with pytest.raises(ExperimentError, match=r"training\.learning_rate"):
        run(learning_rate=1e30)


def test_divergence_in_the_last_step_is_refused(run):
    """Only training losses are looked at, and the broken student is saved."""
    with pytest.raises(ExperimentError, match=r"training\.learning_rate"):
        run(learning_rate=1e30, max_steps=1)


def test_not_a_number_in_a_weight_is_refused(run, base_settings, tokenizer):
    """A check for infinity alone lets NaN through."""
    student = make_student(base_settings, make_teacher(), tokenizer)
    with torch.no_grad():
        student.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ExperimentError, match=r"nan at step 1.*training\.learning_rate"):
        run(student=student)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_batch_that_is_not_finite_is_named(run, monkeypatch, microbatch_size):
    """Hours later nobody knows which text did it, or where to go on from."""
    steps = 4
    seen = {}

    class Poisoned(distil_module.Distiller):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            if self.training:
                step = seen.setdefault("calls", 0) // (
                    BATCH_SIZE // (microbatch_size or BATCH_SIZE)
                )
                seen["calls"] += 1
                if step == steps - 1 and "ids" not in seen:
                    seen["ids"] = sorted(inputs["index"].tolist())
                    output["loss"] = output["loss"] * float("nan")
            return output

    monkeypatch.setattr(distil_module, "Distiller", Poisoned)
    with pytest.raises(ExperimentError) as raised:
        run(max_steps=8, checkpoint_steps=2, microbatch_size=microbatch_size)
    said = str(raised.value)
    assert f"the loss is nan at step {steps}" in said
    assert f"training examples {', '.join(map(str, seen['ids']))} (counted from 0)" in said
    assert "the last good checkpoint is checkpoint-2" in said


def test_gradient_that_is_not_finite_is_named(run, base_settings, tokenizer):
    """A finite loss with an infinite gradient makes every weight NaN, and the next loss with it."""
    student = make_student(base_settings, make_teacher(), tokenizer)
    weight = student.encoder.layer[0].output.dense.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(student)
    with pytest.raises(
        ExperimentError, match=r"gradient has the norm (nan|inf) at step 1, training"
    ):
        run(student=student)
    assert are_equal(student, before)


def test_corpus_smaller_than_a_batch_is_refused(run):
    """Dropping the last, short batch leaves none, and training ends without a step."""
    with pytest.raises(ExperimentError, match=r"7 blocks.*training\.batch_size=8"):
        run(num_train=BATCH_SIZE - 1)


# Padding and precision


def test_padded_validation_loss_does_not_hang_on_the_batch(run, corpora):
    """Padding gets into the loss, or batches instead of sequences are averaged."""
    examples = spread(corpora[False].validation, 10)
    assert len({len(example["input_ids"]) for example in examples}) > 3
    # So small a rate leaves the student as it was.
    outcomes = [
        run(name=f"{size}", packing=False, max_steps=1, learning_rate=1e-20, microbatch_size=size)
        for size in (None, 4, 1)
    ]
    expected = losses_by_hand(outcomes[0].teacher, outcomes[0].first_student, examples)
    for outcome in outcomes:
        for name, loss in expected.items():
            assert outcome.losses[name] == pytest.approx(loss, rel=1e-4)


def test_padded_corpus_trains(run):
    """Padding breaks the step, or makes its loss that of other sequences."""
    outcome = run(packing=False, max_steps=4)
    assert [step for step, m in outcome.logged if "distill/loss/total" in m] == [1, 2, 3, 4]
    assert not are_equal(outcome.student, outcome.first_student)


def test_bf16_is_used_and_close_to_fp32(run):
    """The precision is not passed on, or the relation loss itself is rounded to bf16."""
    fp32 = run(name="fp32", max_steps=1, learning_rate=1e-20)
    bf16 = run(name="bf16", max_steps=1, learning_rate=1e-20, precision="bf16")
    assert bf16.losses["total"] != fp32.losses["total"]
    # bf16 keeps 8 bits; the error of single products averages out over tokens and heads.
    for name, loss in fp32.losses.items():
        assert bf16.losses[name] == pytest.approx(loss, rel=5e-2)
    assert next(bf16.student.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"]
)
def test_checkpoint_that_would_run_code_is_refused(name, run, tmp_path):
    """A pickle of somebody else in a run folder, which is run when the run is resumed."""
    settings = {"num_train": 20, "max_steps": 5, "checkpoint_steps": 2}
    whole = run(name="run", **settings)
    shutil.rmtree(whole.checkpoints / "checkpoint-5")
    folder = whole.checkpoints / "checkpoint-4"
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    marker = tmp_path / "evil"
    torch.save(Touch(marker), folder / name)
    torch.save(Touch(marker), folder / "training_args.bin")
    (folder / "whole.json").unlink()
    digests = {path.name: fingerprint_files([path]) for path in folder.iterdir()}
    (folder / "whole.json").write_text(json.dumps(digests))
    with pytest.raises(ExperimentError, match=r"checkpoint-4.*would run code"):
        run(name="run", resume=True, **settings)
    assert not marker.exists()
