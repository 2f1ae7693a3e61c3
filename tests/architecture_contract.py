"""Rules that layer dropout must satisfy on every architecture, checked on tiny models.

``python tests/architecture_contract.py`` checks them for all architectures and writes
``docs/architectures.json``, from which ``docs/reference/architectures.md`` is generated.
"""

import copy
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.config import AdapterConfig
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import ARCHITECTURES, Gates, find_blocks, find_stacks, gated
from droppeft.messages.tensors import HEAD
from droppeft.models.loading import load_backbone
from droppeft.models.packaged import builtin_model_folder

LAYERS = 3
FILE = Path(__file__).parents[1] / "docs" / "architectures.json"

COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOW = {**MIXED, "sliding_window": 3, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "decoder_sparse_step": 1,
}
BART = {
    "d_model": 16,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_factor": 3.0,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "position_biased_input": False,
    "pooler_hidden_size": 16,
}
DEBERTA_V3 = {
    **DEBERTA,
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
BIASES = "a dropped first block still returns the position biases that later blocks use"
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny configuration of a model type, and the reference for its gated model.

    Attributes:
        model_type: a key of ``ARCHITECTURES``.
        settings: settings of the configuration in addition to :data:`COMMON`.
        variant: name of these settings, if the type has several cases.
        reference: a key of :data:`REFERENCES`.
        note: a remark for the documentation.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    reference: str = "sliced"
    note: str = ""

    @property
    def name(self) -> str:
        """The type and the variant."""
        return f"{self.model_type}, {self.variant}" if self.variant else self.model_type

    def config(self) -> Any:
        """Return a new configuration."""
        return AutoConfig.for_model(self.model_type, **{**COMMON, **self.settings})


CASES: tuple[Case, ...] = (
    # Encoders
    Case("bert"),
    Case("big_bird", {"attention_type": "original_full"}, note="checked with full attention"),
    Case("camembert"),
    Case("convbert", {"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}),
    Case("data2vec-text"),
    Case("deberta", DEBERTA),
    Case("deberta-v2", DEBERTA_V3),
    Case(
        "deberta-v2",
        {**DEBERTA_V3, "conv_kernel_size": 3},
        "convolution",
        "replaced",
        "the convolution after block 0 belongs to the encoder: it runs even if block 0 is dropped",
    ),
    Case("distilbert", {"dim": 16, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": 2}),
    Case("electra", {"embedding_size": 8}),
    Case("ernie"),
    Case(
        "esm",
        {"position_embedding_type": "rotary", "token_dropout": False},
        reference="replaced",
        note="an unused head for contacts has one weight per layer",
    ),
    Case("eurobert"),
    Case("megatron-bert"),
    Case(
        "modernbert",
        {**MIXED, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        reference="replaced",
        note="its first block does not normalise its input, at whatever position",
    ),
    Case("mpnet"),
    Case("nomic_bert"),
    Case("nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 4}),
    Case("rembert", {"input_embedding_size": 8, "output_embedding_size": 8}),
    Case("roberta"),
    Case("roberta-prelayernorm"),
    Case("roformer", {"embedding_size": 16}),
    Case("xlm-roberta"),
    Case("xlm-roberta-xl"),
    Case("xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
    # Decoders
    Case("apertus"),
    Case("arcee"),
    Case("biogpt"),
    Case("bloom", {"n_layer": LAYERS, "n_head": 2}),
    Case("codegen", {"num_attention_heads": 4, "rotary_dim": 4}),
    Case("cohere"),
    Case("cohere2", WINDOW),
    Case(
        "deepseek_v3",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        "one dense layer",
    ),
    Case("diffllama", {}, "", "replaced", "the scaling in a block depends on its depth"),
    Case("ernie4_5", {"head_dim": 8}),
    Case("exaone4", WINDOW),
    Case("falcon", {"alibi": False}, "rotary"),
    Case("falcon", {"alibi": True, "parallel_attn": False}, "ALiBi"),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}, "new decoder"),
    Case("gemma", {"head_dim": 8}),
    Case("gemma2", {**WINDOW, "query_pre_attn_scalar": 8}),
    Case(
        "gemma3",
        {
            "text_config": {
                **COMMON,
                **WINDOW,
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 8,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                **VISION,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 39,
        },
        note="only the text model; the layers of the vision tower always run",
    ),
    Case("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 8}),
    Case("glm", {"head_dim": 8}),
    Case("glm4", {"head_dim": 8}),
    Case("gpt2"),
    Case(
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scaled",
        "replaced",
        "attention is scaled by the depth of the block",
    ),
    Case("gpt_bigcode"),
    Case(
        "gpt_neo",
        {
            "num_layers": LAYERS,
            "num_heads": 2,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 3,
        },
    ),
    Case("gpt_neox"),
    Case("gpt_oss", {**WINDOW, **EXPERTS}),
    Case("gptj", {"rotary_dim": 4}),
    Case("granite"),
    Case("granitemoe", EXPERTS),
    Case("helium", {"head_dim": 8}),
    Case("llama"),
    Case("ministral", WINDOW),
    Case("mistral", {"sliding_window": 3}),
    Case("mixtral", EXPERTS),
    Case("mpt", {"d_model": 16, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 32}),
    Case("nemotron", {"head_dim": 8}),
    Case("olmo"),
    Case("olmo2"),
    Case("olmo3", WINDOW),
    Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Case("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    Case("persimmon"),
    Case("phi"),
    Case("phi3"),
    Case("phimoe", EXPERTS),
    Case("qwen2", {**WINDOW, "use_sliding_window": True}),
    Case("qwen2_moe", {**QWEN_EXPERTS, "mlp_only_layers": [1]}, "a dense layer"),
    Case(
        "qwen2_moe",
        {**QWEN_EXPERTS, "decoder_sparse_step": 2},
        "every second",
        "replaced",
        "whether a block has experts depends on its depth",
    ),
    Case("qwen3", {**WINDOW, "use_sliding_window": True}),
    Case("qwen3_moe", {**QWEN_EXPERTS, "head_dim": 8}),
    Case("seed_oss", {"head_dim": 8}),
    Case("smollm3", {**WINDOW, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]}),
    Case("stablelm"),
    Case("starcoder2", {"sliding_window": 3}),
    Case("xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": LAYERS, "attention_heads": 2}),
    # Encoder-decoders
    Case("bart", BART),
    Case("blenderbot", BART),
    Case("blenderbot-small", BART),
    Case(
        "m2m_100",
        {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        note="transformers itself drops 5 % of the layers by default: set both layerdrops to 0",
    ),
    Case("marian", BART),
    Case("mbart", BART),
    Case("mt5", T5, "", "moved biases", BIASES),
    Case("pegasus", BART),
    Case("plbart", BART),
    Case("t5", T5, "", "moved biases", BIASES),
    Case("t5", {**T5, "feed_forward_proj": "gated-gelu"}, "1.1", "moved biases", BIASES),
    Case("umt5", T5),
    # Vision
    Case("deit", VISION),
    Case("dinov2", VISION),
    Case("vit", VISION),
    Case("vit_msn", VISION),
)
"""One or more cases for every architecture."""

LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Entries of configurations with one value per layer."""


def build(
    case: Case,
    auto: Any = AutoModel,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
) -> Any:
    """Return a model with reproducible random weights, in evaluation mode."""
    config = case.config()
    if num_labels is not None:
        config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=attn_implementation).eval()
        perturb(model)
    return model


def perturb(model: nn.Module) -> None:
    """Add noise: tensors that are initialised with zeros or ones could be confused."""
    with torch.no_grad():
        for value in model.parameters():
            if value.numel() and value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.1)


def batch(case: Case, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return rows of 7 tokens, padded on the right from the second on, or images."""
    generator = torch.Generator().manual_seed(1)
    if "image_size" in case.settings:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(4, 38, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1:, 5:], mask[1:, 5:] = 0, 0
    columns = {"input_ids": ids, "attention_mask": mask}
    if case.config().is_encoder_decoder:
        columns["decoder_input_ids"] = torch.randint(4, 38, (rows, 5), generator=generator)
    return columns


def all_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks, encoder first."""
    return [block for blocks in find_stacks(model).values() for block in blocks]


def patterns(model: nn.Module) -> Iterator[tuple[bool, ...]]:
    """Yield gates: all patterns of one stack with open and closed gates; six for two stacks."""
    stacks = [len(blocks) for blocks in find_stacks(model).values()]
    if len(stacks) == 1:
        [depth] = stacks
        for number in range(1, 2**depth - 1):
            yield tuple(bool(number >> layer & 1) for layer in range(depth))
        return
    first = (False, True, True)
    last = (True, True, False)
    only_last = (False, False, True)
    yield from (
        only_last + only_last,
        first + last,
        last + first,
        (True,) * LAYERS + only_last,
    )
    rng = random.Random(len(list(model.parameters())))
    for _ in range(2):
        yield tuple(gate for _ in stacks for gate in rng.sample([*first, rng.random() < 0.5], 3))


def hidden(output: Any) -> torch.Tensor:
    """Return the hidden states of the last layer."""
    states: torch.Tensor = output.last_hidden_state
    return states


def step(
    model: Any, columns: Mapping[str, torch.Tensor], between: Callable[[], None] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run forward, ``between`` and backward; return the last hidden states and all gradients."""
    model.zero_grad()
    states = hidden(model(**columns))
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    if between is not None:
        between()
    (states * weights).sum().backward()
    gradients = {
        name: None if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }
    return states.detach(), gradients


def same(one: Any, other: Any) -> bool:
    """Whether both are equal tensors, or both are ``None``."""
    return (one is None) == (other is None) and (one is None or torch.equal(one, other))


# References: models without gates


def moved_names(model: nn.Module, active: tuple[bool, ...]) -> dict[str, str]:
    """Return, by the name of every active block in the full model, its name in the small one."""
    gates = iter(active)
    names = {}
    for path, blocks in find_stacks(model).items():
        remaining = [layer for layer, _ in enumerate(blocks) if next(gates)]
        names.update({f"{path}.{old}.": f"{path}.{new}." for new, old in enumerate(remaining)})
    return names


def sliced_config(model: Any, active: tuple[bool, ...]) -> Any:
    """Return the configuration of a model that has only the active blocks."""
    config = copy.deepcopy(model.config)
    start = 0
    for depth in ARCHITECTURES[config.model_type].stacks.values():
        *parents, last = depth.split(".")
        owner: Any = config
        for parent in parents:
            owner = getattr(owner, parent)
        gates = active[start : start + getattr(owner, last)]
        start += len(gates)
        setattr(owner, last, sum(gates))
        for name in LAYER_LISTS:
            values = getattr(owner, name, None)
            if values is not None:
                remaining = [value for value, runs in zip(values, gates, strict=True) if runs]
                setattr(owner, name, remaining)
        slice_numbers(owner, gates)
    return config


def slice_numbers(config: Any, gates: tuple[bool, ...]) -> None:
    """Change settings that refer to layers by index."""
    if getattr(config, "mlp_only_layers", None):
        remaining = [layer for layer in config.mlp_only_layers if gates[layer]]
        config.mlp_only_layers = [sum(gates[:layer]) for layer in remaining]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = sum(gates[: config.first_k_dense_replace])
    if hasattr(config, "attention_types"):
        config.attention_types = [[config.attention_layers, 1]]


Reference = tuple[Any, dict[str, str]]
"""A model, and the name of each of its parameters in the gated model."""


def sliced(
    model: Any, active: tuple[bool, ...], auto: Any = AutoModel, stays: str = ""
) -> Reference:
    """Return a new model without the dropped layers, with the weights of the active ones.

    Args:
        stays: end of the name of a parameter that stays in the first block of the new model.
    """
    small = auto.from_config(sliced_config(model, active)).eval()
    moved = moved_names(model, active)
    paths = tuple(f"{path}." for path in find_stacks(model))
    origin = {}
    for old in model.state_dict():
        if not old.startswith(paths) or (stays and old.endswith(stays)):
            origin[old] = old
            continue
        for before, after in moved.items():
            if old.startswith(before):
                origin[after + old.removeprefix(before)] = old
    values = model.state_dict()
    small.load_state_dict({new: values[old] for new, old in origin.items()})
    return small, origin


def sliced_with_moved_biases(
    model: Any, active: tuple[bool, ...], auto: Any = AutoModel
) -> Reference:
    """T5: the table of position biases is in the first block of a stack, but used by the stack."""
    return sliced(model, active, auto, "layer.0.SelfAttention.relative_attention_bias.weight")


class PassThrough(nn.Module):
    """Replacement for a dropped block."""

    def __init__(self, block: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.attention_type = getattr(block, "attention_type", None)  # used by ModernBERT

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the input."""
        return (hidden, None) if self.in_tuple else hidden


def replaced(model: Any, active: tuple[bool, ...], auto: Any = AutoModel) -> Reference:
    """Return a new model in which dropped blocks are replaced by :class:`PassThrough`.

    For architectures in which the position of a block in the list matters.
    """
    whole = auto.from_config(model.config).eval()
    whole.load_state_dict(model.state_dict())
    in_tuple = ARCHITECTURES[model.config.model_type].output == "tuple"
    gates = iter(active)
    for path, blocks in find_stacks(whole).items():
        for layer, block in enumerate(blocks):
            if not next(gates):
                whole.set_submodule(f"{path}.{layer}", PassThrough(block, in_tuple))
    return whole, {name: name for name, _ in whole.named_parameters()}


REFERENCES: dict[str, Callable[..., Reference]] = {
    "sliced": sliced,
    "moved biases": sliced_with_moved_biases,
    "replaced": replaced,
}


# Rules


def a_dropped_block_is_absent(case: Case) -> None:
    model, columns = build(case), batch(case)
    blocks = all_blocks(model)
    full = hidden(model(**columns))
    names = {value: name for name, value in model.named_parameters()}
    for active in patterns(model):
        small, origin = REFERENCES[case.reference](model, active)
        expected, expected_gradients = step(small, columns)
        with gated(blocks) as gates:
            gates.active = active
            found, ours = step(model, columns)
            assert gates.executed == tuple(map(int, active)), active
        assert torch.equal(found, expected), active
        assert not torch.equal(found, full), active
        for name, gradient in expected_gradients.items():
            assert same(ours.pop(origin[name]), gradient), (active, name)
        # Only the dropped blocks' parameters are missing in the small model.
        assert all(gradient is None for gradient in ours.values()), active
        for block, runs in zip(blocks, active, strict=True):
            trained = [names[value] for value in block.parameters() if value.grad is not None]
            assert runs or not [name for name in trained if name not in origin.values()], active
    assert torch.equal(hidden(model(**columns)), full)


def open_gates_change_nothing(case: Case) -> None:
    model, columns = build(case).train(), batch(case)
    before = (list(model.state_dict()), [name for name, _ in model.named_modules()])
    torch.manual_seed(3)
    plain, gradients = step(model, columns)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with gated(all_blocks(model)):
        found, ours = step(model, columns)
        assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, plain)
    assert all(same(ours[name], gradient) for name, gradient in gradients.items())


def a_dropped_block_does_not_run(case: Case) -> None:
    """Not even to find out what it returns: hooks would record values of a dropped layer."""
    model, columns = build(case), batch(case)
    blocks, runs = all_blocks(model), []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if name and not name.endswith("relative_attention_bias"):  # used by T5's whole stack
                module.register_forward_hook(lambda *_, index=index: runs.append(index))
    with gated(blocks) as gates, torch.no_grad():
        gates.active = [index % LAYERS == 1 for index in range(len(blocks))]
        model(**columns)
    assert {index for index in runs if index % LAYERS != 1} == set()
    assert {index for index in runs if index % LAYERS == 1}


def checkpointing_recomputes_what_ran(case: Case) -> None:
    """Also if the gates change before the backward."""
    for whole, reentrant in CHECKPOINTING[checkpointing(case)]:
        model, columns = build(case).train(), batch(case)
        if not whole:
            train_only_blocks(model)
        blocks = all_blocks(model)
        active = random.Random(case.name).choice(list(patterns(model)))
        with gated(blocks) as gates, calls_inside(blocks) as calls:

            def invert(gates: Gates = gates, active: tuple[bool, ...] = active) -> None:
                gates.active = tuple(not runs for runs in active)

            gates.active = active
            torch.manual_seed(4)
            expected, theirs = step(model, columns)
            forward_calls = list(calls)
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(4)
            found, ours = step(model, columns, invert)
            assert gates.executed == tuple(2 * runs for runs in active)
        # Two forwards and a recomputation, which may skip what the backward does not need.
        for count, first, runs in zip(calls, forward_calls, active, strict=True):
            assert 2 * first < count <= 3 * first if runs else count == 0
        assert torch.equal(found, expected)
        # Gradients of the encoder's output are then summed over decoder blocks in another order.
        rounding = 1e-5 if reentrant and len(find_stacks(model)) > 1 else 0.0
        assert_gradients(ours, theirs, rounding)


def train_only_blocks(model: Any) -> None:
    """Freeze all but the blocks, as with adapters, and let the embeddings require gradients."""
    model.requires_grad_(False)
    for block in all_blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight.requires_grad_()
    model.enable_input_require_grads()


@contextmanager
def calls_inside(blocks: list[nn.Module]) -> Iterator[list[int]]:
    """Count the calls of modules inside each block."""
    calls = [0] * len(blocks)

    def count(*_: object, index: int) -> None:
        calls[index] += 1

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():
                if name and not name.endswith(
                    "relative_attention_bias"
                ):  # used by T5's whole stack
                    hook = module.register_forward_pre_hook(partial(count, index=index))
                    hooks.callback(hook.remove)
        yield calls


def assert_gradients(ours: dict[str, Any], theirs: dict[str, Any], rounding: float) -> None:
    """Check that gradients are equal up to ``rounding`` times the largest, or both ``None``."""
    largest = max(float(value.abs().max()) for value in theirs.values() if value is not None)
    for name, other in theirs.items():
        found = ours[name]
        assert (found is None) == (other is None), name
        assert found is None or float((found - other).abs().max()) <= rounding * largest, name


def hidden_states_are_those_of_every_depth(case: Case) -> None:
    """Hidden states and attentions by layer must belong to the right layer."""
    model = build(case, attn_implementation="eager")
    blocks = all_blocks(model)
    with gated(blocks) as gates, torch.no_grad():
        gates.active = [index % LAYERS != 1 for index in range(len(blocks))]
        output = model(**batch(case), output_hidden_states=True, output_attentions=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    depths = [output[name] for name in names if output.get(name) is not None]
    assert len(depths) == len(find_stacks(model))
    for states in depths:
        assert len(states) == LAYERS + 1
        assert [torch.equal(states[1], states[2]), torch.equal(states[0], states[1])] == [1, 0]
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    for entries in [output[name] for name in names if output.get(name)]:
        assert [entry is None for entry in entries] == [False, True, False]


def generation_is_right_or_refused(case: Case) -> None:
    auto = generator(case)
    if auto is None:
        return
    model = build(case, auto)
    prompt = {"input_ids": batch(case)["input_ids"][:1]}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = {**options, "use_cache": True}, {**options, "use_cache": False}
    blocks = all_blocks(model)
    full = model.generate(**prompt, **cached)
    active = (True,) * (len(blocks) - LAYERS) + (False, True, True)
    small, _ = REFERENCES[case.reference](model, active, auto)
    with gated(blocks) as gates:
        assert torch.equal(model.generate(**prompt, **cached), full)
        gates.active = active
        number = active.index(False)
        with pytest.raises(DroppeftError, match=f"block {number} was dropped in an earlier part"):
            model.generate(**prompt, **cached)
        assert torch.equal(model.generate(**prompt, **plain), small.generate(**prompt, **plain))
        gates.active = (True,) * len(blocks)
        assert torch.equal(model.generate(**prompt, **cached), full)


def a_classifier_has_adapters_by_layer(case: Case) -> None:
    """As in ``droppeft run``: from a saved base model to the gradients of a step."""
    support = classification(case)
    if support not in CLASSIFIES:
        return
    attached, max_length = classifier(case, support)
    path, blocks = find_blocks(attached)
    groups = trainable_by_layer(attached, path)
    with gated(blocks) as gates:
        gates.active = (True, False, True)
        attached.train()(**batch(case), labels=torch.tensor([0, 1])).loss.backward()
    for layer in range(LAYERS):
        gradients = [value.grad for value in groups[layer].values()]
        assert gradients
        assert all((gradient is not None) == (layer != 1) for gradient in gradients), layer
    assert all(value.grad is not None for value in groups[HEAD].values())
    assert COMMON["max_position_embeddings"] - 2 <= max_length <= COMMON["max_position_embeddings"]
    attached(input_ids=torch.full((1, max_length), 5))


def classifier(case: Case, support: str) -> tuple[Any, int]:
    """Load a base model as ``droppeft run`` does, with LoRA and a new head for two classes.

    Returns:
        The model, and the largest number of tokens of its input.
    """
    with tempfile.TemporaryDirectory() as folder:
        build(case).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(builtin_model_folder() / name, folder)
        backbone = load_backbone(folder, ("one", "other"), 0)
    model, path = backbone.model, backbone.blocks_path
    targets = ("default",) if support == "yes" else attention_modules(model, path)
    spec = adapter_spec(AdapterConfig(targets=targets), LAYERS)
    return attach(model, spec, path, 0, backbone.new_modules), backbone.max_length


def attention_modules(model: nn.Module, path: str) -> tuple[str, ...]:
    """Return names of linear modules in the attention, as a user would choose them."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(path) and "att" in name and isinstance(module, nn.Linear | Conv1D)
    }
    return tuple(sorted(names))


RULES: tuple[Callable[[Case], None], ...] = (
    a_dropped_block_is_absent,
    open_gates_change_nothing,
    a_dropped_block_does_not_run,
    checkpointing_recomputes_what_ran,
    hidden_states_are_those_of_every_depth,
    generation_is_right_or_refused,
    a_classifier_has_adapters_by_layer,
)
"""The rules that every architecture must satisfy."""


# The results


def generator(case: Case) -> Any:
    """Return the class of transformers that generates text with this type, if there is one."""
    config = case.config()
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    encoder = "encoder.layer" in ARCHITECTURES[case.model_type].stacks
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and case.model_type != "gemma3"
    return AutoModelForCausalLM if known and not encoder else None


CHECKPOINTING: dict[str, tuple[tuple[bool, bool], ...]] = {
    "both": ((True, False), (True, True), (False, False), (False, True)),
    "non-reentrant; both for adapters": ((True, False), (False, False), (False, True)),
    "–": (),
}
"""By name, the pairs that work: (the whole model is trained, reentrant)."""


@cache
def checkpointing(case: Case) -> str:
    """Return the entry of :data:`CHECKPOINTING` for the model, found without gates."""
    model, columns = build(case).train(), batch(case)
    if not model.supports_gradient_checkpointing:
        return "–"
    model.activation_checkpointing_enable({"use_reentrant": True})
    try:
        step(model, columns)
    except RuntimeError as error:
        reasons = {"backward through the graph a second": "non-reentrant; both for adapters"}
        [found] = [name for reason, name in reasons.items() if reason in str(error)]
        return found
    return "both"


CLASSIFIES = ("yes", "name targets")


@cache
def classification(case: Case) -> str:
    """Return whether ``droppeft run`` can classify texts with this type (:data:`CLASSIFIES`)."""
    if type(case.config()) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "–"
    try:
        classifier(case, "yes")
    except DroppeftError as error:
        reasons = {
            "peft has no default targets": "name targets",
            "no fitting weights for dense": "with a trained head",
            "has 2 lists of blocks": "two stacks",
        }
        [found] = [name for reason, name in reasons.items() if reason in str(error)]
        return found
    return "yes"


def outcome(case: Case) -> dict[str, Any]:
    """Return a row of the documentation's table."""
    model = build(case)
    return {
        "model_type": case.model_type,
        "variant": case.variant,
        "class": type(model).__name__,
        "blocks": list(find_stacks(model)),
        "output": ARCHITECTURES[case.model_type].output,
        "reference": case.reference,
        "checkpointing": checkpointing(case),
        "classification": classification(case),
        "note": case.note,
    }


def main() -> None:
    """Check all cases and write the results. Nothing is written if a check fails."""
    rows = []
    for case in CASES:
        for rule in RULES:
            rule(case)
        rows.append(outcome(case))
    content = {"transformers": transformers.__version__, "cases": rows}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
