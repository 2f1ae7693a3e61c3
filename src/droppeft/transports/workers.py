"""The transport that runs several clients at a time, in processes forked from the server's. Ours.

They share the frozen weights and the tokenised rows, which nobody writes to. A client does the same
work in any of them, and different clients have different files, so that no result depends on the
number of processes.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch

from droppeft.client.global_model import attached
from droppeft.client.run_inputs import Loaded
from droppeft.data.conversations import Message
from droppeft.data.texts import Rows
from droppeft.data.tokens import ordered_batches
from droppeft.errors import DroppeftError
from droppeft.layer_dropout.modes import Mode
from droppeft.messages.instruction import Instruction, modes_of
from droppeft.messages.server_state import GlobalModel
from droppeft.tasks.generation import GenerationSettings, complete_prompts
from droppeft.tasks.task import BatchResult
from droppeft.training.loop import Evaluation, evaluate_batches
from droppeft.transports.base import Arrival
from droppeft.transports.forked_processes import Call, ForkedProcesses, ProcessLost
from droppeft.transports.in_process import InProcess

THREADS_S = 20.0
"""Seconds in which a process must have used its threads once; it takes milliseconds."""


class Workers:
    """Processes that run clients, and share the work of evaluating a global model.

    Args:
        loaded: data and model of the run.
        inner: runs a client in the process that calls it.
        count: number of processes.

    Raises:
        DroppeftError: they could not be forked.
    """

    def __init__(self, loaded: Loaded, inner: InProcess, count: int) -> None:
        self._loaded, self._inner = loaded, inner
        functions: dict[str, Callable[..., Any]] = {
            "client": inner.reply,
            "evaluate": self._evaluate_here,
            "complete": self._complete_here,
            "threads": _use_threads,
        }
        assert len(loaded.test)  # tokenised here once, and not in every process
        try:
            self._processes = ForkedProcesses(count, functions, self._begin)
        except OSError as error:
            raise DroppeftError(
                f"{count} workers could not be started ({error.strerror}); set workers=1"
            ) from None
        if loaded.config.threads > 1:
            self._check_threads(count)

    def _check_threads(self, count: int) -> None:
        """Check that the processes can use several threads.

        They cannot if this process has used several before, as a Python program may have: they then
        wait for threads that only this process has.
        """
        try:
            list(self._processes.run([("threads", ())] * count, THREADS_S))
        except TimeoutError:
            raise DroppeftError(
                f"threads={self._loaded.config.threads} does not work in several workers, because "
                "torch has used several threads in this process before; set threads=1 or workers=1"
            ) from None

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Run each client in the next free process, and yield replies as they come.

        Clients that take longest begin first, so that the processes finish together.

        Raises:
            DroppeftError: a process was killed; the run cannot go on.
        """
        order = sorted(
            range(len(instructions)), key=lambda index: -self._rows_to_run(instructions[index])
        )
        calls: list[Call] = [("client", (instructions[index],)) for index in order]
        for number, reply in self._run(calls, [f"client {instructions[i].client}" for i in order]):
            yield Arrival(order[number], reply)

    def evaluate(self, model: GlobalModel, rows: Rows) -> Evaluation:
        """Evaluate a global model on test rows, with the batches that one process would have."""
        start = time.perf_counter()
        table, config = self._loaded.test, self._loaded.config
        batches = ordered_batches(rows, table.lengths, config.evaluation.batch_size)
        parts = min(len(self._processes), len(batches))
        calls: list[Call] = [("evaluate", (model, batches[part::parts])) for part in range(parts)]
        results: list[Any] = [None] * len(batches)
        tokens = 0
        for part, (found, counted) in self._run(calls, ["an evaluation"] * parts):
            results[part::parts] = found
            tokens += counted
        metrics = self._loaded.model.task.metrics(results)
        judged = tuple(zip(batches, results, strict=True))
        return Evaluation(metrics, len(rows), time.perf_counter() - start, tokens, judged)

    def complete(
        self,
        models: Sequence[GlobalModel],
        prompts: Sequence[Sequence[Message]],
        settings: GenerationSettings,
    ) -> list[list[str]]:
        """Return each model's answers to the same prompts."""
        calls: list[Call] = [("complete", (model, prompts, settings)) for model in models]
        found = dict(self._run(calls, ["generated texts"] * len(models)))
        return [found[index] for index in range(len(models))]

    def _run(self, calls: Sequence[Call], names: Sequence[str]) -> Iterator[tuple[int, Any]]:
        try:
            yield from self._processes.run(calls)
        except ProcessLost as lost:
            memory = ", perhaps because memory ran out" if "SIGKILL" in lost.how else ""
            raise DroppeftError(
                f"the process of {names[lost.call]} was {lost.how}{memory}; complete rounds are "
                "saved: free memory or set fewer workers in the run's config.toml, and resume it"
            ) from None

    def _rows_to_run(self, instruction: Instruction) -> float:
        """About how many rows a client runs, to tell which one takes longest."""
        client = self._inner.clients[instruction.client]
        rows = getattr(client, "rows", None)  # a site that refuses has none
        if rows is None:
            return 0.0
        if instruction.evaluate_only:
            return float(instruction.validation_rows or len(rows.test))
        if instruction.budget.epochs is not None:
            each = float(instruction.budget.epochs * len(rows.train))
        else:
            each = float((instruction.budget.steps or 0) * instruction.training.batch_size)
        shares = modes_of(instruction).shares()
        return each * (3 * fmean(shares[Mode.TRAIN]) + fmean(shares[Mode.FORWARD]))

    # In the forked processes.

    def _begin(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not exist in this process
        torch.set_num_threads(self._loaded.config.threads)

    def _evaluate_here(
        self, model: GlobalModel, batches: Sequence[Rows]
    ) -> tuple[list[BatchResult], int]:
        loaded, table = self._loaded, self._loaded.test
        with attached(loaded.model, model) as whole:
            precision = loaded.config.training.precision
            return evaluate_batches(whole, table, batches, loaded.model.task, precision)

    def _complete_here(
        self,
        model: GlobalModel,
        prompts: Sequence[Sequence[Message]],
        settings: GenerationSettings,
    ) -> list[str]:
        longest = self._loaded.config.training.max_length
        with attached(self._loaded.model, model) as whole:
            return complete_prompts(whole, self._loaded.model.tokenizer, prompts, longest, settings)


def _use_threads() -> None:
    torch.ones(1 << 20).add_(1.0)
