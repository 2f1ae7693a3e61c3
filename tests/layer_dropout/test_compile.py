"""Gates work with every use of torch.compile, and cause few graphs to be compiled.

Graphs are captured (in some tests also differentiated) and then run without a compiler backend;
``benchmarks/compile_blocks`` checks and times torch's default backend.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.exc import Unsupported

import architecture_contract as contract
from droppeft.layer_dropout import find_blocks, find_stacks, gated, layer_dropout
from pages import python_of
from tiny import tiny_model

LAYERS = 3
PATTERNS = 20
TUTORIAL = "docs/tutorials/layer_dropout_in_trainer.ipynb"
Batch = dict[str, torch.Tensor]


class Compiler:
    """A compiler backend that counts the graphs it is called with."""

    def __init__(self) -> None:
        self.graphs = 0
        self.name = "eager"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    """Start without compiled graphs; exceeding the limit of recompilations is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield (found := Compiler())
    assert found.graphs > 0
    torch._dynamo.reset()


def batch(length: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (4, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4) % 2}


def lora_model(model_type: str) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "q_proj"], init_lora_weights=False
    )
    model = tiny_model(LAYERS, model_type)
    model.config.use_cache = False
    return get_peft_model(model, lora).train()


def step(run: Callable[..., Any], model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Return the loss, and gradients by name."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = run(**inputs).loss
    loss.backward()
    trained = {n: value for n, value in model.named_parameters() if value.requires_grad}
    gradients = {n.replace("_orig_mod.", ""): value.grad for n, value in trained.items()}
    return {"loss": loss.detach(), **gradients}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, other in theirs.items():
        one = ours[name]
        assert (one is None) == (other is None), name
        assert one is None or torch.allclose(one, other, rtol=1e-5, atol=1e-7), name


def forwards(model: nn.Module, compiler: Compiler) -> nn.Module:
    for block in find_blocks(model)[1]:
        block.forward = torch.compile(block.forward, backend=compiler)  # type: ignore[method-assign]
    return model


def blocks(model: nn.Module, compiler: Compiler) -> nn.Module:
    for block in find_blocks(model)[1]:
        block.compile(backend=compiler)
    return model


def entries_of_the_list(model: nn.Module, compiler: Compiler) -> nn.Module:
    path, found = find_blocks(model)
    for layer, block in enumerate(found):
        model.set_submodule(f"{path}.{layer}", torch.compile(block, backend=compiler))
    return model


def whole_model(model: nn.Module, compiler: Compiler) -> Any:
    return torch.compile(model, backend=compiler)


# A block has two graphs: the input of the first block of a frozen backbone needs no gradient,
# other inputs do. A whole model also has graphs before, between and after the blocks.
GRAPHS = {forwards: 2, blocks: 2, entries_of_the_list: 2, whole_model: 8}


@pytest.mark.sample("blocks")
@pytest.mark.parametrize("way", GRAPHS, ids=lambda way: way.__name__)
def test_gates_of_compiled_blocks_can_change(way: Callable[..., Any], compiler: Compiler) -> None:
    plain, model = lora_model("bert"), lora_model("bert")
    inner = find_blocks(model)[1]
    run = way(model, compiler)
    rng = random.Random(1)
    with gated(find_blocks(plain)[1]) as expected, gated(find_blocks(model)[1]) as gates:
        for number in range(PATTERNS):
            active = [rng.random() < 0.5 for _ in inner]
            expected.active = gates.active = active
            inputs = batch(seed=number)
            assert_close(step(run, model, inputs), step(plain, plain, inputs))
            assert gates.executed == expected.executed
            for block, runs in zip(inner, active, strict=True):
                trained = [value for value in block.parameters() if value.requires_grad]
                assert trained
                assert all((value.grad is not None) == runs for value in trained)
    assert compiler.graphs <= GRAPHS[way]


def test_drawing_gates_is_not_part_of_a_graph(compiler: Compiler) -> None:
    """A hook of the block sets its gate, and block.compile compiles hooks too."""
    model = blocks(lora_model("bert"), compiler)
    with layer_dropout(model, None, rates=[0.5] * LAYERS, sampling="bernoulli") as dropout:
        for number in range(PATTERNS // 2):
            dropout.step = number
            ran = dropout.executed
            step(model, model, batch(seed=number))
            now = zip(dropout.executed, ran, strict=True)
            assert tuple(count - before for count, before in now) == dropout.active
    assert compiler.graphs <= GRAPHS[blocks]


def recipe(compiler: Compiler) -> str:
    """Return the code of the tutorial, changed to use the test's backend."""
    code = python_of(TUTORIAL, "torch.compile(block.forward)")
    assert code.count("torch.compile(block.forward)") == 1
    return code.replace("(block.forward)", "(block.forward, backend=compiler)")


@pytest.mark.full  # aot_eager takes long
def test_the_tutorial_s_code_with_texts_of_any_length(compiler: Compiler) -> None:
    """Also evaluates inside the context."""
    plain, model = lora_model("llama"), lora_model("llama")
    plain.config.use_cache = False
    compiler.name = "aot_eager"
    names = {"model": model, "compiler": compiler, "torch": torch, "find_blocks": find_blocks}
    exec(recipe(compiler), names)
    rng = random.Random(2)
    seen = set()
    with (
        layer_dropout(plain, None, rates=[0.5] * LAYERS, sampling="bernoulli") as expected,
        layer_dropout(model, None, rates=[0.5] * LAYERS, sampling="bernoulli") as dropout,
    ):
        for number in range(PATTERNS):
            expected.step = dropout.step = number
            inputs = batch(rng.randint(3, 20), number)
            assert_close(step(model, model, inputs), step(plain, plain, inputs))
            with torch.no_grad():
                full = model(**inputs).logits
                assert torch.allclose(full, plain(**inputs).logits, rtol=1e-4, atol=1e-6)
            assert dropout.executed == expected.executed
            seen.add(dropout.active)
    assert len(seen) == 2**LAYERS
    # Three graphs (input with and without gradient in training, and evaluation), each compiled for
    # the first length and once for all other lengths.
    assert compiler.graphs <= 6


@pytest.mark.sample("non-reentrant")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_blocks_are_recomputed_as_they_ran(
    compiler: Compiler, reentrant: bool
) -> None:
    plain, model = lora_model("bert"), lora_model("bert")
    compiler.name = "aot_eager"  # with "eager", recomputation would draw dropout again
    forwards(model, compiler)
    for each in (plain, model):
        each.activation_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    with gated(find_blocks(plain)[1]) as expected, gated(find_blocks(model)[1]) as gates:
        for active in [(True, False, True), (False, True, False), (True, True, False)]:
            expected.active = gates.active = active
            assert_close(step(model, model, batch()), step(plain, plain, batch()))
            assert gates.executed == expected.executed
    assert compiler.graphs == 1


@pytest.mark.parametrize("drawn", [False, True], ids=["gated", "layer_dropout"])
def test_fullgraph_is_refused(compiler: Compiler, drawn: bool) -> None:
    model = tiny_model(LAYERS).train()
    run = torch.compile(model, backend=compiler, fullgraph=True)
    context: Any = layer_dropout(model, None, 0.3) if drawn else gated(find_blocks(model)[1])
    with context as gates:
        with pytest.raises(Unsupported, match=r"a gate decides .* compile without fullgraph=True"):
            run(**batch())
        assert gates.executed == (0,) * LAYERS
    assert run(**batch()).loss.isfinite()


@pytest.mark.parametrize("model_type", ["t5", "deberta"])
def test_the_class_of_a_compiled_block_is_recognised(model_type: str) -> None:
    """If dropped, it returns what its class returns, without being run once."""
    [case, *_] = [case for case in contract.CASES if case.model_type == model_type]
    model, columns = contract.build(case), contract.batch(case)
    active = (False, True, True, *[True] * LAYERS)[: len(contract.all_blocks(model))]
    with gated(contract.all_blocks(model)) as gates:
        gates.active = active
        expected = contract.hidden(model(**columns))
    for path, found in list(find_stacks(model).items()):
        for layer, block in enumerate(found):
            model.set_submodule(f"{path}.{layer}", torch.compile(block, backend="eager"))
    with gated(contract.all_blocks(model)) as gates:
        gates.active = active
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(contract.hidden(model(**columns)), expected)
        assert gates.executed == tuple(map(int, active))
