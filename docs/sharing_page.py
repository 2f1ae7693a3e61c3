"""The page of layer sharing: what travels, the criteria, and what each costs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from tables import NOTICE, markdown_table, place, read_table, read_values

from droppeft.sharing.criteria import CRITERIA

HEAD = """\
# Layer criteria

This page lists the criteria by which a client chooses its personal layers, and what each of them
costs. [Layer sharing](../concepts/layer_sharing.md) explains what personal layers are. The setting
is `sharing.criterion`. The layers that score highest stay on the client.

```
droppeft run method=droppeft sharing.fraction=0.5 sharing.criterion=relative_gradient_norm
```

"Runs the model" says whether computing the scores needs extra forward passes: once over
32 validation rows, or once per layer. "Collects" says what is kept during
training, which takes as much memory as the adapter's layers.

- `relative_gradient_norm` divides a layer's gradient norm by its typical norm among clients. The
  server computes the typical norms from what clients report anyway, and sends one number per layer.
  In the first round the gradient norm is used.
- `cka` needs at least four validation rows. A client with fewer shares its lower layers.

## Criteria
"""
COLUMNS = ("criterion", "what it measures", "runs the model", "collects")
COST_HEAD = """\

## What scoring costs

Measured by `benchmarks/sharing_criteria`: local trainings of {steps} steps of {batch} texts with
the built-in model at full depth, {repeats} of each kind in random order, on {place}. "Extra" is the
median CPU time compared with sharing everything, with a bootstrap 95 % interval. It includes saving
half of the layers. "Tokens" are run to score {rows} rows. `relative_gradient_norm` was not measured
separately; on the client it costs what `gradient_norm` costs.
"""


def sharing_page() -> str:
    """What is shared, by which criteria, and the measured cost of each."""
    rows = [
        (f"`{name}`", one.summary, one.runs_model, one.needs or "–")
        for name, one in CRITERIA.items()
    ]
    return f"{NOTICE}\n\n{HEAD}\n{markdown_table(COLUMNS, rows)}{_costs()}"


def _costs() -> str:
    content = read_values("sharing_criteria")
    head = COST_HEAD.format(
        steps=content["local_steps"],
        batch=content["batch_size"],
        repeats=content["repeats"],
        place=place(content["machine"]),
        rows=content["score_rows"],
    )
    repeats: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_table("sharing_criteria", "repeats"):
        repeats.setdefault(row["criterion"], []).append(row)
    plain = repeats.pop("none")
    rows = [
        (f"`{name}`", f"{own[0]['scoring_tokens']:,}", _extra(plain, own))
        for name, own in repeats.items()
        if name in CRITERIA
    ]
    return f"{head}\n{markdown_table(('criterion', 'tokens run to score', 'extra'), rows)}"


def _extra(plain: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> str:
    rng = np.random.default_rng(0)
    base, own = (np.array([row["cpu_s"] for row in rows]) for rows in (plain, repeats))
    drawn = [
        np.median(rng.choice(own, len(own))) / np.median(rng.choice(base, len(base))) - 1
        for _ in range(2000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{median(own) / median(base) - 1:+.1%} ({low:+.1%} to {high:+.1%})"
