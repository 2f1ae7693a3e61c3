"""Table of adapter types: where their tensors are, what can be set, and which types are refused.

Ours. ``docs/reference/adapters.md`` is generated from this table and from the results of
``tests/adapter_contract.py``.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from droppeft.errors import DroppeftError

BOTTLENECK = "bottleneck"

Kind = Literal["layered", "sliced", "global", "refused"]


@dataclass(frozen=True)
class AdapterType:
    """Properties of an adapter type that do not depend on a model.

    Attributes:
        kind: ``"layered"``: every tensor belongs to one layer. ``"sliced"``: peft has one tensor
            for all layers, which is split into a parameter per layer here. ``"global"``: the
            tensors belong to no layer. ``"refused"``: the type cannot be used.
        title: the name that its authors use.
        source: the paper or page that describes it.
        settings: by name of our settings, the name of the field of peft's configuration class.
        closed: fields of that class that may not be set as options, in addition to
            :data:`droppeft.adapters.settings.CLOSED`.
        note: a remark for the documentation; for a refused type, the reason.
    """

    kind: Kind
    title: str
    source: str
    settings: Mapping[str, str] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()
    note: str = ""


def _layered(title: str, source: str, note: str = "", /, **settings: str) -> AdapterType:
    return AdapterType("layered", title, source, settings, note=note)


def _prompt(title: str, source: str, note: str) -> AdapterType:
    return AdapterType("global", title, source, {"tokens": "num_virtual_tokens"}, note=note)


def _refused(title: str, source: str, reason: str) -> AdapterType:
    return AdapterType("refused", title, source, note=reason)


_SVD = "frozen parts come from an SVD of the weights, which may differ between kinds of hardware"
_DRAWN = "frozen parts are drawn from a separate seed, which is an option"
_TIED = "it has one tensor for all layers, which cannot be dropped or shared by layer"
_TASKS = "its forward needs a task id for every text"
_PROMPT = "not for decoders: transformers cannot find the last text token after a prompt"

TYPES: dict[str, AdapterType] = {
    BOTTLENECK: _layered(
        "Bottleneck adapter",
        "arXiv:1902.00751",
        "ours; to be loaded with load_bottleneck, not with peft",
        width="width",
    ),
    "lora": AdapterType(
        "layered",
        "LoRA",
        "arXiv:2106.09685",
        {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        # The first may change the backbone's weights, the second is not limited to layers.
        closed=frozenset({"init_lora_weights", "target_parameters"}),
        note="also rsLoRA (options.use_rslora) and DoRA (options.use_dora)",
    ),
    "adamss": AdapterType(
        "layered",
        "AdaMSS",
        "openreview:8ZdWmpYxT0",
        closed=frozenset({"use_asa"}),  # it needs calls in the training loop
        note=_SVD,
    ),
    "beft": _layered("BEFT", "arXiv:2509.15974"),
    "boft": _layered("BOFT", "arXiv:2311.06243"),
    "c3a": _layered("C3A", "arXiv:2407.19342", "options.block_size must divide the widths"),
    "deft": _layered("DEFT", "NeurIPS 2025", "", rank="r", alpha="alpha", dropout="deft_dropout"),
    "delora": _layered("DeLoRA", "arXiv:2503.18225", "", rank="r"),
    "fourierft": _layered("FourierFT", "arXiv:2405.03003", _DRAWN),
    "glora": _layered("GLoRA", "arXiv:2306.07967", "", rank="r"),
    "gralora": _layered(
        "GraLoRA", "arXiv:2505.20355", "", rank="r", alpha="alpha", dropout="gralora_dropout"
    ),
    "hira": _layered("HiRA", "openreview:TwJrTz9cRS", "", rank="r", dropout="hira_dropout"),
    "hra": _layered("HRA", "arXiv:2405.17484", "the rank must be even", rank="r"),
    "ia3": _layered("(IA)³", "arXiv:2205.05638"),
    "ln_tuning": _layered(
        "LayerNorm tuning", "arXiv:2312.11420", "on the normalisation modules of the layers"
    ),
    "loha": _layered("LoHa", "arXiv:2108.06098", "", rank="r", alpha="alpha"),
    "lokr": _layered("LoKr", "arXiv:2309.14859", "", rank="r", alpha="alpha"),
    "miss": _layered("MiSS", "arXiv:2409.15371", "", rank="r", dropout="miss_dropout"),
    "oft": _layered("OFT", "arXiv:2306.07280", "options.oft_block_size must divide the widths"),
    "osf": _layered("OSF", "arXiv:2504.07097", f"trains half of each matrix; {_SVD}"),
    "peanut": _layered("PEANuT", "arXiv:2410.01870", "", rank="r"),
    "psoft": _layered(
        "PSOFT",
        "openreview:FSHrinMArK",
        _SVD,
        rank="r",
        alpha="psoft_alpha",
        dropout="psoft_dropout",
    ),
    "pvera": _layered("PVeRA", "arXiv:2512.07703", _DRAWN, rank="r", dropout="pvera_dropout"),
    "randlora": _layered(
        "RandLoRA",
        "arXiv:2502.00987",
        _DRAWN,
        rank="r",
        alpha="randlora_alpha",
        dropout="randlora_dropout",
    ),
    "road": _layered("RoAd", "arXiv:2409.00119", "options.group_size must divide the widths"),
    "supertuning": _layered("Super-Tuning", "arXiv:2607.09287"),
    "vera": _layered("VeRA", "arXiv:2310.11454", _DRAWN, rank="r", dropout="vera_dropout"),
    "waveft": _layered("WaveFT", "arXiv:2505.12532", _DRAWN),
    "prefix_tuning": AdapterType(
        "sliced",
        "Prefix tuning",
        "arXiv:2101.00190",
        {"tokens": "num_virtual_tokens"},
        closed=frozenset({"prefix_projection", "encoder_hidden_size"}),  # one MLP for all layers
        note="every layer has a prefix; not for models without a key-value cache, such as "
        "DeBERTa-v2, nor in a custom training loop with transformers' own gradient checkpointing, "
        "which discards the prefix",
    ),
    "prompt_tuning": _prompt("Prompt tuning", "arXiv:2104.08691", _PROMPT),
    "p_tuning": _prompt(
        "P-tuning",
        "arXiv:2103.10385",
        f"{_PROMPT}; the exported folder has the prompt's values, but not its encoder",
    ),
    "adalora": _refused(
        "AdaLoRA",
        "arXiv:2303.10512",
        "it needs calls in the training loop to move ranks between layers",
    ),
    "adaption_prompt": _refused(
        "Adaption prompt",
        "arXiv:2303.16199",
        "it cannot train a task head and only supports decoders",
    ),
    "cartridge": _refused(
        "Cartridges",
        "arXiv:2506.06266",
        "it is distilled from a long text, not trained on a task; use prefix_tuning",
    ),
    "cpt": _refused(
        "Context-aware prompt tuning", "arXiv:2410.17222", "it is only for causal language models"
    ),
    "frod": _refused(
        "FRoD",
        "doi:10.1609/aaai.v40i31.39813",
        "its frozen basis is computed from all adapted layers together, so the tensors of a layer "
        "cannot be used if a different set of layers has adapters",
    ),
    "lily": _refused("Lily", "arXiv:2407.09946", _TIED),
    "multitask_prompt_tuning": _refused("Multitask prompt tuning", "arXiv:2303.02861", _TASKS),
    "poly": _refused("Poly", "arXiv:2202.13914", _TASKS),
    "shadow": _refused(
        "ShadowPEFT",
        "arXiv:2604.19254",
        "it runs a second model next to all layers of the backbone",
    ),
    "shira": _refused(
        "SHiRA",
        "arXiv:2406.13175",
        "it stores sparse tensors for the backward, whose memory is not counted yet",
    ),
    "tinylora": _refused("TinyLoRA", "arXiv:2602.04118", _TIED),
    "trainable_tokens": _refused(
        "Trainable tokens",
        "peft",
        "it trains rows of the embedding only and cannot train a task head",
    ),
    "unilora": _refused("UniLoRA", "arXiv:2506.00799", _TIED),
    "vblora": _refused("VB-LoRA", "arXiv:2405.15179", _TIED),
    "xlora": _refused(
        "X-LoRA", "arXiv:2402.07148", "it mixes LoRA adapters that are already trained"
    ),
}
"""All types of droppeft and of peft, in the order of the documentation."""


def adapter_type(name: str) -> AdapterType:
    """Return a type that can be used.

    Raises:
        DroppeftError: if the name is unknown or the type is refused.
    """
    usable = [known for known, kind in TYPES.items() if kind.kind != "refused"]
    if name not in TYPES:
        near = difflib.get_close_matches(name.lower(), TYPES, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(usable)}"
        raise DroppeftError(f"adapter.type={name} is unknown; {hint}")
    found = TYPES[name]
    if found.kind == "refused":
        raise DroppeftError(f"adapter.type={name} is refused: {found.note}")
    return found


_MATRIX = "it treats the quantised codes as if they were weights"
_IN_PLACE = "it changes a layer's output in place, which bitsandbytes does not allow"

NOT_ON: dict[str, dict[str, str]] = {
    "8bit": {
        "adamss": _MATRIX,
        "c3a": _IN_PLACE,
        "deft": _MATRIX,
        "delora": _MATRIX,
        "glora": _MATRIX,
        "gralora": _IN_PLACE,
        "hra": _MATRIX,
        "osf": _MATRIX,
        "peanut": _MATRIX,
        "psoft": _MATRIX,
        "supertuning": _MATRIX,
    },
}
"""By quantisation, types that do not work on such a backbone, with the reason."""

NOT_ON["4bit"] = {**NOT_ON["8bit"], "loha": _MATRIX, "lokr": _MATRIX}


def check_on(name: str, options: Collection[str], quantization: str) -> None:
    """Check that a type and its options work on a quantised backbone.

    Args:
        name: a type that can be used.
        options: names of the options that are set.
        quantization: quantisation of the backbone.

    Raises:
        DroppeftError: if the type or an option does not work.
    """
    refused = NOT_ON.get(quantization, {})
    bits = quantization.removesuffix("bit")
    if name in refused:
        usable = [
            known
            for known, kind in TYPES.items()
            if kind.kind != "refused" and known not in refused
        ]
        raise DroppeftError(
            f"adapter.type={name} does not work with {bits}-bit weights: {refused[name]}; "
            f"set quantization=none, or choose {', '.join(usable)}"
        )
    if quantization == "8bit" and "use_dora" in options:
        raise DroppeftError(
            "adapter.options.use_dora: peft loses the scales of 8-bit weights when it computes "
            "DoRA's norms on a CPU; use quantization=4bit or quantization=none"
        )
