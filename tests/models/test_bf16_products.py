"""Linear maps with frozen bf16 weights compute in fp32 on CPUs without bf16 instructions."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from chats import LAYERS, save_chat_model
from droppeft.client import client_model
from droppeft.config import AdapterConfig
from droppeft.federated_method import adapter_spec
from droppeft.models import bf16_products
from droppeft.models.bf16_products import Fp32ProductLinear, use_fp32_products
from droppeft.models.causal_lm import load_causal_lm
from droppeft.models.precision import DTYPES, autocast
from droppeft.tasks.registry import task_named

SEVERAL_PARTS = 7 * 32
"""Values at a time, for a weight of 48 rows of 32."""


def linear(bias: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=bias)).to(torch.bfloat16).requires_grad_(False)
    use_fp32_products(model)
    return model[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [2**21, SEVERAL_PARTS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_and_gradients_are_those_of_fp32_rounded(
    bias: bool, at_once: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16_products, "VALUES_AT_ONCE", at_once)
    module = linear(bias)
    values = torch.randn(2, 5, 32).to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(2, 5, 48).to(torch.bfloat16)
    with autocast(precision, torch.device("cpu")):
        found = module(values)
    found.backward(gradient)
    assert found.dtype == values.grad.dtype == torch.bfloat16  # type: ignore[union-attr]

    exact = values.detach().float().requires_grad_()
    expected = functional.linear(exact, module.weight.float())
    rounded = expected.detach().to(torch.bfloat16)
    assert torch.equal(found, rounded if module.bias is None else rounded + module.bias)
    expected.backward(gradient.float())
    of_input = exact.grad
    assert of_input is not None
    torch.testing.assert_close(values.grad, of_input.to(torch.bfloat16), rtol=2**-7, atol=1e-5)


def test_other_types_are_those_of_torch() -> None:
    module, values = linear(True).float(), torch.randn(3, 32)
    assert torch.equal(module(values), functional.linear(values, module.weight, module.bias))
    trained = linear(False).requires_grad_(True)
    trained(values.to(torch.bfloat16)).sum().backward()
    assert trained.weight.grad is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_chat_model(tmp_path_factory.mktemp("chat")))


@pytest.mark.parametrize(
    ("precision", "instructions", "expected"),
    [("bf16", None, 7 * LAYERS + 1 + 2 * 7 * LAYERS), ("bf16", "amx", 0), ("fp32", None, 0)],
)
def test_a_client_in_bf16_has_them_where_the_cpu_has_no_instructions(
    precision: str,
    instructions: str | None,
    expected: int,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the model and in A and B of its adapter."""
    monkeypatch.setattr(client_model, "bf16_instructions", lambda: instructions)
    adapter = {"targets": ("all-linear",), "rank": 2}
    model = client_model.ClientModel(
        load_causal_lm(folder, dtype=DTYPES[precision]), task_named("causal_lm"), "cpu", seed=0
    )
    model.attach(adapter_spec(AdapterConfig.model_validate(adapter), LAYERS))
    assert sum(isinstance(one, Fp32ProductLinear) for one in model.model.modules()) == expected


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_maps_keep_their_own_products(quantization: str, folder: str) -> None:
    model = load_causal_lm(folder, quantization=quantization, dtype=torch.bfloat16).model
    use_fp32_products(model)
    names = {name for name, one in model.named_modules() if isinstance(one, Fp32ProductLinear)}
    assert names == {"lm_head"}


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_trained_map_computes_in_fp32_under_autocast(held: torch.dtype) -> None:
    """Its output and its gradients are those of fp32, rounded to bf16."""
    module, values = linear(True).to(held).requires_grad_(True), torch.randn(3, 32)
    with autocast("bf16", torch.device("cpu")):
        found = module(values)
    exact = functional.linear(values, module.weight.float(), module.bias.float())
    assert torch.equal(found, exact.bfloat16())
    found.sum().backward()
    assert module.weight.grad is not None


def test_a_model_computes_nearly_what_torch_does(folder: str) -> None:
    tokens = torch.arange(2, 26).reshape(2, 12)
    logits: dict[str, torch.Tensor] = {}
    for name, dtype in (
        ("fp32", torch.float32),
        ("torch", torch.bfloat16),
        ("ours", torch.bfloat16),
    ):
        model = load_causal_lm(folder, dtype=dtype).model
        if name == "ours":
            use_fp32_products(model)
        with torch.inference_mode():
            logits[name] = model(tokens).logits.float()
    errors = {name: (logits[name] - logits["fp32"]).norm() for name in ("torch", "ours")}
    assert 0 < errors["ours"] < 1.2 * errors["torch"]
    assert errors["ours"] < 0.02 * logits["fp32"].norm()
