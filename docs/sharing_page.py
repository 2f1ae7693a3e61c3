"""The page of layer sharing: what travels, the criteria, and what each costs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from tables import NOTICE, markdown_table, place, read_table, read_values

from droppeft.sharing.criteria import CRITERIA

HEAD = """\
# Personalised layer sharing

After its local training each client scores the layers of its adapter. The layers that score highest
stay on the client (*personal* layers), the others are shared (DropPEFT, arXiv:2503.10217, which
scores by gradient norm). The other criteria, hysteresis, files, and what happens when a reply is
lost are ours.

```
droppeft run sharing.fraction=0.5                             # half of the layers are shared
droppeft run sharing.fraction=0.5 sharing.criterion=position  # always the lower half
droppeft run sharing.head=personal                            # only the head is not shared
droppeft run method=fedsa_lora                                # LoRA's A is shared, B is not
droppeft run method=ditto                                     # and a personal adapter beside it
droppeft run method=local                                     # nothing is sent
```

By default all layers are shared (`sharing.fraction=1`). [Findings](findings.md) say what is known
of smaller fractions.

- **Order in time.** A client begins its local training with the global values of the layers that
  it shared in its last participation, and with its own values of the others. In its first
  participation everything is global. The layers that it chooses after training determine its
  upload, and its download the next time. So with a fraction of one half the upload of layers is
  halved from the first participation on, and the download from the second. The head is sent whole.
- **Which layers the client chooses among**: those that it trained and that ran. The others stay
  shared or personal as they were; at the beginning all are shared. The fraction is of the layers
  that the client chooses among, and halves are rounded up: one half of three layers is two, a
  quarter of six is two.
- **Hysteresis.** A shared layer becomes personal in place of another only if its score is higher
  by more than `sharing.hysteresis` of the other's score. With `position` there is no hysteresis.
- **What is unusual for a client** (`sharing.criterion=relative_gradient_norm`, ours). By gradient
  norm all clients choose much the same personal layers, and then nobody trains these layers of the
  global model. This criterion divides the norm by the norm that is typical of the layer. The
  server fits the typical norms to what clients have reported, which they do anyway, and sends
  every client one number per layer. In the first round nothing is known yet, and the gradient norm
  is used.
- **On the server** a layer becomes the mean over the clients that sent it, weighted by rows
  (`sharing.weights=active_steps`: times the steps in which it ran). A layer that nobody sent does
  not change. `coverage` in `rounds.jsonl` says how many clients sent each layer; `shared` and
  `scores` in `clients.jsonl` say what each client chose. A layer that did not run in a local
  training is not sent and has the score 0; `shared` lists it as it was before.
- **On the client** the personal tensors are stored in `$DROPPEFT_STATE`, else in `droppeft` in the
  platform's folder for states (on Linux `$XDG_STATE_HOME` or `~/.local/state`). There is one file
  per local training, written atomically, with a checksum and the names of run, client and round;
  only its owner can read it. While a layer is personal, it is in no message and in no
  checkpoint. When it becomes shared, its values are
  sent, and with them what it has learnt before. The server says from which participation the next
  local training begins, so a lost or late reply, a killed process or a server that goes back to an
  older checkpoint change nothing. If a file is gone or damaged, the client fails in that round,
  and gets all global values in the next. When a run ends, such a client is evaluated with the
  global layers, and `personalised_lost` of `result.json` names it.
- **Two accuracies.** A run ends with the accuracy of the global model on the global test set, and
  with that of every client's own model on the client's test rows: mean, worst tenth, deviation.
  `evaluation.newcomers=true` also evaluates clients that never trained, after one epoch on their
  own rows, in which learning rates fall from their peak to 0. With a personal head there is no
  global accuracy.
- **Export.** `droppeft export RUN --client 3` writes client 3's own model as an adapter, with
  `--merge` as a plain model. The client's state must be on this machine.

LoRA's A and B are averaged separately, and the product of the means is not the mean of the
products. `sharing.factors=product` averages B·A over the clients that share a layer and reduces
the result to the rank by SVD. That is nearer, and still not exact when the mean has a higher rank.

`cka` compares rows. A client with fewer than four validation rows cannot tell its layers apart by
it, and shares the lower ones.

A prompt is in no layer, so adapter types of the kind *global* have no personal layers.

## Criteria
"""
COLUMNS = ("criterion", "what it measures", "runs the model", "collects")
COST_HEAD = """\

## What scoring costs

`benchmarks/sharing_criteria`: local trainings of {steps} steps of {batch} texts with the built-in
model at full depth, {repeats} of each kind in random order, on {place}. Extra is the median CPU
time of a local training over that of one that shares everything, less one, with a bootstrap 95 %
interval. It includes saving half of the layers (with `position` there is nothing else). Tokens are
those run to score the {rows} rows of `sharing.score_rows`, or as many as the client has.
`relative_gradient_norm` was not measured: on the client it is `gradient_norm` and one division per
layer. A mean gradient, or the values at the start, take as much memory as the adapter's layers:
{bytes:.2f} MB here.
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
