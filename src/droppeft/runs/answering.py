"""Let the model of a run answer prompts. Ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.client.global_model import attach_model
from droppeft.client.run_inputs import Say
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.runs.export import load_source, saved_model
from droppeft.tasks.generation import GenerationSettings, complete_prompts
from droppeft.tasks.registry import task_named


@dataclass(frozen=True)
class Answering:
    """A model that answers.

    Attributes:
        model: a causal language model with its adapter.
        tokenizer: that of the model.
        positions: largest number of tokens of prompt and answer together.
        settings: how answers are generated.
        round: after which the model was saved; 0 before training.
    """

    model: Any
    tokenizer: Any
    positions: int
    settings: GenerationSettings
    round: int

    def with_settings(self, settings: GenerationSettings) -> "Answering":
        """Return the same model with other settings.

        Raises:
            DroppeftError: the answers would leave no room for a prompt.
        """
        if settings.max_new_tokens >= self.positions:
            raise DroppeftError(
                f"--max-new-tokens {settings.max_new_tokens} is more than the {self.positions} "
                "positions of the model; lower it"
            )
        return replace(self, settings=settings)

    def answers(self, prompts: Sequence[Sequence[Message]], streamer: Any = None) -> list[str]:
        """Return the answer to each prompt; of a prompt that is too long the middle is left out.

        Args:
            prompts: messages, of which the last is not the assistant's.
            streamer: as in :func:`~droppeft.tasks.generation.generate_texts`.

        Raises:
            DroppeftError: the model's chat template refuses a prompt, or it has no tokens.
        """
        longest = self.positions - self.settings.max_new_tokens
        return complete_prompts(
            self.model, self.tokenizer, prompts, longest, self.settings, streamer
        )


@contextmanager
def loaded_model(
    run: Path,
    settings: GenerationSettings,
    say: Say,
    round: int | None = None,
    client: int | None = None,
) -> Iterator[Answering]:
    """Load the model of a run for answers.

    Args:
        run: folder of a run, which may be finished, stopped, or running in another process.
        settings: how answers are generated.
        say: called with each step, to show progress.
        round: of the checkpoint; ``None`` as in :func:`~droppeft.runs.export.saved_model`.
        client: whose model is loaded; ``None`` for the global one.

    Raises:
        DroppeftError: as :func:`~droppeft.runs.export.export_run`, or the run's model does not
            generate text.
    """
    run = run.resolve()
    config, checkpoint = saved_model(run, round, client)
    if not task_named(config.task).generates:
        raise DroppeftError(
            f"{run}: its model was trained for task={config.task} and does not generate text; "
            "name a run of task=causal_lm"
        )
    source = load_source(run, config, checkpoint, client, False, say)
    attach_model(source.client_model, source.model)
    model, tokenizer = source.client_model.model, source.backbone.tokenizer
    positions = source.backbone.max_length
    answering = Answering(model, tokenizer, positions, GenerationSettings(), source.round)
    with base_delta_applied(model, source.model.base_delta):
        yield answering.with_settings(settings)
