"""Random sizes, and logits and heads from ordinary to hostile, row by row."""

import math
import random

import numpy as np


class Draw(random.Random):
    """Random choices, and numpy's arrays from the same seed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.arrays = np.random.default_rng(self.getrandbits(64))

    def chance(self, share):
        return self.random() < share

    def weighted(self, table):
        """A value of {value: weight} or [(value, weight)]; what can be called is called with this object."""
        values, weights = zip(*(table.items() if isinstance(table, dict) else table), strict=True)
        (value,) = self.choices(values, weights)
        return value(self) if callable(value) else value


def draw_shape(draw, small):
    """Leading dimensions (...) of at most 40 rows, 6 where they are to be few."""
    most = 6 if small else 40
    dims = draw.weighted({0: 1, 1: 5, 2: 5, 3: 2, 4: 1})
    if dims == 1:
        return (draw.randint(0, most) if draw.chance(0.95) else 0,)
    shape, left = [], most
    for _ in range(dims):
        size = draw.weighted({0: 0.3, 1: 2, 2: 3, 3: 2, 4: 1, 5: 1, 7: 0.5, 13: 0.3})
        size = min(size, max(left, 1))
        left //= max(size, 1)
        shape.append(size)
    return tuple(draw.sample(shape, len(shape)))


CLASSES = [
    (1, 0.5), (2, 1), (3, 1), (lambda d: d.randint(4, 40), 6), (lambda d: d.randint(41, 200), 4),
    (64, 0.5), (128, 0.5), (256, 0.3), (lambda d: d.randint(201, 700), 2),
]  # fmt: skip


def pick_other(draw, V, t):
    return (t + draw.randint(1, V - 1)) % V if V > 1 else t


# What a row of logits may look like: changes row [V], whose target is t, in place.
def _shifted(low, high):
    def change(row, t, draw):
        row[t] = np.max(row) + draw.uniform(low, high)

    return change


def _set(value, at="some"):
    def change(row, t, draw):
        if at == "all":
            row[:] = value
        elif at == "target":
            row[t] = value
        elif at == "tail":
            row[draw.randint(0, len(row)) :] = value
            row[t] = draw.uniform(-3, 3)
        else:
            where = draw.arrays.random(len(row)) < draw.choice([0.02, 0.3, 0.9])
            where[t] = False
            row[where] = value

    return change


def _huge(row, t, draw):
    row[draw.randrange(len(row))] = draw.choice([1e30, -1e30])
    if draw.chance(0.5):
        row[t] = draw.choice([1e30, -1e30])


def _near_target(row, t, draw):
    row[:] = np.round(row)
    row[t] = row[pick_other(draw, len(row), t)]


def _offset(row, t, draw):
    row += draw.choice([1e4, -1e4, 1e2, 2.0**20])


ORDINARY = [
    (None, 6), (_shifted(0, 3), 4), (_shifted(3, 12), 3), (_shifted(12, 45), 1), (_shifted(-60, -5), 1),
    (_shifted(-103, -88), 0.5), (_shifted(-1e4, -1e3), 0.2), (_near_target, 0.5), (_offset, 0.3),
    (_set(0.7, "all"), 0.3), (_set(-math.inf), 0.6), (_set(-1e30), 0.3), (_set(-math.inf, "tail"), 0.6),
    (_set(1e-41, "all"), 0.1),
]  # fmt: skip
HOSTILE = [
    (_set(math.nan, "target"), 1), (_set(math.nan), 1), (_set(math.inf), 1), (_set(math.inf, "target"), 1),
    (_set(-math.inf, "all"), 1), (_set(-math.inf, "target"), 2), (_huge, 2), (_set(1e30, "all"), 1), (None, 3),
]  # fmt: skip
DEAD = [(_set(math.nan, "all"), 1), (_set(math.inf), 1), (_set(-math.inf, "all"), 1), (_set(math.nan), 1), (None, 3)]


def _towards(p):
    """The target's probability a little above or below p: on one side of a threshold, but not far."""

    def change(row, t, draw):
        others = np.delete(row, t)
        near = p * (1 + draw.choice([-1, 1]) * draw.choice([1e-2, 1e-3, 1e-4, 3e-5]))
        if len(others) and near < 1:
            row[t] = others.max() + np.log(np.exp(others - others.max()).sum()) + math.log(near) - math.log1p(-near)

    return change


def draw_logits(draw, target, dead, V, hostile, threshold=None):
    rows = draw.arrays.standard_normal((len(target), V)) * draw.choice([0.1, 1, 2, 4])
    for row, t, is_dead in zip(rows, target, dead, strict=True):
        t = t if 0 <= t < V else 0
        table = DEAD if is_dead else HOSTILE if hostile and draw.chance(0.4) else ORDINARY
        (change,) = draw.choices(*zip(*table, strict=True))
        if threshold is not None and not is_dead and draw.chance(0.15):
            change = _towards(threshold)
        if change is not None:
            change(row, t, draw)
    return rows


def draw_head(draw, target, dead, V, D, hostile, bias):
    """Input [N, D], weight [V, D] and bias [V]; some rows point at their target's weight or away from it.

    In some, logits are multiples of 1/4 below 64, which 16 bits hold: then only gradients are rounded.
    """
    exact = draw.chance(0.4)
    W = draw.arrays.standard_normal((V, D)) / math.sqrt(D) * draw.choice([0.3, 1, 2])
    x = draw.arrays.standard_normal((len(target), D))
    b = draw.arrays.standard_normal(V) * 0.3
    if exact:
        W, x, b = draw.arrays.integers(-4, 5, W.shape) / 4, np.round(x).clip(-2, 2), np.round(b * 8) / 4
    if bias and V > 2 and draw.chance(0.15):
        masked = draw.arrays.random(V) < 0.4
        masked[np.clip(target, 0, V - 1)] = False
        b[masked] = -math.inf
    for n, t in enumerate(target):
        towards = W[t if 0 <= t < V else 0]
        by = draw.choice([0, 0, 2, 6, 12, -6])
        if not exact:
            x[n] += towards / max((towards**2).sum(), 0.1) * by
        elif by:
            x[n] = np.sign(towards) * np.sign(by) * draw.choice([1, 2])
        if dead[n] or (hostile and draw.chance(0.2)):
            x[n, draw.randrange(D)] = draw.choice([math.nan, math.inf, 1.0])
            if draw.chance(0.3):
                x[n] = math.nan if dead[n] else 0
    return x, W, b if bias else None
