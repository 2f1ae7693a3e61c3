import numpy as np
import pytest
import torch
from torch import nn

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import (
    Parameters,
    count_parameters,
    get_tensors,
    set_tensors,
    trainable_by_layer,
)
from droppeft.adapters.tensor_names import layer_of
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec, LayerAdapter
from droppeft.messages.tensors import HEAD, OTHER, flatten
from tiny import FAMILIES, tiny_model

SPEC = AdapterSpec((LayerAdapter("lora", 2),) * 4, alpha=16.0)


def attached(family: str = "bert") -> tuple[nn.Module, Parameters]:
    backbone = tiny_model(4, family)
    model = attach(backbone, SPEC, find_blocks(backbone)[0], 0)
    return model, trainable_by_layer(model, find_blocks(model)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_belongs_to_the_block_that_holds_it(family: str) -> None:
    model, groups = attached(family)
    path, blocks = find_blocks(model)
    holder = {
        id(value): layer for layer, block in enumerate(blocks) for value in block.parameters()
    }
    for name, value in model.named_parameters():
        if id(value) in holder:
            assert layer_of(name, path) == holder[id(value)]
        else:
            assert layer_of(name, path) == (HEAD if value.requires_grad else OTHER)
    assert list(groups) == [0, 1, 2, 3, HEAD]


def test_a_layer_is_found_by_its_whole_index_and_path() -> None:
    assert layer_of("encoder.layer.10.dense.weight", "encoder.layer") == 10
    assert layer_of("encoder.layer_norm.1.weight", "encoder.layer") == OTHER
    assert layer_of("other.encoder.layer.1.weight", "encoder.layer") == OTHER
    assert layer_of("classifier.modules_to_save.default.weight", "encoder.layer") == HEAD
    assert layer_of("classifier.original_module.weight", "encoder.layer") == OTHER


def test_groups_come_in_order_of_depth_and_without_frozen_tensors() -> None:
    model = nn.ModuleDict(
        {
            "head": nn.ModuleDict({"modules_to_save": nn.Linear(2, 1)}),
            "prompt": nn.Linear(2, 2),
            "h": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(11)),
        }
    )
    model["h"].get_submodule("3").requires_grad_(False)
    model["prompt"].get_parameter("bias").requires_grad_(False)
    groups = trainable_by_layer(model, "h")
    assert list(groups) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, OTHER, HEAD]
    assert list(groups[OTHER]) == ["prompt.weight"]
    assert count_parameters(groups) == 10 * 4 + 4 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_can_be_written_into_another_model(family: str) -> None:
    _, source = attached(family)
    with torch.no_grad():
        for number, value in enumerate(v for named in source.values() for v in named.values()):
            value.copy_(torch.linspace(number, number + 1, value.numel()).reshape(value.shape))
    sent = get_tensors(source)
    _, target = attached(family)
    set_tensors(target, sent)
    for key, named in source.items():
        assert list(target[key]) == list(named)
        assert all(torch.equal(target[key][name], value) for name, value in named.items())
    assert {array.dtype for _, _, array in flatten(sent)} == {np.dtype(np.float32)}


def test_tensors_are_copies() -> None:
    _, parameters = attached()
    sent = get_tensors(parameters)
    copies = {name: array.copy() for _, name, array in flatten(sent)}
    with torch.no_grad():
        for named in parameters.values():
            for value in named.values():
                value.add_(1.0)
    assert all(np.array_equal(array, copies[name]) for _, name, array in flatten(sent))


def test_tensors_that_are_not_given_do_not_change() -> None:
    _, parameters = attached()
    before = get_tensors(parameters)
    set_tensors(parameters, {2: {name: array + 1 for name, array in before[2].items()}})
    for key, named in get_tensors(parameters).items():
        shift = 1 if key == 2 else 0
        assert all(
            np.array_equal(array, before[key][name] + shift) for name, array in named.items()
        )


@pytest.mark.parametrize("mistake", ["name", "shape"])
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(mistake: str) -> None:
    _, parameters = attached()
    before = get_tensors(parameters)
    name = next(iter(before[3]))
    good = {key: {n: array + 1 for n, array in named.items()} for key, named in before.items()}
    if mistake == "name":
        good[3]["lora_C"] = np.zeros(1, dtype=np.float32)
        message = "tensor lora_C does not belong to this model's adapter"
    else:
        good[3][name] = good[3][name].T
        shapes = (before[3][name].shape[::-1], before[3][name].shape)
        message = f"tensor {name} has shape {shapes[0]} instead of {shapes[1]}"
    with pytest.raises(DroppeftError) as caught:
        set_tensors(parameters, good)
    assert str(caught.value) == message
    for key, named in get_tensors(parameters).items():
        assert all(np.array_equal(array, before[key][n]) for n, array in named.items())


@pytest.mark.parametrize("kind", ["module", "parameter", "storage"])
def test_a_tensor_under_two_names_is_refused(kind: str) -> None:
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    first, second = layers.get_submodule("0"), layers.get_submodule("1")
    if kind == "module":
        layers[1] = first
    elif kind == "parameter":
        second.weight = first.weight
    else:
        # A different object with the same memory, transposed.
        second.weight = nn.Parameter(first.get_parameter("weight").detach().t())
    with pytest.raises(DroppeftError, match=r"^h\.1\.weight and h\.0\.weight are the same tensor"):
        trainable_by_layer(nn.ModuleDict({"h": layers}), "h")
