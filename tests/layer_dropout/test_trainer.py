"""LayerDropoutCallback in transformers' Trainer; test_trainers.py has other trainers."""

import copy
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from step_recorder import Gates, StepRecorder, trained
from torch._dynamo.utils import counters
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.layer_dropout.trainer import LayerDropoutCallback
from processes import started
from tiny import tiny_model

LAYERS = 6


def lora_model() -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    return get_peft_model(tiny_model(LAYERS), lora)


def full_model() -> Any:
    return tiny_model(LAYERS)


def rows(number: int = 14) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (number, 6), generator=generator)
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids)]


def make(
    folder: Path, model: Any, callback: LayerDropoutCallback, *others: Any, **settings: Any
) -> Trainer:
    chosen = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **chosen),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[callback, *others],
    )


def train(
    folder: Path, model: Any, settings: Any = (), **arguments: Any
) -> tuple[Trainer, StepRecorder]:
    callback = LayerDropoutCallback(0.5, **dict(settings))
    recorder = StepRecorder(callback)
    trainer = make(folder, model, callback, recorder, **arguments)
    trainer.train()
    return trainer, recorder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, StepRecorder]:
    """The LoRA model, trained with the default settings; tests must not change it."""
    return train(tmp_path_factory.mktemp("plain"), lora_model())


def gated_blocks(model: Any) -> int:
    return sum("forward" in vars(block) for block in find_blocks(model)[1])


@pytest.mark.parametrize("build", [lora_model, full_model])
def test_a_step_updates_the_layers_that_it_runs(tmp_path: Path, build: Callable[[], Any]) -> None:
    _, recorder = train(tmp_path, build(), max_steps=8)
    assert len(recorder.gates) == 8
    assert len(set(recorder.gates)) > 1
    assert all(sum(active) == 3 for active in recorder.gates)
    # AdamW decays by 0.5 and has momentum, but a dropped layer has no gradient at all.
    assert recorder.moved == recorder.gates
    assert recorder.forwards == [list(map(int, active)) for active in recorder.gates]


def test_accumulated_batches_run_the_same_layers(tmp_path: Path) -> None:
    """An epoch has 7 batches, so with 3 per step the last step of an epoch has one batch."""
    _, recorder = train(tmp_path, lora_model(), gradient_accumulation_steps=3, max_steps=7)
    assert len(set(recorder.gates)) > 1
    assert recorder.moved == recorder.gates
    numbers = [3, 3, 1, 3, 3, 1, 3]
    for active, number, counts in zip(recorder.gates, numbers, recorder.forwards, strict=True):
        assert counts == [number * runs for runs in active]


def test_evaluation_between_steps_is_at_full_depth(tmp_path: Path) -> None:
    trainer, _ = train(
        tmp_path, lora_model(), eval_strategy="steps", eval_steps=2, eval_on_start=True, max_steps=6
    )
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 4
    # The last evaluation during training used the final weights.
    assert trainer.evaluate()["eval_loss"] == losses[-1]
    trainer.remove_callback(LayerDropoutCallback)
    assert trainer.predict(rows(4)).metrics["test_loss"] == losses[-1]


def test_the_mean_depth_is_logged(tmp_path: Path) -> None:
    """Bernoulli sampling, so that the number varies; logged every two steps."""
    trainer, recorder = train(
        tmp_path,
        lora_model(),
        {"sampling": "bernoulli"},
        max_steps=6,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    depths = [sum(active) for active in recorder.gates]
    pairs = [(a + b) / 2 for a, b in zip(depths[::2], depths[1::2], strict=True)]
    history = trainer.state.log_history
    assert [row["active_layers"] for row in history if "loss" in row] == pairs
    assert [row["trained_layers"] for row in history if "loss" in row] == pairs
    assert sum("active_layers" in row for row in history) == 3


def test_truncated_steps_change_only_what_they_train(tmp_path: Path) -> None:
    """With reentrant checkpoints, which the Trainer makes the inputs require a gradient for."""
    callback = LayerDropoutCallback(backward_depths=(1, 0.5))
    recorder = StepRecorder(callback)
    model = lora_model()
    model.enable_input_require_grads()
    trainer = make(
        tmp_path,
        model,
        callback,
        recorder,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        max_steps=8,
    )
    trainer.train()
    assert recorder.gates == [(True,) * LAYERS] * 8
    depths = [sum(layers) for layers in recorder.moved]
    assert set(depths) == {3, 6}
    assert all(
        layers[-depth:] == (True,) * depth
        for layers, depth in zip(recorder.moved, depths, strict=True)
    )
    logged = [row["trained_layers"] for row in trainer.state.log_history if "loss" in row]
    assert logged == depths


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole, uninterrupted = train(tmp_path, lora_model(), {"every": 2}, **arguments)
    callback = LayerDropoutCallback(0.5, every=2)
    recorder = StepRecorder(callback)
    second = make(tmp_path, lora_model(), callback, recorder, **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert recorder.gates == uninterrupted.gates[3:]
    assert len(set(recorder.gates)) > 1
    for ours, theirs in zip(trained(second.model), trained(whole.model), strict=True):
        assert all(map(torch.equal, ours, theirs))


def checkpointing(reentrant: bool) -> dict[str, Any]:
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(
    tmp_path: Path, plain: tuple[Trainer, StepRecorder], reentrant: bool
) -> None:
    trainer, recorder = train(tmp_path, lora_model(), **checkpointing(reentrant))
    assert trainer.model.is_activation_checkpointing
    assert recorder.moved == recorder.gates
    for ours, theirs in zip(trained(trainer.model), trained(plain[0].model), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.full
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_of_a_trained_backbone_changes_nothing(
    tmp_path: Path, reentrant: bool
) -> None:
    whole, _ = train(tmp_path, full_model())
    trainer, recorder = train(tmp_path, full_model(), **checkpointing(reentrant))
    assert recorder.moved == recorder.gates
    for ours, theirs in zip(trained(trainer.model), trained(whole.model), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_the_gates_count_a_skipped_step_as_the_trainer_does(
    tmp_path: Path, plain: tuple[Trainer, StepRecorder]
) -> None:
    """With a loss scaler with which the first step overflows, as may happen in fp16 on a GPU."""
    callback = LayerDropoutCallback(0.5)
    recorder = StepRecorder(callback)
    trainer = make(tmp_path, lora_model(), callback, recorder)
    trainer.accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127, backoff_factor=2.0**-120
    )
    with torch.no_grad():
        trainer.model.get_submodule("base_model.model.classifier").weight.mul_(100.0)
    trainer.train()
    assert recorder.gates == plain[1].gates
    assert recorder.moved == [(False,) * LAYERS, *recorder.gates[1:]]


def test_without_a_gpu_the_trainer_ignores_fp16(
    tmp_path: Path, plain: tuple[Trainer, StepRecorder]
) -> None:
    trainer, _ = train(tmp_path, asked := lora_model(), fp16=True)
    assert trainer.accelerator.scaler is None
    pairs = zip(plain[0].model.parameters(), asked.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_autocast_in_bf16(tmp_path: Path) -> None:
    trainer, recorder = train(tmp_path, lora_model(), bf16=True)
    assert recorder.moved == recorder.gates
    assert all(value.isfinite().all() for layer in trained(trainer.model) for value in layer)


def test_a_schedule_follows_the_trainer_s_steps(tmp_path: Path) -> None:
    settings = {"schedule": "recovery", "schedule_part": 0.4}
    _, recorder = train(tmp_path, lora_model(), settings, max_steps=10)
    assert [sum(active) for active in recorder.gates] == [3] * 6 + [6] * 4


def test_the_seed_is_the_trainer_s_unless_given(tmp_path: Path) -> None:
    def gates(settings: dict[str, Any], seed: int) -> list[Gates]:
        return train(tmp_path, lora_model(), settings, seed=seed, max_steps=4)[1].gates

    first = gates({}, 1)
    assert gates({"seed": 1}, 2) == first
    assert gates({}, 2) != first


def test_nothing_is_left_after_training(tmp_path: Path) -> None:
    trainer, recorder = train(tmp_path, model := lora_model())
    assert recorder.callback.dropout is None
    assert gated_blocks(model) == 0
    trainer.train()  # once more, with the same callback
    assert len(recorder.gates) == 10
    assert recorder.gates[:5] == recorder.gates[5:]


class RaiseOnce(TrainerCallback):
    """Raises an error after the first step of the first training."""

    def __init__(self) -> None:
        self.armed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and self.armed:
            self.armed = False
            raise RuntimeError("mine")


def train_with_error(folder: Path, model: Any) -> tuple[Trainer, LayerDropoutCallback]:
    callback = LayerDropoutCallback(0.5)
    trainer = make(folder, model, callback, RaiseOnce(), max_steps=3)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    return trainer, callback


def test_after_training_raised(tmp_path: Path) -> None:
    trainer, callback = train_with_error(tmp_path, model := lora_model())
    assert gated_blocks(model) == LAYERS
    loss = trainer.evaluate()["eval_loss"]
    callback.remove()
    assert gated_blocks(model) == 0
    assert trainer.evaluate()["eval_loss"] == loss  # every layer ran before, too
    callback.remove()  # a second call has no effect


def test_training_again_after_training_raised(tmp_path: Path) -> None:
    trainer, callback = train_with_error(tmp_path, model := lora_model())
    trainer.train()
    assert trainer.state.global_step == 3
    assert callback.dropout is None
    assert gated_blocks(model) == 0


def test_a_garbage_collected_callback_removes_its_gates(tmp_path: Path) -> None:
    model = lora_model()
    train_with_error(tmp_path, model)
    gc.collect()
    assert gated_blocks(model) == 0


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    model, callback = lora_model(), LayerDropoutCallback(0.5)
    trainer = make(tmp_path, model, callback)
    args = copy.copy(trainer.args)
    args._n_gpu = 2
    message = "this process has 2 GPUs, and the Trainer would copy the model"
    with pytest.raises(DroppeftError, match=message):
        callback.on_train_begin(args, trainer.state, trainer.control, model=model)
    assert gated_blocks(model) == 0


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove compiled graphs before and after, and global settings of the Trainer."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.full
@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_model_is_trained_alike(tmp_path: Path) -> None:
    """With more than eight patterns, torch's limit of recompilations of a function."""

    def run(**arguments: Any) -> tuple[Any, ...]:
        model = lora_model()
        _, recorder = train(tmp_path, model, {"sampling": "bernoulli"}, max_steps=16, **arguments)
        return recorder.gates, recorder.forwards, recorder.moved, trained(model)

    plain = run()
    assert len(set(plain[0])) > 8
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = run(torch_compile=True, torch_compile_backend="eager")
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert compiled[:3] == plain[:3]
    for ours, theirs in zip(compiled[3], plain[3], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_impossible_rates_are_refused_when_training_begins(tmp_path: Path) -> None:
    trainer = make(tmp_path, lora_model(), LayerDropoutCallback(0.9))
    with pytest.raises(DroppeftError, match=r"the largest possible mean is 0\.6666"):
        trainer.train()


@pytest.mark.parametrize("name", ["meen", "total_steps", "optimizer"])
def test_a_setting_that_does_not_exist_is_refused_at_once(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        LayerDropoutCallback(0.5, **{name: 1})


def train_in_one_of_two(rank: int, folder: Path) -> None:
    """Train three models in one of two processes, and write what happened to a file."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = []
    for build, settings in (
        (lora_model, {}),
        (lora_model, checkpointing(False)),
        (full_model, {"ddp_find_unused_parameters": True, **checkpointing(False)}),
    ):
        trainer, recorder = train(folder, build(), gradient_accumulation_steps=2, **settings)
        total = sum(float(value.sum()) for layer in trained(trainer.model) for value in layer)
        kind = type(trainer.model_wrapped).__name__
        rows.append([kind, recorder.gates, recorder.moved, recorder.forwards, total])
    (folder / str(rank)).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.full  # each process imports torch and transformers
def test_two_processes_run_the_same_layers(tmp_path: Path) -> None:
    """With unused parameters detected, a dropped layer has no gradient in any process.

    A process that has used gloo must end without finalizing Python, as those of
    ``multiprocessing`` do: otherwise a thread of gloo that still holds tensors can abort it
    (pytorch/pytorch#179291).
    """
    both = [started(train_in_one_of_two, rank, tmp_path) for rank in range(2)]
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    one, other = ((tmp_path / rank).read_text() for rank in "01")
    assert one == other
    runs = json.loads(one)
    assert len(runs) == 3
    for kind, gates, moved, forwards, _ in runs:
        assert kind == "DistributedDataParallel"
        assert len({tuple(active) for active in gates}) > 1
        assert moved == gates
        assert all(map(any, forwards))
