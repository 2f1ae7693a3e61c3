"""Can the most frequent label of a client be read off the change of the head's bias?

    python -m benchmarks.label_inference.run

40 clients of the built-in data train once, with labels by Dir(0.1). The attacker guesses that a
client's most frequent label is the class whose bias rose most, in three places: in the update of
the client, as the server sees it; in the model before and after a round of 5 clients, as everybody
sees it, 50 rounds for each client; and in the same models with differential privacy. The noise is
that of 16 rounds at epsilon 8 and 2 with delta 1e-3. Writes `study.json` and `result.csv.gz`; about
a minute on one core.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.study import about, write_table, write_values
from droppeft.client.run_inputs import clients_of
from droppeft.config import Config, load_config, resolve
from droppeft.federated_method import all_tensors
from droppeft.messages.reply import Update
from droppeft.messages.tensors import HEAD, Tensors
from droppeft.server.prepare import Prepared, prepare
from droppeft.server.privacy_accountant import with_noise_multiplier
from droppeft.server.private_merge import private_update

NAME = "label_inference"
CLIENTS, COHORT, ROUNDS, REPEATS = 40, 5, 16, 50
EPSILONS = (8.0, 2.0)
SETTINGS = (
    *("method=fedlora", f"clients={CLIENTS}", f"cohort_size={COHORT}", f"rounds={ROUNDS}"),
    *("partition.alpha=0.1", "partition.min_rows=20", "frozen.layers=5", "frozen.cache=false"),
    *("training.local_steps=10", "training.max_length=32", "threads=1", "accelerator=cpu"),
    *("evaluation.personalised=false", "evaluation.validation_clients=0"),
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
)


def bias_of(tensors: Tensors) -> npt.NDArray[np.float64]:
    """The head's bias, shape (classes,)."""
    [bias] = [value for name, value in tensors[HEAD].items() if name.endswith("bias")]
    return bias.astype(np.float64)


def private_config(config: Config, epsilon: float) -> Config:
    """The configuration with differential privacy."""
    words = (f"privacy.epsilon={epsilon}", "privacy.delta=1e-3", "privacy.clip_norm=1.2")
    asked = load_config(None, [*SETTINGS, *words])
    return config.model_copy(update={"privacy": with_noise_multiplier(asked).privacy})


def updates_of(prepared: Prepared) -> list[Update]:
    """One update of every client, from the model before training."""
    clients = clients_of(prepared.loaded)
    instructions = prepared.method.instruct(prepared.setup, prepared.state, 1, range(CLIENTS))
    updates = []
    for instruction in instructions:
        reply = clients[instruction.client].run(instruction)
        assert isinstance(reply, Update)
        updates.append(reply)
    return updates


def cohorts() -> Iterator[tuple[int, Sequence[int]]]:
    """Targets, each with the clients of a round that it takes part in."""
    rng = np.random.default_rng(0)
    for target in range(CLIENTS):
        others = [client for client in range(CLIENTS) if client != target]
        for _ in range(REPEATS):
            yield target, [target, *rng.choice(others, size=COHORT - 1, replace=False)]


def released(prepared: Prepared, config: Config, updates: Sequence[Update]) -> Tensors:
    """The model after a round: with noise or, without privacy, the mean with equal weights."""
    if config.privacy.is_on:
        names = all_tensors(prepared.state)
        return private_update(config, prepared.state, names, updates).tensors
    mean = np.mean([bias_of(update.tensors) for update in updates], axis=0)
    return {HEAD: {"bias": mean.astype(np.float32)}}


def main() -> None:
    """Train once, attack, and write the results."""
    config = resolve(load_config(None, SETTINGS), cuda=False)
    prepared = prepare(config, print)
    labels, before = prepared.loaded.data.train.labels, bias_of(prepared.state.model.tensors)
    frequent = [np.bincount(labels[rows.train]).argmax() for rows in prepared.loaded.clients]
    updates = updates_of(prepared)
    rows: list[Mapping[str, object]] = []

    def add(where: str, epsilon: float | None, right: Sequence[bool]) -> None:
        counts = {"guesses": len(right), "right": sum(map(int, right))}
        rows.append({"where": where, "epsilon": epsilon, **counts})
        print(rows[-1], flush=True)

    add(
        "update",
        None,
        [
            (bias_of(update.tensors) - before).argmax() == label
            for update, label in zip(updates, frequent, strict=True)
        ],
    )
    for epsilon in (None, *EPSILONS):
        settings = config if epsilon is None else private_config(config, epsilon)
        add(
            "model",
            epsilon,
            [
                (
                    bias_of(released(prepared, settings, [updates[one] for one in cohort])) - before
                ).argmax()
                == frequent[target]
                for target, cohort in cohorts()
            ],
        )
    common = np.bincount(labels).argmax()
    add("most frequent label of all", None, [label == common for label in frequent])
    write_table(NAME, "result", rows)
    noise = {f"{one:g}": private_config(config, one).privacy.noise_multiplier for one in EPSILONS}
    write_values(NAME, {**about(NAME), "noise_multipliers": noise, "settings": SETTINGS})


if __name__ == "__main__":
    main()
