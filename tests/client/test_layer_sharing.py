"""Personalised layer sharing, from the scores to the next local training and to whole runs."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from droppeft.adapters.by_layer import set_tensors
from droppeft.client import client_state, layer_scoring
from droppeft.client.client_state import client_folder, load_tensors
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import (
    Instruction,
    LayerDropout,
    SharingRule,
    first_trained_layer,
)
from droppeft.messages.reply import Failure, Update
from droppeft.messages.tensors import HEAD, flatten, payload_bytes
from droppeft.methods import METHODS
from droppeft.runs.export import export_run
from droppeft.server.prepare import Prepared, prepare
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.sharing.criteria import CRITERIA, typical_norms
from droppeft.training.loop import evaluate
from droppeft.transports.in_process import InProcess
from handmade import assert_same, setup_for, update_for
from processes import started
from runs import Clients, Recorder, interfering, outcome, rows_of, stop_after_a_round, update_of

pytestmark = pytest.mark.usefixtures("state")

RUN = "00c0ffee"
LAYERS = 4
HALF = ("sharing.fraction=0.5", "sharing.hysteresis=0")


@pytest.fixture
def first(prepared: Prepared) -> Instruction:
    """The first instruction of client 1, in which all layers run."""
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
    return replace(instruction, run=RUN, dropout=None)


def with_rule(
    instruction: Instruction, criterion: str = "gradient_norm", **changes: Any
) -> Instruction:
    rule = SharingRule(criterion, 0.5, 0.0, None)
    return replace(instruction, sharing=replace(rule, **changes))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_client_shares_the_layers_that_score_lowest_and_saves_the_others(
    clients: Clients, first: Instruction, criterion: str
) -> None:
    reply = update_of(clients, with_rule(first, criterion))
    assert reply.shared is not None
    assert reply.scores is not None
    personal = [layer for layer in range(LAYERS) if layer not in reply.shared]
    ranked = sorted(range(LAYERS), key=lambda layer: (reply.scores or ())[layer])
    assert set(personal) == set(ranked[2:])
    assert set(reply.tensors) == {*reply.shared, HEAD}
    assert list(load_tensors(client_folder(RUN, 1), 1)) == personal
    forwards = {"no": 0, "once": 1, "per layer": LAYERS + 1}[CRITERIA[criterion].runs_model]
    assert (reply.cost.scoring_tokens > 0) == (reply.cost.scoring_wall_s > 0) == (forwards > 0)
    once = update_of(clients, with_rule(first, "cka")).cost.scoring_tokens
    assert reply.cost.scoring_tokens == forwards * once


def test_clients_are_told_what_is_typical() -> None:
    """Typical norms follow from each client's last participation; unmerged updates do not count."""
    setup = setup_for(*HALF, "sharing.criterion=relative_gradient_norm", "dropout.mean=0")
    method, seen = METHODS["droppeft"], (1, 1, 1, 1)
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0, 1, 2])
    assert [instruction.sharing.typical for instruction in instructions if instruction.sharing] == [
        None
    ] * 3
    norms = [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 2.0)]
    replies: list[Update | Failure] = [
        replace(update_for(instruction), importance=client_norms, active_steps=seen)
        for instruction, client_norms in zip(instructions, norms, strict=False)
    ]
    state = method.merge(setup, state, instructions, [*replies, Failure(2, "asleep")])
    instructions = method.instruct(setup, state, 2, [2, 0])
    typical = (0.75, 1.0, 1.25, 1.0)
    assert [instruction.sharing.typical for instruction in instructions if instruction.sharing] == [
        typical
    ] * 2
    again = replace(update_for(instructions[1]), importance=(0.0, 4.0, 2.0, 0.0), active_steps=seen)
    state = method.merge(setup, state, instructions, [Failure(2, "asleep"), again])
    [instruction] = method.instruct(setup, state, 3, [1])
    assert instruction.sharing is not None
    assert instruction.sharing.typical == typical_norms([again.importance, norms[1]])


def test_a_client_divides_by_what_is_typical(clients: Clients, first: Instruction) -> None:
    plain = update_of(clients, with_rule(first, "relative_gradient_norm"))
    assert plain.scores == plain.importance
    typical = (1.0, 2.0, 4.0, 0.5)
    told = update_of(clients, with_rule(first, "relative_gradient_norm", typical=typical))
    assert told.scores == pytest.approx(
        [n / u for n, u in zip(told.importance, typical, strict=True)]
    )


@pytest.mark.parametrize(
    "criterion", [name for name, one in CRITERIA.items() if one.runs_model == "no"]
)
def test_scores_of_gradients_take_no_further_passes(
    clients: Clients, first: Instruction, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps take two forward and two backward passes of the model."""
    passes = {"forward": 0, "backward": 0}
    backward, forward = torch.Tensor.backward, clients[0].model.task.loss

    def counting_backward(*arguments: Any, **options: Any) -> Any:
        passes["backward"] += 1
        return backward(*arguments, **options)

    def counting_forward(*arguments: Any, **options: Any) -> Any:
        passes["forward"] += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", counting_backward)
    monkeypatch.setattr(type(clients[0].model.task), "loss", staticmethod(counting_forward))
    reply = update_of(clients, with_rule(first, criterion))
    assert passes == {"forward": reply.steps, "backward": reply.steps}


def test_the_criterion_position_has_no_hysteresis() -> None:
    for criterion, hysteresis in (("position", 0.0), ("gradient_norm", 0.1)):
        setup = setup_for("sharing.fraction=0.5", f"sharing.criterion={criterion}")
        method = METHODS["droppeft"]
        [instruction] = method.instruct(setup, method.init(setup), 1, [0])
        assert instruction.sharing is not None
        assert instruction.sharing.hysteresis == hysteresis


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_does_not_change_training(
    clients: Clients, first: Instruction, criterion: str
) -> None:
    """If all layers are shared, training with a sharing rule gives the same bits as without."""
    plain, ruled = (
        update_of(clients, first),
        update_of(clients, with_rule(first, criterion, fraction=1.0)),
    )
    assert_same(plain.tensors, ruled.tensors)
    assert plain.importance == ruled.importance
    assert plain.train_loss == ruled.train_loss
    assert not client_folder(RUN, 1).exists()


def test_a_layer_that_never_ran_stays_shared_or_personal(
    clients: Clients, first: Instruction
) -> None:
    """Of the other three layers, half (2) are shared; this one stays shared and is not sent."""
    instruction = replace(first, dropout=LayerDropout((0.0, 1.0, 0.0, 0.0), "exact"))
    new = update_of(clients, with_rule(instruction))
    assert new.shared is not None
    assert 1 in new.shared
    assert len(new.shared) == 3
    assert 1 not in new.tensors
    assert (new.scores or ())[1] == 0.0
    later = with_rule(replace(instruction, round=2), shared=(0, 2))
    mine = update_of(clients, later)
    assert mine.shared is not None
    assert len(mine.shared) == 2
    assert 1 in load_tensors(client_folder(RUN, 1), 2)


def test_without_a_choice_no_forward_pass_is_run_for_scores(
    clients: Clients, first: Instruction
) -> None:
    for fraction in (1.0, 0.0):
        reply = update_of(clients, with_rule(first, "leave_one_out", fraction=fraction))
        assert len(reply.shared or ()) == fraction * LAYERS
        assert reply.cost.scoring_tokens == 0
        assert reply.scores == (0.0,) * LAYERS


def test_leave_one_out_is_the_loss_without_the_change_of_the_layer(
    clients: Clients, first: Instruction
) -> None:
    reply = update_of(clients, with_rule(first, "leave_one_out"))
    client_model, rows = clients[0].model, clients[1].rows.validation[:32]
    trained = {**reply.tensors, **load_tensors(client_folder(RUN, 1), 1)}

    def loss(tensors: Any) -> float:
        set_tensors(client_model.parameters, tensors)
        return evaluate(
            client_model.model, clients[0].table, rows, client_model.task, 64, "fp32"
        ).loss

    whole = loss(trained)
    undone = [loss({**trained, i: first.tensors[i]}) - whole for i in range(LAYERS)]
    assert reply.scores == pytest.approx(undone, abs=1e-12)


def test_block_states_are_the_hidden_states_of_the_model(
    clients: Clients, first: Instruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with transformers' hidden states, computed row by row and without padding."""
    found: list[Any] = []

    def spy(name: str, result: Any) -> tuple[float, ...]:
        found.extend(result.block_states())
        return (0.0,) * LAYERS

    monkeypatch.setattr(layer_scoring, "scores_of", spy)
    monkeypatch.setattr(layer_scoring, "SCORE_ROWS", 3)
    update_of(clients, with_rule(first, "block_influence"))
    monkeypatch.undo()
    client_model, rows = clients[0].model, clients[1].rows.validation[:3]
    cosines, means = np.zeros((LAYERS, 2)), []
    with torch.inference_mode():
        for row in rows:
            batch = client_model.task.collate(clients[0].table, np.array([row]))
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            states = client_model.model(**inputs, output_hidden_states=True).hidden_states
            means.append([one[0].mean(dim=0).double().numpy() for one in states])
            for layer in range(LAYERS):
                cosine = torch.cosine_similarity(states[layer][0], states[layer + 1][0], dim=-1)
                cosines[layer] += [float(cosine.sum()), len(cosine)]
    assert [one.cosine for one in found] == pytest.approx(cosines[:, 0] / cosines[:, 1], abs=1e-5)
    for layer in range(LAYERS):
        for seen, depth in ((found[layer].before, layer), (found[layer].after, layer + 1)):
            expected = np.array([row[depth] for row in means])
            gaps = np.abs(seen[:, None] - expected[None]).max(axis=2)  # rows are sorted by length
            assert gaps.min(axis=0).max() < 1e-5
            assert len(set(gaps.argmin(axis=0))) == len(rows)


# What one participation means for the next


@pytest.fixture
def sharing(prepare_with: Callable[..., Prepared]) -> Prepared:
    return prepare_with(*HALF, "dropout.mean=0", "rounds=9")


def update_with(prepared: Prepared, instruction: Instruction, shared: tuple[int, ...]) -> Update:
    """An update in which the client has added 1 to all tensors and shares these layers."""
    whole = prepared.state.model.tensors
    moved = {
        key: {name: array + np.float32(1) for name, array in named.items()}
        for key, named in whole.items()
        if key in (*shared, HEAD)
    }
    scores = (0.0,) * LAYERS
    return update_for(
        instruction, tensors=moved, shared=shared, scores=scores, active_steps=(2,) * LAYERS
    )


def test_the_chosen_layers_determine_the_upload_and_the_next_download(
    sharing: Prepared,
) -> None:
    setup, method, state = sharing.setup, sharing.method, sharing.state
    [instruction] = method.instruct(setup, state, 1, [2])
    assert set(instruction.tensors) == {0, 1, 2, 3, HEAD}  # a first instruction brings all tensors
    assert (instruction.state_round, instruction.sharing and instruction.sharing.shared) == (
        None,
        None,
    )
    state = method.merge(setup, state, [instruction], [update_with(sharing, instruction, (0, 3))])
    [other] = method.instruct(setup, state, 2, [1])
    assert set(other.tensors) == {0, 1, 2, 3, HEAD}  # for a client that has not taken part yet
    [instruction] = method.instruct(setup, state, 4, [2])
    assert set(instruction.tensors) == {0, 3, HEAD}
    assert instruction.state_round == 1
    assert instruction.sharing is not None
    assert instruction.sharing.shared == (0, 3)
    assert_same({0: instruction.tensors[0]}, {0: state.model.tensors[0]})
    # Layer 1 becomes shared, layer 3 personal: 1 is sent now and comes back next time.
    state = method.merge(setup, state, [instruction], [update_with(sharing, instruction, (0, 1))])
    [instruction] = method.instruct(setup, state, 5, [2])
    assert set(instruction.tensors) == {0, 1, HEAD}
    assert instruction.state_round == 4
    evaluation = method.evaluate_client(setup, state, 6, 2)
    assert (
        set(evaluation.tensors),
        evaluation.state_round,
        evaluation.sharing,
        evaluation.share,
    ) == (
        {0, 1, HEAD},
        4,
        None,
        frozenset(),
    )


def test_an_update_that_was_not_merged_changes_nothing(sharing: Prepared) -> None:
    setup, method, state = sharing.setup, sharing.method, sharing.state
    [instruction] = method.instruct(setup, state, 1, [2])
    state = method.merge(setup, state, [instruction], [update_with(sharing, instruction, (0, 3))])
    [instruction] = method.instruct(setup, state, 2, [2])
    late = method.merge(setup, state, [instruction], [Failure(2, "late")])
    [again] = method.instruct(setup, late, 3, [2])
    assert (again.state_round, again.sharing) == (instruction.state_round, instruction.sharing)
    lost = method.merge(setup, state, [instruction], [Failure(2, "gone", lost=True)])
    [anew] = method.instruct(setup, lost, 3, [2])
    assert set(anew.tensors) == {0, 1, 2, 3, HEAD}
    assert anew.state_round is None
    assert anew.sharing is not None
    assert anew.sharing.shared is None


def test_local_training_begins_with_global_shared_layers_and_saved_personal_layers(
    clients: Clients, first: Instruction
) -> None:
    """The result is the same as if the server had sent all layers."""
    one = update_of(clients, with_rule(first))
    assert one.shared is not None
    personal = load_tensors(client_folder(RUN, 1), 1)
    merged = {
        key: {name: array * np.float32(0.5) for name, array in named.items()}
        for key, named in one.tensors.items()
    }
    later = with_rule(replace(first, round=2, tensors=merged, state_round=1), shared=one.shared)
    told = replace(later, tensors={**merged, **personal}, state_round=None)
    found, expected = update_of(clients, later), update_of(clients, told)
    assert found.train_loss == expected.train_loss
    assert_same(found.tensors, expected.tensors)


def test_untrained_layers_of_an_arm_are_not_chosen_among(
    clients: Clients, first: Instruction
) -> None:
    """Layers 0 and 1 run with the client's values and are not trained: they stay as they were.

    Of the two layers that are trained, one is shared.
    """
    names = frozenset(name for key, name, _ in flatten(first.tensors) if key not in (0, 1))
    instruction = replace(first, train=names, share=names, starts=(2,))
    new = update_of(clients, with_rule(instruction))
    assert {0, 1} < set(new.shared or ())
    assert len(set(new.tensors) & {2, 3}) == 1
    later = update_of(clients, with_rule(replace(instruction, round=2), shared=(1, 2, 3)))
    assert set(later.shared or ()) & {0, 1} == {1}
    assert_same({0: load_tensors(client_folder(RUN, 1), 2)[0]}, {0: first.tensors[0]})


def test_a_personal_layer_can_be_the_first_trained_layer() -> None:
    """Otherwise the modelled clock would not count the backward pass of a personal layer."""
    overrides = ("configurator.policy=uniform_random", "configurator.means=[0]")
    setup = setup_for(*overrides, "configurator.depths=[[0.75]]", "sharing.fraction=0.25")
    method = METHODS["droppeft"]
    state = method.init(setup)
    [instruction] = method.instruct(setup, state, 1, [0])
    assert first_trained_layer(instruction) == 1
    reply = update_for(instruction, shared=(3,), scores=(0.0,) * 4)
    [later] = method.instruct(setup, method.merge(setup, state, [instruction], [reply]), 2, [0])
    assert set(later.tensors) == {3, HEAD}
    assert first_trained_layer(later) == 1


# Whole runs


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, *HALF, "clients=3", "rounds=5"]


def sizes(prepared: Prepared) -> tuple[int, int]:
    tensors = prepared.state.model.tensors
    return payload_bytes({0: tensors[0]}), payload_bytes({HEAD: tensors[HEAD]})


def test_only_shared_layers_are_sent_and_the_ledger_counts_them(
    overrides: list[str], tmp_path: Path, sharing: Prepared
) -> None:
    start_run(load_config(None, [*overrides, "dropout.mean=0"]), tmp_path / "run", Recorder())
    layer, head = sizes(sharing)
    seen: set[int] = set()
    for row in rows_of(tmp_path / "run" / "clients.jsonl"):
        assert row["upload_bytes"] == 2 * layer + head
        first = row["client"] not in seen
        assert row["download_bytes"] == (4 if first else 2) * layer + head
        assert len(row["shared"]) == 2
        seen.add(row["client"])
    for row in rows_of(tmp_path / "run" / "rounds.jsonl"):
        assert sum(row["coverage"]) == 2 * row["accepted"]


def test_all_layers_shared_is_the_run_without_sharing(
    tiny_overrides: list[str], tmp_path: Path, whole_run: Path, state: Path
) -> None:
    """Without sharing, and with 0.9 of four layers, which is rounded to all of them."""
    overrides = [*tiny_overrides, "sharing.fraction=0.9"]
    result = start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    plain, found = outcome(whole_run), outcome(tmp_path / "run")
    assert found["adapter"] == plain["adapter"]
    assert found["rounds"] == plain["rounds"]
    assert result["personalised"] == plain["result"]["personalised"]
    assert not list(state.rglob("*.safetensors"))


def begin(overrides: list[str], out: Path) -> None:
    start_run(load_config(None, overrides), out, Recorder())


def resume(_: list[str], out: Path) -> None:
    resume_run(out, Recorder())


@pytest.mark.full
def test_a_run_that_is_killed_at_any_moment_ends_the_same(
    overrides: list[str], tmp_path: Path
) -> None:
    """The run has a process of its own, which gets SIGKILL three times at arbitrary moments."""
    overrides = [*overrides, "rounds=9"]
    begin(overrides, tmp_path / "whole")
    out = tmp_path / "run"
    for rounds, work in ((1, begin), (2, resume), (4, resume)):
        process = started(work, overrides, out)
        limit = time.monotonic() + 120
        while process.is_alive() and rows_until(out) < rounds and time.monotonic() < limit:
            time.sleep(0.002)
        process.kill()
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
        assert rounds <= rows_until(out) < 9
    resume_run(out, Recorder())
    assert outcome(out) == outcome(tmp_path / "whole")


def begin_and_be_killed(overrides: list[str], out: Path, nth: int, before: bool) -> None:
    """Kill the process in the middle of writing the nth client state, or after it."""
    real, count = client_state.write_atomically, 0

    def write(path: Path, content: bytes, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == nth and before:
            path.with_name(f".{path.name}.half").write_bytes(content[: len(content) // 2])
        else:
            real(path, content, **options)
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    client_state.write_atomically = write
    begin(overrides, out)


@pytest.mark.full
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("nth", [1, 3, 4])
def test_a_run_that_is_killed_while_a_client_saves_its_layers_ends_the_same(
    overrides: list[str], tmp_path: Path, nth: int, before: bool
) -> None:
    """The process is killed in the middle of a file, or after it but before the server's merge.

    Two clients take part in every round. The first file is the first client's of round 1, the third
    and fourth are those of round 2. At the fourth file, the first client has already deleted old
    files in round 2, and runs this round again from the state that it saved in round 1.
    """
    overrides = [*overrides, "clients=2"]
    begin(overrides, tmp_path / "whole")
    out = tmp_path / "run"
    process = started(begin_and_be_killed, overrides, out, nth, before)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert rows_until(out) == (0 if nth < 3 else 1)
    resume_run(out, Recorder())
    assert outcome(out) == outcome(tmp_path / "whole")


def rows_until(out: Path) -> int:
    path = out / "rounds.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_after_a_damaged_file_a_client_fails_once_and_gets_the_global_layers(
    overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damages = interfering(
        lambda instruction: instruction.round == 3 and not instruction.evaluate_only,
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    )
    config = load_config(None, [*overrides, "clients=2"])
    with caplog.at_level(logging.WARNING):
        start_run(config, tmp_path / "run", Recorder(), damages)
    assert caplog.text.count(" is damaged (") == 2
    rows = rows_of(tmp_path / "run" / "clients.jsonl")
    third = [row for row in rows if row["round"] == 3]
    assert [row["reason"] for row in third] == [
        "the state that it saved in round 2 is missing or damaged"
    ] * 2
    whole = max(row["download_bytes"] for row in rows)
    assert [row["download_bytes"] for row in rows if row["round"] == 4] == [whole] * 2
    assert all(row["accepted"] for row in rows if row["round"] >= 4)


def test_a_personal_head_is_never_sent_and_there_is_no_global_accuracy(
    overrides: list[str], tmp_path: Path, sharing: Prepared
) -> None:
    shared = [override for override in overrides if not override.startswith("sharing.")]
    config = load_config(None, [*shared, "sharing.head=personal", "dropout.mean=0"])
    result = start_run(config, tmp_path / "run", Recorder())
    layer, _ = sizes(sharing)
    rows = rows_of(tmp_path / "run" / "clients.jsonl")
    assert {row["upload_bytes"] for row in rows} == {4 * layer}
    assert result["global_accuracy"] is None
    assert result["personalised_clients"] == 3
    assert not (tmp_path / "run" / "adapter").exists()
    for client in range(3):
        [*_, last] = sorted(client_folder(result["run"], client).iterdir())
        assert list(load_tensors(client_folder(result["run"], client), int(last.stem[-6:]))) == [
            HEAD
        ]


@pytest.mark.sample("more0-False")
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("sharing.head=personal",),
        ("method=ditto",),
        ("method=local",),
        ("method=fedsa_lora",),  # one half of a layer is shared, the other half personal
    ],
)
def test_the_exported_model_of_any_client_has_the_reported_quality(
    overrides: list[str], tmp_path: Path, more: tuple[str, ...], merge: bool
) -> None:
    """Loaded without droppeft and evaluated on the test rows of each client; one never trained."""
    other = any(override.startswith("method=") for override in more)
    base = [w for w in overrides if not other or not w.startswith(("sharing.", "dropout."))]
    sizes = ("clients=4", "cohort_size=1", "rounds=2", "training.learning_rate=0.02")
    config = load_config(None, [*base, *more, *sizes, "training.local_steps=8"])
    result = start_run(config, tmp_path / "run", Recorder())
    prepared = prepare(load_config(tmp_path / "run" / "config.toml"), lambda step: None)
    clients = clients_of(prepared.loaded)
    assert {one["participations"] > 0 for one in result["personalised"]} == {True, False}
    for one in result["personalised"]:
        out = tmp_path / f"own-{one['client']}"
        done = export_run(tmp_path / "run", out, client=one["client"], merge=merge)
        assert (done.value, done.rows) == (one["accuracy"], one["rows"])
        found: dict[str, Any] = {}
        exec(done.lines, found)
        rows = clients[one["client"]].rows.test
        measured = evaluate(
            found["classify"].model, clients[0].table, rows, clients[0].model.task, 64
        )
        assert measured.metrics["accuracy"] == one["accuracy"]
        assert measured.loss == pytest.approx(one["loss"], rel=1e-5)
        card = (done.folder / "README.md").read_text()
        assert f"with which client {one['client']} would start" in card


def test_a_card_says_in_what_precision_its_accuracy_was_measured(
    overrides: list[str], tmp_path: Path
) -> None:
    config = load_config(None, [*overrides, "training.precision=bf16", "rounds=1"])
    start_run(config, tmp_path / "run", Recorder())
    for out, client in (("own", 1), ("global", None)):
        done = export_run(tmp_path / "run", tmp_path / out, client=client)
        card = (done.folder / "README.md").read_text()
        assert ", computed in bf16 (the lines below: in fp32) |" in card


def test_a_client_is_exported_only_where_its_state_is(
    overrides: list[str], tmp_path: Path, state: Path
) -> None:
    start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    with pytest.raises(DroppeftError, match="has no client 3; its clients are 0 to 2"):
        export_run(tmp_path / "run", client=3)
    shutil.rmtree(state)
    with pytest.raises(
        DroppeftError, match="client 0 has no model here: the state that it saved in"
    ):
        export_run(tmp_path / "run", client=0)
    assert not list((tmp_path / "run").glob("adapter-*"))


def test_personal_values_are_in_no_message_and_no_checkpoint(
    overrides: list[str], tmp_path: Path
) -> None:
    """Compares all files that clients saved with all tensors that were sent."""
    sent: set[bytes] = set()
    saved: set[bytes] = set()

    class RecordsMessages:
        def __init__(self, inner: InProcess) -> None:
            self.inner = inner

        def exchange(self, instructions: Any) -> Any:
            for arrival in self.inner.exchange(instructions):
                instruction = instructions[arrival.index]
                messages = [instruction.tensors]
                if isinstance(arrival.reply, Update):
                    messages.append(arrival.reply.tensors)
                    personal = load_tensors(
                        client_folder(instruction.run, instruction.client), instruction.round
                    )
                    saved.update(
                        array.tobytes() for _, _, array in flatten(personal) if array.any()
                    )
                    assert set(personal).isdisjoint(arrival.reply.tensors)
                sent.update(a.tobytes() for one in messages for _, _, a in flatten(one))
                yield arrival

    start_run(
        load_config(None, [*overrides, "dropout.mean=0"]),
        tmp_path / "run",
        Recorder(),
        lambda loaded: nullcontext(RecordsMessages(InProcess(clients_of(loaded)))),
    )
    checkpoints = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors"))
    assert saved
    assert not saved & sent
    assert not [array for array in saved if array in checkpoints]


# Sharing together with other settings


@pytest.mark.sample("more1")
@pytest.mark.parametrize(
    "more",
    [
        ("configurator.policy=budgeted_thompson", "dropout.mean=none"),
        ("configurator.policy=budgeted_thompson", "configurator.reward=agreement"),
        ("frozen.layers=1", "sharing.criterion=leave_one_out"),
        ("training.offload=true", "dropout.every=round", "sharing.criterion=block_influence"),
        ("training.checkpointing=true", "sharing.criterion=fisher"),
        ("sharing.criterion=relative_gradient_norm", "server.optimizer=momentum"),
        ("sharing.head=personal", "sharing.criterion=random"),
        ("quantization=8bit", "adapter.options.use_rslora=true"),
        ("adapter.type=prefix_tuning", "adapter.tokens=3"),
        ("adapter.type=lora", "adapter.options.use_dora=true", "sharing.criterion=cka"),
    ],
)
def test_runs_with_sharing_and_other_settings_can_be_resumed(
    overrides: list[str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    of_arms = any(override.startswith("configurator.") for override in more)
    base = [
        override for override in overrides if not (of_arms and override.startswith("dropout.mean"))
    ]
    all_overrides = [*base, *(override for override in more if override != "dropout.mean=none")]
    result = start_run(load_config(None, all_overrides), tmp_path / "whole", Recorder())
    rows = rows_of(tmp_path / "whole" / "clients.jsonl")
    assert all(row["accepted"] for row in rows)
    assert all(0 < len(row["shared"]) < LAYERS for row in rows)
    assert result["personalised_clients"] == 3
    stop_after_a_round(all_overrides, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    for folder in ("run", "whole"):
        (tmp_path / folder / "adapter").mkdir(exist_ok=True)  # a personal head leaves none
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
