"""Measure what a step takes on this machine, rate by rate, each trial in a fresh process.

Ours. Rates take turns, so that all meet the same states of a machine that does other things too.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.resources.model_shape import check_runnable
from droppeft.resources.profile_run import ProfileRun, run_steps


@dataclass(frozen=True)
class Measured:
    """What was found at one rate.

    Attributes:
        rate: mean drop rate over all layers behind the frozen ones.
        trials: that measured time; torch and malloc as in a run.
        frugal: the one that measured memory; freed memory went back at once.
    """

    rate: float
    trials: tuple[ProfileRun, ...]
    frugal: ProfileRun

    @property
    def step_s(self) -> float:
        """Median over the trials."""
        return statistics.median(trial.step_s for trial in self.trials)

    @property
    def step_quartiles_s(self) -> tuple[float, float]:
        """Lower and upper quartile over the trials."""
        times = [trial.step_s for trial in self.trials]
        if len(times) == 1:
            return times[0], times[0]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high

    @property
    def executed(self) -> float:
        """Blocks that ran in a step, mean over all trials."""
        return statistics.fmean(trial.executed for trial in self.trials)

    @property
    def activation_bytes_peak(self) -> int:
        """Most that any step stored."""
        return max(trial.activation_bytes_peak for trial in (*self.trials, self.frugal))

    @property
    def used_bytes(self) -> int:
        """Peak memory in use, the process included where it is resident memory."""
        return self.frugal.peak_bytes

    @property
    def resident_bytes(self) -> int:
        """Peak memory as a run has it, with what malloc does not give back: the largest trial."""
        return max(trial.peak_bytes for trial in self.trials)

    @property
    def step_j(self) -> float | None:
        """Median energy over the trials, ``None`` where the hardware does not report it."""
        found = [trial.step_j for trial in self.trials if trial.step_j is not None]
        return statistics.median(found) if found else None


def at_rate(config: Config, rate: float) -> Config:
    """The configuration with another mean rate."""
    if not 0 <= rate <= 1:
        raise DroppeftError(f"a rate of {rate:g} is impossible; it must lie between 0 and 1")
    chosen = config.dropout.model_copy(update={"mean": rate, "count": None, "rates": None})
    return config.model_copy(update={"dropout": chosen})


def profile(
    config: Config, rates: Sequence[float], repeats: int, steps: int, trial_done: Callable[[], None]
) -> list[Measured]:
    """Measure a step at each rate.

    Args:
        config: resolved.
        rates: mean drop rates over the layers behind the frozen ones.
        repeats: trials per rate that measure time; one more measures memory.
        steps: of each.
        trial_done: called after each trial.

    Raises:
        DroppeftError: a trial cannot be made, which is found before the first, or failed.
    """
    at = {rate: at_rate(config, rate) for rate in rates}
    for one in at.values():
        check_runnable(one)
    found: dict[float, list[ProfileRun]] = {rate: [] for rate in at}
    for frugal in (True, *[False] * repeats):
        for rate, trials in found.items():
            trials.append(in_fresh_process(at[rate], steps, frugal=frugal))
            trial_done()
    return [Measured(rate, tuple(trials[1:]), trials[0]) for rate, trials in found.items()]


def in_fresh_process(config: Config, steps: int, *, frugal: bool) -> ProfileRun:
    """:func:`~droppeft.resources.profile_run.run_steps` in a process that has done nothing else.

    It is forked from one that has loaded the libraries and no more, where the system can do that.

    Raises:
        DroppeftError: as the trial did, or because the process died.
    """
    context: Any = multiprocessing.get_context(_start_method())
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, config, steps, frugal), daemon=True)
    process.start()
    sender.close()
    answer: ProfileRun | str | None = None
    try:
        answer = receiver.recv()
    except EOFError:
        pass
    finally:
        if answer is None:
            process.terminate()
        process.join()
    if isinstance(answer, str):
        raise DroppeftError(answer)
    if answer is None:
        raise DroppeftError(
            f"the process that measured rate {config.dropout.mean:g} died (exit code "
            f"{process.exitcode}), probably for want of memory; lower training.batch_size or "
            "training.max_length"
        )
    return answer


def _start_method() -> str:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["droppeft.resources.profile_run"])
    return "forkserver"


def _answer(sender: Connection, config: Config, steps: int, frugal: bool) -> None:
    """Send a ProfileRun, or the sentence with which it failed."""
    try:
        sender.send(run_steps(config, steps, frugal=frugal))
    except (DroppeftError, MemoryError, RuntimeError) as error:
        sender.send(str(error).strip().partition("\n")[0] or "there is not enough memory")
    except KeyboardInterrupt:
        sender.close()  # the parent says it
