"""What every adapter type must do, checked on tiny models.

``python tests/adapter_contract.py`` runs it for all types on all families, whole and quantised, and
writes ``docs/adapters.json``, from which ``docs/adapters.md`` is made. It takes half an hour.
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
from droppeft.messages import HEAD, OTHER, AdapterSpec, LayerKey, flatten
from droppeft.models.loading import HEAD_MODULES, quiet
from droppeft.models.quantization import put_values, quantised, settle
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

# Settings for models as small as these. A new type gets a row here if its defaults do not fit.
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
    """A type with its settings, on a tiny model of a family, whole or quantised."""

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
        """Layered, sliced or global."""
        return TYPES[self.name].kind


class Attached:
    """A tiny model that wears the adapter of a case."""

    def __init__(self, case: Case, spec: AdapterSpec | None = None, base: Any = None) -> None:
        self.base = backbone(case.family, case.quantization) if base is None else base
        path, _ = find_blocks(self.base)
        self.model: Any = attach(self.base, spec or case.spec, path, 7)
        path, self.blocks = find_blocks(self.model)
        self.groups: Parameters = trainable_by_layer(self.model, path)

    def scramble(self) -> None:
        """Trained-looking values everywhere: a fresh adapter changes nothing, so proves nothing."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for named in self.groups.values():
                for value in named.values():
                    value.add_(torch.randn(value.shape, generator=generator) * 0.1)

    def train(self, gates: list[tuple[bool, ...]], groups: Parameters | None = None) -> None:
        """Take a step of droppeft's training, decay included, for every entry of ``gates``."""
        rates = {"learning_rate": 5e-4, "head_learning_rate": 5e-4, "weight_decay": 0.1}
        torch.manual_seed(11)
        trained = self.groups if groups is None else groups
        task = Classification(("input_ids",), 0, torch.device("cpu"))
        train(
            Trainable(self.model, self.blocks, trained, task),
            [Step(texts(), active, 1.0) for active in gates],
            replace(TRAINING, **rates),
        )


def case(name: str, family: str, quantization: str = "none") -> Case:
    """The case of a type with the settings that fit tiny models."""
    return Case(name, family, SETTINGS.get(name, {}), quantization)


def usable_on(quantization: str) -> list[str]:
    """Types that the table does not refuse."""
    return [name for name in USABLE if name not in NOT_ON.get(quantization, {})]


def outcome(case: Case) -> dict[str, Any]:
    """How many tensors a layer has (or the prompt, if it is in no layer), or why it is refused."""
    try:
        groups = Attached(case).groups
    except DroppeftError as error:
        return {"refused": str(error)}
    key: LayerKey = OTHER if case.kind == "global" else 0
    return {"tensors": len(groups[key])}


def backbone(family: str, quantization: str = "none") -> Any:
    """A tiny model without dropout, with biases and a loud head, so that adapters are heard."""
    model = tiny_model(LAYERS, family)
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                value.copy_(torch.linspace(-0.1, 0.1, value.numel()).roll(number))
            elif name.startswith(("classifier", "score")):
                value.mul_(20.0)
    with quiet():
        made = quantised(model, quantization, HEAD_MODULES)
    settle(made)
    return without_dropout(made)


def dequantised(case: Case) -> Any:
    """The backbone of a case in full precision, with the values that its codes stand for.

    Its linear maps are of the same class in all families, as they are when quantised.
    """
    plain = backbone(case.family)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.bias = module.bias
            plain.set_submodule(name, linear)
    put_values(backbone(case.family, case.quantization), plain)
    return plain


def without_dropout(model: Any) -> Any:
    """The same model, without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def texts(rows: int = 8) -> dict[str, torch.Tensor]:
    """Two classes that differ by their words; rows of different length, padded on the right."""
    labels = np.arange(rows) % 2
    ids = np.random.default_rng(0).integers(2, 30, (rows, 7)) + 30 * labels[:, None]
    ids[::3, 5:] = 0
    columns = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def answer(model: Any, **options: Any) -> Any:
    """What a model says to :func:`texts`."""
    batch = texts()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)


def logits(model: Any) -> torch.Tensor:
    """In evaluation mode, without gradients."""
    with torch.no_grad():
        found: torch.Tensor = answer(model.eval()).logits
    return found


def loss(model: Any) -> torch.Tensor:
    """Cross-entropy of a model as it stands."""
    return functional.cross_entropy(answer(model).logits, texts()["labels"])


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """All values, buffers included."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Equal names, equal bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def only_adapter_and_head_are_trained(case: Case) -> None:
    attached = Attached(case)
    assert list(attached.groups) == [*([OTHER] if case.kind == "global" else range(LAYERS)), HEAD]
    ours = {id(value) for named in attached.groups.values() for value in named.values()}
    attached.scramble()
    loss(attached.model.train()).backward()
    for name, value in attached.model.named_parameters():
        assert value.requires_grad == (id(value) in ours), name
        assert (value.grad is not None and bool(value.grad.any())) == (id(value) in ours), name


def the_seed_alone_decides(case: Case) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = Attached(case)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(copies(one.model), copies(Attached(case).model))


def tensors_survive_the_way_there_and_back(case: Case) -> None:
    one, other = Attached(case), Attached(case)
    one.scramble()
    sent = get_tensors(one.groups)
    set_tensors(other.groups, sent)
    back = get_tensors(other.groups)
    there = [(key, name, array.tobytes()) for key, name, array in flatten(sent)]
    assert there == [(key, name, array.tobytes()) for key, name, array in flatten(back)]
    assert torch.equal(logits(one.model), logits(other.model))


def a_dropped_layer_is_left_alone(case: Case) -> None:
    """The first step gives it momentum; the second, without it, must not use that, nor decay it."""
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
    answers = logits(attached.model)
    assert not torch.equal(answers, logits(plain))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("one", "two")]
        for folder in folders:
            export_adapter(attached.model.train(), folder, "card")
        one, two = ({file.name: file.read_bytes() for file in f.iterdir()} for f in folders)
        assert one == two
        load = load_bottleneck if case.name == BOTTLENECK else PeftModel.from_pretrained
        assert torch.equal(logits(load(plain, folders[0])), answers)


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
    layers = [None if layer == DROPPED else one for layer, one in enumerate(case.spec.layers)]
    whole, part = Attached(case), Attached(case, replace(case.spec, layers=tuple(layers)))
    assert list(part.groups) == [layer for layer in range(LAYERS) if layer != DROPPED] + [HEAD]
    whole.scramble()
    set_tensors(part.groups, {0: get_tensors(whole.groups)[0]})
    with torch.no_grad():
        behind_first, expected = (
            answer(attached.model.eval(), output_hidden_states=True).hidden_states[1]
            for attached in (part, whole)
        )
    assert torch.equal(behind_first, expected)


def quantised_weights_count_as_their_values(case: Case) -> None:
    """Fresh and trained, in values and gradients: codes taken for numbers would show in one."""
    if case.quantization == "none":
        return
    codes, values = Attached(case), Attached(case, base=dequantised(case))
    for _ in ("fresh", "trained"):
        found, expected = (answers_and_gradients(attached) for attached in (codes, values))
        for name, value in expected.items():
            near = 1e-3 * float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=0, atol=near, msg=name)
        codes.scramble()
        values.scramble()


def answers_and_gradients(attached: Attached) -> dict[str, torch.Tensor]:
    """In training mode, as an 8-bit layer rounds its inputs when it is evaluated on a CPU."""
    torch.manual_seed(5)
    given = answer(attached.model.train()).logits
    attached.model.zero_grad()
    functional.cross_entropy(given, texts()["labels"]).backward()
    named = [pair for values in attached.groups.values() for pair in values.items()]
    missing = torch.zeros(())
    gradients = {name: missing if v.grad is None else v.grad.clone() for name, v in named}
    return {"logits": given.detach(), **gradients}


RULES: tuple[Callable[[Case], None], ...] = (
    only_adapter_and_head_are_trained,
    the_seed_alone_decides,
    tensors_survive_the_way_there_and_back,
    a_dropped_layer_is_left_alone,
    training_the_adapter_alone_lowers_the_loss,
    what_is_exported_is_what_was_trained,
    detaching_gives_the_backbone_back,
    layers_without_an_adapter_change_nothing_in_others,
    quantised_weights_count_as_their_values,
)
"""The contract."""


def main() -> None:
    """Run everything; nothing is written if a rule is broken."""
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
