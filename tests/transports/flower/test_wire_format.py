"""Packing: every field comes back unchanged, and anything else is refused."""

import dataclasses
import json
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from droppeft.client.published_task import PublishedTask
from droppeft.config import as_tree, load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, BaseDelta, Instruction
from droppeft.messages.reply import EvaluationReply, Failure, Reply, Update
from droppeft.messages.tensors import payload_bytes
from droppeft.refusals import Refused
from droppeft.transports.flower.wire_format import (
    MOST_HEAD,
    MOST_TEXT,
    Malformed,
    Packed,
    RunContext,
    one_line,
    pack_instruction,
    pack_reply,
    unpack_instruction,
    unpack_reply,
)
from handmade import filled, instruction_for, update_for

ENOUGH = 10**9
RUN_CONTEXT = RunContext(
    as_tree(load_config(None)),
    PublishedTask("classification", ("neg", "pos"), "a", "b"),
    {"data_hash": "a", "split_hash": "b"},
    model_server=True,
)

# Values are drawn by the type hints of the dataclasses, so a new field is tested without a change
# here.

printable = st.characters(categories=("L", "M", "N", "P", "S")) | st.just(" ")
texts = st.text(printable, max_size=9) | st.sampled_from(("a.b|c/d:0", "0", "__metadata__"))
numbers = st.floats() | st.sampled_from((-0.0, 0.1, 1e-310, 1e23, float("nan"), float("inf")))


def array_of(shape: tuple[int, ...], kind: str, seed: int, layout: str) -> Any:
    values = np.asarray(np.random.default_rng(seed).normal(size=shape) * 100).astype(kind)
    if layout == "transposed":
        return values.T
    return values[..., ::2] if layout == "strided" and values.ndim else values


arrays = st.builds(
    array_of,
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(("f4", "f2", "f8", "i8", "i4", "u1", "?", ">f4")),
    st.integers(0, 9),
    st.sampled_from(("dense", "transposed", "strided")),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    int: st.integers(-(2**63), 2**63 - 1),
    float: numbers,
    bool: st.booleans(),
    types.NoneType: st.none(),
    Any: json_values,
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Draw values of a type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values_of(hint) for name, hint in hints.items()})
    if origin is np.ndarray:
        return arrays
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(map(values_of, args))
    if origin is Mapping:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    if origin is frozenset:
        return st.frozensets(values_of(args[0]), max_size=3)
    assert origin is tuple
    if args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    return st.tuples(*map(values_of, args))


def fingerprint(value: Any) -> Any:
    """Equal for two values that are the same in every bit, type and order."""
    if isinstance(value, np.ndarray):
        little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"))
        return ("array", value.shape, little.dtype.str, little.tobytes())
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return (type(value), [(name, fingerprint(getattr(value, name))) for name in names])
    if isinstance(value, Mapping):
        return [(fingerprint(key), fingerprint(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return (type(value), [fingerprint(item) for item in value])
    return (type(value), sorted(value) if isinstance(value, frozenset) else repr(value))


@given(values_of(Instruction), values_of(RunContext))
def test_every_instruction_comes_back(instruction: Instruction, run_context: RunContext) -> None:
    packed = pack_instruction(instruction, run_context)
    assert fingerprint(unpack_instruction(packed)) == fingerprint((instruction, run_context))
    assert pack_instruction(*unpack_instruction(packed)) == packed


@given(values_of(Update) | values_of(EvaluationReply) | values_of(Failure))
def test_every_reply_comes_back(reply: Reply) -> None:
    packed = pack_reply(reply)
    assert fingerprint(unpack_reply(packed, ENOUGH, simulated=True)) == fingerprint(reply)


def test_a_refusal_becomes_its_sentence() -> None:
    few = unpack_reply(pack_reply(Refused("too_few_rows", 20)), ENOUGH)
    too_few = "it has fewer rows of this task than the 20 that it takes part with"
    assert few == Failure(-1, too_few, for_good=True)
    lost = unpack_reply(pack_reply(Refused("state_lost", 7)), ENOUGH)
    assert lost == Failure(
        -1, "the state that it saved in round 7 is missing or damaged", lost=True
    )


def test_only_a_simulation_sends_texts() -> None:
    with pytest.raises(Malformed, match="no update and no evaluation and no refusal"):
        unpack_reply(pack_reply(Failure(3, "a cell has the value 47")), ENOUGH)


@pytest.mark.parametrize(
    "refusal",
    [
        {"code": "new", "numbers": []},
        {"code": "{0.__class__}", "numbers": [1.0]},
        {"code": "too_few_rows", "numbers": []},
        {"code": "too_few_rows", "numbers": [1.0, 2.0, 3.0]},
        {"code": "error", "numbers": [1.0]},
        {"code": "state_lost", "numbers": [1e16]},
        {"code": "state_lost", "numbers": [float("nan")]},
        {"code": "state_lost", "numbers": [float("-inf")]},
    ],
    ids=str,
)
def test_a_refusal_that_no_client_sends_is_refused(refusal: dict[str, Any]) -> None:
    packed = changed(pack_reply(Refused("error")), lambda head: head.update(refusal=refusal))
    with pytest.raises(Malformed, match=r"of a reason|no such reason"):
        unpack_reply(packed, ENOUGH)


def test_layers_and_names_keep_their_order_and_kind() -> None:
    w = np.zeros(1, np.float32)
    tensors = {"head": {"z": w, "a": w}, 3: {}, "3": {"a": w}, 10: {"b": w}, 2: {"b": w}}
    instruction, _ = unpack_instruction(
        pack_instruction(instruction_for(tensors=tensors), RUN_CONTEXT)
    )
    assert [(key, list(named)) for key, named in instruction.tensors.items()] == [
        ("head", ["z", "a"]),
        (3, []),
        ("3", ["a"]),
        (10, ["b"]),
        (2, ["b"]),
    ]


def test_one_tensor_in_two_places_is_two() -> None:
    w = np.arange(3, dtype=np.float32)
    instruction = instruction_for(tensors={0: {"w": w}}, base_delta=BaseDelta("v1", {"w": w}))
    back, _ = unpack_instruction(pack_instruction(instruction, RUN_CONTEXT))
    assert back.base_delta is not None
    back.tensors[0]["w"][0] = 7
    assert back.base_delta.tensors["w"].tolist() == [0, 1, 2]


def test_an_option_keeps_its_type() -> None:
    options = (("a", True), ("b", 1), ("c", 1.0), ("d", "1"), ("e", ("x", "y")), ("f", ()))
    spec = AdapterSpec(layers=(), alpha=1.0, options=options)
    back, _ = unpack_instruction(pack_instruction(instruction_for(adapter=spec), RUN_CONTEXT))
    assert fingerprint(back.adapter.options) == fingerprint(options)


def test_equal_sets_give_equal_bytes() -> None:
    names = [f"layer.{i}.A" for i in range(50)]
    one = instruction_for(share=frozenset(names), nonce="n")
    other = instruction_for(share=frozenset(reversed(names)), nonce="n")
    assert pack_instruction(one, RUN_CONTEXT) == pack_instruction(other, RUN_CONTEXT)


def test_numbers_that_are_not_finite_can_be_unpacked() -> None:
    update = update_for(instruction_for(), train_loss=float("nan"), reward=float("-inf"))
    back = unpack_reply(pack_reply(update), ENOUGH)
    assert isinstance(back, Update)
    assert (np.isnan(back.train_loss), back.reward) == (True, float("-inf"))


def test_the_tensors_can_be_written_to() -> None:
    back, _ = unpack_instruction(pack_instruction(instruction_for(), RUN_CONTEXT))
    assert all(array.flags.writeable for named in back.tensors.values() for array in named.values())


def test_the_reason_of_a_failure_becomes_one_line() -> None:
    packed = pack_reply(Failure(3, "no\nroom\x1b[31m" + "!" * MOST_TEXT))
    back = unpack_reply(packed, ENOUGH, simulated=True)
    assert isinstance(back, Failure)
    assert back.reason.startswith("no room [31m!!!")
    assert len(back.reason) == MOST_TEXT


def test_a_cut_line_shows_that_it_was_cut() -> None:
    assert [one_line("abcd", most) for most in (5, 4, 3, 1)] == ["abcd", "abcd", "ab…", "…"]


@given(st.text(max_size=30), st.integers(1, 12))
def test_one_line_is_printable_and_short(text: str, most: int) -> None:
    line = one_line(text, most)
    assert line.isprintable()
    assert len(line) == min(len(text), most)
    assert line == text or not text.isprintable() or line[:-1] == text[: most - 1]


def test_packing_needs_neither_flower_nor_torch() -> None:
    check = (
        "import sys, droppeft.transports.flower.wire_format;"
        "print(*{'flwr', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("kind", [object, np.complex64, np.longdouble, "U3", "M8[s]"])
def test_an_array_that_cannot_travel_is_not_packed(kind: Any) -> None:
    with pytest.raises(Malformed, match="the reply cannot be packed"):
        pack_reply(update_for(instruction_for(), tensors={0: {"w": np.zeros(2, kind)}}))


def test_a_value_that_cannot_travel_is_not_packed() -> None:
    with pytest.raises(Malformed, match="the reply cannot be packed: int32 is not JSON"):
        pack_reply(update_for(instruction_for(), steps=np.int32(3)))


@pytest.mark.parametrize("steps", ["3", 2.5, True, None, 2**63])
def test_what_would_be_refused_is_not_packed(steps: Any) -> None:
    with pytest.raises(Malformed):
        pack_reply(update_for(instruction_for(), steps=steps))


def test_an_integer_in_a_field_of_floats_is_packed_as_a_float() -> None:
    whole = update_for(instruction_for(), train_loss=2, importance=(0, 1, 2, 3))
    assert pack_reply(whole) == pack_reply(
        replace(whole, train_loss=2.0, importance=(0.0, 1.0, 2.0, 3.0))
    )


def test_a_text_too_long_is_neither_packed_nor_read() -> None:
    names = frozenset(str(number) for number in range(MOST_HEAD // 8))
    with pytest.raises(Malformed, match=f"{MOST_HEAD} at most"):
        pack_instruction(instruction_for(share=names), RUN_CONTEXT)
    with pytest.raises(Malformed, match=f"{MOST_HEAD} at most"):
        unpack_instruction(Packed(" " * (MOST_HEAD + 1), safetensors.numpy.save({})))


def test_a_blob_too_large_is_refused_before_it_is_read() -> None:
    packed = pack_reply(update_for(instruction_for()))
    size = len(packed.tensors)
    assert isinstance(unpack_reply(packed, size), Update)
    with pytest.raises(Malformed, match=f"{size} bytes of tensors, {size - 1} at most"):
        unpack_reply(packed, size - 1)
    with pytest.raises(Malformed, match="5 bytes of tensors, 4 at most"):
        unpack_reply(Packed("", b"xxxxx"), 4)


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=30), st.sampled_from("fd?"))
def test_the_blob_is_little_larger_than_its_arrays(shapes: list[list[int]], kind: str) -> None:
    tensors = {0: {f"a long name {i}" * 20: np.zeros(s, kind) for i, s in enumerate(shapes)}}
    packed = pack_reply(update_for(instruction_for(), tensors=tensors))
    assert len(packed.tensors) <= payload_bytes(tensors) + 200 * len(shapes) + 16


# What must be refused


def changed(packed: Packed, change: Callable[[dict[str, Any]], object]) -> Packed:
    """A message whose text was changed; it stays written as droppeft writes JSON."""
    tree = json.loads(packed.head)
    change(tree)
    return replace(packed, head=json.dumps(tree, separators=(",", ":")))


def test_a_text_that_was_not_changed_is_read() -> None:
    packed = pack_reply(update_for(instruction_for(), tensors=filled(1.0, 2)))
    assert changed(packed, lambda head: None) == packed
    assert isinstance(unpack_reply(packed, ENOUGH), Update)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.pop("steps"), "message.update.steps is not valid: field required"),
        (lambda tree: tree.update(x=1), "message.update is not valid: unexpected keyword"),
        (lambda tree: tree["cost"].update(x=1), "message.update.cost is not valid: unexpected"),
        (lambda tree: tree["cost"].pop("rows"), "message.update.cost is not valid: field required"),
        (lambda tree: tree.update(steps="2"), "message.update.steps .* valid integer"),
        (lambda tree: tree.update(steps=True), "message.update.steps .* valid integer"),
        (lambda tree: tree.update(steps=2.0), "message.update.steps .* valid integer"),
        (lambda tree: tree.update(steps=2**63), "an integer of more than 64 bits"),
        (lambda tree: tree.update(steps=-(2**63) - 1), "an integer of more than 64 bits"),
        (lambda tree: tree.update(active_steps=[2**63]), "an integer of more than 64 bits"),
        (lambda tree: tree.update(train_loss=None), "message.update.train_loss .* valid number"),
        (lambda tree: tree.update(train_loss=True), "message.update.train_loss .* valid number"),
        (lambda tree: tree.update(train_loss=10**400), "not as this version writes it"),
        (lambda tree: tree.update(train_loss=1), "not as this version writes it"),
        (lambda tree: tree.update(reward="1"), "message.update.reward .* valid number"),
        (lambda tree: tree.update(nonce=7), "message.update.nonce .* valid string"),
        (lambda tree: tree.update(nonce="a\x1b[2J"), "too long or not printable"),
        (lambda tree: tree.update(nonce="\ud800"), "invalid JSON"),
        (lambda tree: tree.update(nonce="n" * (MOST_TEXT + 1)), "too long or not printable"),
        (lambda tree: tree.update(active_steps={}), "message.update.active_steps .* valid array"),
        (lambda tree: tree.update(active_steps=[1, "1"]), "message.update.active_steps .* integer"),
        (lambda tree: tree.update(cost=[]), "message.update.cost is not valid: input should be"),
        (lambda tree: tree.pop("scores"), "something is missing, twice, or of another type"),
        (lambda tree: tree.update(tensors=3), "message.update.tensors .* an object"),
        (lambda tree: tree.update(tensors={"head": {}}), "not as this version writes it"),
        (lambda tree: tree.update(tensors={"head": {"a": 0}}), "message.update.tensors .* not val"),
    ],
)
def test_a_text_that_is_not_an_update_is_refused(change: Any, expected: str) -> None:
    packed = pack_reply(update_for(instruction_for(), tensors=filled(1.0, 2)))
    with pytest.raises(Malformed, match=expected):
        unpack_reply(changed(packed, lambda head: change(head["update"])), ENOUGH)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda names: names.append(3), "message.tensors.3 is not valid: .* valid array"),
        (lambda names: names.append([9]), "message.tensors.3 is not valid: field required"),
        (lambda names: names.append([9, [], []]), "message.tensors.3 is not valid"),
        (lambda names: names.append([0, []]), "something is missing, twice"),
        (lambda names: names.append([None, []]), "message.tensors.3 is not valid"),
        (lambda names: names.append([1.0, []]), "message.tensors.3 is not valid"),
        (lambda names: names.append([9, ["a\n"]]), "too long or not printable"),
        (lambda names: names.append([9, ["a"]]), "does not hold the 4 tensors that it should"),
        (lambda names: names.append([9, "a"]), "message.tensors.3 is not valid"),
        (lambda names: names.pop(), "does not hold the 2 tensors that it should"),
        (
            lambda names: (names[0].__setitem__(1, ["same", "same"]), names.pop()),
            "something is missing, twice",
        ),
        (lambda names: names.append([2**63, []]), "an integer of more than 64 bits"),
    ],
)
def test_names_that_do_not_fit_the_tensors_are_refused(change: Any, expected: str) -> None:
    packed = pack_reply(update_for(instruction_for(), tensors=filled(1.0, 2)))
    assert [len(names) for _, names in json.loads(packed.head)["tensors"]] == [1, 1, 1]
    with pytest.raises(Malformed, match=expected):
        unpack_reply(changed(packed, lambda head: change(head["tensors"])), ENOUGH)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"share": ["a", "a"]}, "something is missing, twice"),
        ({"share": ["b", "a"]}, "not as this version writes it"),
        ({"share": "abc"}, "message.instruction.share .* valid array"),
        ({"train": 3}, "message.instruction.train .* valid array"),
        ({"dropout": {"rates": [], "sampling": "often", "every": 1}}, "'exact' or 'bernoulli'"),
        ({"dropout": {"rates": [], "sampling": ["exact"], "every": 1}}, "'exact' or 'bernoulli'"),
    ],
)
def test_a_text_that_is_not_an_instruction_is_refused(
    change: dict[str, Any], expected: str
) -> None:
    packed = pack_instruction(instruction_for(), RUN_CONTEXT)
    with pytest.raises(Malformed, match=expected):
        unpack_instruction(changed(packed, lambda head: head["instruction"].update(change)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda head: head.update(run_context=None), "the message is no instruction"),
        (lambda head: head["run_context"].update(x=1), "message.run_context .* unexpected"),
        (lambda head: head["run_context"].update(config=[]), "message.run_context.config"),
        (lambda head: head["run_context"].update(identity={"a": 1}), "message.run_context.identit"),
        (lambda head: head["run_context"].update(identity={"a": "\n"}), "not printable"),
        (lambda head: head["run_context"].update(identity={"\n": "a"}), "not printable"),
        (lambda head: head["run_context"].update(model_server=1), "message.run_context.model_serv"),
        (
            lambda head: head.update(base_delta=["a"], tensors=head["tensors"][:2]),
            "not as this version writes it",
        ),
        (lambda head: head.update(base_delta=["a"]), "does not hold the 4 tensors"),
    ],
)
def test_a_task_that_is_not_whole_is_refused(change: Any, expected: str) -> None:
    packed = pack_instruction(instruction_for(tensors=filled(1.0, 2)), RUN_CONTEXT)
    with pytest.raises(Malformed, match=expected):
        unpack_instruction(changed(packed, change))


def test_a_message_of_the_wrong_direction_is_refused() -> None:
    with pytest.raises(Malformed, match="no update and no evaluation and no refusal"):
        unpack_reply(pack_instruction(instruction_for(), RUN_CONTEXT), ENOUGH)
    with pytest.raises(Malformed, match="the message is no instruction"):
        unpack_instruction(pack_reply(Refused("error")))


def test_a_message_of_two_kinds_is_refused() -> None:
    packed = pack_reply(update_for(instruction_for()))
    refusal = json.loads(pack_reply(Refused("error")).head)["refusal"]
    with pytest.raises(Malformed, match="not as this version writes it"):
        unpack_reply(changed(packed, lambda head: head.update(refusal=refusal)), ENOUGH)


REFUSAL = pack_reply(Refused("state_lost", 1)).head


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"numbers":', '"numbers":[2.0],"numbers":', "something is missing, twice"),
        ('"refusal":', '"refusal":null,"refusal":', "something is missing, twice"),
        ('"update":null,', "", "something is missing, twice"),
        ('"numbers":[1.0]', '"numbers": [1.0]', "not as this version writes it"),
        ('"state_lost"', '"\\u0073tate_lost"', "not as this version writes it"),
        ("[1.0]", "[1.]", "invalid JSON"),
        ("[1.0]", "[01]", "invalid JSON"),
        ("[1.0]", f"[{'1' * 5_000}]", "invalid JSON"),
    ],
)
def test_a_refusal_written_otherwise_is_refused(old: str, new: str, expected: str) -> None:
    assert REFUSAL.count(old) == 1
    with pytest.raises(Malformed, match=expected):
        unpack_reply(Packed(REFUSAL.replace(old, new), EMPTY), ENOUGH)


EMPTY = safetensors.numpy.save({})


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("", "invalid JSON"),
        ("{", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ("1" * 5_000, "invalid JSON"),
        ("[]", "message is not valid: input should be"),
        ("null", "message is not valid: input should be"),
        ("{}", "no update and no evaluation and no refusal"),
        ('{"task":{}}', "message is not valid: unexpected keyword"),
        ('{"failure":{}}', "message.failure.client is not valid: field required"),
        ('{"failure":[]}', "message.failure is not valid: input should be"),
    ],
)
def test_a_head_that_is_no_reply_is_refused(head: str, expected: str) -> None:
    with pytest.raises(Malformed, match=expected):
        unpack_reply(Packed(head, EMPTY), ENOUGH)


def blob(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(kind: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (b"", "not a complete"),
        (EMPTY[:9], "not a complete"),
        (blob({}, length=2**63), "not a complete"),
        (blob({}, length=2**40), "not a complete"),
        (blob({}, b"more"), "not a complete"),
        (blob([]), "not a complete"),
        (blob({"0": entry("U8", [4], 0, 3)}, b"abc"), "not a complete"),
        (blob({"0": entry("U8", [3], 0, 2**40)}, b"abc"), "not a complete"),
        (
            blob({"0": entry("U8", [2], 0, 2), "1": entry("U8", [2], 1, 3)}, b"abc"),
            "not a complete",
        ),
        (blob({"0": entry("U8", [0, 2**63, 2**63], 0, 0)}), "not a complete"),
        (blob({"0": entry("U8", [1] * 100, 0, 1)}, b"a"), "not a complete"),
        (blob({"0": entry("BF16", [1], 0, 2)}, b"ab"), "unknown to numpy: 'BF16'"),
        (blob({"0": entry("F4", [2], 0, 1)}, b"a"), "unknown to numpy: 'F4'"),
        (blob({"0": entry("U8", [1], 0, 1)}, b"a"), "does not hold the 0 tensors"),
    ],
)
def test_a_hostile_blob_is_refused(tensors: bytes, expected: str) -> None:
    with pytest.raises(Malformed, match=expected):
        unpack_reply(replace(pack_reply(Refused("error")), tensors=tensors), ENOUGH)


@pytest.mark.parametrize(
    "change",
    [
        lambda head, hostile: head.update({hostile: 1}),
        lambda head, hostile: head.update(tensors=[[hostile, hostile]]),
        lambda head, hostile: head.update(tensors=[[0, [hostile]]]),
        lambda head, hostile: head["update"].update({hostile: 1}),
        lambda head, hostile: head["update"].update(steps=hostile),
        lambda head, hostile: head["update"].update(nonce=hostile),
        lambda head, hostile: head["update"].update(tensors={hostile: {hostile: hostile}}),
        lambda head, hostile: head["update"]["cost"].update({hostile: hostile}),
        lambda head, hostile: head["update"]["cost"].update(rows=hostile),
        lambda head, hostile: head.update(evaluation=hostile),
        lambda head, hostile: head.update(run_context={"identity": {hostile: 1}}),
    ],
)
def test_an_error_repeats_nothing_from_the_message(change: Any) -> None:
    packed = pack_reply(update_for(instruction_for()))
    with pytest.raises(Malformed) as caught:
        unpack_reply(changed(packed, lambda head: change(head, "\x1b]0;owned\x07")), ENOUGH)
    assert "owned" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_malformed_is_an_error_for_people() -> None:
    assert issubclass(Malformed, DroppeftError)


def readable(packed: Packed) -> None:
    """Unpacking raises :class:`Malformed`, or gives a reply that has the same text again."""
    try:
        reply = unpack_reply(packed, ENOUGH)
    except Malformed:
        return
    assert isinstance(reply, Update | Failure)
    assert pack_reply(reply).head == packed.head


def readable_task(packed: Packed) -> None:
    try:
        instruction, run_context = unpack_instruction(packed)
    except Malformed:
        return
    assert pack_instruction(instruction, run_context).head == packed.head


UPDATE = pack_reply(update_for(instruction_for(), tensors={0: {"a": np.ones((2, 2), "f4")}, 1: {}}))
TASK = pack_instruction(
    instruction_for(base_delta=BaseDelta("v", {"b": np.ones(1, "f4")})), RUN_CONTEXT
)


@given(st.text() | json_values.map(json.dumps), st.binary())
def test_anything_may_arrive(head: str, tensors: bytes) -> None:
    readable(Packed(head, tensors))
    readable(Packed(head, EMPTY))
    readable(Packed(UPDATE.head, tensors))


@given(st.data())
def test_a_message_may_arrive_with_other_bytes(data: st.DataObject) -> None:
    for good, read in ((UPDATE, readable), (TASK, readable_task)):
        head = data.draw(edited(good.head, st.text(max_size=3)))
        tensors = data.draw(edited(good.tensors, st.binary(max_size=9)))
        read(replace(good, head=head))
        read(replace(good, tensors=tensors))
        read(Packed(head, tensors))


@given(st.data())
def test_a_message_may_arrive_with_other_values(data: st.DataObject) -> None:
    for good, read in ((UPDATE, readable), (TASK, readable_task)):
        tree = json.loads(good.head)
        node = data.draw(st.sampled_from(list(containers(tree))))
        value = data.draw(json_values | st.sampled_from(list(containers(tree))).map(deep_copy))
        if isinstance(node, dict):
            node[data.draw(st.sampled_from(sorted(node)) | st.text(max_size=3))] = value
        else:
            node.insert(data.draw(st.integers(0, len(node))), value)
        read(replace(good, head=json.dumps(tree, separators=(",", ":"))))


def edited(text: Any, pieces: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Replace a part of a text, or of bytes, by another."""
    place = st.integers(0, len(text))
    return st.builds(
        lambda start, length, piece: text[:start] + piece + text[start + length :],
        place,
        st.integers(0, 8) | place,
        pieces,
    )


def containers(tree: Any) -> Any:
    """Yield every object and list that is not empty."""
    if isinstance(tree, dict | list) and tree:
        yield tree
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(item)


def deep_copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))
