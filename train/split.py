"""Which sequences train an estimator and which measure it: split by sequence, never by token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

HELD_OUT_SHARE = 0.1
VALIDATION_SHARE = 0.06
"""Share of the training sequences that choose what is kept of the training."""
MIN_SEQUENCES = 3


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """Sequences in recording order; one between the two ranges belongs to neither."""

    train: range
    """Sequences the estimators and the fitted baselines learn from."""
    held_out: range
    """Sequences everything is measured on."""

    def to_dict(self) -> dict[str, list[int]]:
        """JSON-ready form, which `read_json` rebuilds: first and one past the last of each part."""
        return {
            "train": [self.train.start, self.train.stop],
            "held_out": [self.held_out.start, self.held_out.stop],
        }


def split_sequences(num_sequences: int, held_out_share: float = HELD_OUT_SHARE) -> SequenceSplit:
    """Hold out the last sequences.

    Neighbours may share a document, so the sequence before the held-out ones is dropped.

    Args:
        num_sequences: In the traces, all shards together.
        held_out_share: Share to hold out, between 0 and 1; at least one sequence is.

    Raises:
        ValueError: If there are too few sequences, or the share is out of range.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must be between 0 and 1, not {held_out_share}.")
    if num_sequences < MIN_SEQUENCES:
        raise ValueError(
            f"The traces hold {num_sequences} sequences; at least {MIN_SEQUENCES} are needed: one "
            "to train on, one to measure on, one between. Collect more tokens."
        )
    num_held_out = min(max(1, round(num_sequences * held_out_share)), num_sequences - 2)
    num_train = num_sequences - num_held_out - 1
    return SequenceSplit(train=range(num_train), held_out=range(num_train + 1, num_sequences))


def split_off_validation(train: range) -> tuple[range, range]:
    """Set aside the last training sequences to choose by, less the one next to the others.

    Args:
        train: Training sequences.

    Returns:
        Sequences to fit on, and sequences to choose by; the latter is empty if there are too few.
    """
    if len(train) < MIN_SEQUENCES:
        return train, train[len(train) :]
    parts = split_sequences(len(train), VALIDATION_SHARE)
    return train[parts.train.start : parts.train.stop], train[parts.held_out.start :]


def rows_of(sequences: range, first_sequence: int, sequence_offsets: Tensor) -> slice:
    """The tokens of a shard that belong to a range of sequences.

    Args:
        sequences: Wanted, counted over all shards.
        first_sequence: The shard's first sequence, counted the same way.
        sequence_offsets: The shard's own, [N + 1], int64.

    Returns:
        Rows of the shard; empty if it holds none of the sequences.
    """
    last = len(sequence_offsets) - 1
    start = min(max(sequences.start - first_sequence, 0), last)
    stop = min(max(sequences.stop - first_sequence, 0), last)
    return slice(int(sequence_offsets[start]), int(sequence_offsets[stop]))


@dataclass(frozen=True, kw_only=True)
class HeldOutParts:
    """Held-out sequences in three parts, so that no figure is measured on what chose it."""

    calibrate: range
    """Probabilities are fitted here and judged on the next, and the other way round."""
    choose: range
    """So calibration and each layer's form are chosen on both."""
    report: range
    """What is reported is measured here."""


def split_held_out(held_out: range) -> HeldOutParts:
    """Split held-out sequences: a quarter, a quarter, half.

    Neighbours may share a document: one sequence before the reported ones is dropped where there
    are at least five.

    Raises:
        ValueError: If there are fewer than three sequences.
    """
    if len(held_out) < MIN_SEQUENCES:
        raise ValueError(
            f"{len(held_out)} held-out sequences are too few: at least {MIN_SEQUENCES} are needed, "
            "to calibrate, to choose and to report on. Collect more tokens, or shorter sequences."
        )
    report = held_out.start + (len(held_out) + 1) // 2
    gap = 1 if len(held_out) > 4 else 0
    middle = held_out.start + (report - gap - held_out.start + 1) // 2
    return HeldOutParts(
        calibrate=range(held_out.start, middle),
        choose=range(middle, report - gap),
        report=range(report, held_out.stop),
    )
