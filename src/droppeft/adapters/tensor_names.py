"""Names of tensors: to which layer one belongs, and what it was called before peft. Ours."""

from droppeft.messages.tensors import HEAD, OTHER, LayerKey

PREFIX = "prompt_encoder.default.layer."
"""Start of the names of a prefix's parameters; the index of the layer follows."""

LORA_A, LORA_B = ".lora_A.", ".lora_B."
"""Parts of the names of LoRA's factors A (r, in) and B (out, r)."""


def layer_of(name: str, blocks_path: str) -> LayerKey:
    """Return the group of a parameter: its layer's index, ``"head"`` or ``"other"``."""
    for path in (f"{blocks_path}.", PREFIX):
        if name.startswith(path):
            return int(name.removeprefix(path).partition(".")[0])
    return HEAD if ".modules_to_save." in name else OTHER


def backbone_name(name: str) -> str:
    """Return the name that a backbone parameter had before peft wrapped its module."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
