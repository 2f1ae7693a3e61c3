"""Measure what a step takes on this machine at several drop rates, each in fresh processes.

Ours. The rates alternate, so that other load of the machine affects all of them alike.
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
class RateProfile:
    """What was measured at one drop rate.

    Attributes:
        rate: mean drop rate over the layers after the frozen ones.
        timed_runs: profile runs that measured time, with torch and malloc as in a real run.
        memory_run: the profile run that measured memory; freed memory was returned at once.
    """

    rate: float
    timed_runs: tuple[ProfileRun, ...]
    memory_run: ProfileRun

    @property
    def step_s(self) -> float:
        """Median over the timed runs."""
        return statistics.median(run.step_s for run in self.timed_runs)

    @property
    def step_quartiles_s(self) -> tuple[float, float]:
        """Lower and upper quartile over the timed runs."""
        times = [run.step_s for run in self.timed_runs]
        if len(times) == 1:
            return times[0], times[0]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high

    @property
    def trained(self) -> float:
        """Blocks that a step trained, mean over the timed runs."""
        return statistics.fmean(run.trained for run in self.timed_runs)

    @property
    def activation_bytes_peak(self) -> int:
        """Largest number of bytes that a step stored for the backward."""
        return max(run.activation_bytes_peak for run in (*self.timed_runs, self.memory_run))

    @property
    def used_bytes(self) -> int:
        """Peak memory in use. On a CPU it includes the process."""
        return self.memory_run.peak_bytes

    @property
    def resident_bytes(self) -> int:
        """Peak memory as in a real run, freed memory that malloc keeps included."""
        return max(run.peak_bytes for run in self.timed_runs)

    @property
    def step_j(self) -> float | None:
        """Median energy of a step; ``None`` where the hardware does not report it."""
        energies = [run.step_j for run in self.timed_runs if run.step_j is not None]
        return statistics.median(energies) if energies else None


def at_rate(config: Config, rate: float) -> Config:
    """The configuration with another mean drop rate."""
    if not 0 <= rate <= 1:
        raise DroppeftError(f"a rate of {rate:g} is impossible; it must lie between 0 and 1")
    chosen = config.dropout.model_copy(update={"mean": rate, "count": None, "rates": None})
    return config.model_copy(update={"dropout": chosen})


def profile(
    config: Config, rates: Sequence[float], repeats: int, steps: int, run_done: Callable[[], None]
) -> list[RateProfile]:
    """Measure a step at each rate.

    Args:
        config: resolved.
        rates: mean drop rates over the layers after the frozen ones.
        repeats: profile runs per rate that measure time; one more measures memory.
        steps: of each profile run.
        run_done: called after each profile run.

    Raises:
        DroppeftError: a rate cannot run, which is checked before the first run, or a run failed.
    """
    configs = {rate: at_rate(config, rate) for rate in rates}
    for each in configs.values():
        check_runnable(each)
    runs: dict[float, list[ProfileRun]] = {rate: [] for rate in configs}
    for release_memory in (True, *[False] * repeats):
        for rate, of_rate in runs.items():
            of_rate.append(in_fresh_process(configs[rate], steps, release_memory=release_memory))
            run_done()
    return [RateProfile(rate, tuple(timed), memory) for rate, (memory, *timed) in runs.items()]


def in_fresh_process(config: Config, steps: int, *, release_memory: bool) -> ProfileRun:
    """Call :func:`~droppeft.resources.profile_run.run_steps` in a fresh process.

    Where the system supports it, it is forked from a process that has only loaded the libraries.

    Raises:
        DroppeftError: the profile run failed, or the process died.
    """
    context: Any = multiprocessing.get_context(_start_method())
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_run, args=(sender, config, steps, release_memory), daemon=True
    )
    process.start()
    sender.close()
    result: ProfileRun | str | None = None
    try:
        result = receiver.recv()
    except EOFError:
        pass
    finally:
        if result is None:
            process.terminate()
        process.join()
    if isinstance(result, str):
        raise DroppeftError(result)
    if result is None:
        raise DroppeftError(
            f"the process that measured rate {config.dropout.mean:g} died (exit code "
            f"{process.exitcode}), probably for lack of memory; lower training.batch_size or "
            "training.max_length"
        )
    return result


def _start_method() -> str:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["droppeft.resources.profile_run"])
    return "forkserver"


def _send_run(sender: Connection, config: Config, steps: int, release_memory: bool) -> None:
    """Send a ProfileRun, or the error message."""
    try:
        sender.send(run_steps(config, steps, release_memory=release_memory))
    except (DroppeftError, MemoryError, RuntimeError) as error:
        sender.send(str(error).strip().partition("\n")[0] or "there is not enough memory")
    except KeyboardInterrupt:
        sender.close()  # the parent process reports it
