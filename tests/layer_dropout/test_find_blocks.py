"""The list of blocks is found by its documented path; other models are refused."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, PreTrainedModel

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import ARCHITECTURES, find_blocks
from refusals import refused

NAMES = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "xlm-roberta": "roberta.encoder.layer",
    "deberta-v3": "deberta.encoder.layer",
    "deberta-v2-conv": "deberta.encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
}


def test_blocks_of_a_classifier(model: PreTrainedModel, architecture: str) -> None:
    name, blocks = find_blocks(model)
    assert name == NAMES[architecture]
    assert blocks == tuple(model.get_submodule(name))
    assert len(blocks) == 4


def test_blocks_of_a_base_model(model: PreTrainedModel) -> None:
    name, blocks = find_blocks(AutoModel.from_config(model.config))
    assert [name] == list(ARCHITECTURES[model.config.model_type].stacks)
    assert len(blocks) == 4


@pytest.mark.parametrize("architecture", ["gpt2", "llama"], indirect=True)
def test_blocks_of_a_causal_language_model(model: PreTrainedModel, architecture: str) -> None:
    name, _ = find_blocks(AutoModelForCausalLM.from_config(model.config))
    assert name == NAMES[architecture]


def test_blocks_under_peft(model: PreTrainedModel, architecture: str) -> None:
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    name, blocks = find_blocks(wrapped)
    assert name == f"base_model.model.{NAMES[architecture]}"
    assert blocks == tuple(wrapped.get_submodule(name))


def test_an_unknown_architecture_is_refused() -> None:
    config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=10)
    with pytest.raises(DroppeftError, match=r"MambaModel .*'mamba'.* docs/.*/architectures.md"):
        find_blocks(AutoModel.from_config(config))


def test_a_model_without_configuration_is_refused() -> None:
    with pytest.raises(DroppeftError, match=r"Linear .model_type ''"):
        find_blocks(torch.nn.Linear(1, 1))


def test_a_list_of_another_length_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    model = build("bert")
    del model.bert.encoder.layer[2]
    with pytest.raises(DroppeftError, match=r"has 3 blocks .* says 4"):
        find_blocks(model)


def test_a_second_list_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    model = build("llama")
    model.layers = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(DroppeftError, match="has 2 lists"):
        find_blocks(model)


def test_a_list_whose_name_ends_with_the_same_letter_is_ignored(
    build: Callable[..., PreTrainedModel],
) -> None:
    model = build("gpt2")
    model.transformer.branch = nn.ModuleList(nn.Identity() for _ in range(4))
    assert find_blocks(model)[0] == "transformer.h"


def test_a_missing_list_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    model = build("gpt2")
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(DroppeftError, match="has no list of blocks 'h'"):
        find_blocks(model)


def test_a_wrapper_for_several_processes_is_named(build: Callable[..., PreTrainedModel]) -> None:
    """Here DataParallel; DistributedDataParallel has the model as ``module``, too."""
    wrapper = nn.DataParallel(build("bert"))
    with refused("^DataParallel wraps a model; pass the model itself, which is its `module`"):
        find_blocks(wrapper)
    assert find_blocks(wrapper.module)


def test_the_older_fsdp_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    model = build("bert")
    kind = type("FullyShardedDataParallel", (nn.Identity,), {})
    model.bert.encoder.layer[1] = kind()
    with refused("FullyShardedDataParallel cannot be dropped; use its successor, .*fully_shard"):
        find_blocks(model)
