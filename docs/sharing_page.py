"""The page of layer sharing: what travels, the criteria, and what each costs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from tables import NOTICE, markdown_table, place, read_table, read_values

from droppeft.sharing.criteria import CRITERIA

HEAD = """\
# Personalised layer sharing

Each client scores the layers of its adapter after its training, keeps those that score highest to
itself and shares the others (DropPEFT, arXiv:2503.10217, which scores by gradient norm; the other
criteria, hysteresis and all that is said of files and of lost turns is ours).

```
droppeft run sharing.fraction=0.5                             # half of the layers travel
droppeft run sharing.fraction=0.5 sharing.criterion=position  # always the lower half
droppeft run sharing.head=personal                            # all layers travel, the head does not
droppeft run method=fedsa_lora                                # LoRA's A travels, B does not
droppeft run method=ditto                                     # all travels, and each keeps its own
droppeft run method=local                                     # nothing is sent
```

By default all layers are shared (`sharing.fraction=1`): see [findings](findings.md) for what is
known of smaller fractions.

- **Order in time.** A turn begins with the global values of the layers that the client shared in
  its last merged turn, and with its own of the others; a first turn begins with everything
  global. What it chooses after its training rules its upload, and what it downloads next time. So
  a fraction of one half halves what layers upload from the first turn on, and what they download
  from the second; the head travels whole.
- **Which layers there is a choice about**: those that the turn trained and ran. Others stay what
  they are, and all begin as shared. The fraction is of the layers that there is a choice about, and
  halves are rounded up: one half of three layers is two, a quarter of six is two.
- **Hysteresis.** A shared layer takes the place of a kept one when it scores higher by more than
  `sharing.hysteresis` of that one's score; by `position` there is none.
- **What is unusual** (`sharing.criterion=relative_gradient_norm`, ours). By gradient norm all
  clients keep much the same layers, which nobody then teaches the global model. This criterion
  divides the norm by what is usual in the layer: the server fits that to the norms that clients
  have reported (it gets them anyway) and tells every client one number per layer. In the first
  round nothing is known, and it is the gradient norm.
- **On the server** a layer becomes the mean over the clients that sent it, weighted by rows
  (`sharing.weights=active_steps`: times the steps that it ran in). A layer that nobody sent keeps
  its value. `coverage` in `rounds.jsonl` counts, for each layer, who sent it; `shared` and
  `scores` in `clients.jsonl` say what each client chose. A layer that the turn did not run is not
  sent and has the score 0; in `shared` it stands as what it was before.
- **On the client** what is kept lies in `$DROPPEFT_STATE`, else in `droppeft` in `$XDG_STATE_HOME`
  or `~/.local/state`: a file per turn, written in one step, with a checksum and the names of run,
  client and round, readable by its owner alone. While a
  layer is personal it is in no message and in no checkpoint; once it is shared, what it has learnt
  before is in what is sent. The server says from which turn the next begins, so that a lost or
  late reply, a killed process or a server that goes back to an older checkpoint change nothing. A
  file that is gone or damaged costs the client that turn; with the next one it gets everything
  global again. When a run ends, such a client is measured with the global layers (and named in
  `personalised_lost` of `result.json`).
- **Two accuracies.** A run ends with the global model on the global test set and with every
  client's own model on that client's test rows: mean, worst tenth, deviation.
  `evaluation.newcomers=true` also measures what clients that never trained have after one epoch
  of their own (learning rates fall from their peaks to nothing in it). With a personal head there
  is no global accuracy.
- **Export.** `droppeft export RUN --client 3` writes client 3's own model as an adapter, with
  `--merge` as a plain model; what it keeps must be on this machine.

LoRA's A and B are averaged by themselves, and the mean of products is not the product of means.
`sharing.factors=product` averages B·A over the holders of a layer and cuts the result to the rank
by SVD: nearer, and still not exact when the mean has more rank.

`cka` compares rows: a client with fewer than four validation rows cannot tell its layers apart by
it, and shares the lower ones.

A prompt is in no layer, so that adapter types of the kind *global* have nothing to keep.

## Criteria
"""
COLUMNS = ("criterion", "what it measures", "runs the model", "collects")
COST_HEAD = """\

## What scoring costs

`benchmarks/sharing_criteria`: turns of {steps} steps of {batch} texts of the built-in model at
full depth, {repeats} of each kind in random order, on {place}. Extra is the median of a turn's
CPU time over that of turns that share everything, less one, with a bootstrap 95 % interval;
keeping half of the layers is in it (with `position` there is nothing else). Tokens are those run
to score the {rows} rows of `sharing.score_rows`, or as many as the client has.
`relative_gradient_norm` was not measured: on the client it is `gradient_norm` and one division per
layer. A mean gradient, or the values at the start, take as much memory as the adapter's layers:
{bytes:.2f} MB here.
"""


def sharing_page() -> str:
    """What is shared, by which criteria, and the measured cost of each."""
    rows = [
        (f"`{name}`", one.summary, one.runs_model, one.reads or "–")
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
        bytes=content["adapter_bytes"] / 1e6,
    )
    repeats: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_table("sharing_criteria", "repeats"):
        repeats.setdefault(row["criterion"], []).append(row)
    plain = repeats.pop("none")
    rows = [
        (f"`{name}`", f"{own[0]['scoring_tokens']:,}", _extra(plain, own))
        for name, own in repeats.items()
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
