"""Self-attention relations of teacher and student for one held-out sentence, side by side.

Shape suffixes in this file:
    B sequences, here 1   S tokens   D size of a state   R relation heads   H relation head size
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.corpus import held_out_sentences, special_ids
from minilm_exp.errors import ExperimentError
from minilm_exp.objective_settings import RelationTerm, layer_pairs
from minilm_exp.provenance import fingerprint_model
from minilm_exp.relations import relation_losses
from minilm_exp.result import Result
from minilm_exp.settings import Settings
from minilm_exp.states import State, StateTap
from minilm_exp.student import load_checkpoint
from minilm_exp.teacher import fingerprint_teacher, load_encoder, load_tokenizer
from minilm_exp.vocabulary import match_vocabularies

# Tokens of the sentence, special ones included.
FEWEST_TOKENS, MOST_TOKENS = 8, 16
# Sentences that are looked at before one is cut.
_NUM_SENTENCES = 2000
# Columns of a label; a letter of Chinese takes two.
_LABEL_COLUMNS = 12


@dataclass(frozen=True)
class Compared:
    """One relation of one pair of layers.

    Attributes:
        pair: The states, such as query and key.
        teacher_layer: Counted from 1.
        student_layer: Counted from 1.
        num_relation_heads: Over which the maps are means.
        teacher: The relation (S, S); each row sums to 1.
        student: The same.
        divergence: KL(teacher || student) in nats, the mean over relation heads and tokens, which
            is what is distilled.
    """

    pair: tuple[str, str]
    teacher_layer: int
    student_layer: int
    num_relation_heads: int
    teacher: Tensor
    student: Tensor
    divergence: float

    @property
    def difference(self) -> float:
        """The largest between the two maps."""
        return float((self.teacher - self.student).abs().max())


@dataclass(frozen=True)
class HeatMaps:
    """What the last distillation on the corpus compares, for one sentence.

    Attributes:
        teacher: Its name; that of a stage where a stage's student is the teacher.
        tokens: Of the sentence (S).
        compared: The relations.
    """

    teacher: str
    tokens: list[str]
    compared: list[Compared]


def heat_maps(settings: Settings, result: Result) -> HeatMaps:
    """Runs teacher and student, as they lie on disk, on a held-out sentence.

    It is the first one of the corpus's held-out documents that has FEWEST_TOKENS to MOST_TOKENS
    tokens of the student; where none has, the beginning of the first.

    Raises:
        ExperimentError: There is nothing to compare, for the reason it says.
    """
    stage = settings.origin
    relations = [t for t in stage.settings.objective.terms.values() if isinstance(t, RelationTerm)]
    if settings.recipe.name == "finetune" or stage.settings.data == "task":
        raise ExperimentError("nothing was distilled on a corpus")
    if not relations:
        raise ExperimentError(f"objective={stage.settings.objective.name} compares no relations")
    if settings.corpus.pretokenized:
        raise ExperimentError("the corpus has no text, only token ids")
    folder = Path(result.folder)
    student, tokenizer = _checkpoint(settings, folder / "student")
    if result.student_fingerprint not in (None, fingerprint_model(folder / "student")):
        raise ExperimentError("the student's files are not those that the run wrote")
    teacher_tokenizer = load_tokenizer(settings.teacher)
    fingerprint = result.made_by.get("input.corpus", "")
    ids = _sentence(held_out_sentences(settings, teacher_tokenizer, fingerprint), tokenizer)
    if stage.teacher == "teacher":
        if fingerprint_teacher(settings.teacher) != result.made_by.get("input.teacher"):
            raise ExperimentError("the teacher's files are not those that the run read")
        teacher = load_encoder(settings.teacher)
    else:
        place = folder / "stages" / stage.teacher / "student"
        teacher, teacher_tokenizer = _checkpoint(settings, place)
    teacher_ids = match_vocabularies(tokenizer, teacher_tokenizer)
    ids_BS = torch.tensor([ids])
    compared = _compare(
        relations,
        (teacher, ids_BS if teacher_ids is None else teacher_ids[ids_BS]),
        (student, ids_BS),
        stage.settings.layer_selection.teacher_layer,
    )
    tokens = [_label(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return HeatMaps(stage.settings.teacher.name, tokens, compared)


def _checkpoint(
    settings: Settings, folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if not folder.is_dir():
        raise ExperimentError(f"there is no {folder.name} in {folder.parent.name}")
    trusts_code = settings.teacher.trust_remote_code
    return load_checkpoint(str(folder), None, "the student of the run", trusts_code)


def _sentence(sentences: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids with the tokens that open and close a sequence."""
    opening, closing = special_ids(tokenizer)
    first: list[int] = []
    for sentence in itertools.islice(sentences, _NUM_SENTENCES):
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        if FEWEST_TOKENS <= len(ids) + 2 <= MOST_TOKENS:
            return [opening, *ids, closing]
        if len(ids) > len(first):
            first = first if len(first) + 2 > MOST_TOKENS else ids
    if not first:
        raise ExperimentError("the held-out text of the corpus is no longer in the cache")
    return [opening, *first[: MOST_TOKENS - 2], closing]


@torch.no_grad()
def _compare(
    terms: list[RelationTerm],
    teacher: tuple[PreTrainedModel, Tensor],
    student: tuple[PreTrainedModel, Tensor],
    teacher_layer: int,
) -> list[Compared]:
    """Every relation of the terms; teacher and student are models with the ids they read (B, S)."""
    numbers = (teacher[0].config.num_hidden_layers, student[0].config.num_hidden_layers)
    wanted = [
        (term.num_relation_heads, pair, layers)
        for term in terms
        for layers in layer_pairs(term.layers, *numbers, teacher_layer)
        for pair in term.state_pairs
    ]
    taken = [
        _states(*model, {State(name, layers[side]) for _, pair, layers in wanted for name in pair})
        for side, model in enumerate((teacher, student))
    ]
    found = []
    for num_heads, pair, layers in dict.fromkeys(wanted):
        states = [
            {name: taken[side][State(name, layers[side])] for name in pair} for side in (0, 1)
        ]
        divergence, _ = relation_losses(states[0], states[1], [pair], num_heads)
        teacher_SS, student_SS = (
            mean_relation(own[pair[0]], own[pair[1]], num_heads) for own in states
        )
        found.append(Compared(pair, *layers, num_heads, teacher_SS, student_SS, float(divergence)))
    return found


def _states(model: PreTrainedModel, ids_BS: Tensor, wanted: set[State]) -> dict[State, Tensor]:
    model.eval()
    tap = StateTap(model, wanted)
    try:
        return {state: taken.float() for state, taken in tap(input_ids=ids_BS).items()}
    finally:
        tap.close()


def mean_relation(first_BSD: Tensor, second_BSD: Tensor, num_relation_heads: int) -> Tensor:
    """The relation of two states of one sequence, the mean over relation heads (S, S).

    MiniLMv2, equations 7 and 8: the softmax of the scaled dot products.
    """
    heads_RSH = [
        state[0].unflatten(-1, (num_relation_heads, -1)).transpose(0, 1)
        for state in (first_BSD, second_BSD)
    ]
    scores_RSS = heads_RSH[0] @ heads_RSH[1].mT * heads_RSH[0].shape[-1] ** -0.5
    return scores_RSS.softmax(dim=-1).mean(dim=0)


def _label(token: str) -> str:
    """Cut, and without characters that would turn the rest of the page around."""
    # Of byte-level tokenizers and SentencePiece, what stands for a blank.
    token = token.replace("\u0120", "\u2423").replace("\u2581", "\u2423")
    shown = "".join(sign for sign in token if unicodedata.category(sign)[0] not in "CZ")
    columns = itertools.accumulate(
        2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in shown
    )
    number = sum(column <= _LABEL_COLUMNS for column in columns)
    return shown if number == len(shown) else f"{shown[: number - 1]}…"
