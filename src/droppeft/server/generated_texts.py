"""Texts that the model writes before and after training, and how good they are. Ours.

They are written once, when a run ends; no state depends on them.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from droppeft.client.global_model import attached
from droppeft.data.conversations import ConversationTable, Message, prompts_and_references
from droppeft.messages.server_state import GlobalModel
from droppeft.server.prepare import Prepared, evaluation_sample
from droppeft.tasks.generation import GenerationSettings, complete_prompts
from droppeft.tasks.text_metrics import text_scores

SHOWN = 3
"""Number of samples in ``result.json``."""


def written_before_and_after(
    prepared: Prepared, model: GlobalModel
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Let the model before training and the given one complete a sample of test prompts.

    Args:
        prepared: the server; its state has the model before training.
        model: the model after training.

    Returns:
        The scores of both for ``result.json``, and the samples, each with ``prompt``,
        ``reference``, ``before`` and ``after``. Both are empty if no texts were asked for, or if
        the test rows have no prompts.
    """
    table: ConversationTable = prepared.loaded.data.test
    sample = evaluation_sample(len(table), prepared.config.evaluation.generated)
    prompts, references = prompts_and_references(table, sample, len(sample))
    if not prompts:
        return {}, []
    start = time.perf_counter()
    both = _written(prepared, (prepared.state.model, model), prompts)
    texts = dict(zip(("before", "after"), both, strict=True))
    samples = [
        {"prompt": prompt[-1].content, "reference": reference, "before": before, "after": after}
        for prompt, reference, before, after in zip(
            prompts, references, texts["before"], texts["after"], strict=True
        )
    ]
    scores = {name: asdict(text_scores(found, references)) for name, found in texts.items()}
    return {
        "generated": {
            "rows": len(prompts),
            **scores,
            "samples": samples[:SHOWN],
            "generated_wall_s": time.perf_counter() - start,
        }
    }, samples


def _written(
    prepared: Prepared, models: Sequence[GlobalModel], prompts: Sequence[Sequence[Message]]
) -> list[list[str]]:
    """The answers of each model, which the run's workers write at the same time if it has any."""
    config, tokenizer = prepared.config, prepared.model.tokenizer
    settings = GenerationSettings(
        max_new_tokens=config.evaluation.max_new_tokens, batch_size=config.evaluation.batch_size
    )
    if prepared.workers is not None:
        return prepared.workers.complete(models, prompts, settings)
    texts = []
    for model in models:
        with attached(prepared.model, model) as whole:
            longest = config.training.max_length
            texts.append(complete_prompts(whole, tokenizer, prompts, longest, settings))
    return texts
