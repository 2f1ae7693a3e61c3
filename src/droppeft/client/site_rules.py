"""What a site lets a server ask for: every instruction is checked before anything runs. Ours.

The limits are those of the site's node file, and some that hold for every site: an honest run is
far below them, and beyond them an instruction could only be a mistake or an attack. What a client
must keep is in :mod:`droppeft.client.kept_tensors`, since it holds without a node file too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from droppeft.adapters.by_layer import Parameters
from droppeft.adapters.settings import check_options_of_server
from droppeft.cached_layers.cached_layers import bytes_of_other_runs
from droppeft.client.client_model import ClientModel
from droppeft.client.client_state import bytes_of_client
from droppeft.client.node_file import Limits, NodeFile, Sending
from droppeft.config import Config
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, Instruction, LocalTraining, checked_run
from droppeft.messages.tensors import HEAD
from droppeft.quantities import counted
from droppeft.refusals import Refused
from droppeft.sharing.criteria import CRITERIA
from droppeft.training.deadline import Deadline

MOST_STEPS = 100_000
"""Most steps of a local training at a site without a limit of its own."""

LEAST_ROWS = 4
"""Fewest rows that an update or a measurement is about, unless the site has fewer: a value for a
single row would tell too much about it."""

MOST_TOKENS = 2**18
"""Most tokens of a batch, padding included, which bound the memory of a step."""

MOST_NEW_TOKENS = 2_048
"""Most tokens of a generated text."""

MOST_STARTS = 1_000
"""Most candidates for the lowest layer that a step trains."""

MOST_RANK, MOST_WIDTH, MOST_VIRTUAL_TOKENS = 1_024, 4_096, 1_024
"""Largest sizes of adapters."""

CHANGES_BACKBONE = frozenset({"flora", "fedex_lora"})
"""Methods whose instructions change the backbone."""

_Bounds = tuple[str, float | None, float, float]
"""Name, value (``None`` if there is none), smallest and largest possible value."""


@dataclass(frozen=True)
class SiteRules:
    """What a site allows.

    Attributes:
        limits: how much a server may ask for.
        send: what may leave beside the adapters' tensors.
    """

    limits: Limits
    send: Sending

    @classmethod
    def of(cls, node: NodeFile) -> "SiteRules":
        """Return the rules of a node file."""
        return cls(node.limits, node.send)

    def allowed(
        self, instruction: Instruction, model: ClientModel, rows: ClientRows, lengths: Rows
    ) -> Instruction:
        """Return the instruction as this site runs it: with as much cache as the site gives.

        Args:
            instruction: from the server.
            model: of this client.
            rows: of this client.
            lengths: tokens of each row of its table, shape (rows,).

        Raises:
            Refused: the site does not run it; the cause says which value is impossible.
        """
        _check_possible(instruction, model.num_layers)
        self._check_measured(instruction, rows)
        self._check_backbone(instruction)
        longest = int(lengths.max())
        training = instruction.training
        _check_memory(training.evaluation_batch_size, len(lengths), longest)
        asked = instruction.generation
        if asked is not None:
            _check_memory(
                training.evaluation_batch_size, asked.rows, asked.max_length + asked.max_new_tokens
            )
        if not instruction.evaluate_only:
            _check_memory(training.rows_at_once, len(rows.train), longest)
            self._check_budget(instruction, len(rows.train))
        return self._with_own_cache(instruction, model)

    def check_sent(self, instruction: Instruction, parameters: Parameters) -> None:
        """Check that the head stays if the site does not send it.

        Args:
            instruction: from the server.
            parameters: that it trains.

        Raises:
            Refused: the head would be sent.
        """
        if not self.send.head and instruction.share.intersection(parameters.get(HEAD, ())):
            raise Refused("head")

    def check_room(self, client: int, new_bytes: int) -> None:
        """Check that tensors may be saved.

        Args:
            client: whose tensors they are.
            new_bytes: of the tensors.

        Raises:
            Refused: the site does not give so much of its disk.
        """
        most = self.limits.disk_mb
        needed = (bytes_of_client(client) + new_bytes) / 1e6
        if most is not None and needed > most:
            raise Refused("disk", needed, most)

    def deadline(self, start: float) -> Deadline | None:
        """Return when a local training must end that began at ``start``."""
        seconds = self.limits.seconds
        return None if seconds is None else Deadline(start, seconds)

    def _check_measured(self, instruction: Instruction, rows: ClientRows) -> None:
        """Check what would be measured on the site's validation and test rows."""
        rule, generation = instruction.sharing, instruction.generation
        measures = (
            instruction.evaluate_only
            or instruction.reward_rows > 0
            or (rule is not None and CRITERIA[rule.criterion].runs_model != "no")
        )
        if measures and not self.send.measurements:
            raise Refused("measurements")
        for asked, most in (
            (instruction.validation_rows, len(rows.validation)),
            (instruction.reward_rows, len(rows.validation)),
            (generation.rows if generation else 0, len(rows.test)),
        ):
            if 0 < asked < min(LEAST_ROWS, most):
                raise Refused("few_measured", asked, LEAST_ROWS)

    def _check_budget(self, instruction: Instruction, rows: int) -> None:
        steps, batch_size = instruction.budget.steps, instruction.training.batch_size
        if steps is None:
            epochs = instruction.budget.epochs or 0
            steps, trained = epochs * math.ceil(rows / batch_size), rows
        else:
            trained = min(steps * batch_size, rows)
        if trained < min(LEAST_ROWS, rows):
            raise Refused("few_trained", trained, LEAST_ROWS)
        both = steps if instruction.personal_adapter is None else 2 * steps
        most = self.limits.steps or MOST_STEPS
        if both > most:
            raise Refused("steps", min(both, 10**12), most)

    def _check_backbone(self, instruction: Instruction) -> None:
        methods = self.limits.methods
        if instruction.base_delta and methods is not None and not CHANGES_BACKBONE & {*methods}:
            raise Refused("backbone")

    def _with_own_cache(self, instruction: Instruction, model: ClientModel) -> Instruction:
        """Lower the limit of the cache to what the site's disk has left beside saved tensors."""
        most, cache = self.limits.disk_mb, instruction.cache
        if most is None or cache is None:
            return instruction
        used = bytes_of_client(instruction.client) + bytes_of_other_runs(
            instruction.run, instruction.client
        )
        room = max(0, int(most * 1e6) - used - 2 * _bytes_of(model, instruction.adapter))
        return replace(instruction, cache=replace(cache, limit_bytes=min(cache.limit_bytes, room)))


def check_run(node: NodeFile, task: str, method: str) -> None:
    """Check that a site takes part in runs of a task with a method.

    Raises:
        Refused: it does not.
    """
    if node.task not in (None, task):
        raise Refused("other_task")
    if node.limits.methods is not None and method not in node.limits.methods:
        raise Refused("method")


def check_least_rows(config: Config) -> None:
    """Refuse settings of a run of sites with which every site would refuse some instruction.

    Args:
        config: of the server.

    Raises:
        DroppeftError: sites would be asked for a measurement or a training on too few rows.
    """
    asked, training = config.evaluation, config.training
    rows = {
        f"evaluation.personalised_generated={asked.personalised_generated}": (
            asked.personalised_generated
        ),
        f"training.local_steps={training.local_steps} with training.batch_size="
        f"{training.batch_size}": (training.local_steps or 0) * training.batch_size,
    }
    if clients := min(asked.validation_clients, config.clients):
        each = math.ceil(asked.rows / clients)
        rows[f"evaluation.rows={asked.rows} for {counted(clients, 'validation client')}"] = each
    for setting, count in rows.items():
        if 0 < count < LEAST_ROWS:
            raise DroppeftError(
                f"{setting} asks each site to use {counted(count, 'row')}, and a site refuses "
                f"fewer than {LEAST_ROWS}; raise it"
            )


def _bytes_of(model: ClientModel, spec: AdapterSpec) -> int:
    """Bytes of all tensors of an adapter."""
    return sum(4 * math.prod(shape) for _, shape in model.layout(spec).values())


def _check_memory(batch_size: int, rows: int, longest: int) -> None:
    tokens = min(batch_size, rows) * longest
    if tokens > MOST_TOKENS:
        raise Refused("memory", min(tokens, 10**12), MOST_TOKENS)


def _check_possible(instruction: Instruction, layers: int) -> None:
    """Check that all values are possible in a run.

    Raises:
        Refused: one is not; the cause names it.
    """
    try:
        checked_run(instruction.run)
        for name, value, least, most in _bounds(instruction, layers):
            if value is not None and not least <= value <= most:
                raise DroppeftError(f"{name}={value} is not between {least} and {most}")
        _check_choices(instruction, layers)
        _check_adapter(instruction.adapter, layers)
    except DroppeftError as error:
        raise Refused("impossible") from error


def _bounds(instruction: Instruction, layers: int) -> Iterator[_Bounds]:
    """Yield what an instruction's numbers may be."""
    many, large = 10**6 - 1, 1e9  # rounds have six digits in names of files
    yield "round", instruction.round, 1, many
    yield "state_round", instruction.state_round, 0, many
    yield "frozen", instruction.frozen, 0, layers
    yield "number of starts", len(instruction.starts), 1, MOST_STARTS
    yield from (("starts", start, 0, layers) for start in instruction.starts)
    yield "reward_rows", instruction.reward_rows, 0, many
    yield "validation_rows", instruction.validation_rows, 0, many
    yield "budget.steps", instruction.budget.steps, 0 if instruction.evaluate_only else 1, 10**12
    yield "budget.epochs", instruction.budget.epochs, 1, 10**9
    yield "personal_adapter", instruction.personal_adapter, 0, large
    yield "objective.proximal", instruction.objective.proximal, 0, large
    yield from _bounds_of_training(instruction.training)
    yield from _bounds_of_parts(instruction, layers)


def _bounds_of_training(training: LocalTraining) -> Iterator[_Bounds]:
    yield "batch_size", training.batch_size, 1, 10**6
    yield "micro_batch_size", training.micro_batch_size, 1, 10**6
    yield "evaluation_batch_size", training.evaluation_batch_size, 1, 10**6
    yield "rounds", training.rounds, 1, 10**9
    yield "learning_rate", training.learning_rate, 0, 1e3
    yield "head_learning_rate", training.head_learning_rate, 0, 1e3
    yield "loraplus_lr_ratio", training.loraplus_lr_ratio, 0, 1e3
    yield "warmup_fraction", training.warmup_fraction, 0, 1
    yield "weight_decay", training.weight_decay, 0, 1e3
    yield "clip_norm", training.clip_norm, 0, 1e12


def _bounds_of_parts(instruction: Instruction, layers: int) -> Iterator[_Bounds]:
    """Of the parts that some instructions have."""
    dropout, rule, asked = instruction.dropout, instruction.sharing, instruction.generation
    penalty = instruction.objective.rank_penalty
    if dropout is not None:
        yield from (("dropout.rates", rate, 0, 1) for rate in dropout.rates)
        yield "number of dropout.rates", len(dropout.rates), layers, layers
        yield "dropout.every", dropout.every, 1, 10**9
    if rule is not None:
        yield "sharing.fraction", rule.fraction, 0, 1
        yield "sharing.hysteresis", rule.hysteresis, 0, 1e9
        yield from (("sharing.shared", layer, 0, layers - 1) for layer in rule.shared or ())
        yield from (("sharing.typical", norm, 0, 1e30) for norm in rule.typical or ())
        yield "sharing.typical", len(rule.typical) if rule.typical else None, layers, layers
    if asked is not None:
        yield "generation.rows", asked.rows, 1, 10**6
        yield "generation.max_length", asked.max_length, 1, MOST_TOKENS
        yield "generation.max_new_tokens", asked.max_new_tokens, 1, MOST_NEW_TOKENS
    if penalty is not None:
        yield "rank_penalty.weight", penalty.weight, 0, 1e9
        yield "rank_penalty.unpenalised", penalty.unpenalised, 0, MOST_RANK


def _check_choices(instruction: Instruction, layers: int) -> None:
    budget, rule = instruction.budget, instruction.sharing
    if (budget.steps is None) == (budget.epochs is None):
        raise DroppeftError("the budget has neither steps nor epochs, or both")
    if rule is not None and rule.criterion not in CRITERIA:
        raise DroppeftError(f"sharing.criterion={rule.criterion} is unknown")


def _check_adapter(spec: AdapterSpec, layers: int) -> None:
    """Check the sizes of an adapter, and that its options name nothing on this machine."""
    if len(spec.layers) != layers:
        raise DroppeftError(f"the adapter is for {len(spec.layers)} layers, the model has {layers}")
    bounds: list[_Bounds] = [
        ("adapter.alpha", spec.alpha, 0, 1e9),
        ("adapter.dropout", spec.dropout, 0, 1),
        ("adapter.tokens", spec.tokens, 1, MOST_VIRTUAL_TOKENS),
    ]
    for layer in {*spec.layers} - {None}:
        if layer is not None:
            bounds.append(("adapter.rank", layer.rank, 1, MOST_RANK))
            bounds.append(("adapter.width", layer.width, 1, MOST_WIDTH))
            check_options_of_server(layer.type, spec.options)
    for name, value, least, most in bounds:
        if value is not None and not least <= value <= most:
            raise DroppeftError(f"{name}={value} is not between {least} and {most}")
