"""Checkpoints: everything comes back, and damage is noticed."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, BaseDelta, LayerAdapter
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import flatten
from droppeft.runs.checkpoints import Checkpoint, load_newest, load_round, save
from handmade import filled


@dataclass(frozen=True)
class Seen:
    """A part of a memory, and the memory of a small method."""

    round: int


@dataclass(frozen=True)
class Noted:
    """A memory with every type that a memory may contain."""

    by_client: Mapping[int, tuple[float, ...]]
    by_name: Mapping[str, Seen]
    tried: frozenset[int]
    last: Seen | None


@dataclass(frozen=True)
class Text:
    """A memory with the field names of :class:`Seen` and another type."""

    round: str


arrays = st.builds(
    lambda shape, kind, seed: np.random.default_rng(seed).normal(size=shape).astype(kind),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from((np.float32, np.float64, np.float16)),
    st.integers(0, 9),
)
names = st.text("abc.|/ é", min_size=1, max_size=8)
named = st.dictionaries(names, arrays, min_size=1, max_size=3)
sizes = st.none() | st.integers(1, 64)
layers = st.none() | st.builds(LayerAdapter, st.just("lora"), sizes, sizes)
specs = st.builds(
    AdapterSpec,
    layers=st.lists(layers, max_size=5).map(tuple),
    alpha=st.floats(0.1, 64),
    dropout=st.floats(0, 0.9),
    targets=st.lists(st.sampled_from(("query", "value", "default")), min_size=1).map(tuple),
    options=st.lists(
        st.tuples(
            names,
            st.booleans() | st.integers(0, 9) | names | st.lists(names, max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)
keys = st.integers(0, 40) | st.sampled_from(("head", "other"))
models = st.builds(
    GlobalModel,
    adapter=specs,
    tensors=st.dictionaries(keys, named, max_size=4),
    base_delta=st.none() | st.builds(BaseDelta, names, st.dictionaries(names, arrays, max_size=2)),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
states = st.builds(
    ServerState,
    model=models,
    alternatives=st.dictionaries(st.text("abc -", min_size=1, max_size=5), models, max_size=2),
    memory=st.builds(
        Noted,
        by_client=st.dictionaries(st.integers(), st.lists(st.floats(allow_nan=False)).map(tuple)),
        by_name=st.dictionaries(st.text(max_size=3), st.builds(Seen, st.integers(0, 99))),
        tried=st.frozensets(st.integers(0, 99)),
        last=st.none() | st.builds(Seen, st.integers(0, 99)),
    ),
    agreement=st.dictionaries(st.integers(0, 99), st.floats(allow_nan=False, allow_infinity=False)),
)


def assert_same(one: GlobalModel, other: GlobalModel) -> None:
    assert one.adapter == other.adapter
    left, right = list(flatten(one.tensors)), list(flatten(other.tensors))
    assert [item[:2] for item in left] == [item[:2] for item in right]
    pairs = [(first[2], second[2]) for first, second in zip(left, right, strict=True)]
    if one.base_delta is None or other.base_delta is None:
        assert one.base_delta is other.base_delta
    else:
        assert one.base_delta.version == other.base_delta.version
        assert list(one.base_delta.tensors) == list(other.base_delta.tensors)
        values = (one.base_delta.tensors.values(), other.base_delta.tensors.values())
        pairs += zip(*values, strict=True)
    for first, second in pairs:
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert first.tobytes() == second.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=states, round=st.integers(0, 99999), facts=st.dictionaries(st.text(), json_values))
def test_any_state_comes_back(
    tmp_path: Path, state: ServerState, round: int, facts: dict[str, Any]
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    save(tmp_path, Checkpoint(round, state, facts))
    loaded = load_newest(tmp_path, Noted)
    assert (loaded.round, loaded.facts, loaded.state.memory) == (round, facts, state.memory)
    assert loaded.state.agreement == state.agreement
    assert_same(loaded.state.model, state.model)
    assert list(loaded.state.alternatives) == list(state.alternatives)
    for name, model in state.alternatives.items():
        assert_same(loaded.state.alternatives[name], model)


def checkpoint(round: int) -> Checkpoint:
    spec = AdapterSpec(layers=(None, LayerAdapter("lora", rank=8)), alpha=16.0)
    model = GlobalModel(spec, filled(float(round)))
    return Checkpoint(round, ServerState(model, memory=Seen(round)), {"initial": 0.5})


def head(loaded: Checkpoint) -> float:
    return float(loaded.state.model.tensors["head"]["head.W"][0])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    paths = [save(tmp_path / "checkpoints", checkpoint(round)) for round in (0, 1, 2, 9, 10)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[-2:]
    assert load_newest(tmp_path / "checkpoints", Seen).round == 10


def test_a_round_can_be_chosen(tmp_path: Path) -> None:
    for round in (8, 9, 10):
        save(tmp_path, checkpoint(round))
    assert head(load_round(tmp_path, 9, Seen)) == 9.0
    with pytest.raises(DroppeftError, match=r"no round 8; the saved rounds are: 10, 9$"):
        load_round(tmp_path, 8, Seen)
    with pytest.raises(DroppeftError, match=r"no round 8; the saved rounds are: none$"):
        load_round(tmp_path / "nowhere", 8, Seen)


def test_a_chosen_round_that_is_damaged_is_not_replaced_by_another(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1))
    path = save(tmp_path, checkpoint(2))
    path.write_bytes(flip_the_last(path.read_bytes()))
    with pytest.raises(DroppeftError, match=r"round-00002.safetensors: is damaged"):
        load_round(tmp_path, 2, Seen)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_the_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [truncate, flip_the_last, lambda content: b"", lambda content: b"not a checkpoint"]
)
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, checkpoint(1))
    newest = save(tmp_path, checkpoint(2))
    newest.write_bytes(damage(newest.read_bytes()))
    loaded = load_newest(tmp_path, Seen)
    assert (loaded.round, head(loaded), loaded.state.memory) == (1, 1.0, Seen(1))
    assert "round-00002.safetensors is damaged" in caplog.text


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1))
    newest = save(tmp_path, checkpoint(2))
    whole = newest.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        loaded = load_newest(tmp_path, Seen)
        if loaded.round != 1 and head(loaded) != 2.0:
            unnoticed.append(place)
    assert unnoticed == []


def test_a_folder_without_a_readable_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DroppeftError, match="holds no readable checkpoint; start a new run"):
        load_newest(tmp_path / "nowhere", Seen)
    save(tmp_path, checkpoint(1)).write_bytes(b"")
    with pytest.raises(DroppeftError, match="holds no readable checkpoint"):
        load_newest(tmp_path, Seen)


def test_a_crash_while_writing_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for round in (1, 2):
        save(tmp_path, checkpoint(round))

    def crash(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, checkpoint(3))
    monkeypatch.undo()
    assert load_newest(tmp_path, Seen).round == 2
    assert len(list(tmp_path.glob("round-*.safetensors"))) == 2
    save(tmp_path, checkpoint(3))
    assert load_newest(tmp_path, Seen).round == 3


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).bytes(8 * 5000)
    values = tuple(x for x in struct.unpack("5000d", drawn) if np.isfinite(x))
    memory = Noted({7: (*values, 5e-324, -0.0, 0.1)}, {}, frozenset(), None)
    state = replace(checkpoint(1).state, memory=memory)
    save(tmp_path, Checkpoint(1, state, {}))
    loaded = load_newest(tmp_path, Noted).state.memory.by_client[7]
    assert struct.pack(f"{len(loaded)}d", *loaded) == struct.pack(
        f"{len(loaded)}d", *memory.by_client[7]
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Noted, r"it has \['round'\], and not \['by_client', "), (Text, r"round: input should be a")],
)
def test_the_memory_of_another_method_is_refused(tmp_path: Path, kind: type, why: str) -> None:
    save(tmp_path, checkpoint(3))
    said = rf"round-00003.safetensors: the server's memory is not that .*{why}.*; start a new run"
    for load in (lambda: load_newest(tmp_path, kind), lambda: load_round(tmp_path, 3, kind)):
        with pytest.raises(DroppeftError, match=said):
            load()
