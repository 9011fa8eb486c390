"""What a loss can say about its tokens from the same pass."""

from typing import NamedTuple

from torch import Tensor

# What the kernels keep of each row: the fields of `rows` (6, ...), for backward and for the statistics. The entropy
# follows, as a seventh, where it is asked for.
LOG_PROB, LSE, COEF, ROW_MAX, SUM_EXP, CORRECT, ROW_ENTROPY = range(7)
N_FIELDS = 6
# What is summed up of each part of a row, `sums` (F, ...): largest u, sum of exp((u - largest) unit), u of the target
# (NaN if it is not in that part); with label smoothing the sum of u; and last, where it is asked for, the entropy of
# the part by itself. See `sweeps` for u and unit.
SHARD_MAX, SHARD_SUM_EXP, SHARD_TARGET, SHARD_SUM = range(4)


def n_fields(entropy: bool) -> int:
    """Fields of `rows`."""
    return N_FIELDS + entropy


def n_sums(smoothing: bool, entropy: bool) -> int:
    """Fields of `sums`."""
    return SHARD_SUM + smoothing + entropy


class LossStats(NamedTuple):
    """Statistics of one call, detached and on the device of the logits; reading a value is what synchronises.

    Per row, in the shape of the target:
        log_prob: log-probability of the target, float32 (float64 for float64 logits); 0 for ignored rows.
        lse: logsumexp of the logits after scale and softcap, dtype as log_prob; 0 for ignored rows.
        kept: bool, the rows that have a gradient: not truncated, not ignored, not of zero weight.
        correct: bool, the target's logit is the largest of its row; False for ignored rows.
        valid: bool, the rows that are not ignored.
        entropy: of the predicted distribution softmax(z), in nats, dtype as log_prob; 0 for ignored rows. None unless
            return_stats is "entropy".
    0-d int64:
        n_valid, n_kept: how many rows are valid, and kept.
    0-d float32:
        class_fraction: share of the classes that took part in the matmuls of the gradients, the mean over the rows that
            did. 1 unless a linear loss with a `gradient_tolerance` has left some out; 1 as well where the gradients are
            made in backward (reduction="none", allow_retain_graph) or not at all: nothing is known yet.
    """

    log_prob: Tensor
    lse: Tensor
    kept: Tensor
    correct: Tensor
    valid: Tensor
    n_valid: Tensor
    n_kept: Tensor
    class_fraction: Tensor
    entropy: Tensor | None = None

    # Shares are in the dtype of log_prob: a quotient of integers would have the default one, whatever that is.

    @property
    def truncated_fraction(self) -> Tensor:
        """Share of the valid rows that were dropped; 0 if no row is valid."""
        return (self.n_valid - self.n_kept).to(self.log_prob.dtype) / self.n_valid.clamp(min=1)

    @property
    def accuracy(self) -> Tensor:
        """Share of the valid rows whose target has the largest logit; 0 if no row is valid."""
        return self.correct.sum().to(self.log_prob.dtype) / self.n_valid.clamp(min=1)

    @property
    def mean_confidence(self) -> Tensor:
        """Mean probability of the target over the valid rows; 0 if no row is valid."""
        return self.log_prob.exp().where(self.valid, 0).sum() / self.n_valid.clamp(min=1)


def from_rows(rows: Tensor, valid: Tensor, class_fraction: Tensor) -> LossStats:
    """Statistics in memory of their own: whoever changes them changes nothing that backward needs."""
    kept = rows[COEF] != 0
    return LossStats(
        log_prob=rows[LOG_PROB].clone(),
        lse=rows[LSE].clone(),
        kept=kept,
        correct=rows[CORRECT] != 0,
        valid=valid,
        n_valid=valid.sum(),
        n_kept=kept.sum(),
        class_fraction=class_fraction,
        entropy=rows[ROW_ENTROPY].clone() if len(rows) > ROW_ENTROPY else None,
    )
