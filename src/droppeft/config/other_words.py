"""Words of other libraries that users type as settings or methods, and what is meant here. Ours."""

import difflib
from collections.abc import Iterable, Mapping

_WORDS: dict[str, tuple[str, ...]] = {
    # transformers and PyTorch
    "training.learning_rate": ("lr",),
    "training.local_epochs (in each round) or rounds": ("epochs", "num_epochs", "num_train_epochs"),
    "training.local_steps (in each round)": ("steps", "max_steps", "num_steps"),
    "training.batch_size": (
        "batch_size",
        "batch",
        "train_batch_size",
        "per_device_train_batch_size",
    ),
    "evaluation.batch_size": ("eval_batch_size", "per_device_eval_batch_size"),
    "evaluation.every": ("eval_steps", "eval_strategy"),
    "training.max_length": ("max_seq_length", "max_seq_len", "model_max_length"),
    "training.schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "training.warmup_fraction": ("warmup", "warmup_ratio", "warmup_steps"),
    "training.clip_norm": ("max_grad_norm", "grad_clip"),
    "training.checkpointing": ("gradient_checkpointing",),
    "training.precision": (
        *("fp16", "bf16", "amp", "mixed_precision", "precision"),
        *("dtype", "torch_dtype"),
    ),
    "server.optimizer (clients use AdamW)": ("optim", "optimizer"),
    "quantization=8bit": ("load_in_8bit",),
    "quantization=4bit": ("load_in_4bit", "qlora"),
    "model": ("model_name", "model_name_or_path", "base_model"),
    "data": ("dataset", "dataset_name", "train_file"),
    "source.text": ("text_column", "dataset_text_field"),
    "source.label": ("labels", "label_column", "target_column"),
    "accelerator": ("device", "gpu", "cuda", "use_cpu"),
    "workers": ("num_workers", "num_processes", "n_jobs"),
    "seed": ("random_seed", "random_state"),
    "tracker": ("report_to", "logger"),
    "--out FOLDER": ("out", "output", "output_dir"),
    # peft
    "adapter.type": ("adapter", "peft", "peft_type"),
    "method=fedlora (LoRA in all layers) or adapter.rank": ("lora",),
    "adapter.rank": ("r", "lora_r", "lora_rank"),
    "adapter.alpha (scale) or partition.alpha (skew)": ("alpha",),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.targets": ("target_modules", "lora_target_modules"),
    "adapter.tokens": ("num_virtual_tokens",),
    # Flower and papers about federated learning
    "clients": ("num_clients", "n_clients", "num_supernodes", "num_partitions", "num_users"),
    "cohort_size (a number of clients)": (
        "clients_per_round",
        "fraction_fit",
        "fraction_train",
        "participation",
        "sample_fraction",
    ),
    "rounds": ("num_rounds", "num_server_rounds", "n_rounds", "comm_rounds"),
    "method": ("strategy", "algorithm", "aggregation"),
    "method=fedlora": ("fedavg",),
    "training.proximal": ("mu", "prox", "proximal_mu", "fedprox"),
    "partition.kind": ("partition", "iid", "non_iid", "noniid", "dirichlet"),
    "partition.alpha": ("dirichlet_alpha",),
    "dropout.mean": ("dropout", "drop_rate", "dropout_rate", "layer_dropout"),
    # Tables
    "clock.profiles": ("clock", "profile", "profiles"),
    "configurator.policy": ("configurator", "bandit"),
    "evaluation.every or evaluation.rows": ("evaluation",),
    "frozen.layers": ("frozen", "freeze"),
    "server.optimizer": ("server",),
    "sharing.fraction": ("sharing",),
    "source.text or source.label": ("source",),
}

KEYS: dict[str, str] = {word: meaning for meaning, words in _WORDS.items() for word in words}
"""By a word that is typed as a key: the setting that is meant."""

METHODS: dict[str, str] = {
    **dict.fromkeys(("fedavg", "lora", "peft", "fedit"), "method=fedlora"),
    "fedprox": "method=fedlora training.proximal=0.01",
    "fedavgm": "method=fedlora server.optimizer=momentum",
    **dict.fromkeys(("fedadam", "fedopt"), "method=fedlora server.optimizer=adam"),
    "fedyogi": "method=fedlora server.optimizer=yogi",
    "fedmedian": "method=fedlora server.merge=median",
    "fedtrimmedavg": "method=fedlora server.merge=trimmed_mean",
    "krum": "method=fedlora server.merge=krum",
    **dict.fromkeys(("multikrum", "multi_krum"), "method=fedlora server.merge=multi_krum"),
    "qlora": "method=fedlora quantization=4bit",
    **dict.fromkeys(("adapter", "adapters", "bottleneck"), "method=fedadapter"),
    "ia3": "method=fedia3",
    "bitfit": "method=fedbitfit",
    **dict.fromkeys(("prompt", "prompt_tuning"), "method=fedprompt"),
    **dict.fromkeys(("p_tuning", "ptuning"), "method=fedptuning"),
    **dict.fromkeys(("prefix", "prefix_tuning"), "method=fedprefix"),
    **dict.fromkeys(("central", "centralized", "sft"), "method=centralised"),
}
"""By a word that is typed as a method: the settings that are meant."""


def meant_key(key: str, known: Iterable[str]) -> str | None:
    """What someone means who types a key that does not exist; ``None`` if that is not clear.

    Args:
        key: as it was typed, perhaps with a table, as ``training.lr``.
        known: the keys that exist.
    """
    keys = sorted(known)
    leaf = key.rpartition(".")[2]
    same_leaf = [one for one in keys if one.rpartition(".")[2] == leaf]
    return (
        _nearest(key, keys, 0.85)
        or _in(KEYS, key)
        or _in(KEYS, leaf)
        or " or ".join(same_leaf)
        or _nearest(key, keys, 0.6)
    )


def meant_method(word: str) -> str | None:
    """The settings that are meant by a method's name of another library; ``None`` if unknown."""
    return _in(METHODS, word)


def _in(words: Mapping[str, str], word: str) -> str | None:
    return words.get(word.lower().replace("-", "_"))


def _nearest(key: str, keys: list[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=cutoff)), None)
