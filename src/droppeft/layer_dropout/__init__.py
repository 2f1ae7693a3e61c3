"""Stochastic transformer layer dropout for any training loop; needs torch alone.

Source: DropPEFT (arXiv:2503.10217); see the modules for what is ours. A plain loop::

    import random
    from droppeft.layer_dropout import find_blocks, gated, layer_rates, sample_active

    _, blocks = find_blocks(model)
    rates = layer_rates(0.5, "incremental", len(blocks), protected={0})
    rng = random.Random(0)
    model.train()
    with gated(blocks) as gates:
        for batch in batches:
            gates.active = sample_active(rates, "exact", rng)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()  # outside of the context every layer runs
"""

from droppeft.layer_dropout.blocks import BLOCK_PATHS, Gates, find_blocks, gated
from droppeft.layer_dropout.gates import (
    SAMPLINGS,
    Sampling,
    conditioned_rates,
    expected_active,
    sample_active,
)
from droppeft.layer_dropout.rates import SHAPES, explicit_rates, layer_rates, protected_ends

__all__ = [
    "BLOCK_PATHS",
    "SAMPLINGS",
    "SHAPES",
    "Gates",
    "Sampling",
    "conditioned_rates",
    "expected_active",
    "explicit_rates",
    "find_blocks",
    "gated",
    "layer_rates",
    "protected_ends",
    "sample_active",
]
