"""Settings and options of adapters, and the messages for those that are refused."""

from typing import Any

import pytest

from droppeft.adapters.settings import CLOSED, check, checked_options, open_options
from droppeft.adapters.types import TYPES
from droppeft.config import AdapterConfig, load_config, to_toml
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.messages.instruction import AdapterSpec, LayerAdapter

USABLE = [name for name, kind in TYPES.items() if kind.kind != "refused"]


def refusal(*overrides: str) -> str:
    with pytest.raises(DroppeftError) as caught:
        check(adapter_spec(load_config(None, overrides).adapter, 2))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", USABLE)
def test_a_type_needs_no_other_setting(name: str) -> None:
    config = load_config(None, [f"adapter.type={name}"])
    assert check(adapter_spec(config.adapter, 2)) == name


@pytest.mark.parametrize("name", USABLE)
def test_a_written_configuration_can_be_read_again(name: str, tmp_path: Any) -> None:
    config = load_config(None, [f"adapter.type={name}"])
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    again = load_config(tmp_path / "run.toml")
    assert again == config
    assert check(adapter_spec(again.adapter, 2)) == name


def test_a_type_has_its_own_defaults() -> None:
    lora = AdapterConfig.model_validate({})
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.0)
    assert AdapterConfig.model_validate({"type": "bottleneck"}).width == 64
    assert AdapterConfig.model_validate({"type": "prefix_tuning", "tokens": 5}).tokens == 5
    ia3 = AdapterConfig.model_validate({"type": "ia3"})
    assert (ia3.rank, ia3.alpha, ia3.dropout, ia3.width, ia3.tokens) == (None,) * 5


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (("adapter.type=ia3", "adapter.rank=4"), "rank"),
        (("adapter.type=hra", "adapter.alpha=4"), "alpha"),
        (("adapter.type=loha", "adapter.dropout=0.1"), "dropout"),
        (("adapter.width=4",), "width"),
        (("adapter.type=bottleneck", "adapter.tokens=4"), "tokens"),
        (("adapter.type=bottleneck", "adapter.dropout=0"), "dropout"),
        (("adapter.type=prompt_tuning", "adapter.targets=query"), "targets"),
        (("adapter.type=prefix_tuning", "adapter.rank=2"), "rank"),
    ],
)
def test_a_setting_that_a_type_does_not_have_is_refused(
    overrides: tuple[str, ...], setting: str
) -> None:
    name = overrides[0].partition("type=")[2] or "lora"
    assert (
        refusal(*overrides) == f"adapter.{setting}: type {name} has no such setting; leave it out"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("adapter.options.init_weight=true", "adapter.type=ia3"),
            "adapter.options.init_weight: type ia3 has no such option; it has init_ia3_weights",
        ),
        (
            ("adapter.options.r=4", "adapter.type=hra"),
            "adapter.options.r: set adapter.rank instead",
        ),
        (
            ("adapter.options.module_dropout=often", "adapter.type=loha"),
            "adapter.options.module_dropout: input should be a valid number, unable to parse "
            "string as a number, got 'often'",
        ),
        (
            ("adapter.options.depth=2", "adapter.type=bottleneck"),
            "adapter.options.depth: type bottleneck has no such option; it has none",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_refused(overrides: tuple[str, ...], message: str) -> None:
    assert refusal(*overrides) == message


@pytest.mark.parametrize(
    "option",
    [
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "task_type",
    ],
)
def test_options_that_affect_more_than_layers_are_closed(option: str) -> None:
    assert refusal(f"adapter.options.{option}=x") == (
        f"adapter.options.{option} cannot be set: droppeft sets it, or it affects more than single "
        "layers"
    )


def test_no_closed_option_is_open() -> None:
    for name in USABLE:
        assert not open_options(name).keys() & (CLOSED | TYPES[name].closed), name


@pytest.mark.parametrize("value", ["2020-01-01", "[1, 2]", "{ a = 1 }"])
def test_an_option_is_a_plain_value(value: str) -> None:
    with pytest.raises(DroppeftError, match=r"^adapter\.options: x must be a number, true, false"):
        load_config(None, [f"adapter.options.x={value}"])


def test_options_come_from_file_and_overrides(tmp_path: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[adapter]\ntype = "oft"\n[adapter.options]\ncoft = true\neps = 1e-4\n')
    config = load_config(path, ["adapter.options.oft_block_size=4"])
    spec = adapter_spec(config.adapter, 1)
    assert spec.options == (("coft", True), ("eps", 1e-4), ("oft_block_size", 4))
    assert checked_options("oft", spec.options) == {"coft": True, "eps": 1e-4, "oft_block_size": 4}


def test_a_misspelt_option_table_is_unknown() -> None:
    with pytest.raises(DroppeftError, match=r"^unknown key adapter\.option\.x; did you mean"):
        load_config(None, ["adapter.option.x=1"])


def layer(name: str, **fields: Any) -> LayerAdapter:
    return LayerAdapter(name, **fields)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((None, None), "no layer has an adapter; at least one must have one"),
        (
            (layer("lora", rank=1), layer("ia3")),
            "an adapter must have the same type in all layers, not ia3, lora",
        ),
        ((layer("lora", rank=0), None), "adapter.rank must be 1 or more"),
        (
            (layer("lora", rank=4), layer("lora")),
            "adapter.type=lora needs adapter.rank in every layer that has an adapter",
        ),
        (
            (layer("bottleneck"),),
            "adapter.type=bottleneck needs adapter.width in every layer that has an adapter",
        ),
        (
            (layer("prompt_tuning"),),
            "adapter.type=prompt_tuning needs adapter.tokens in every layer that has an adapter",
        ),
        (
            (layer("hira", rank=2), layer("hira", rank=4)),
            "adapter.type=hira must have the same rank in all layers",
        ),
    ],
)
def test_specifications_that_are_impossible_are_refused(
    layers: tuple[LayerAdapter | None, ...], message: str
) -> None:
    with pytest.raises(DroppeftError) as caught:
        check(AdapterSpec(layers))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning"])
def test_prompts_must_be_in_every_layer(name: str) -> None:
    with pytest.raises(DroppeftError, match="must be the same in every layer"):
        check(AdapterSpec((layer(name), None), tokens=2))
