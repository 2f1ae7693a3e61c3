"""One client, which runs the server's instructions on its own rows; the same on every transport."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors
from droppeft.client.client_model import ClientModel
from droppeft.client.client_state import StateLost, client_folder, load_tensors, save_tensors
from droppeft.client.layer_scoring import LayerChoice, score_layers
from droppeft.client.local_training import reads, train_locally
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.messages import (
    AdapterSpec,
    CachedLayersCost,
    Failure,
    Instruction,
    LayerKey,
    LocalTraining,
    MeasuredCost,
    Measurement,
    Objective,
    Reply,
    Tensors,
    Update,
    flatten,
    restrict,
)
from droppeft.training.loop import Evaluation, Step, TrainOutcome, evaluate, train


@dataclass(frozen=True)
class Client:
    """A client as one process runs it; all that it does follows from the instruction it is given.

    Attributes:
        model: the frozen model of the process. Clients that run one after another share it; it is
            left with the values of the last one.
        table: the tokenised rows that ``rows`` points into.
        rows: this client's own.
    """

    model: ClientModel
    table: TokenTable
    rows: ClientRows

    def run(self, instruction: Instruction) -> Reply:
        """Do what an instruction asks for: train, or measure.

        Raises:
            DroppeftError: an instruction that does not fit this client or model, or tensors that
                cannot be saved.
        """
        try:
            return self.measure(instruction) if instruction.measure else self.train(instruction)
        except StateLost as error:
            return Failure(instruction.client, str(error), lost=True)

    def measure(self, instruction: Instruction) -> Measurement:
        """Measure this client's model at full depth on test rows, on which it never trains.

        With a budget of epochs: what the model would be after so many epochs of training on this
        client's rows. Nothing of that training is saved but the states behind frozen layers.

        Raises:
            DroppeftError: as :meth:`run`.
            StateLost: what this client saved is not there any more.
        """
        parameters = self._load(instruction)
        self.model.load_layers()
        with base_delta_applied(self.model.model, instruction.base_delta):
            if instruction.budget.epochs:
                train_locally(self.model, parameters, self.table, self.rows, instruction)
            found = self._evaluate(self.rows.test, instruction.training)
        return Measurement(
            instruction.round,
            instruction.client,
            instruction.nonce,
            found.rows,
            found.accuracy,
            found.loss,
        )

    def train(self, instruction: Instruction) -> Update:
        """Load, train, score the layers, save what stays here, and pack what may travel.

        Raises:
            DroppeftError: as :meth:`run`.
            StateLost: what this client saved is not there any more.
        """
        start = time.perf_counter()
        parameters = self._load(instruction)
        if instruction.base_delta is not None:
            self.model.load_layers()  # what is added to is then where it will be used

        def measure(count: int) -> Evaluation:
            return self._evaluate(self.rows.validation[:count], instruction.training)

        with base_delta_applied(self.model.model, instruction.base_delta):
            start_values = get_tensors(parameters) if reads(instruction) == "start" else {}
            before = measure(instruction.reward_rows) if instruction.reward_rows else None
            outcome, cached = train_locally(
                self.model, parameters, self.table, self.rows, instruction
            )
            after = measure(instruction.reward_rows) if instruction.reward_rows else None
            scored = score_layers(
                self.model, parameters, instruction, outcome, start_values, measure
            )
        personal = _names_of(self.model.parameters, scored.personal if scored else ())
        tensors = _trained_and_shared(parameters, instruction, personal, outcome)
        self._save_the_rest(parameters, instruction, personal)
        own = self._train_personal_adapter(parameters, instruction)
        cost = _cost(outcome, cached, (before, after), scored, own)
        return Update(
            round=instruction.round,
            client=instruction.client,
            nonce=instruction.nonce,
            tensors=tensors,
            examples=outcome.examples,
            steps=outcome.steps,
            active_steps=outcome.active_steps,
            importance=outcome.importance,
            train_loss=outcome.loss,
            reward=before.loss - after.loss if before and after else None,
            cost=replace(cost, total_wall_s=time.perf_counter() - start),
            shared=scored.shared if scored else None,
            scores=scored.scores if scored else None,
        )

    def _load(self, instruction: Instruction) -> Parameters:
        """Set all values that training begins with; return the parameters that it trains.

        Raises:
            DroppeftError: a tensor is to be trained and nobody has a value for it.
        """
        model = self.model
        model.attach(instruction.adapter)
        fresh = model.fresh_tensors(instruction.adapter)
        sent = {name for _, name, _ in flatten(instruction.tensors)}
        missing = frozenset(name for _, name, _ in flatten(fresh)) - sent
        saved = _saved(instruction, missing)
        here = {name for _, name, _ in flatten(saved)}
        needed = (missing if instruction.train is None else missing & instruction.train) - here
        if needed:
            raise DroppeftError(
                f"round {instruction.round}, client {instruction.client}: the instruction lacks "
                f"{min(needed)}, and this client has not saved it"
            )
        set_tensors(model.parameters, instruction.tensors)
        set_tensors(model.parameters, saved)
        set_tensors(model.parameters, restrict(fresh, missing - here))
        return _trained_parameters(model.parameters, instruction)

    def _save_the_rest(
        self, parameters: Parameters, instruction: Instruction, personal: frozenset[str]
    ) -> None:
        """Save all that was to be trained and may not travel, and whole layers that are not shared.

        Args:
            parameters: those that were to be trained.
            personal: names of the layers that are not shared, whether they were trained or not.
        """
        trained = frozenset(name for named in parameters.values() for name in named)
        names = (trained - instruction.share) | personal
        if names:
            tensors = restrict(get_tensors(self.model.parameters), names)
            save_tensors(
                client_folder(instruction.run, instruction.client),
                instruction.round,
                instruction.state_round,
                tensors,
            )

    def _train_personal_adapter(
        self, parameters: Parameters, instruction: Instruction
    ) -> TrainOutcome | None:
        """Train a whole adapter of this client's own on the same batches, and save it."""
        if instruction.personal_adapter is None:
            return None
        folder = client_folder(instruction.run, instruction.client)
        own = (
            instruction.tensors
            if instruction.state_round is None
            else load_tensors(folder, instruction.state_round)
        )
        set_tensors(self.model.parameters, own)
        alone = replace(
            instruction, objective=Objective(proximal=instruction.personal_adapter), sharing=None
        )
        with base_delta_applied(self.model.model, instruction.base_delta):
            outcome, _ = train_locally(
                self.model, parameters, self.table, self.rows, alone, anchors=instruction.tensors
            )
        save_tensors(
            folder, instruction.round, instruction.state_round, get_tensors(self.model.parameters)
        )
        return outcome

    def _evaluate(self, rows: Rows, settings: LocalTraining) -> Evaluation:
        """Measure at full depth on some of this client's rows."""
        self.model.load_layers()
        return evaluate(
            self.model.model,
            self.table,
            rows,
            self.model.task,
            settings.evaluation_batch_size,
            settings.precision,
        )


def rehearse(
    model: ClientModel, table: TokenTable, settings: LocalTraining, spec: AdapterSpec
) -> None:
    """Take a step that moves nothing, where settings ask for more than every model and adapter can.

    Some adapters answer in fp32 where a model counts on what autocast makes: DeBERTa-v2 then fails.

    Args:
        model: left with whatever values it has.
        table: the rows of the step are its first ones.

    Raises:
        DroppeftError: the step failed; with what to set.
    """
    if settings.precision == "fp32" and not settings.checkpointing:
        return
    model.attach(spec)
    model.load_layers()
    batch = model.task.collate(table, np.arange(min(2, len(table))))
    step = Step(batch, (True,) * model.num_layers, rate_factor=0.0)
    try:
        with torch.random.fork_rng():
            train(model.trainable(model.parameters), [step], settings)
    except RuntimeError as error:
        kind = next(layer.type for layer in spec.layers if layer)
        checkpointing = str(settings.checkpointing).lower()
        raise DroppeftError(
            f"adapter.type={kind} on this model cannot be trained with "
            f"training.precision={settings.precision} and training.checkpointing={checkpointing} "
            f"({str(error).strip().partition(chr(10))[0]}); use fp32 and false, or another type"
        ) from None


def _trained_parameters(parameters: Parameters, instruction: Instruction) -> Parameters:
    """Those that the instruction trains; they alone have gradients from now on."""
    trained: dict[LayerKey, dict[str, nn.Parameter]] = {}
    for key, named in parameters.items():
        for name, value in named.items():
            value.requires_grad_(instruction.train is None or name in instruction.train)
            if value.requires_grad:
                trained.setdefault(key, {})[name] = value
    return trained


def _saved(instruction: Instruction, missing: frozenset[str]) -> Tensors:
    """Of what this client has saved, the tensors that the instruction does not bring."""
    if instruction.state_round is None:
        return {}
    return restrict(
        load_tensors(client_folder(instruction.run, instruction.client), instruction.state_round),
        missing,
    )


def _names_of(parameters: Parameters, layers: Collection[LayerKey]) -> frozenset[str]:
    return frozenset(name for key in layers for name in parameters.get(key, {}))


def _trained_and_shared(
    parameters: Parameters,
    instruction: Instruction,
    personal: frozenset[str],
    outcome: TrainOutcome,
) -> Tensors:
    """What travels: tensors that instruction and client let go, of layers that ran at least
    once.
    """
    trained = {
        key: named
        for key, named in parameters.items()
        if not isinstance(key, int) or outcome.active_steps[key] > 0
    }
    return restrict(get_tensors(trained), instruction.share - personal)


def _cost(
    outcome: TrainOutcome,
    cached: CachedLayersCost,
    rewards: Sequence[Evaluation | None],
    scored: LayerChoice | None,
    own: TrainOutcome | None,
) -> MeasuredCost:
    """What the parts took; the whole, ``total_wall_s``, is filled in by who knows it."""
    measured = [one for one in rewards if one]
    return MeasuredCost(
        total_wall_s=0.0,
        train_wall_s=outcome.wall_s,
        reward_wall_s=sum(one.wall_s for one in measured),
        activation_bytes_peak=outcome.activation_bytes_peak,
        tokens=outcome.tokens,
        rows=outcome.rows,
        layer_tokens=outcome.layer_tokens,
        reward_tokens=sum(one.tokens for one in measured),
        cached_layers=cached,
        scoring_tokens=scored.tokens if scored else 0,
        scoring_wall_s=scored.wall_s if scored else 0.0,
        personal_steps=own.steps if own else 0,
        personal_tokens=own.tokens if own else 0,
        personal_wall_s=own.wall_s if own else 0.0,
    )
