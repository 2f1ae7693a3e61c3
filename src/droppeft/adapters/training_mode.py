"""Which modules of a model with an adapter are in training mode. Ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def set_training_mode(model: nn.Module, *, backbone_dropout: bool) -> None:
    """Put adapters and head in training mode, and the frozen backbone if it drops values.

    Args:
        model: with an adapter attached, of peft or a bottleneck.
        backbone_dropout: whether the backbone is in training mode too.
    """
    model.train(backbone_dropout)
    if backbone_dropout:
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            _train_but(module, "base_layer")
        elif isinstance(module, ModulesToSaveWrapper):
            _train_but(module, "original_module")
        elif any(value.requires_grad for value in module.parameters(recurse=False)):
            module.training = True
    for module in _head(model):
        module.train()


def _train_but(module: nn.Module, frozen: str) -> None:
    module.training = True
    for name, child in module.named_children():
        if name != frozen:
            child.train()


def _head(model: Any) -> Iterator[nn.Module]:
    """The modules of a transformers model that are not inside of its encoder or decoder."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = plain.base_model_prefix
    if hasattr(plain, prefix):
        yield from (child for name, child in plain.named_children() if name != prefix)


@contextmanager
def inputs_as_they_are(model: nn.Module, precision: str) -> Iterator[None]:
    """Keep LoRA's layers from casting their inputs to fp32, which autocast would cast back.

    Other types compute with their inputs outside of products, where autocast casts nothing.

    Args:
        model: with an adapter attached.
        precision: in which the forward pass runs, under autocast.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    only_lora = all(isinstance(layer, LoraLayer) for layer in layers)
    with disable_input_dtype_casting(model, active=only_lora and precision != "fp32"):
        yield
