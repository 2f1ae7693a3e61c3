"""Prefix tuning with one parameter per layer instead of peft's single tensor for all layers.

Source: Prefix tuning (arXiv:2101.00190) as implemented by peft. Splitting the tensor by layer is
ours: weight decay and momentum would otherwise change the part of a layer in steps that drop it.
"""

from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftModelForSequenceClassification
from torch import nn
from transformers import DynamicCache


class PrefixRows(nn.Module):
    """The prefix of each layer, as a parameter.

    Args:
        whole: peft's tensor of shape (tokens, L x 2 x H_kv): for each layer keys, then values.
        num_layers: number of layers L.
    """

    def __init__(self, whole: torch.Tensor, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.ParameterList(
            nn.Parameter(part.detach().clone()) for part in whole.chunk(num_layers, dim=1)
        )

    def whole(self) -> torch.Tensor:
        """Return the single tensor that peft uses."""
        return torch.cat(list(self.layer), dim=1).detach().cpu()


class Prefix(DynamicCache):  # type: ignore[misc]
    """Cached keys and values of a prefix. It is never written, so a layer may run twice."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values (B, heads, S, head size) with the prefix before them."""
        prefix = self.layers[layer_idx]
        keys, values = ((prefix.keys, key_states), (prefix.values, value_states))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


class PrefixModel:
    """What peft's models for prefix tuning get: one parameter per layer (:class:`PrefixRows`).

    The parameter of a layer that does not run has no gradient. Outputs, and the files that
    ``save_pretrained`` writes, are those of peft's model.
    """

    active_peft_config: Any
    prompt_encoder: Any

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)  # type: ignore[call-arg]
        encoder = self.prompt_encoder["default"]
        self.prompt_encoder["default"] = PrefixRows(encoder.embedding.weight, config.num_layers)

    def get_prompt(
        self, batch_size: int, task_ids: object = None, max_cache_len: object = None
    ) -> Prefix:
        """Return keys and values of the prefix, per layer (B, heads, tokens, head size)."""
        config = self.active_peft_config
        heads, tokens = config.num_attention_heads, config.num_virtual_tokens
        pairs = []
        for row in self.prompt_encoder["default"].layer:
            parts = row.view(tokens, 2, heads, config.token_dim // heads).permute(1, 2, 0, 3)
            pairs.append(tuple(parts.unsqueeze(1).expand(-1, batch_size, -1, -1, -1)))
        return Prefix(pairs)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """Return the tensor that peft saves, of shape (tokens, L x 2 x H_kv)."""
        rows: PrefixRows = self.prompt_encoder[adapter_name]
        return rows.whole()


class PrefixClassifier(PrefixModel, PeftModelForSequenceClassification):  # type: ignore[misc]
    """A sequence classifier with a prefix."""


class PrefixCausalLM(PrefixModel, PeftModelForCausalLM):  # type: ignore[misc]
    """A causal language model with a prefix."""

    def get_prompt(
        self, batch_size: int, task_ids: object = None, max_cache_len: object = None
    ) -> DynamicCache:
        """Return the prefix; without gradients, as a cache that generation can extend."""
        prefix = super().get_prompt(batch_size)
        if torch.is_grad_enabled():
            return prefix
        return DynamicCache([(layer.keys, layer.values) for layer in prefix.layers])


PREFIX_MODELS = {"SEQ_CLS": PrefixClassifier, "CAUSAL_LM": PrefixCausalLM}
"""By peft's name of the task."""
