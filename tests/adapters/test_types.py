"""Every type of peft is in the table, and every type that can be used satisfies the contract."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from transformers import AutoModelForSequenceClassification, XLMRobertaConfig
from transformers.pytorch_utils import Conv1D

import adapter_contract as contract
from adapter_contract import Attached, Case
from droppeft.adapters.attach import attach, export_adapter
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.adapters.settings import config_class
from droppeft.adapters.types import BOTTLENECK, NOT_ON, TYPES, AdapterType, adapter_type
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec, LayerAdapter
from tiny import FAMILIES, tiny_model

MAIN = (BOTTLENECK, "lora", "ia3", "prefix_tuning", "prompt_tuning")
RECORDED = json.loads(contract.FILE.read_text(encoding="utf-8"))
CASES = [
    contract.case(name, family)
    for name in contract.USABLE
    for family in FAMILIES
    if (name in MAIN or family in ("bert", "llama"))
    and "refused" not in RECORDED["none"][name][family]
]
QUANTISED = [
    contract.case(name, "bert" if quantization == "4bit" else "llama", quantization)
    for quantization in NOT_ON
    for name in contract.usable_on(quantization)
    if name not in MAIN and TYPES[name].kind == "layered"
]
NOT_QUANTISED = [
    contract.case(name, "bert", quantization)
    for quantization in NOT_ON
    for name in NOT_ON[quantization]
]
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("lora", {"options": {"use_dora": True}}),
    ("lora", {"options": {"use_rslora": True}, "targets": ("all-linear",)}),
    ("loha", {"rank": 2, "alpha": 4.0}),
    ("ia3", {"targets": ("query", "intermediate.dense")}),
    ("supertuning", {"options": {"sparsity": 0.9, "r": 2}}),
    (BOTTLENECK, {"width": 4, "targets": ("feed_forward",)}),
    ("prefix_tuning", {"tokens": 2, "options": {"init_weights": "zero"}}),
    ("prompt_tuning", {"tokens": 2, "options": {"prompt_tuning_init": "SAMPLE_VOCAB"}}),
    (
        "p_tuning",
        {
            "tokens": 2,
            "options": {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5},
        },
    ),
)


def label(value: Any) -> str:
    if not isinstance(value, Case):
        return str(value)
    bits = "" if value.quantization == "none" else f"-{value.quantization}"
    return f"{value.name}-{value.family}{bits}"


def test_every_type_of_peft_is_in_the_table() -> None:
    """If a new version of peft has a new type, look at it and add an entry to TYPES."""
    assert {kind.value.lower() for kind in PeftType} | {BOTTLENECK} == TYPES.keys()


def test_every_type_has_a_title_and_a_source() -> None:
    assert all(kind.title and kind.source for kind in TYPES.values())
    titles = [kind.title for kind in TYPES.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.sample("lora-bert", "lora-llama", *(f"{name}-bert" for name in MAIN))
@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_contract(case: Case) -> None:
    for rule in contract.RULES:
        rule(case)


@pytest.mark.sample("lora-settings0", "loha-*", "p_tuning-*", "bottleneck-*")
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_the_contract_with_other_settings(name: str, settings: Mapping[str, Any]) -> None:
    for rule in contract.RULES:
        rule(Case(name, "bert", settings))


@pytest.mark.sample("lora-4bit")
@pytest.mark.parametrize("quantization", NOT_ON)
@pytest.mark.parametrize("name", MAIN)
def test_the_contract_on_a_quantised_backbone(name: str, quantization: str) -> None:
    for rule in contract.RULES:
        rule(contract.case(name, "bert", quantization))


@pytest.mark.sample("loha-*", "vera-*", "boft-*")
@pytest.mark.parametrize("case", QUANTISED, ids=label)
def test_other_types_on_a_quantised_backbone(case: Case) -> None:
    contract.a_dropped_layer_does_not_change(case)
    contract.quantised_weights_count_as_their_values(case)


@pytest.mark.sample("lora", "bottleneck", "ia3", "prefix_tuning", "prompt_tuning")
@pytest.mark.parametrize("name", contract.USABLE)
def test_the_record_is_up_to_date(name: str) -> None:
    """Run python tests/adapter_contract.py to update docs/adapters.json."""
    assert RECORDED["none"][name] == {
        family: contract.outcome(contract.case(name, family)) for family in FAMILIES
    }


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("quantization", NOT_ON)
def test_the_record_of_quantised_backbones_is_up_to_date(family: str, quantization: str) -> None:
    for name, outcomes in RECORDED[quantization].items():
        found = contract.outcome(contract.case(name, family, quantization))
        assert outcomes[family] == found, name


def test_the_record_has_no_other_types() -> None:
    for quantization in contract.QUANTIZATIONS:
        assert list(RECORDED[quantization]) == contract.usable_on(quantization)
        assert all(list(found) == list(FAMILIES) for found in RECORDED[quantization].values())


def test_settings_of_a_type_are_fields_of_its_class() -> None:
    for name in contract.USABLE:
        if name != BOTTLENECK:
            known = config_class(name).__dataclass_fields__
            assert set(TYPES[name].settings.values()) <= known.keys(), name
            assert TYPES[name].closed <= known.keys(), name
            assert "modules_to_save" in known, name


# Refusals


@pytest.mark.parametrize("name", [name for name in TYPES if name not in contract.USABLE])
def test_a_refused_type_says_why(name: str) -> None:
    with pytest.raises(DroppeftError) as caught:
        adapter_type(name)
    assert str(caught.value) == f"adapter.type={name} is refused: {TYPES[name].note}"
    assert len(TYPES[name].note) > 20


@pytest.mark.parametrize("case", NOT_QUANTISED, ids=label)
def test_types_refused_on_a_quantised_backbone_do_not_work(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = contract.backbone(case.family, case.quantization)
    before = contract.copies(base)
    with pytest.raises(DroppeftError) as caught:
        Attached(case, base=base)
    assert str(caught.value) == (
        f"adapter.type={case.name} does not work with {case.quantization[0]}-bit weights: "
        f"{NOT_ON[case.quantization][case.name]}; set quantization=none, or choose "
        f"{', '.join(contract.usable_on(case.quantization))}"
    )
    assert contract.same(contract.copies(base), before)
    monkeypatch.setattr("droppeft.adapters.attach.check_on", lambda *_: None)
    with pytest.raises((DroppeftError, RuntimeError, AssertionError)):
        contract.quantised_weights_count_as_their_values(case)


def test_dora_is_refused_on_8_bits_and_works_on_4() -> None:
    settings = {"options": {"use_dora": True}}
    with pytest.raises(DroppeftError, match=r"adapter.options.use_dora: peft loses the scales"):
        Attached(Case("lora", "bert", settings, "8bit"))
    contract.quantised_weights_count_as_their_values(Case("lora", "bert", settings, "4bit"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LoRA", "did you mean lora?"),
        ("prefix", "did you mean prefix_tuning?"),
        ("houlsby", f"known are {', '.join(contract.USABLE)}"),
    ],
)
def test_an_unknown_type_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(DroppeftError) as caught:
        adapter_type(name)
    assert str(caught.value) == f"adapter.type={name} is unknown; {hint}"


def test_types_refused_for_the_task_head_cannot_train_one() -> None:
    for name in ("adaption_prompt", "trainable_tokens", "xlora"):
        assert "modules_to_save" not in config_class(name).__dataclass_fields__


@pytest.mark.parametrize("name", ["lily", "tinylora", "unilora", "vblora"])
def test_types_refused_for_tied_tensors_have_them(name: str) -> None:
    options = {"vblora": {"vector_length": 8}}.get(name, {})
    config = config_class(name)(task_type="SEQ_CLS", target_modules=["query"], **options)
    model = get_peft_model(tiny_model(3), config)
    with pytest.raises(
        DroppeftError, match="are the same tensor, which belongs to no single layer"
    ):
        trainable_by_layer(model, find_blocks(model)[0])


@pytest.mark.parametrize("name", ["poly", "multitask_prompt_tuning"])
def test_types_refused_for_task_ids_need_them(name: str) -> None:
    options = {"poly": {"target_modules": ["query"]}}.get(name, {"num_virtual_tokens": 2})
    config = config_class(name)(task_type="SEQ_CLS", **options)
    model = get_peft_model(tiny_model(3), config)
    with pytest.raises(ValueError, match="task_ids"):
        contract.forward(model)


def test_cpt_is_only_for_causal_language_models() -> None:
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        peft.CPTConfig(task_type="SEQ_CLS")


def test_frod_mixes_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPES, "frod", AdapterType("layered", "FRoD", "for this test"))
    case = Case("frod", "bert", {"options": {"progressbar": False}})
    with pytest.raises(AssertionError):
        contract.layers_without_an_adapter_change_nothing_in_others(case)


def test_a_type_whose_tensors_are_tied_is_refused_whatever_the_table_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TYPES, "vblora", AdapterType("layered", "VB-LoRA", "for this test"))
    with pytest.raises(DroppeftError, match="are the same tensor"):
        Attached(Case("vblora", "bert", {"options": {"vector_length": 8}}))


@pytest.mark.parametrize(
    ("name", "wrong_kind", "message"),
    [
        ("prompt_tuning", "layered", "has no trainable tensor in layer 0 of this model"),
        ("lora", "global", "has no trainable tensor in layer other of this model"),
    ],
)
def test_a_type_of_the_wrong_kind_is_refused(
    name: str, wrong_kind: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = replace(TYPES[name], kind=wrong_kind)
    monkeypatch.setitem(TYPES, name, kind)
    monkeypatch.setattr("droppeft.adapters.attach.layer_fields", lambda *_: {})
    with pytest.raises(DroppeftError, match=message):
        Attached(contract.case(name, "bert"))


@pytest.mark.parametrize(("name", "family"), [("loha", "gpt2"), ("osf", "gpt2"), ("loha", "llama")])
def test_a_model_that_does_not_fit_does_not_change(name: str, family: str) -> None:
    """peft raises an error at the first module, at a later one, or not at all."""
    base = contract.backbone(family)
    if family == "llama":
        base.set_submodule("model.layers.1.self_attn.v_proj", Conv1D(32, 32))
    before, plain = contract.copies(base), contract.logits(base)
    with pytest.raises(DroppeftError, match=f"^adapter.type={name} "):
        attach(base, contract.case(name, family).spec, find_blocks(base)[0], 7)
    assert contract.same(contract.copies(base), before)
    assert torch.equal(contract.logits(base), plain)


def test_an_architecture_with_the_modules_of_another_has_its_defaults() -> None:
    """peft has no targets of (IA)³ for XLM-RoBERTa, which has the modules of RoBERTa."""
    base = tiny_model(2, "roberta")
    expected = sorted(trainable(base))
    config = XLMRobertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    other = AutoModelForSequenceClassification.from_config(config)
    assert sorted(trainable(other)) == expected


def trainable(base: Any) -> list[str]:
    spec = AdapterSpec((LayerAdapter("ia3"),) * 2)
    model = attach(base, spec, find_blocks(base)[0], 0)
    return [name for name, value in model.named_parameters() if value.requires_grad]


# Ranks that differ by layer


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "delora"])
def test_ranks_may_differ_by_layer(name: str, tmp_path: Path) -> None:
    spec = AdapterSpec(
        (LayerAdapter(name, 2), None, LayerAdapter(name, 4)), targets=("all-linear",)
    )
    attached = Attached(Case(name, "bert", {}), spec)
    assert list(attached.groups) == [0, 2, "head"]
    uniform = {
        rank: Attached(
            Case(name, "bert", {}), replace(spec, layers=(LayerAdapter(name, rank),) * 3)
        )
        for rank in (2, 4)
    }
    for layer, rank in ((0, 2), (2, 4)):
        shapes = {key: value.shape for key, value in attached.groups[layer].items()}
        assert shapes == {key: v.shape for key, v in uniform[rank].groups[layer].items()}
    attached.scramble()
    export_adapter(attached.model, tmp_path, "card")
    plain = contract.backbone("bert")
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(contract.logits(loaded), contract.logits(attached.model))


def test_feed_forward_modules_of_ia3_scale_their_input() -> None:
    attached = Attached(contract.case("ia3", "bert"))
    kinds = {
        name.rpartition("layer.0.")[2]: module.is_feedforward
        for name, module in attached.model.named_modules()
        if hasattr(module, "is_feedforward") and "layer.0." in name
    }
    assert kinds == {
        "attention.self.key": False,
        "attention.self.value": False,
        "attention.output.dense": True,
        "output.dense": True,
    }


# Prefix


def test_a_prefix_changes_every_layer_and_no_other() -> None:
    """The input of layer 1 depends on the prefix of layer 0, but not on that of layer 1."""
    attached = Attached(contract.case("prefix_tuning", "bert"))
    inputs = []
    for layer in (None, 0, 1):
        if layer is not None:
            [value] = attached.groups[layer].values()
            value.data.add_(1.0)
        with torch.no_grad():
            hidden = contract.forward(
                attached.model.eval(), output_hidden_states=True
            ).hidden_states
        inputs.append(hidden[1])
    assert not torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[1], inputs[2])
