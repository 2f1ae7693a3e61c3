"""Keep a model's list of attention weights aligned with its layers if some are dropped; ours."""

import inspect
import sys
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"


def add_missing_attentions(block: nn.Module) -> None:
    """Add ``None`` to the attention weights that transformers collects, in place of a block's.

    Transformers collects them with hooks on the attention modules, which do not run in a dropped
    block. Without an entry, all later ones would be taken for those of another layer.
    """
    capturing: Any = sys.modules.get(_MODULE)
    collected = capturing and capturing._active_collector.get()
    if not collected:
        return
    for module in block.modules():
        for hook in module._forward_hooks.values():
            if getattr(hook, "__module__", None) == _MODULE:
                name = inspect.getclosurevars(hook).nonlocals["key"]
                if "attentions" in name and name in collected:
                    collected[name].append(None)
