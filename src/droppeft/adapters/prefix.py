"""Prefix tuning with one parameter per layer, where peft has one tensor for all layers.

Source: Prefix tuning (arXiv:2101.00190) as implemented by peft; the cut by layer is ours. With one
tensor, a step that drops a layer would still decay that layer's part and carry on its momentum.
"""

from typing import Any

import torch
from peft import PeftModelForSequenceClassification
from torch import nn
from transformers import DynamicCache

PREFIX = "prompt_encoder.default.layer."
"""Names of the parameters, up to the number of the layer."""


class PrefixRows(nn.Module):
    """The prefix of every layer.

    Args:
        whole: peft's tensor, (tokens, L x 2 x H_kv): layer by layer, keys before values.
        num_layers: L.
    """

    def __init__(self, whole: torch.Tensor, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.ParameterList(
            nn.Parameter(part.detach().clone()) for part in whole.chunk(num_layers, dim=1)
        )

    def whole(self) -> torch.Tensor:
        """The tensor that peft would have."""
        return torch.cat(list(self.layer), dim=1).detach().cpu()


class Prefix(DynamicCache):  # type: ignore[misc]
    """Keys and values before those of the text; only read, so that a layer may run twice."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the prefix before a layer's keys and values (B, heads, S, size of a head)."""
        own = self.layers[layer_idx]
        keys, values = ((own.keys, key_states), (own.values, value_states))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


class PrefixModel(PeftModelForSequenceClassification):  # type: ignore[misc]
    """peft's model for prefix tuning, whose prefix is a :class:`PrefixRows`.

    A layer that does not run leaves its parameter without a gradient. What :meth:`save_pretrained`
    writes, and what the model computes, is what peft's own model would.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        encoder = self.prompt_encoder["default"]
        self.prompt_encoder["default"] = PrefixRows(encoder.embedding.weight, config.num_layers)

    def get_prompt(
        self, batch_size: int, task_ids: object = None, max_cache_len: object = None
    ) -> Prefix:
        """Keys and values of the prefix, per layer (B, heads, tokens, size of a head)."""
        config = self.active_peft_config
        heads, tokens = config.num_attention_heads, config.num_virtual_tokens
        pairs = []
        for row in self.prompt_encoder["default"].layer:
            parts = row.view(tokens, 2, heads, config.token_dim // heads).permute(1, 2, 0, 3)
            pairs.append(tuple(parts.unsqueeze(1).expand(-1, batch_size, -1, -1, -1)))
        return Prefix(pairs)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The tensor that peft writes, (tokens, L x 2 x H_kv)."""
        rows: PrefixRows = self.prompt_encoder[adapter_name]
        return rows.whole()
