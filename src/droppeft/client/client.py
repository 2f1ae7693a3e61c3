"""The client: runs the server's instructions on its own rows, the same on every transport."""

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors
from droppeft.client.client_model import ClientModel
from droppeft.client.client_state import (
    Saved,
    client_folder,
    load_saved,
    load_tensors,
    save_tensors,
)
from droppeft.client.kept_tensors import Kept, read_kept, remember_kept
from droppeft.client.layer_scoring import LayerChoice, score_layers
from droppeft.client.local_training import train_locally
from droppeft.client.rounding_errors import encoded_update, load_errors, save_errors
from droppeft.client.site_rules import SiteRules
from droppeft.data.conversations import ConversationTable, prompts_and_references
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.messages.encoding import decode_tensors
from droppeft.messages.instruction import Instruction, LocalTraining, Objective
from droppeft.messages.reply import Answer, CachedLayersCost, EvaluationReply, MeasuredCost, Update
from droppeft.messages.tensors import (
    OTHER,
    LayerKey,
    Tensors,
    flatten,
    payload_bytes,
    restrict,
)
from droppeft.refusals import Refused
from droppeft.sharing.criteria import CRITERIA
from droppeft.tasks.generation import GenerationSettings, complete_prompts
from droppeft.tasks.text_metrics import text_scores
from droppeft.training.deadline import Deadline
from droppeft.training.loop import Evaluation, TrainOutcome, evaluate


@dataclass(frozen=True)
class Client:
    """A client, in the process that runs it.

    All that a client does follows from the instruction that it is given.

    Attributes:
        model: the frozen model of the process, which all its clients share. After a run it holds
            the adapter values of the client that ran last.
        table: tokenised rows.
        rows: indices of this client's rows in ``table``.
        texts: the same rows before they were tokenised, for a task that generates.
        rules: what a site allows; ``None`` for a client of a simulation, which has no site.
    """

    model: ClientModel
    table: TokenRows
    rows: ClientRows
    texts: ConversationTable | None = None
    rules: SiteRules | None = None

    def run(self, instruction: Instruction) -> Answer:
        """Run an instruction: train, or only evaluate if ``instruction.evaluate_only`` is set.

        Raises:
            Refused: this client has lost its saved state, or is asked for what it does not do.
            DroppeftError: the instruction does not fit this client or its model, or tensors
                cannot be saved.
        """
        if self.rules is not None:
            instruction = self.rules.allowed(instruction, self.model, self.rows, self.table.lengths)
        instruction = self._decoded(instruction)
        return self.measure(instruction) if instruction.evaluate_only else self.train(instruction)

    def measure(self, instruction: Instruction) -> EvaluationReply:
        """Evaluate this client's model on its test or validation rows, with all layers.

        If the instruction asks for it, the model also completes prompts of these rows.

        Raises:
            DroppeftError: as :meth:`run`.
        """
        self._load(instruction, Kept())
        self.model.load_layers()
        with base_delta_applied(self.model.model, instruction.base_delta):
            asked = instruction.validation_rows
            rows = self.rows.validation[:asked] if asked else self.rows.test
            quality = self._evaluate(rows, instruction.training)
            texts, scores = self._generate(instruction)
        return EvaluationReply(
            instruction.round,
            instruction.client,
            instruction.nonce,
            quality.rows,
            {**quality.metrics, **scores},
            texts,
        )

    def train(self, instruction: Instruction) -> Update:
        """Load tensors, train, score layers, save what stays here, and return what is shared.

        Raises:
            DroppeftError: as :meth:`run`.
        """
        start = time.perf_counter()
        kept = read_kept(instruction.run, instruction.client)
        deadline = self.rules.deadline(start) if self.rules else None
        parameters = self._load(instruction, kept)
        if instruction.base_delta is not None:
            self.model.load_layers()  # the delta is added to weights that must be in memory

        def measure(count: int) -> Evaluation:
            return self._evaluate(self.rows.validation[:count], instruction.training)

        with base_delta_applied(self.model.model, instruction.base_delta):
            rule = instruction.sharing
            needs_start = rule is not None and CRITERIA[rule.criterion].needs_start
            start_values = get_tensors(parameters) if needs_start else {}
            before = measure(instruction.reward_rows) if instruction.reward_rows else None
            outcome, cached = train_locally(
                self.model, parameters, self.table, self.rows, instruction, deadline=deadline
            )
            after = measure(instruction.reward_rows) if instruction.reward_rows else None
            scored = score_layers(
                self.model, parameters, instruction, outcome, start_values, measure
            )
        personal = _names_of(self.model.parameters, scored.personal if scored else ())
        trained = _trained_and_shared(parameters, instruction, personal, outcome)
        tensors = self._encoded(instruction, trained)
        remember_kept(instruction, _all_names(parameters), personal)
        self._save_the_rest(parameters, instruction, personal)
        personal_outcome = self._train_personal_adapter(parameters, instruction, deadline)
        cost = _cost(outcome, cached, (before, after), scored, personal_outcome)
        return Update(
            round=instruction.round,
            client=instruction.client,
            nonce=instruction.nonce,
            tensors=tensors,
            examples=outcome.examples,
            targets=outcome.targets,
            steps=outcome.steps,
            active_steps=outcome.active_steps,
            importance=outcome.importance,
            train_loss=outcome.loss,
            reward=before.loss - after.loss if before and after else None,
            cost=replace(cost, total_wall_s=time.perf_counter() - start),
            shared=scored.shared if scored else None,
            scores=scored.scores if scored else None,
        )

    def _decoded(self, instruction: Instruction) -> Instruction:
        """Return the instruction with fp32 values.

        Raises:
            Refused: its tensors are not encoded as it says.
        """
        if instruction.encoding == "fp32":
            return instruction
        layout = self.model.layout(instruction.adapter)
        try:
            tensors = decode_tensors(instruction.tensors, instruction.encoding, layout)
        except ValueError as error:
            raise Refused("impossible") from error
        return replace(instruction, tensors=tensors)

    def _encoded(self, instruction: Instruction, trained: Tensors) -> Tensors:
        """Encode the tensors to be sent, and save what rounding them loses."""
        if instruction.encoding == "fp32":
            return trained
        run, client, round = instruction.run, instruction.client, instruction.round
        tensors, errors = encoded_update(instruction, trained, load_errors(run, client, round))
        if self.rules is not None:
            self.rules.check_room(client, payload_bytes({OTHER: errors}))
        save_errors(run, client, round, errors)
        return tensors

    def _load(self, instruction: Instruction, kept: Kept) -> Parameters:
        """Set the values that training begins with, and return the parameters that are trained.

        A value comes from the instruction, else from this client's saved state, else from the
        seed.

        Raises:
            Refused: the instruction asks for a tensor that this client keeps.
            DroppeftError: a tensor that is to be trained has neither been sent nor saved.
        """
        model = self.model
        model.attach(instruction.adapter)
        fresh = model.fresh_tensors(instruction.adapter)
        sent = {name for _, name, _ in flatten(instruction.tensors)}
        missing = frozenset(name for _, name, _ in flatten(fresh)) - sent
        found = _saved(instruction)
        saved = restrict(found.tensors, missing)
        saved_names = {name for _, name, _ in flatten(saved)}
        trained = missing if instruction.train is None else missing & instruction.train
        needed = trained - saved_names
        if needed:
            raise DroppeftError(
                f"round {instruction.round}, client {instruction.client}: the instruction lacks "
                f"{min(needed)}, and this client has not saved it"
            )
        set_tensors(model.parameters, instruction.tensors)
        set_tensors(model.parameters, saved)
        set_tensors(model.parameters, restrict(fresh, missing - saved_names))
        parameters = _trained_parameters(model.parameters, instruction)
        if not instruction.evaluate_only:
            kept.check(instruction, _all_names(parameters), saved_names, found.chosen)
            if self.rules is not None:
                self.rules.check_sent(instruction, parameters)
        return parameters

    def _save_the_rest(
        self, parameters: Parameters, instruction: Instruction, personal: frozenset[str]
    ) -> None:
        """Save the trained tensors that must not be sent, and all tensors of personal layers.

        Args:
            parameters: the parameters that the instruction trains.
            personal: names of the tensors of personal layers, trained or not.
        """
        names = (_all_names(parameters) - instruction.share) | personal
        if names:
            self._save(instruction, restrict(get_tensors(self.model.parameters), names), personal)

    def _save(
        self, instruction: Instruction, tensors: Tensors, chosen: frozenset[str] = frozenset()
    ) -> None:
        if self.rules is not None:
            self.rules.check_room(instruction.client, payload_bytes(tensors))
        folder = client_folder(instruction.run, instruction.client)
        save_tensors(folder, instruction.round, instruction.state_round, tensors, chosen)

    def _train_personal_adapter(
        self, parameters: Parameters, instruction: Instruction, deadline: Deadline | None
    ) -> TrainOutcome | None:
        """Train this client's personal adapter, if any, on the same batches, and save it."""
        if instruction.personal_adapter is None:
            return None
        folder = client_folder(instruction.run, instruction.client)
        start_values = (
            instruction.tensors
            if instruction.state_round is None
            else load_tensors(folder, instruction.state_round)
        )
        set_tensors(self.model.parameters, start_values)
        personal_instruction = replace(
            instruction, objective=Objective(proximal=instruction.personal_adapter), sharing=None
        )
        with base_delta_applied(self.model.model, instruction.base_delta):
            outcome, _ = train_locally(
                self.model,
                parameters,
                self.table,
                self.rows,
                personal_instruction,
                anchors=instruction.tensors,
                deadline=deadline,
            )
        self._save(instruction, get_tensors(self.model.parameters))
        return outcome

    def _generate(self, instruction: Instruction) -> tuple[int, dict[str, float]]:
        """Complete prompts of test rows; return the number of texts, and their scores if any."""
        asked = instruction.generation
        if asked is None:
            return 0, {}
        if self.texts is None:
            raise DroppeftError(
                f"client {instruction.client} is asked for texts, but its task generates none; set "
                "evaluation.personalised_generated=0"
            )
        prompts, references = prompts_and_references(self.texts, self.rows.test, asked.rows)
        if not prompts:
            return 0, {}
        settings = GenerationSettings(
            max_new_tokens=asked.max_new_tokens,
            batch_size=instruction.training.evaluation_batch_size,
        )
        found = complete_prompts(
            self.model.model, self.model.tokenizer, prompts, asked.max_length, settings
        )
        return len(found), asdict(text_scores(found, references))

    def _evaluate(self, rows: Rows, settings: LocalTraining) -> Evaluation:
        """Evaluate the model, with all layers, on some of this client's rows."""
        self.model.load_layers()
        return evaluate(
            self.model.model,
            self.table,
            rows,
            self.model.task,
            settings.evaluation_batch_size,
            settings.precision,
        )


def _trained_parameters(parameters: Parameters, instruction: Instruction) -> Parameters:
    """Return the parameters that the instruction trains; only they require a gradient."""
    trained: dict[LayerKey, dict[str, nn.Parameter]] = {}
    for key, named in parameters.items():
        for name, value in named.items():
            value.requires_grad_(instruction.train is None or name in instruction.train)
            if value.requires_grad:
                trained.setdefault(key, {})[name] = value
    return trained


def _saved(instruction: Instruction) -> Saved:
    """Load this client's saved state that the instruction names, if it names any."""
    if instruction.state_round is None:
        return Saved({})
    return load_saved(client_folder(instruction.run, instruction.client), instruction.state_round)


def _all_names(parameters: Parameters) -> frozenset[str]:
    return frozenset(name for named in parameters.values() for name in named)


def _names_of(parameters: Parameters, layers: Collection[LayerKey]) -> frozenset[str]:
    return frozenset(name for key in layers for name in parameters.get(key, {}))


def _trained_and_shared(
    parameters: Parameters,
    instruction: Instruction,
    personal: frozenset[str],
    outcome: TrainOutcome,
) -> Tensors:
    """Return the tensors to send: those that the instruction lets travel, of layers that ran.

    Args:
        personal: names of the tensors that the client does not share.
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
    personal: TrainOutcome | None,
) -> MeasuredCost:
    """Return the cost of the parts; the caller fills in ``total_wall_s``."""
    evaluations = [evaluation for evaluation in rewards if evaluation]
    return MeasuredCost(
        total_wall_s=0.0,
        train_wall_s=outcome.wall_s,
        reward_wall_s=sum(evaluation.wall_s for evaluation in evaluations),
        activation_bytes_peak=outcome.activation_bytes_peak,
        tokens=outcome.tokens,
        rows=outcome.rows,
        layer_tokens=outcome.layer_tokens,
        forward_tokens=outcome.forward_tokens,
        reward_tokens=sum(evaluation.tokens for evaluation in evaluations),
        cached_layers=cached,
        scoring_tokens=scored.tokens if scored else 0,
        scoring_wall_s=scored.wall_s if scored else 0.0,
        personal_steps=personal.steps if personal else 0,
        personal_tokens=personal.tokens if personal else 0,
        personal_wall_s=personal.wall_s if personal else 0.0,
    )
