"""Batches are those that finetune takes; data without tokens is refused."""

import pytest

from fastadapter.planning.lengths import Batching, Lengths, drawn_lengths, named_lengths, simulate
from fastadapter.training import UserError, epoch_batches

LENGTHS = Lengths("six", (3, 9, 4, 1, 7, 6), (1, 1, 2, 1, 3, 2), "a test")
TOTAL = sum(LENGTHS.totals)


def test_packed_rows_hold_every_token_once():
    load = simulate(LENGTHS, Batching(4, "packed"))
    assert load.useful == 1 and load.steps == 2 and load.tokens * load.steps == TOTAL
    assert load.squares * load.steps == sum(total**2 for total in LENGTHS.totals)
    assert load.learned * load.steps == sum(LENGTHS.completions)


def test_grouped_batches_are_those_of_finetune():
    load = simulate(LENGTHS, Batching(2))
    totals = LENGTHS.totals
    computed = [len(rows) * max(totals[row] for row in rows) for rows in epoch_batches(totals, 2, 0, 0)]
    assert load.tokens == sum(computed) / 3 and load.largest_tokens == max(computed)
    assert load.useful == TOTAL / sum(computed)


def test_padding_to_a_maximum():
    load = simulate(LENGTHS, Batching(3, "max_length", max_length=12))
    assert load.tokens == 36 and load.useful == TOTAL / 72
    with pytest.raises(UserError, match="below the longest record, 10 tokens"):
        simulate(LENGTHS, Batching(3, "max_length", max_length=9))


def test_a_step_waits_for_the_card_with_most_tokens():
    one, two = (simulate(LENGTHS, Batching(6, "packed", num_gpus=count)) for count in (1, 2))
    assert two.tokens >= one.tokens / 2 and two.useful == 1
    halves = simulate(LENGTHS, Batching(6, "packed", gradient_accumulation_steps=2))
    assert halves.tokens == one.tokens / 2 and halves.passes == 2


def test_a_pack_holds_so_much_and_the_rest_takes_further_passes():
    load = simulate(LENGTHS, Batching(6, "packed", pack_length=12))
    order = [LENGTHS.totals[row] for row in epoch_batches(LENGTHS.totals, 6, 0, 0)[0]]
    packs, tokens = 1, 0
    for total in order:
        if tokens + total > 12:
            packs, tokens = packs + 1, 0
        tokens += total
    assert load.passes == packs > 2 and load.tokens == TOTAL / packs and load.largest_tokens <= 12
    with pytest.raises(UserError, match="--pack-length 9 is below the longest record, 10 tokens"):
        simulate(LENGTHS, Batching(6, "packed", pack_length=9))
    with pytest.raises(UserError, match="--pack-length 9 goes with --packing"):
        Batching(6, pack_length=9)


def test_groups_of_steps_make_up_the_mean():
    load = simulate(named_lengths("reviews", True), Batching(16))
    assert sum(share for share, _ in load.groups) == pytest.approx(1)
    assert sum(share * group.tokens for share, group in load.groups) == pytest.approx(load.tokens)
    assert [group.tokens for _, group in load.groups] == sorted(group.tokens for _, group in load.groups)


def test_the_reviews_are_as_long_as_they_were_counted():
    """252,926 tokens of prompts and 8,309 labels with SmolLM2's tokenizer; 223,298 with MiniLM's."""
    assert sum(named_lengths("reviews", True).totals) == pytest.approx(252_926 + 8_309, rel=0.01)
    assert sum(named_lengths("reviews", False).totals) == pytest.approx(223_298, rel=0.01)


def test_drawn_lengths_have_the_mean_and_deviation_that_were_asked_for():
    totals = drawn_lengths(100, 40, 20_000, 0.5).totals
    mean = sum(totals) / len(totals)
    assert mean == pytest.approx(100, rel=0.02)
    assert (sum((x - mean) ** 2 for x in totals) / len(totals)) ** 0.5 == pytest.approx(40, rel=0.05)


def test_records_are_cut_at_their_end():
    cut = LENGTHS.cut(8)
    assert cut.totals == [4, 8, 6, 2, 8, 8] and cut.completions == (1, 0, 2, 1, 1, 2)
    assert "2 cut to 8" in cut.source


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Lengths("none", (), (), ""), "none: no records"),
        (lambda: Lengths("empty", (3, 0), (1, 0), ""), "empty: record 2 has no tokens"),
        (lambda: drawn_lengths(0, 1, 5, 0.5), "--mean-tokens must be at least 1, got 0"),
        (lambda: drawn_lengths(5, float("nan"), 5, 0.5), "--std-tokens must be at least 0, got nan"),
        (lambda: drawn_lengths(5, 1, 5, 0), "--completion-share must be above 0"),
        (lambda: Batching(16, num_gpus=0), "--num-gpus must be an int of at least 1, got 0"),
        (lambda: Batching(4, num_gpus=8), "--batch-size 4 must be at least --num-gpus 8 times"),
        (lambda: Batching(4, "max_length"), "--padding max_length needs --max-length"),
        (lambda: LENGTHS.cut(0), "--max-length must be at least 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()
