"""What a client keeps in every transport, and what a site gives of its disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from droppeft.cached_layers.cached_layers import state_folder
from droppeft.client.client_state import bytes_of_client, client_folder
from droppeft.client.node_file import Limits, Sending
from droppeft.client.run_inputs import clients_of
from droppeft.client.site_rules import CHANGES_BACKBONE, SiteRules
from droppeft.messages.instruction import Instruction, StateCache
from droppeft.messages.reply import Failure, Update
from droppeft.methods import METHODS
from droppeft.server.prepare import Prepared
from droppeft.transports.in_process import InProcess
from refusals import refused
from runs import Clients, update_of

pytestmark = pytest.mark.usefixtures("state")

NOTHING: frozenset[str] = frozenset()


def test_what_was_kept_stays_when_the_state_is_lost_and_the_process_is_another(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    instruction = instructions[0]
    update_of(clients_of(prepared.loaded), replace(instruction, share=NOTHING))
    for path in client_folder(instruction.run, instruction.client).iterdir():
        path.unlink()
    others = clients_of(prepared.loaded)
    [arrival] = InProcess(others).exchange([replace(instruction, round=2)])
    assert isinstance(arrival.reply, Failure)
    assert "were kept earlier in this run" in arrival.reply.reason
    # Another run has nothing of this one.
    assert isinstance(update_of(others, replace(instruction, run="beef")), Update)


def test_a_client_that_does_not_know_what_it_must_keep_sends_nothing(
    clients: Clients, instructions: list[Instruction]
) -> None:
    instruction = instructions[0]
    update_of(clients, replace(instruction, share=NOTHING))
    [path] = client_folder(instruction.run, instruction.client).parent.glob("*-kept.json")
    assert path.stat().st_mode & 0o077 == 0
    for content in ('{"always": [', '{"always": []}', "[]", '{"always": 1, "chosen": 2}'):
        path.write_text(content)
        with refused("does not know which tensors it must keep"):
            update_of(clients, replace(instruction, round=2))


def test_the_cache_of_frozen_layers_has_the_room_that_the_site_gives(
    prepared: Prepared,
    instructions: list[Instruction],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The update is the same without room."""
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path))
    client, first = clients_of(prepared.loaded)[0], instructions[0]
    instruction = replace(
        first,
        adapter=replace(first.adapter, layers=(None, *first.adapter.layers[1:])),
        tensors={key: named for key, named in first.tensors.items() if key != 0},
        dropout=None,
        frozen=1,
        cache=StateCache("fp16", 10**12),
    )
    updates, stored = [], []
    for run, megabytes in (("a", None), ("b", 0.0)):
        rules = SiteRules(Limits(disk_mb=megabytes), Sending())
        reply = replace(client, rules=rules).run(replace(instruction, run=run))
        assert isinstance(reply, Update)
        updates.append(reply)
        stored.append(sum(path.stat().st_size for path in state_folder(run).rglob("*.*")))
    assert stored[0] > 1000
    assert stored[1] == 0
    assert updates[0].train_loss == updates[1].train_loss


def test_what_a_client_saved_is_counted_in_all_runs(
    clients: Clients, instructions: list[Instruction]
) -> None:
    sizes = [bytes_of_client(0)]
    for run in ("a", "b"):
        update_of(clients, replace(instructions[0], share=NOTHING, run=run))
        sizes.append(bytes_of_client(0))
    assert np.diff(sizes).tolist() == [sizes[1]] * 2
    assert sizes[1] > 0
    assert bytes_of_client(1) == 0


def test_the_methods_that_change_the_backbone_exist() -> None:
    assert set(METHODS) > CHANGES_BACKBONE
