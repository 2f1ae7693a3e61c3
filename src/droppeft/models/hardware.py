"""What the hardware of this machine multiplies fast, and the settings that follow from it. Ours."""

from functools import cache

import torch

from droppeft.config import Config, resolve


def resolve_here(config: Config) -> Config:
    """Replace settings that depend on the machine by their values on this one.

    Raises:
        DroppeftError: as :func:`droppeft.config.resolve`.
    """
    return resolve(config, cuda=torch.cuda.is_available(), bf16=fast_in_bf16())


def fast_in_bf16() -> frozenset[str]:
    """The accelerators of this machine that multiply faster in bf16 than in fp32."""
    fast = {"cpu": bf16_instructions() is not None, "cuda": _cuda_has_bf16()}
    return frozenset(name for name, is_fast in fast.items() if is_fast)


@cache
def bf16_instructions() -> str | None:
    """The name of this processor's instructions for products in bf16; ``None`` without them.

    oneDNN's own answer is not asked: it is true on every processor with AVX512, where products in
    bf16 are converted and no faster than in fp32.
    """
    oneDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not oneDNN:
        return None
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


def _cuda_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_reason(config: Config) -> str:
    """Say in which precision a resolved configuration computes on this machine, and why."""
    precision, accelerator = config.training.precision, config.accelerator
    if accelerator == "cuda":
        unit = "the GPU multiplies fast in bf16" if _cuda_has_bf16() else ""
        none = "the GPU has no units for bf16"
    else:
        name = bf16_instructions()
        unit = f"this processor multiplies fast in bf16 ({name})" if name else ""
        none = "this processor has no instructions for bf16"
    if precision == "fp16":
        return "fp16, as set"
    if precision == "bf16":
        return f"bf16: {unit}" if unit else f"bf16, as set; {none}, so it is not faster than fp32"
    return f"{precision}, as set; {unit}" if unit else f"{precision}: {none}"
