"""How close the gradients of a candidate are to those of full depth: estimates from batches.

Notation: f is a gradient at full depth, g one of a candidate, of one batch; G is the expectation
of f. Products with G use the mean of f over *other* batches, so that the noise of a batch does not
count as agreement with itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

Row = Mapping[str, Any]


def compared(gradient: torch.Tensor, batch: int, full: torch.Tensor) -> dict[str, float]:
    """Compare a candidate's gradient with those of full depth.

    Args:
        gradient: (P,), of a batch.
        batch: its number.
        full: (N, P), gradients of N batches at full depth.

    Returns:
        Products and squares of g, of f of the same batch, and of the mean of f over other batches;
        and the first-order decrease of the loss by a step of size 1 along the sign of g, with the
        largest one that there can be.
    """
    same = full[batch]
    others = (full.sum(0) - same) / (len(full) - 1)
    return {
        "with_same": _dot(gradient, same),
        "square": _dot(gradient, gradient),
        "full_square": _dot(same, same),
        "with_others": _dot(gradient, others),
        "sign_decrease": _dot(gradient.sign(), others),
        "most_sign_decrease": float(others.double().abs().sum()),
    }


def square_of_expectation(gradients: torch.Tensor) -> float:
    """Estimate the squared norm of the expectation of independent gradients (N, P).

    It is the mean product of two different ones, and therefore free of bias; it may be negative.
    """
    number = len(gradients)
    products = gradients.double() @ gradients.double().T
    return float(products.sum() - products.trace()) / (number * (number - 1))


def summary(
    rows: Sequence[Row],
    full_rows: Sequence[Row],
    means: torch.Tensor,
    full: torch.Tensor,
    *,
    all_choices: bool,
) -> dict[str, float | None]:
    """What the pages show of a candidate.

    Args:
        rows: of `compared`, with `batch` and `cost`, one for each batch and draw.
        full_rows: the same of full depth, one for each of these batches.
        means: (n, P), the mean of g over the draws of each of these batches.
        full: (N, P), gradients of N batches at full depth.
        all_choices: whether the draws are all that there are, not a sample.

    Returns:
        - cost: FLOPs of a step, as a share of full depth.
        - cosine: of g and f of the same batch, mean.
        - expectation_cosine: of the expectations of g and f over batches and draws; `None` if noise
          hides one of them. The estimates of their squared norms are beside it.
        - second_moment: mean square of g, as a share of that of f of the same batches.
        - draws_moment: the part of it that is the variance over the draws of a batch.
        - the values of `merits`, each with its standard error (`_error`) by the jackknife over
          batches.
    """
    full_moment = fmean(row["full_square"] for row in full_rows)
    squares = fmean(row["square"] for row in rows)
    drawn = len(rows) / len(means)
    variance = squares - float(means.double().square().sum()) / len(means)
    if not all_choices and drawn > 1:
        variance *= drawn / (drawn - 1)
    product = fmean(row["with_others"] for row in rows)
    norms = square_of_expectation(means), square_of_expectation(full)
    return {
        "cost": fmean(row["cost"] for row in rows),
        "cosine": fmean(cosine(row) for row in rows),
        "expectation_cosine": product / math.sqrt(math.prod(norms)) if min(norms) > 0 else None,
        "expectation_square": norms[0],
        "full_expectation_square": norms[1],
        "second_moment": squares / full_moment,
        "draws_moment": variance / full_moment,
        **_with_errors(merits, rows, full_rows),
    }


def merits(rows: Sequence[Row], full_rows: Sequence[Row]) -> dict[str, float]:
    """Figures of merit, each divided by the cost and by its value at full depth.

    Returns:
        - batch: the decrease of the loss of the batch itself by a step of gradient descent at the
          best rate of the candidate, if the loss curves alike in all directions:
          (E g·f)² / E|g|², a squared cosine.
        - best: the same for the expected loss, (E g·G)² / E|g|².
        - plain: the first-order decrease of the expected loss at the same rate, E g·G.
        - signs: the same if each value that has a gradient moves by the same amount, as AdamW's
          first step does.
    """
    cost = fmean(row["cost"] for row in rows)
    batch, plain, moment, signs = (
        fmean(row[of] for row in rows) / fmean(row[of] for row in full_rows)
        for of in ("with_same", "with_others", "square", "sign_decrease")
    )
    found = {
        "batch": batch * abs(batch) / moment if moment else 0.0,
        "best": plain * abs(plain) / moment if moment else 0.0,
        "plain": plain,
        "signs": signs,
    }
    return {name: value / cost for name, value in found.items()}


def _with_errors(
    of: Callable[[Sequence[Row], Sequence[Row]], dict[str, float]],
    rows: Sequence[Row],
    full_rows: Sequence[Row],
) -> dict[str, float]:
    """Values with their standard errors, from the values without one batch each."""
    batches = sorted({row["batch"] for row in rows})
    without = [
        of(*([row for row in some if row["batch"] != left_out] for some in (rows, full_rows)))
        for left_out in batches
        if len(batches) > 1
    ]
    found = {}
    for name, value in of(rows, full_rows).items():
        values = [one[name] for one in without] or [value]
        spread = sum((one - fmean(values)) ** 2 for one in values)
        found |= {
            name: value,
            f"{name}_error": math.sqrt(spread * (len(values) - 1) / len(values)),
        }
    return found


def cosine(row: Row) -> float:
    """Cosine of g and f of the same batch; 0 if one of them is 0."""
    norms = math.sqrt(row["square"] * row["full_square"])
    return row["with_same"] / norms if norms else 0.0


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.double() @ other.double())
