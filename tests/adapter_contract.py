"""Rules that every adapter type must satisfy, checked on tiny models.

``python tests/adapter_contract.py`` checks them for all types on all model families, with and
without quantisation, and writes ``docs/adapters.json``, from which ``docs/reference/adapters.md``
is generated. It takes half an hour.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.attach import attach, detach, export_adapter
from droppeft.adapters.bottleneck import load_bottleneck
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors, trainable_by_layer
from droppeft.adapters.types import BOTTLENECK, NOT_ON, TYPES
from droppeft.config import AdapterConfig
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks
from droppeft.layer_dropout.modes import skipping
from droppeft.messages.instruction import AdapterSpec
from droppeft.messages.tensors import HEAD, OTHER, LayerKey, flatten
from droppeft.models.loading import HEAD_MODULES
from droppeft.models.quantization import copy_dequantised_values, patch_quantised_layers, quantised
from droppeft.models.quiet import quiet
from droppeft.tasks.classification import Classification
from droppeft.training.loop import Step, Trainable, train
from handmade import TRAINING
from tiny import FAMILIES, tiny_model

LAYERS = 3
DROPPED = 1
EVERY = (True,) * LAYERS
FILE = Path(__file__).parents[1] / "docs" / "adapters.json"
USABLE = tuple(name for name, kind in TYPES.items() if kind.kind != "refused")
QUANTIZATIONS = ("none", *NOT_ON)

# Settings that fit tiny models. Add an entry for a new type if its defaults do not fit.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamss": {"options": {"r": 8, "num_subspaces": 2}},
    BOTTLENECK: {"width": 8},
    "c3a": {"options": {"block_size": 8}},
    "fourierft": {"options": {"n_frequency": 50}},
    "miss": {"rank": 4},
    "oft": {"options": {"oft_block_size": 4}},
    "prefix_tuning": {"tokens": 3},
    "prompt_tuning": {"tokens": 3},
    "p_tuning": {"tokens": 3},
    "psoft": {"rank": 4},
    "pvera": {"rank": 4},
    "randlora": {"rank": 4},
    "road": {"options": {"group_size": 8}},
    "supertuning": {"options": {"sparsity": 0.9}},
    "vera": {"rank": 4},
    "waveft": {"options": {"n_frequency": 50}},
}


@dataclass(frozen=True)
class Case:
    """A type with its settings, on a tiny model of a family, quantised or not."""

    name: str
    family: str
    settings: Mapping[str, Any]
    quantization: str = "none"

    @property
    def spec(self) -> AdapterSpec:
        """The same adapter in every layer."""
        chosen = AdapterConfig.model_validate({"type": self.name, **self.settings})
        return adapter_spec(chosen, LAYERS)

    @property
    def kind(self) -> str:
        """The kind of the type: layered, sliced or global."""
        return TYPES[self.name].kind


class Attached:
    """A tiny model with the adapter of a case."""

    def __init__(self, case: Case, spec: AdapterSpec | None = None, base: Any = None) -> None:
        self.base = backbone(case.family, case.quantization) if base is None else base
        path, _ = find_blocks(self.base)
        self.model: Any = attach(self.base, spec or case.spec, path, 7)
        path, self.blocks = find_blocks(self.model)
        self.groups: Parameters = trainable_by_layer(self.model, path)

    def scramble(self) -> None:
        """Add random values to all trained tensors, since a new adapter has no effect."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for named in self.groups.values():
                for value in named.values():
                    value.add_(torch.randn(value.shape, generator=generator) * 0.1)

    def train(self, gates: list[tuple[bool, ...]], groups: Parameters | None = None) -> None:
        """Take a training step with weight decay for every entry of ``gates``."""
        rates = {"learning_rate": 5e-4, "head_learning_rate": 5e-4, "weight_decay": 0.1}
        torch.manual_seed(11)
        trained = self.groups if groups is None else groups
        task = Classification(("input_ids",), 0, torch.device("cpu"))
        train(
            Trainable(self.model, self.blocks, trained, task),
            [Step([texts()], skipping(active), 1.0) for active in gates],
            replace(TRAINING, **rates),
        )


def case(name: str, family: str, quantization: str = "none") -> Case:
    """Return the case of a type, with settings that fit tiny models."""
    return Case(name, family, SETTINGS.get(name, {}), quantization)


def usable_on(quantization: str) -> list[str]:
    """Return the types that are not refused with a quantisation."""
    return [name for name in USABLE if name not in NOT_ON.get(quantization, {})]


def outcome(case: Case) -> dict[str, Any]:
    """Return the number of tensors of a layer or of a global prompt, or the reason of a refusal."""
    try:
        groups = Attached(case).groups
    except DroppeftError as error:
        return {"refused": str(error)}
    key: LayerKey = OTHER if case.kind == "global" else 0
    return {"tensors": len(groups[key])}


def backbone(family: str, quantization: str = "none") -> Any:
    """Return a tiny model without dropout; biases and a large head make adapters visible."""
    model = tiny_model(LAYERS, family)
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                value.copy_(torch.linspace(-0.1, 0.1, value.numel()).roll(number))
            elif name.startswith(("classifier", "score")):
                value.mul_(20.0)
    with quiet():
        made = quantised(model, quantization, HEAD_MODULES)
    patch_quantised_layers(made)
    return without_dropout(made)


def dequantised(case: Case) -> Any:
    """Return the backbone of a case in full precision, with the dequantised values.

    Its linear maps have the same class in all families, as in a quantised model.
    """
    plain = backbone(case.family)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.bias = module.bias
            plain.set_submodule(name, linear)
    copy_dequantised_values(backbone(case.family, case.quantization), plain)
    return plain


def without_dropout(model: Any) -> Any:
    """Disable dropout and return the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def texts(rows: int = 8) -> dict[str, torch.Tensor]:
    """Return rows of two classes with different tokens, padded on the right."""
    labels = np.arange(rows) % 2
    ids = np.random.default_rng(0).integers(2, 30, (rows, 7)) + 30 * labels[:, None]
    ids[::3, 5:] = 0
    columns = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def forward(model: Any, **options: Any) -> Any:
    """Return the output of a model for :func:`texts`."""
    batch = texts()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)


def logits(model: Any) -> torch.Tensor:
    """Return the logits for :func:`texts` in evaluation mode."""
    with torch.no_grad():
        result: torch.Tensor = forward(model.eval()).logits
    return result


def loss(model: Any) -> torch.Tensor:
    """Return the cross-entropy for :func:`texts` in the current mode."""
    return functional.cross_entropy(forward(model).logits, texts()["labels"])


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether names and bits are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def only_adapter_and_head_are_trained(case: Case) -> None:
    attached = Attached(case)
    assert list(attached.groups) == [*([OTHER] if case.kind == "global" else range(LAYERS)), HEAD]
    trained = {id(value) for named in attached.groups.values() for value in named.values()}
    attached.scramble()
    loss(attached.model.train()).backward()
    for name, value in attached.model.named_parameters():
        assert value.requires_grad == (id(value) in trained), name
        assert (value.grad is not None and bool(value.grad.any())) == (id(value) in trained), name


def the_seed_alone_decides(case: Case) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = Attached(case)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(copies(one.model), copies(Attached(case).model))


def tensors_can_be_copied_to_another_model(case: Case) -> None:
    one, other = Attached(case), Attached(case)
    one.scramble()
    sent = get_tensors(one.groups)
    set_tensors(other.groups, sent)
    received = get_tensors(other.groups)
    expected = [(key, name, array.tobytes()) for key, name, array in flatten(sent)]
    assert expected == [(key, name, array.tobytes()) for key, name, array in flatten(received)]
    assert torch.equal(logits(one.model), logits(other.model))


def a_dropped_layer_does_not_change(case: Case) -> None:
    """Momentum from the first step and weight decay must not change it in the second."""
    without = tuple(layer != DROPPED for layer in range(LAYERS))
    one, two = Attached(case), Attached(case)
    start = copies(one.model)
    one.train([EVERY])
    two.train([EVERY, without])
    for key, named in one.groups.items():
        for name, value in named.items():
            assert not torch.equal(value, start[name]), name
            assert torch.equal(value, two.groups[key][name]) == (key == DROPPED), name
    assert same(copies(one.blocks[DROPPED]), copies(two.blocks[DROPPED]))
    for name, value in two.model.named_parameters():
        assert value.requires_grad or torch.equal(value, start[name]), name


def training_the_adapter_alone_lowers_the_loss(case: Case) -> None:
    attached = Attached(case)
    groups = {key: named for key, named in attached.groups.items() if key != HEAD}
    before = loss(attached.model.eval()).item()
    attached.train([EVERY] * 16, groups)
    assert loss(attached.model.eval()).item() < before


def what_is_exported_is_what_was_trained(case: Case) -> None:
    attached, plain = Attached(case), backbone(case.family, case.quantization)
    attached.scramble()
    expected = logits(attached.model)
    assert not torch.equal(expected, logits(plain))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("one", "two")]
        for folder in folders:
            export_adapter(attached.model.train(), folder, "card")
        one, two = ({file.name: file.read_bytes() for file in f.iterdir()} for f in folders)
        assert one == two
        load = load_bottleneck if case.name == BOTTLENECK else PeftModel.from_pretrained
        assert torch.equal(logits(load(plain, folders[0])), expected)


def detaching_gives_the_backbone_back(case: Case) -> None:
    untouched, attached = backbone(case.family, case.quantization), Attached(case)
    attached.scramble()
    attached.train([EVERY])
    restored = detach(attached.model)
    assert restored is attached.base
    assert same(copies(restored), copies(untouched))
    assert torch.equal(logits(restored), logits(untouched))
    assert not any(value.requires_grad for value in restored.parameters())
    again = attach(restored, case.spec, find_blocks(restored)[0], 7)
    assert same(copies(again), copies(Attached(case).model))


def layers_without_an_adapter_change_nothing_in_others(case: Case) -> None:
    if case.kind != "layered":
        return
    layers = [None if i == DROPPED else layer for i, layer in enumerate(case.spec.layers)]
    whole, part = Attached(case), Attached(case, replace(case.spec, layers=tuple(layers)))
    assert list(part.groups) == [layer for layer in range(LAYERS) if layer != DROPPED] + [HEAD]
    whole.scramble()
    set_tensors(part.groups, {0: get_tensors(whole.groups)[0]})
    with torch.no_grad():
        after_first, expected = (
            forward(attached.model.eval(), output_hidden_states=True).hidden_states[1]
            for attached in (part, whole)
        )
    assert torch.equal(after_first, expected)


def quantised_weights_count_as_their_values(case: Case) -> None:
    """Checked for new and trained adapters, for outputs and gradients."""
    if case.quantization == "none":
        return
    codes, values = Attached(case), Attached(case, base=dequantised(case))
    for _ in ("fresh", "trained"):
        found, expected = (logits_and_gradients(attached) for attached in (codes, values))
        for name, value in expected.items():
            near = 1e-3 * float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=0, atol=near, msg=name)
        codes.scramble()
        values.scramble()


def logits_and_gradients(attached: Attached) -> dict[str, torch.Tensor]:
    """In training mode, since an 8-bit layer on a CPU rounds its inputs in evaluation mode."""
    torch.manual_seed(5)
    output = forward(attached.model.train()).logits
    attached.model.zero_grad()
    functional.cross_entropy(output, texts()["labels"]).backward()
    named = [pair for values in attached.groups.values() for pair in values.items()]
    missing = torch.zeros(())
    gradients = {name: missing if v.grad is None else v.grad.clone() for name, v in named}
    return {"logits": output.detach(), **gradients}


RULES: tuple[Callable[[Case], None], ...] = (
    only_adapter_and_head_are_trained,
    the_seed_alone_decides,
    tensors_can_be_copied_to_another_model,
    a_dropped_layer_does_not_change,
    training_the_adapter_alone_lowers_the_loss,
    what_is_exported_is_what_was_trained,
    detaching_gives_the_backbone_back,
    layers_without_an_adapter_change_nothing_in_others,
    quantised_weights_count_as_their_values,
)
"""The rules that every type must satisfy."""


def main() -> None:
    """Check all cases and write the results. Nothing is written if a check fails."""
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for quantization in QUANTIZATIONS:
        for name in usable_on(quantization):
            families = record.setdefault(quantization, {}).setdefault(name, {})
            for family in FAMILIES:
                one = case(name, family, quantization)
                found = families[family] = outcome(one)
                for rule in RULES if "tensors" in found else ():
                    rule(one)
    FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
