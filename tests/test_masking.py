"""Which tokens masked language modelling predicts, and what stands in their place."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.head_terms import NO_LABEL
from minilm_exp.masking import Masker

NUM_ROWS, NUM_ORDINARY = 400, 128


def ordinary_ids(tokenizer):
    return [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]


def draw_ids(tokenizer, num_rows, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(ordinary_ids(tokenizer))
    return ordinary[torch.randint(len(ordinary), (num_rows, num_tokens), generator=generator)]


def with_ends(tokenizer, ids):
    ends = [torch.full((len(ids), 1), i) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], ids, ends[1]], dim=1)


def mask_all(tokenizer, ids, attention_mask=None, index=None, step=3, seed=7):
    index = torch.arange(len(ids)) if index is None else torch.tensor(index)
    return Masker(tokenizer, seed)(ids, attention_mask, index, step)


def is_same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.fixture(scope="module")
def many(tiny_tokenizer):
    """Many tokens without special ones, the same masked, and which of them are selected."""
    ids = draw_ids(tiny_tokenizer, NUM_ROWS, NUM_ORDINARY)
    masked, labels = mask_all(tiny_tokenizer, ids)
    return ids, masked, labels != NO_LABEL


# Shares


def test_share_of_selected_tokens(many):
    """Another share than BERT's 15%."""
    _, _, is_selected = many
    assert is_selected.double().mean().item() == pytest.approx(0.15, abs=0.006)
    per_row = is_selected.sum(dim=1).double()
    # As many as of independent draws; a fixed number per sequence would have no variance.
    assert per_row.var().item() == pytest.approx(NUM_ORDINARY * 0.15 * 0.85, rel=0.3)


def test_every_place_is_selected_as_often(many):
    """Only the first tokens of a sequence, or places that are counted from another one."""
    _, _, is_selected = many
    per_place = is_selected.double().mean(dim=0)
    assert per_place.min() > 0.06 and per_place.max() < 0.24


def test_fates_of_selected_tokens(many, tiny_tokenizer):
    """Everything masked, or shares other than 80, 10 and 10%."""
    ids, masked, is_selected = many
    now, before = masked[is_selected], ids[is_selected]
    is_mask, is_kept = now == tiny_tokenizer.mask_token_id, now == before
    shares = [which.double().mean().item() for which in (is_mask, is_kept, ~is_mask & ~is_kept)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.015)


def test_other_tokens_are_of_the_whole_vocabulary(many, tiny_tokenizer):
    """A token that always stands for others, or a vocabulary whose end is never drawn."""
    ids, masked, is_selected = many
    is_other = is_selected & (masked != ids) & (masked != tiny_tokenizer.mask_token_id)
    counts = torch.bincount(masked[is_other], minlength=len(tiny_tokenizer))
    assert len(counts) == len(tiny_tokenizer)
    counts = counts[ordinary_ids(tiny_tokenizer)]
    assert (counts > 0).double().mean() > 0.95
    assert counts.max() < 5 * counts.double().mean()


# What is never selected


def test_labels_are_the_original_ids(tiny_tokenizer):
    """Labels of masked ids, or a changed token that is not predicted."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 50, 30))
    masked, labels = mask_all(tiny_tokenizer, ids, torch.ones_like(ids))
    is_selected = labels != NO_LABEL
    assert masked.shape == labels.shape == ids.shape and masked.dtype == labels.dtype == ids.dtype
    assert torch.equal(labels[is_selected], ids[is_selected])
    assert torch.equal(masked[~is_selected], ids[~is_selected])
    assert (masked != ids).any()


def test_special_tokens_are_never_selected(tiny_tokenizer):
    """Ends of sequences, unknown words or masks that are to be predicted."""
    ids = draw_ids(tiny_tokenizer, 200, 20)
    special = sorted(tiny_tokenizer.all_special_ids)
    assert len(special) == 5
    places = [0, 4, 9, 12, 19]
    ids[:, places] = torch.tensor(special)
    for mask in (None, torch.ones_like(ids)):
        masked, labels = mask_all(tiny_tokenizer, ids, mask)
        assert (labels[:, places] == NO_LABEL).all()
        assert torch.equal(masked[:, places], ids[:, places])
        # All others are, some time.
        assert (labels != NO_LABEL).any(dim=0).sum() == 15


@pytest.mark.parametrize("as_type", [torch.long, torch.bool], ids=str)
@pytest.mark.parametrize("padding", [slice(0, 6), slice(14, 20), slice(7, 11)], ids=str)
def test_padding_is_never_selected(padding, as_type, tiny_tokenizer):
    """Padding known by its id only, or thought to be on the right."""
    ids = draw_ids(tiny_tokenizer, 200, 20)
    mask = torch.ones_like(ids)
    mask[:, padding] = 0
    masked, labels = mask_all(tiny_tokenizer, ids, mask.to(as_type))
    assert (labels[:, padding] == NO_LABEL).all()
    assert torch.equal(masked[:, padding], ids[:, padding])
    assert torch.equal((labels != NO_LABEL).any(dim=0), mask[0].bool())


@pytest.mark.parametrize("num_ordinary", [1, 2, 3])
def test_one_token_of_a_sequence_at_least(num_ordinary, tiny_tokenizer):
    """A short sequence that is computed for nothing, or a token too many of it."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 100, num_ordinary))
    masked, labels = mask_all(tiny_tokenizer, ids, torch.ones_like(ids))
    num_selected = (labels != NO_LABEL).sum(dim=1)
    assert (num_selected >= 1).all()
    # Independent draws select none in most; those have exactly one.
    assert (num_selected == 1).double().mean() > 0.85
    assert (labels != NO_LABEL).any(dim=0).sum() == num_ordinary
    assert (masked == tiny_tokenizer.mask_token_id).any() and (masked == ids).all(dim=1).any()


def test_sequence_of_special_tokens_stays_as_it_is(tiny_tokenizer):
    """The least of no draws, or an end that is masked because one token has to be."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 3, 10))
    special = torch.tensor([tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id])
    ids[1] = special.repeat(6)
    masked, labels = mask_all(tiny_tokenizer, ids, torch.ones_like(ids))
    assert torch.equal(masked[1], ids[1]) and (labels[1] == NO_LABEL).all()
    assert (labels[[0, 2]] != NO_LABEL).any(dim=1).all()
    # Nor where all that is not special is padding, of a whole batch.
    masked, labels = mask_all(tiny_tokenizer, ids, torch.zeros_like(ids))
    assert torch.equal(masked, ids) and (labels == NO_LABEL).all()


# What the selection depends on


NUMBERS = [5, 0, 123_456_789_012, 17]


def test_other_rows_do_not_matter(tiny_tokenizer):
    """Random numbers drawn for the whole batch: other micro-batches would train on another loss."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 4, 40))
    masked, labels = mask_all(tiny_tokenizer, ids, torch.ones_like(ids), NUMBERS)
    assert len({tuple(row) for row in (labels != NO_LABEL).tolist()}) == 4
    for rows in ([2], [3, 1], [3, 2, 1, 0], [0, 0]):
        numbers = [NUMBERS[row] for row in rows]
        found = mask_all(tiny_tokenizer, ids[rows], torch.ones_like(ids[rows]), numbers)
        assert is_same(found, (masked[rows], labels[rows]))


@pytest.mark.parametrize("width", [(0, 5), (5, 0)], ids=["right", "left"])
def test_amount_of_padding_does_not_matter(width, tiny_tokenizer):
    """A longer sequence in the batch that changes what is selected of a short one."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 4, 40))
    mask = torch.ones_like(ids)
    pad = torch.nn.functional.pad
    wider = mask_all(
        tiny_tokenizer, pad(ids, width, value=tiny_tokenizer.pad_token_id), pad(mask, width)
    )
    core = slice(width[0], width[0] + ids.shape[1])
    found = [tensor[:, core] for tensor in wider]
    assert is_same(found, mask_all(tiny_tokenizer, ids, mask))


def test_nothing_but_seed_step_and_number_matters(tiny_tokenizer):
    """Global random numbers: a resumed run selects others, and dropout changes with the masks."""
    ids = draw_ids(tiny_tokenizer, 4, 40)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mask_all(tiny_tokenizer, ids, index=NUMBERS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    masker = Masker(tiny_tokenizer, 7)
    for step in (0, 2, 3):  # the last is that of `first`
        found = masker(ids, None, torch.tensor(NUMBERS), step)
    assert is_same(found, first)


CHANGES = [
    {"step": 4},
    {"seed": 8},
    {"index": [6, 1, 123_456_789_013, 18]},
    # Numbers that are written or added to each other: 7 and 3 are the seed and the step.
    {"seed": 3, "step": 7},
    {"seed": 8, "step": 2},
    {"seed": 6, "step": 4},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_seed_step_or_number_selects_others(change, tiny_tokenizer):
    """The same tokens predicted in every epoch, in every run, or at the same places of all rows."""
    ids = draw_ids(tiny_tokenizer, 4, 40)
    first = mask_all(tiny_tokenizer, ids, index=NUMBERS)
    other = mask_all(tiny_tokenizer, ids, **{"index": NUMBERS} | change)
    is_other = ((first[1] != NO_LABEL) != (other[1] != NO_LABEL)).any(dim=1)
    assert is_other.all()


def test_step_and_number_are_told_apart(tiny_tokenizer):
    """Step 1 of example 11 that is step 11 of example 1, or a number cut to 32 bits."""
    ids = draw_ids(tiny_tokenizer, 1, 60)
    settings = [(1, 11, 1), (1, 1, 11), (11, 1, 1), (11, 11, 1), (1, 11, 11), (1, 1, 111)]
    settings += [(1, 1, 1 + 2**31), (1, 1, 1 + 2**32)]
    found = {
        tuple(mask_all(tiny_tokenizer, ids, None, [number], step, seed)[1][0].tolist())
        for seed, step, number in settings
    }
    assert len(found) == len(settings)


def test_inputs_are_not_changed(tiny_tokenizer):
    """A batch that the teacher, or the next epoch, gets with the masks of this one."""
    ids = with_ends(tiny_tokenizer, draw_ids(tiny_tokenizer, 4, 40))
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    index = torch.tensor(NUMBERS)
    copies = [tensor.clone() for tensor in (ids, mask, index)]
    masked, _ = Masker(tiny_tokenizer, 7)(ids, mask, index, 3)
    assert not torch.equal(masked, ids)
    assert is_same((ids, mask, index), copies)


def test_tokenizer_without_a_mask_is_refused():
    """An error from the middle of a run, or the unknown word as a mask."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )
    with pytest.raises(ExperimentError, match="no mask token"):
        Masker(tokenizer, 7)
