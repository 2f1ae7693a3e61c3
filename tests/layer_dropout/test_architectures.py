"""Every architecture of the table satisfies the contract; others are refused."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartForCausalLM,
    DynamicCache,
    T5EncoderModel,
)

import architecture_contract as contract
from architecture_contract import CASES, Case
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import ARCHITECTURES, REFUSED, find_blocks, find_stacks, gated
from droppeft.layer_dropout.architectures import BLOCK_OUTPUTS, DROPPED_OUTPUTS

RECORD = json.loads(contract.FILE.read_text(encoding="utf-8"))
RECORDED = {(row["model_type"], row["variant"]): row for row in RECORD["cases"]}
OFTEN = ("bart", "bert", "deberta-v2", "gpt2", "gpt_neo", "llama", "modernbert", "t5")
"""The architectures that `make test` checks against every rule; together they have every kind of
block and of reference. Of the others it checks that a dropped block is like an absent one."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Tiny configurations cause warnings about special tokens outside the vocabulary."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def case(model_type: str, variant: str = "") -> Case:
    [found] = [one for one in CASES if (one.model_type, one.variant) == (model_type, variant)]
    return found


@pytest.mark.sample("a_dropped_block_is_absent-*", *(f"*-{name}" for name in OFTEN))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("rule", contract.RULES)
def test_the_contract(case: Case, rule: Callable[[Case], None]) -> None:
    rule(case)


@pytest.mark.sample(*OFTEN)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_record_is_up_to_date(case: Case) -> None:
    """Run python tests/architecture_contract.py to update docs/architectures.json."""
    assert RECORDED[case.model_type, case.variant] == contract.outcome(case)


def test_every_architecture_has_a_case_and_every_case_a_row() -> None:
    assert {one.model_type for one in CASES} == set(ARCHITECTURES)
    assert [(one.model_type, one.variant) for one in CASES] == list(RECORDED)
    assert len(ARCHITECTURES) >= 35


def test_the_outputs_are_consistent() -> None:
    for name, architecture in ARCHITECTURES.items():
        assert architecture.output in DROPPED_OUTPUTS, name
        for block in architecture.blocks:
            assert BLOCK_OUTPUTS[block] == architecture.output, name


# Two stacks


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("bart", ["encoder.layers", "decoder.layers"]),
        ("t5", ["encoder.block", "decoder.block"]),
    ],
)
def test_find_stacks_finds_both_stacks_and_find_blocks_refuses_them(
    model_type: str, names: list[str]
) -> None:
    model = contract.build(case(model_type))
    stacks = find_stacks(model)
    assert list(stacks) == names
    assert all(blocks == tuple(model.get_submodule(name)) for name, blocks in stacks.items())
    with pytest.raises(DroppeftError, match=f"has 2 lists of blocks .{', '.join(names)}."):
        find_blocks(model)


def test_a_task_that_needs_one_stack_has_one() -> None:
    encoder = T5EncoderModel(case("t5").config())
    assert find_blocks(encoder)[0] == "encoder.block"
    decoder = BartForCausalLM(case("bart").config())
    assert find_blocks(decoder)[0] == "model.decoder.layers"


def test_stacks_may_be_of_different_depth() -> None:
    config = case("t5").config()
    config.num_decoder_layers = 1
    stacks = find_stacks(AutoModel.from_config(config))
    assert [len(blocks) for blocks in stacks.values()] == [3, 1]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_dropped_first_block_of_t5_returns_biases_with_a_cache(keyword: bool) -> None:
    """It is dropped when the cache already has 4 tokens of the text."""
    model = contract.build(case("t5"))
    block = model.decoder.block[0]
    cache = DynamicCache(config=model.decoder.config)
    model.decoder(torch.arange(4).view(1, 4), past_key_values=cache, use_cache=True)
    # A copy, since this call appends to the cache.
    copied = DynamicCache([(cache.layers[0].keys.clone(), cache.layers[0].values.clone())])
    assert copied.get_seq_length() == 4
    hidden = torch.randn(1, 2, 16)
    _, expected, _ = block(hidden, None, None, past_key_values=copied)
    keywords = {"hidden_states": hidden} if keyword else {}
    with gated([block]) as gates:
        gates.active = (False,)
        given, bias, cross = block(
            *([] if keyword else [hidden]), past_key_values=cache, **keywords
        )
    assert given is hidden
    assert torch.equal(bias, expected)
    assert cross is None


def test_biases_of_an_earlier_block_are_returned() -> None:
    block = contract.build(case("t5")).encoder.block[1]
    hidden, bias = torch.randn(1, 2, 16), torch.randn(1, 2, 2, 2)
    with gated([block]) as gates:
        gates.active = (False,)
        assert block(hidden, None, bias)[1] is bias
        assert block(hidden, position_bias=bias)[1] is bias


# A cache


def test_a_new_cache_in_every_step_is_accepted() -> None:
    model = contract.build(case("llama"))
    columns = contract.batch(case("llama"))
    with gated(contract.all_blocks(model)) as gates:
        for active in [(False, True, True), (False, True, False), (True, True, True)]:
            gates.active = active
            assert model(**columns, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("later", [(True, True, True), (False, False, False), (True, False, True)])
def test_continuing_with_an_incomplete_cache_is_refused_for_any_gates(
    later: tuple[bool, ...],
) -> None:
    model = contract.build(case("llama"))
    columns = contract.batch(case("llama"))
    with gated(contract.all_blocks(model)) as gates:
        gates.active = (False, False, False)
        cache = model(**columns, use_cache=True).past_key_values
        gates.active = later
        with pytest.raises(DroppeftError, match=r"block 0 was dropped .* use_cache=False"):
            model(columns["input_ids"][:, :1], past_key_values=cache)


def test_the_auxiliary_loss_of_experts_is_that_of_the_layers_that_ran() -> None:
    """Hooks record the routers; the router of a dropped layer must not be recorded."""
    model = contract.build(case("mixtral"), AutoModelForCausalLM)
    columns = contract.batch(case("mixtral"))
    inputs = {**columns, "labels": columns["input_ids"], "output_router_logits": True}
    active = (False, True, True)
    small, _ = contract.sliced(model, active, AutoModelForCausalLM)
    with gated(contract.all_blocks(model)) as gates:
        gates.active = active
        found = model(**inputs)
    expected = small(**inputs)
    assert len(found.router_logits) == 2
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)


# Refusals


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_type_gives_the_reason(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING
    assert model_type not in ARCHITECTURES
    model = nn.Module()
    model.config = CONFIG_MAPPING[model_type]()  # type: ignore[assignment]
    with pytest.raises(DroppeftError) as caught:
        find_blocks(model)
    assert str(caught.value) == (
        f"layers of {model_type} models cannot be dropped: {REFUSED[model_type]}"
    )


def test_albert_has_one_block_for_all_depths() -> None:
    config = AlbertConfig(
        vocab_size=10, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    model = AutoModel.from_config(config)
    assert config.num_hidden_layers == 12
    assert len(model.encoder.albert_layer_groups) == 1


def test_a_block_of_another_class_is_refused() -> None:
    model = contract.build(case("t5"))
    model.encoder.block[1] = nn.Identity()
    with pytest.raises(DroppeftError, match=r"block 1 of .* is of class Identity, not T5Block"):
        find_stacks(model)


def test_a_block_of_a_derived_class_is_accepted() -> None:
    model = contract.build(case("t5"))
    kind = type(model.encoder.block[0])
    model.encoder.block[0].__class__ = type("FSDPBlock", (kind,), {})
    expected = contract.hidden(model(**contract.batch(case("t5"))))
    blocks = contract.all_blocks(model)
    with gated(blocks) as gates:
        assert torch.equal(contract.hidden(model(**contract.batch(case("t5")))), expected)
        gates.active = (False, *[True] * 5)
        assert len(blocks[0](torch.randn(1, 2, 16))[1].shape) == 4
