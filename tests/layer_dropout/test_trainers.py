"""The table of trainers in the documentation: every cell is what happens."""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from step_recorder import Gates, StepRecorder, moved, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from droppeft.layer_dropout import find_blocks, layer_dropout
from droppeft.layer_dropout.dropout import DrawnGates
from droppeft.layer_dropout.trainer import LayerDropoutCallback
from droppeft.models.packaged import builtin_model_folder
from pages import ROOT, markdown_of
from processes import started
from refusals import refused
from tiny import save_tiny_model, tiny_model

PAGE = ROOT / "docs/tutorials/layer_dropout_in_trainer.ipynb"
LAYERS = 6
STEPS = 3
PAIR = ("DistributedDataParallel", "FSDP2 (`fully_shard`)")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}
"""By column of the table, arguments of a Trainer."""


class Outcome(NamedTuple):
    """By step: open gates, layers that changed, and forwards of each layer. And in the end."""

    gates: list[Gates]
    moved: list[Gates]
    forwards: list[list[int]]
    log: dict[str, float]
    weights: list[torch.Tensor]


# Trainers


def arguments(folder: Path, column: str, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
        "gradient_checkpointing": False,
        **SETTINGS[column],
        **others,
    }


def lora(task: str | None = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj", "query"])


def llama() -> dict[str, Any]:
    """Return a small language model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"model": AutoModelForCausalLM.from_config(config), "processing_class": tokenizer}


def classifier_trainer(folder: Path, column: str, callbacks: list[Any]) -> Any:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (24, 6), generator=generator)
    return Trainer(
        get_peft_model(tiny_model(LAYERS), lora("SEQ_CLS")),
        TrainingArguments(**arguments(folder, column)),
        train_dataset=[{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)],
        callbacks=callbacks,
    )


def sft_trainer(folder: Path, column: str, callbacks: list[Any]) -> Any:
    from trl import SFTConfig, SFTTrainer  # slow to import

    texts = ["one tree grows", "two rivers meet far below", "a stone", "rain fell on the old roof"]
    return SFTTrainer(
        args=SFTConfig(max_length=16, **arguments(folder, column)),
        train_dataset=Dataset.from_dict({"text": texts * 6}),
        peft_config=lora(),
        callbacks=callbacks,
        **llama(),
    )


PAIRS = {
    "prompt": ["once upon a time"] * 24,
    "chosen": [" there was a cat", " two rivers meet"] * 12,
    "rejected": [" rain fell", " a stone"] * 12,
}


def dpo_trainer(folder: Path, column: str, callbacks: list[Any], **others: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    chosen = {"peft_config": lora(), **others}
    settings = {name: chosen.pop(name) for name in list(chosen) if name.startswith("precompute")}
    return DPOTrainer(
        args=DPOConfig(max_length=32, **arguments(folder, column, **settings)),
        train_dataset=Dataset.from_dict(PAIRS),
        callbacks=callbacks,
        **{**llama(), **chosen},
    )


def kto_trainer(folder: Path, column: str, callbacks: list[Any]) -> Any:
    from trl import KTOConfig, KTOTrainer

    texts = [" there was a cat", " rain fell", " two rivers meet", " a stone"] * 6
    rows = {"prompt": PAIRS["prompt"], "completion": texts, "label": [True, False] * 12}
    return KTOTrainer(
        args=KTOConfig(max_length=32, **arguments(folder, column)),
        train_dataset=Dataset.from_dict(rows),
        peft_config=lora(),
        callbacks=callbacks,
        **llama(),
    )


def reward_trainer(folder: Path, column: str, callbacks: list[Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    model = tiny_model(LAYERS, "llama", len(llama()["processing_class"]))
    model.config.num_labels = 1
    model.score = nn.Linear(32, 1, bias=False)
    return RewardTrainer(
        model,
        RewardConfig(max_length=32, **arguments(folder, column)),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=llama()["processing_class"],
        peft_config=lora("SEQ_CLS"),
        callbacks=callbacks,
    )


def grpo_trainer(folder: Path, column: str, callbacks: list[Any], **others: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    models = {"peft_config": lora(), **llama()}
    models |= {name: others.pop(name) for name in models.keys() & others.keys()}
    settings = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, **others}
    return GRPOTrainer(
        args=GRPOConfig(**arguments(folder, column, **settings)),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, t)) % 7) for t in completions],
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "a stone fell"] * 12}),
        callbacks=callbacks,
        **models,
    )


def rloo_trainer(folder: Path, column: str, callbacks: list[Any], **others: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    settings = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, **others}
    return RLOOTrainer(
        args=RLOOConfig(**arguments(folder, column, **settings)),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, t)) % 7) for t in completions],
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "a stone fell"] * 12}),
        peft_config=lora(),
        callbacks=callbacks,
        **llama(),
    )


def embedder_trainer(
    folder: Path, column: str, callbacks: list[Any], loss: str = "", **settings: int
) -> Any:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    model = SentenceTransformer(str(save_tiny_model(folder / "model", LAYERS)), device="cpu")
    without_dropout(model)
    pairs = {"anchor": ["a cat", "a dog", "the sun", "rain"] * 6}
    pairs["positive"] = ["cats", "dogs", "sunny", "it rains"] * 6
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(**arguments(folder, column)),
        train_dataset=Dataset.from_dict(pairs),
        loss=getattr(losses, loss or "MultipleNegativesRankingLoss")(model, **settings),
        callbacks=callbacks,
    )


TRAINERS: dict[str, Callable[..., Any]] = {
    "`Trainer`": classifier_trainer,
    "TRL's `SFTTrainer`": sft_trainer,
    "TRL's `RewardTrainer`": reward_trainer,
    "TRL's `DPOTrainer` with an adapter": dpo_trainer,
    "TRL's `KTOTrainer` with an adapter": kto_trainer,
    "TRL's `GRPOTrainer` with an adapter": grpo_trainer,
    "TRL's `RLOOTrainer` with an adapter": rloo_trainer,
    "`SentenceTransformerTrainer`": embedder_trainer,
    "`SentenceTransformerTrainer`, cached losses": functools.partial(
        embedder_trainer, loss="CachedMultipleNegativesRankingLoss", mini_batch_size=2
    ),
}
"""By row of the table."""


def with_trainer(row: str, folder: Path, column: str, mean: float = 0.5) -> Outcome:
    callback = LayerDropoutCallback(mean)
    recorder = StepRecorder(callback)
    trainer = TRAINERS[row](folder, column, [callback, recorder])
    trainer.train()
    weights = [value for layer in trained(trainer.model) for value in layer]
    log = trainer.state.log_history[0]
    return Outcome(recorder.gates, recorder.moved, recorder.forwards, log, weights)


# Loops of one's own


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def batch(step: int, rank: int, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + number)
    ids = torch.randint(1, 60, (4, 6), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(4) % 2}


def prepared_model(column: str) -> Any:
    model = tiny_model(LAYERS).train()
    without_dropout(model)
    settings = SETTINGS[column]
    if "gradient_checkpointing" in settings:
        model.activation_checkpointing_enable(settings["gradient_checkpointing_kwargs"])
        model.enable_input_require_grads()
    if column == "torch.compile":
        for block in find_blocks(model)[1]:
            block.compile(backend="eager")
    return model


def values(model: Any) -> list[list[torch.Tensor]]:
    return [
        [value.to_local() if isinstance(value, DTensor) else value for value in layer]
        for layer in trained(model)
    ]


@contextmanager
def recorded(model: Any, dropout: DrawnGates, found: Any) -> Iterator[None]:
    """Append what a step did: the gates, which layers changed, and how often each layer ran."""
    before, executed, active = values(model), dropout.executed, dropout.active
    yield
    ran = zip(dropout.executed, executed, strict=True)
    after = (active, moved(before, values(model)), [now - then for now, then in ran])
    for steps, value in zip(found, after, strict=True):
        steps.append(value)


def loop(column: str, wrap: Callable[[Any], Any], ranks: list[int]) -> Outcome:
    """Train on batches of some ranks, as DistributedDataParallel would on one rank each."""
    model = prepared_model(column)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    number = SETTINGS[column].get("gradient_accumulation_steps", 1) * len(ranks)
    found: Any = ([], [], [])
    with layer_dropout(model, optimizer, 0.5, seed=1) as dropout:
        for step in range(STEPS):
            with recorded(model, dropout, found):
                for rank in ranks:
                    for part in range(number // len(ranks)):
                        (wrapped(**batch(step, rank, part)).loss / number).backward()
                optimizer.step()
                optimizer.zero_grad()
    full = [v.full_tensor() if isinstance(v, DTensor) else v for v in model.parameters()]
    return Outcome(*found, {}, [value.detach() for value in full])


def with_accelerate(column: str) -> Outcome:
    """Accelerate's wrappers of model and optimizer, which decide when a step is taken."""
    settings = SETTINGS[column]
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=(number := settings.get("gradient_accumulation_steps", 1)),
        dynamo_backend="eager" if column == "torch.compile" else "no",
    )
    model = prepared_model("plain" if column == "torch.compile" else column)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    wrapped, stepped = accelerator.prepare(model, optimizer)
    found: Any = ([], [], [])
    with layer_dropout(model, stepped, 0.5, seed=1) as dropout:
        for step in range(STEPS):
            with recorded(model, dropout, found):
                for part in range(number):
                    with accelerator.accumulate(wrapped):
                        accelerator.backward(wrapped(**batch(step, 0, part)).loss)
                        stepped.step()
                        stepped.zero_grad()
    return Outcome(*found, {}, [value.detach() for value in model.parameters()])


def ddp(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for block in find_blocks(model)[1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_one_of_two(rank: int, folder: Path) -> None:
    """Train in every way in one of two processes, and write what happened to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for row, wrap in zip(PAIR, (ddp, fsdp2), strict=True):
        for column in SETTINGS:
            torch._dynamo.reset()
            try:
                outcome = loop(column, wrap, [rank])
                found[f"{row} {column}"] = outcome._replace(weights=[])._asdict()
                torch.save(outcome.weights, folder / f"{row} {column} {rank}")
            except RuntimeError as error:
                found[f"{row} {column}"] = {"error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    both = [started(train_in_one_of_two, rank, folder) for rank in range(2)]
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    return folder


def of_two_processes(row: str, column: str, folder: Path) -> Outcome:
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    found = one[f"{row} {column}"]
    assert other[f"{row} {column}"] == found
    if "error" in found:
        raise RuntimeError(found["error"])
    weights = [torch.load(folder / f"{row} {column} {rank}") for rank in range(2)]
    assert all(map(torch.equal, *weights))
    gates = [tuple(active) for active in found["gates"]]
    changed = [tuple(active) for active in found["moved"]]
    return Outcome(gates, changed, found["forwards"], {}, weights[0])


# The table


def cells() -> Iterator[tuple[str, str, str]]:
    """Yield row, column and content of each cell of the table in the documentation."""
    page = markdown_of(PAGE)
    [table] = re.findall(r"^\| trainer \|.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    for name, *contents in rows:
        for column, content in zip(header[1:], contents, strict=True):
            yield name, column.strip("`"), content


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove compiled graphs before and after, and global settings of the Trainer."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def plain(row: str, folder: Path) -> Outcome:
    return with_trainer(row, folder, "plain")


@functools.cache
def in_one_process(column: str, ranks: int) -> Outcome:
    return loop(
        "plain" if "checkpointing" in column else column, lambda model: model, [*range(ranks)]
    )


def outcome(row: str, column: str, request: pytest.FixtureRequest) -> tuple[Outcome, Outcome]:
    """Return what happens, and what the same training gives in another way."""
    folder = request.getfixturevalue("tmp_path")
    if row in PAIR:
        folder = request.getfixturevalue("two_processes")
        return of_two_processes(row, column, folder), in_one_process(column, 2)
    if row == "Accelerate":
        return with_accelerate(column), in_one_process(column, 1)
    found = with_trainer(row, folder, column)
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    return found, found if column == "accumulation" else plain(row, base / TRAINERS_FOLDER)


TRAINERS_FOLDER = "trainers"


@pytest.mark.sample(
    "*SFT*accumulation", "*DPO*plain", "*cached*plain", "*GRPO*plain", "Accelerate-accumulation"
)
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("row", "column", "content"), [pytest.param(*cell, id="-".join(cell[:2])) for cell in cells()]
)
def test_a_cell_of_the_table(
    row: str, column: str, content: str, request: pytest.FixtureRequest
) -> None:
    if content.startswith("no"):
        with pytest.raises(RuntimeError):
            outcome(row, column, request)
        return
    found, expected = outcome(row, column, request)
    assert len(found.gates) == STEPS
    assert len(set(found.gates)) > 1
    assert found.moved == found.gates
    for active, counts in zip(found.gates, found.forwards, strict=True):
        ran, dropped = ({c for c, a in zip(counts, active, strict=True) if a == x} for x in (1, 0))
        assert len(ran) == len(dropped) == 1
        # Only generation, which GRPO and RLOO do in training mode, runs dropped layers.
        assert min(ran) > min(dropped)
        assert ("GRPO" in row or "RLOO" in row) == (min(dropped) > 0)
    assert found.gates == expected.gates
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.log.get("active_layers", 3) == 3
    if "DPO" in row:
        assert found.log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if "KTO" in row:
        assert found.log["loss"] == pytest.approx(0.5, abs=1e-6)
    if "GRPO" in row or "RLOO" in row:
        assert found.log["kl"] == pytest.approx(0, abs=1e-6)
        assert found.log["clip_ratio/region_mean"] == 0


# Losses that compare forwards of different layers


REFERENCE = "the reference of {}Config would run every layer .* train an adapter"
REUSE = "GRPOConfig would use the log-probabilities of a generation in {} batches"


@pytest.mark.sample("dpo*settings0*", "rloo*", "grpo*settings7*")
@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (dpo_trainer, {"peft_config": None}, REFERENCE.format("DPO")),
        (dpo_trainer, {"precompute_ref_log_probs": True}, REFERENCE.format("DPO")),
        (dpo_trainer, {"ref_model": True}, REFERENCE.format("DPO")),
        (grpo_trainer, {"peft_config": None}, REFERENCE.format("GRPO")),
        (rloo_trainer, {"num_iterations": 2}, "RLOOConfig would use .* in 2 batches"),
        (grpo_trainer, {"num_iterations": 2}, f"{REUSE.format(2)}.*, or .* with every=2"),
        (grpo_trainer, {"steps_per_generation": 3}, f"{REUSE.format(3)}.*, or .* with every=3"),
        (
            grpo_trainer,
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            f"{REUSE.format(3)}.* steps_per_generation=2, as gradient_accumulation_steps$",
        ),
    ],
)
def test_a_comparison_of_different_layers_is_refused(
    tmp_path: Path, build: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    if settings.get("ref_model"):
        settings = {"ref_model": llama()["model"]}
    elif "peft_config" in settings:
        llama()["model"].save_pretrained(tmp_path / "model")  # TRL loads the reference from there
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        settings = {**settings, "model": loaded}
    trainer = build(tmp_path, "plain", [LayerDropoutCallback(0.5)], **settings)
    before = [value.clone() for value in trainer.model.parameters()]
    with refused(message):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_layers_may_be_held_while_log_probabilities_are_used(tmp_path: Path) -> None:
    """Without a learning rate, all ratios of probabilities are 1 and none is clipped."""
    settings = {"num_iterations": 2, "epsilon": 1e-6, "learning_rate": 0.0, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}

    def trainer() -> Any:
        callback = LayerDropoutCallback(0.5, every=2)
        return grpo_trainer(tmp_path, "plain", [callback], **settings)

    (first := trainer()).train()
    rows = [row for row in first.state.log_history if "loss" in row]
    assert [row["clip_ratio/region_mean"] for row in rows] == [0.0] * 4
    with refused("other layers; resume from a checkpoint whose step is a multiple of 2"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
