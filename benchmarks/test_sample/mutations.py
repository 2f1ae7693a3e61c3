"""One deliberate error per important behaviour; tests should notice each of them."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """An error to be made in the source.

    Attributes:
        what: the error, in a few words.
        file: the file in ``src/droppeft``.
        old: a text that occurs once in the file.
        new: what takes its place.
        tests: the files in ``tests`` that are about the behaviour.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # Layer dropout
    Mutation(
        "the gate of the next block is used",
        "layer_dropout/blocks.py",
        "if gates._active[self.index]:",
        "if gates._active[(self.index + 1) % len(gates._active)]:",
        ("layer_dropout/test_blocks.py",),
    ),
    Mutation(
        "gates stay after the context",
        "layer_dropout/blocks.py",
        '                del vars(block)["forward"]',
        "                pass",
        ("layer_dropout/test_blocks.py",),
    ),
    Mutation(
        "the blocks of one architecture are said to return a tensor",
        "layer_dropout/architectures.py",
        '_h("GPTNeoBlock", "tuple")',
        '_h("GPTNeoBlock", "tensor")',
        ("layer_dropout/test_architectures.py",),
    ),
    Mutation(
        "a layer is dropped with the probability that it should run",
        "layer_dropout/gates.py",
        "rng.random() >= rate for rate in rates",
        "rng.random() < rate for rate in rates",
        ("layer_dropout/test_gates.py",),
    ),
    Mutation(
        "the last protected layer is dropped",
        "layer_dropout/rates.py",
        "range(num_layers - last, num_layers)",
        "range(num_layers - last + 1, num_layers)",
        ("layer_dropout/test_rates.py",),
    ),
    Mutation(
        "layers are dropped in evaluation too",
        "layer_dropout/dropout.py",
        "trains = block.training and torch.is_grad_enabled()",
        "trains = True",
        ("layer_dropout/test_dropout.py",),
    ),
    Mutation(
        "checkpointed blocks are recomputed under new gates",
        "layer_dropout/dropout.py",
        "if torch._C._current_graph_task_id() != -1:",
        "if False:",
        ("layer_dropout/test_dropout.py",),
    ),
    Mutation(
        "the Trainer's gates do not follow its step",
        "layer_dropout/trainer.py",
        "self._dropout.step = state.global_step",
        "pass",
        ("layer_dropout/test_trainer.py",),
    ),
    Mutation(
        "the recovery at full depth begins too late",
        "layer_dropout/schedules.py",
        "1 - progress <= part + _ROUNDING",
        "1 - progress < part / 2",
        ("layer_dropout/test_schedules.py",),
    ),
    # Seeds
    Mutation(
        "all clients draw the same numbers",
        "seeds.py",
        "{seed}|{round}|{client}|{step}|{purpose}",
        "{seed}|{round}|{step}|{purpose}",
        ("test_seeds.py",),
    ),
    Mutation(
        "batches are the same in every round",
        "client/local_training.py",
        'purpose="batches", round=instruction.round,',
        'purpose="batches", round=1,',
        ("client/test_client.py",),
    ),
    # Training
    Mutation(
        "gradients are kept after a step",
        "training/loop.py",
        "self.optimizer.zero_grad(set_to_none=True)",
        "pass",
        ("training/test_loop.py",),
    ),
    Mutation(
        "the head has the learning rate of the adapter",
        "training/loop.py",
        "return settings.head_learning_rate",
        "return settings.learning_rate",
        ("training/test_loop.py",),
    ),
    Mutation(
        "the last batch is not evaluated",
        "data/tokens.py",
        "for start in range(0, len(rows), batch_size)]",
        "for start in range(0, len(rows) - batch_size + 1, batch_size)]",
        ("data/test_tokens.py", "training/test_loop.py"),
    ),
    # Adapters
    Mutation(
        "initial values do not follow the seed",
        "adapters/attach.py",
        "torch.manual_seed(seed)",
        "torch.manual_seed(0)",
        ("adapters/test_attach.py",),
    ),
    Mutation(
        "an adapter stays after it is detached",
        "adapters/attach.py",
        "backbone.set_submodule(name, module.get_base_layer())",
        "pass",
        ("adapters/test_attach.py",),
    ),
    Mutation(
        "tensors are loaded into the layer above",
        "adapters/by_layer.py",
        'return int(name.removeprefix(path).partition(".")[0])',
        'return int(name.removeprefix(path).partition(".")[0]) + 1',
        ("adapters/test_by_layer.py",),
    ),
    Mutation(
        "a type that does not work with 8-bit weights is not refused",
        "adapters/types.py",
        '        "peanut": _MATRIX,\n',
        "",
        ("adapters/test_types.py",),
    ),
    Mutation(
        "prompts are accepted on decoders",
        "adapters/attach.py",
        'if TYPES[name].kind == "global" and hasattr(model, "score"):',
        "if False:",
        ("adapters/test_types.py",),
    ),
    # Merging and methods
    Mutation(
        "clients are merged with equal weights",
        "sharing/aggregation.py",
        "    return float(update.examples)\n",
        "    return 1.0\n",
        ("sharing/test_aggregation.py", "methods/test_methods.py"),
    ),
    Mutation(
        "layers that score highest are shared",
        "sharing/selection.py",
        "highest = max(shared, key=",
        "highest = min(shared, key=",
        ("sharing/test_selection.py",),
    ),
    Mutation(
        "FedEx-LoRA forgets its residual",
        "methods/fedex_lora.py",
        "return mean - up.astype(np.float64) @ down.astype(np.float64)",
        "return mean * 0",
        ("methods/test_lora_merges.py",),
    ),
    Mutation(
        "FLoRA starts a round with the old factors",
        "methods/flora.py",
        "result[key][b] = np.zeros_like(result[key][b])",
        "pass",
        ("methods/test_lora_merges.py",),
    ),
    Mutation(
        "Ditto's pull has no effect",
        "client/client.py",
        "objective=Objective(proximal=instruction.personal_adapter), sharing=None",
        "objective=Objective(), sharing=None",
        ("methods/test_personalisation.py",),
    ),
    # The server
    Mutation(
        "updates that are not finite are merged",
        "server/validation.py",
        "if not np.isfinite(array).all():",
        "if False:",
        ("server/test_validation.py",),
    ),
    Mutation(
        "an update of another instruction is merged",
        "server/validation.py",
        'return None if reply.nonce == instruction.nonce else "does',
        'return None if True else "does',
        ("server/test_validation.py",),
    ),
    Mutation(
        "a round is merged below its quorum",
        "server/rounds.py",
        "if updates >= quorum:",
        "if True:",
        ("server/test_rounds.py",),
    ),
    Mutation(
        "a late update counts",
        "server/round_cost.py",
        "if deadline_s is None or pair[0] <= deadline_s]",
        "]",
        ("server/test_round_cost.py",),
    ),
    Mutation(
        "a resumed run does not drop the rows of later rounds",
        "runs/read_ledger.py",
        'if row["round"] <= last_round]',
        "]",
        ("runs/test_ledger.py", "server/test_run.py"),
    ),
    Mutation(
        "a finished run is not evaluated on all test rows",
        "server/final_evaluation.py",
        "evaluation_sample(len(prepared.test), final_rows(prepared))",
        "prepared.sample",
        ("server/test_run.py",),
    ),
    # State and caches
    Mutation(
        "damaged files are read",
        "checked_safetensors.py",
        'if _digest(text, arrays) != metadata["sha256"]:',
        "if False:",
        ("runs/test_checkpoints.py", "client/test_client_state.py"),
    ),
    Mutation(
        "the saved state of another round is loaded",
        "client/client_state.py",
        'if (head["round"], head["of"]) != (round, _owner(folder)):',
        "if False:",
        ("client/test_client_state.py",),
    ),
    Mutation(
        "personal layers are sent",
        "client/client.py",
        "instruction.share - personal)",
        "instruction.share)",
        ("client/test_layer_sharing.py",),
    ),
    Mutation(
        "cached states are those of the layer below",
        "cached_layers/frozen_layers.py",
        "self._last = blocks[depth - 1]",
        "self._last = blocks[max(depth - 2, 0)]",
        ("cached_layers/test_frozen_layers.py",),
    ),
    # Data, bandit and clock
    Mutation(
        "validation rows are trained on",
        "data/partition.py",
        "train=shuffled[validation + test :]",
        "train=shuffled[validation:]",
        ("data/test_partition.py",),
    ),
    Mutation(
        "the bandit learns from the first rounds",
        "bandit/learning.py",
        "if last - window < each.round <= last]",
        "if each.round <= window]",
        ("bandit/test_learning.py",),
    ),
    Mutation(
        "the waiting time of a client costs full power",
        "costs/modelled_clock.py",
        "profile.idle_watts * waiting_s",
        "profile.train_watts * waiting_s",
        ("costs/test_modelled_clock.py",),
    ),
    # Flower
    Mutation(
        "a node with other texts takes part",
        "transports/flower/client_runtime.py",
        "if changed is not None:",
        "if False:",
        ("transports/flower/test_client_runtime.py",),
    ),
    Mutation(
        "an error of a client ends its process",
        "transports/flower/client_runtime.py",
        "except Exception as error:",
        "except KeyError as error:",
        ("transports/flower/test_client_runtime.py",),
    ),
    Mutation(
        "a message with an unused tensor is accepted",
        "transports/flower/wire_format.py",
        "if arrays.keys() != {str(number) for number in range(count)}:",
        "if not {str(number) for number in range(count)} <= arrays.keys():",
        ("transports/flower/test_wire_format.py",),
    ),
    # The user's settings
    Mutation(
        "an unknown setting is refused without a hint",
        "config/reading.py",
        "if key not in known | tables and not key.startswith(opened):",
        "if False:",
        ("test_config.py",),
    ),
    Mutation(
        "settings without an effect are accepted",
        "methods/without_effect.py",
        "for key in given(config):",
        "for key in ():",
        ("methods/test_rules.py",),
    ),
)
