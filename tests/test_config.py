"""Configuration: accepted and refused values, error messages, and written files."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from droppeft.config import (
    Config,
    as_tree,
    build_config,
    known_keys,
    load_config,
    parse_override,
    read_toml,
    resolve,
    to_toml,
)
from droppeft.config.dropout import DEFAULT_MEAN_RATE
from droppeft.config.other_words import KEYS, METHODS
from droppeft.config.training import DEFAULT_LOCAL_STEPS
from droppeft.errors import DroppeftError


def file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(DroppeftError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    shown = caught.value.__context__ if not caught.value.__suppress_context__ else None
    assert (caught.value.__cause__ or shown) is None, "the traceback must show no other error"
    return message


# Defaults


def test_nothing_given_is_the_default_run() -> None:
    assert load_config(None) == Config()
    assert (Config().model, Config().data) == ("builtin", "builtin")


def test_the_default_method_is_adaptive_with_its_own_defaults() -> None:
    assert Config().method == "adaptive"
    assert Config() == load_config(None, ["method=adaptive"])
    assert (Config().frozen.layers, Config().dropout.mean) == ("half", 0.0)


def test_a_method_that_is_not_given_can_be_another_one() -> None:
    assert load_config(None, [], "droppeft") == load_config(None, ["method=droppeft"])
    assert load_config(None, ["method=fedlora"], "droppeft").method == "fedlora"


def test_defaults_among_mutually_exclusive_settings() -> None:
    assert load_config(None, ["method=droppeft"]).dropout.mean == DEFAULT_MEAN_RATE
    assert Config().training.local_steps == DEFAULT_LOCAL_STEPS
    assert (
        load_config(None, ["method=droppeft", "dropout.shape=decay"]).dropout.mean
        == DEFAULT_MEAN_RATE
    )


def test_every_setting_is_described() -> None:
    assert all(field.description for _, field in known_keys())


def test_a_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.rounds = 3
    with pytest.raises(ValidationError):
        config.dropout.mean = 0.1


# Overrides and files


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rounds=5", ("rounds", 5)),
        ("dropout.mean=0.5", ("dropout.mean", 0.5)),
        ("dropout.rates=[0, 0.5]", ("dropout.rates", [0, 0.5])),
        ("dropout.mean=.5", ("dropout.mean", 0.5)),
        ("target=-.5e1", ("target", -5.0)),
        ("dropout.rates=[0,.5]", ("dropout.rates", [0, 0.5])),
        ("data=./.5", ("data", "./.5")),
        ("data=a.5", ("data", "a.5")),
        ("method=fedlora", ("method", "fedlora")),
        ('method="fedlora"', ("method", "fedlora")),
        ("data=a=b.csv", ("data", "a=b.csv")),
        (" rounds =5", ("rounds", 5)),
        ("source.label=", ("source.label", "")),
    ],
)
def test_an_override_is_read_as_toml_or_as_text(
    override: str, expected: tuple[str, object]
) -> None:
    assert parse_override(override) == expected


@pytest.mark.parametrize("override", ["rounds", "=5", " =5", ""])
def test_an_override_without_key_or_equals_sign_is_refused(override: str) -> None:
    assert repr(override) in refusal(override)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "rounds = 7\nclients = 30\n[adapter]\nrank = 4\nalpha = 8.0\n")
    config = load_config(path, ["rounds=9", "adapter.rank=2"])
    assert (config.rounds, config.clients) == (9, 30)
    assert (config.adapter.rank, config.adapter.alpha) == (2, 8.0)


@pytest.mark.parametrize(
    ("overrides", "rank", "alpha"),
    [
        (["method=fedlora"], 8, 16),
        (["method=fedlora", "adapter.rank=4"], 4, 8),
        (["method=adaptive"], 16, 32),
        (["method=adaptive", "adapter.rank=8"], 8, 16),
        (["method=adaptive", "adapter.alpha=16"], 16, 16),
        (["method=adaptive", "adapter.type=ia3"], None, None),
    ],
)
def test_a_rank_alone_keeps_the_scale(
    overrides: list[str], rank: int | None, alpha: int | None
) -> None:
    adapter = load_config(None, overrides).adapter
    assert (adapter.rank, adapter.alpha) == (rank, alpha)


def test_the_last_of_two_overrides_wins() -> None:
    assert load_config(None, ["rounds=5", "rounds=6"]).rounds == 6


def test_the_order_of_overrides_of_different_keys_does_not_matter() -> None:
    overrides = ["clients=50", "cohort_size=40", "dropout.count=2"]
    assert load_config(None, overrides) == load_config(None, overrides[::-1])


@pytest.mark.parametrize("value", ["a,b", " a , b ", '["a", "b"]'])
def test_a_list_of_texts_may_be_written_with_commas(value: str) -> None:
    assert load_config(None, [f"source.text={value}"]).source.text == ("a", "b")


# Mutually exclusive settings: mean, count, rates; local_steps, local_epochs


def test_a_given_setting_removes_the_default_of_its_group() -> None:
    dropout = load_config(None, ["dropout.count=2"]).dropout
    assert (dropout.mean, dropout.count, dropout.rates) == (None, 2, None)
    dropout = load_config(None, ["dropout.rates=[0.0, 0.5]"]).dropout
    assert (dropout.mean, dropout.count, dropout.rates) == (None, None, (0.0, 0.5))
    training = load_config(None, ["training.local_epochs=1"]).training
    assert (training.local_steps, training.local_epochs) == (None, 1)


@pytest.mark.parametrize("value", ["mean = 0.2", "count = 1", "rates = [0.1, 0.2]"])
@pytest.mark.parametrize("override", ["mean=0.5", "count=3", "rates=[0.4, 0.4]"])
def test_an_override_replaces_the_files_mutually_exclusive_setting(
    tmp_path: Path, value: str, override: str
) -> None:
    path = file(tmp_path, f"[dropout]\n{value}\nshape = 'decay'\n")
    dropout = load_config(path, [f"dropout.{override}"]).dropout
    assert dropout == load_config(None, [f"dropout.{override}", "dropout.shape=decay"]).dropout


def test_an_override_of_another_key_leaves_the_files_choice(tmp_path: Path) -> None:
    path = file(tmp_path, "[dropout]\ncount = 1\n[training]\nlocal_epochs = 2\n")
    config = load_config(path, ["dropout.shape=decay", "training.batch_size=8"])
    assert (config.dropout.count, config.dropout.mean) == (1, None)
    assert (config.training.local_epochs, config.training.local_steps) == (2, None)


@pytest.mark.parametrize(
    "overrides",
    [
        ("dropout.mean=0.5", "dropout.count=2"),
        ("dropout.count=2", "dropout.rates=[0.5]"),
        ("dropout.mean=0.5", "dropout.rates=[0.5]"),
    ],
)
def test_two_mutually_exclusive_overrides_are_refused(overrides: tuple[str, str]) -> None:
    assert "only one of dropout.mean, dropout.count and dropout.rates" in refusal(*overrides)


def test_steps_and_epochs_at_once_are_refused() -> None:
    message = refusal("training.local_steps=5", "training.local_epochs=1")
    assert "only one of training.local_steps and training.local_epochs" in message


def test_two_mutually_exclusive_settings_in_the_file_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "[dropout]\nmean = 0.2\ncount = 1\n")
    message = refusal(path=path)
    assert "only one of" in message
    assert str(path) in message


# Refusals


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("round", "rounds"),
        ("dropout.maen", "dropout.mean"),
        ("training.lr_rate", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("rank", "adapter.rank"),
        ("kind", "partition.kind"),
        ("lr", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("optimizer.lr", "training.learning_rate"),
        ("batch-size", "training.batch_size"),
        ("epochs", "training.local_epochs (in each round) or rounds"),
        ("alpha", "adapter.alpha (scale) or partition.alpha (skew)"),
        ("schedule", "dropout.schedule or training.schedule"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key: str, nearest: str) -> None:
    message = refusal(f"{key}=1")
    assert "unknown key" in message
    assert f"did you mean {nearest}?" in message


def test_an_unknown_key_without_a_similar_one_points_to_the_list() -> None:
    assert "list all with: droppeft settings" in refusal("qqqqqq=1")


def test_a_table_needs_one_of_its_settings() -> None:
    assert refusal("dropout=.5") == "dropout is a table of settings; did you mean dropout.mean?"


def test_words_of_other_libraries_stand_for_settings_that_exist() -> None:
    """A setting that also exists in another library needs no entry."""
    known = {key for key, _ in known_keys()}
    assert not known & set(KEYS)
    for meaning in KEYS.values():
        named = [word for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)?", meaning) if word in known]
        assert named or meaning.startswith("--out ")
    for meaning in METHODS.values():
        assert load_config(None, meaning.split())


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "[dropout]\nmaen = 0.5\n")
    message = refusal(path=path)
    assert "dropout.maen" in message
    assert str(path) in message
    assert "did you mean dropout.mean?" in message


@pytest.mark.parametrize(
    "override",
    [
        "rounds=many",
        "rounds=1.5",
        "rounds=0",
        "seed=-1",
        f"seed={2**63}",
        "clients=[1]",
        "transport=true",
        "accelerator=gpu",
        "target=0",
        "dropout.mean=1.1",
        "dropout.mean=-0.1",
        "dropout.mean=nan",
        "dropout.count=-1",
        "dropout.count=1.5",
        "dropout.rates=[0.5, 1.5]",
        "dropout.rates=[0.5, nan]",
        "dropout.shape=flat",
        "dropout.sampling=coin",
        "dropout.protect_first=-1",
        "adapter.rank=0",
        "adapter.alpha=0",
        "adapter.dropout=1.0",
        "training.learning_rate=0",
        "training.learning_rate=inf",
        "training.local_steps=0",
        "training.precision=fp8",
        "partition.kind=random",
        "partition.alpha=0",
        "partition.min_rows=2",
        "source.text=a,b,c",
        "evaluation.every=0",
    ],
)
def test_a_wrong_value_names_its_key(override: str) -> None:
    key = override.partition("=")[0]
    message = refusal(override)
    assert key in message
    assert "unknown" not in message


def test_a_wrong_value_is_shown() -> None:
    assert "'many'" in refusal("rounds=many")
    assert "1.1" in refusal("dropout.mean=1.1")


def test_a_value_in_place_of_a_table_is_refused() -> None:
    assert "dropout" in refusal("dropout=0.5")
    assert refusal("rounds=5", "rounds.more=5").startswith("rounds.more: rounds is a value")


def test_settings_that_contradict_each_other_are_refused() -> None:
    message = refusal("cohort_size=6", "clients=5")
    assert "cohort_size=6" in message
    assert "clients=5" in message
    assert "partition.key" in refusal("partition.kind=natural")
    fractions = ("partition.validation_fraction=0.5", "partition.test_fraction=0.5")
    assert "no training rows" in refusal(*fractions)
    assert load_config(None, ["partition.kind=natural", "partition.key=user"]).partition.key


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    assert refusal(path=absent) == f"{absent}: no such configuration file"
    assert f"{tmp_path}: cannot be read" in refusal(path=tmp_path)
    broken = file(tmp_path, "rounds = \n")
    assert f"{broken}: not valid TOML" in refusal(path=broken)
    broken.write_text('Orthopädie = "orthopaedics"\n', encoding="utf-8")
    assert "letters such as ä needs quotes" in refusal(path=broken)
    broken.write_bytes(b"model = '\xff'")
    assert f"{broken}: cannot be read" in refusal(path=broken)


# Round trips


def tables() -> st.SearchStrategy[dict[str, object]]:
    rate = st.floats(0, 1)
    rivals = st.one_of(
        st.fixed_dictionaries({"mean": rate}),
        st.fixed_dictionaries({"count": st.integers(0, 48)}),
        st.fixed_dictionaries({"rates": st.lists(rate, min_size=1, max_size=24)}),
        st.just({}),
    )
    lengths = st.one_of(
        st.fixed_dictionaries({"local_steps": st.integers(1, 99)}),
        st.fixed_dictionaries({"local_epochs": st.integers(1, 9)}),
        st.just({}),
    )
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    return st.fixed_dictionaries(
        {"dropout": rivals, "training": lengths},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "model": text,
            "clients": st.integers(5, 1000),
            "target": st.floats(0.01, 0.99),
            "adapter": st.fixed_dictionaries(
                {"alpha": st.floats(1e-6, 1e6)},
                optional={"targets": st.lists(text, min_size=1), "rank": st.integers(1, 64)},
            ),
            "source": st.fixed_dictionaries({"text": st.lists(text, min_size=1, max_size=2)}),
        },
    )


@given(tables())
def test_as_tree_and_build_config_are_inverse(tree: dict[str, object]) -> None:
    config = build_config(tree)
    assert build_config(as_tree(config)) == config
    assert as_tree(build_config(as_tree(config))) == as_tree(config)


@given(tables())
def test_a_written_file_is_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    config = build_config(tree)
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_written_file_holds_every_setting_that_has_a_value(tmp_path: Path) -> None:
    tree = read_toml(file(tmp_path, to_toml(Config())))
    for key, _ in known_keys():
        table, _, leaf = key.rpartition(".")
        holder = getattr(Config(), table) if table else Config()
        written = tree.get(table, {}) if table else tree
        assert (leaf in written) == (getattr(holder, leaf) is not None)


@given(st.sampled_from([key for key, _ in known_keys()]))
def test_every_known_key_may_be_given_as_its_default(key: str) -> None:
    table, _, leaf = key.rpartition(".")
    value = getattr(getattr(Config(), table) if table else Config(), leaf)
    tree = {table: {leaf: value}} if table else {leaf: value}
    assert build_config(tree) == Config()


# What depends on the machine


def test_resolve_fills_in_the_accelerator_and_leaves_workers_to_the_machine() -> None:
    resolved = resolve(Config(), cuda=False)
    assert (resolved.threads, resolved.workers) == (1, 0)
    assert resolved.accelerator == "cpu"
    assert resolve(Config(), cuda=True).accelerator == "cuda"


@pytest.mark.parametrize(
    ("settings", "cuda", "bf16", "expected"),
    [
        ((), False, (), "fp32"),
        ((), False, ("cpu",), "bf16"),
        ((), True, ("cpu",), "fp32"),
        ((), True, ("cuda",), "bf16"),
        (("accelerator=cpu",), True, ("cuda",), "fp32"),
        (("training.precision=fp32",), False, ("cpu",), "fp32"),
        (("method=flora",), False, ("cpu",), "fp32"),
    ],
)
def test_resolve_takes_the_precision_that_the_hardware_does_well(
    settings: tuple[str, ...], cuda: bool, bf16: tuple[str, ...], expected: str
) -> None:
    config = resolve(load_config(None, settings), cuda=cuda, bf16=bf16)
    assert config.training.computed_in == expected


def test_resolve_keeps_what_was_chosen() -> None:
    config = load_config(None, ["threads=3", "accelerator=cpu", "training.precision=fp16"])
    assert resolve(config, cuda=True) == config


def test_resolve_refuses_a_missing_accelerator() -> None:
    with pytest.raises(DroppeftError, match="no CUDA device"):
        resolve(load_config(None, ["accelerator=cuda"]), cuda=False)


def test_resolve_makes_existing_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "builtin").mkdir()
    resolved = resolve(load_config(None, ["data=texts", "model=some/hub-id"]), cuda=False)
    assert resolved.data == str(tmp_path.resolve() / "texts")
    assert resolved.model == "some/hub-id"
    assert resolve(Config(), cuda=False).data == "builtin"


@pytest.mark.parametrize("name", ["./not-there", "../not-there", "/not/there"])
def test_resolve_leaves_a_path_that_does_not_exist_as_it_is(name: str) -> None:
    """Without ./ it would be taken for a Hub id."""
    config = resolve(load_config(None, [f"data={name}", f"model={name}"]), cuda=False)
    assert (config.data, config.model) == (name, name)


def test_resolve_expands_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE_DATA_ARE", str(tmp_path))
    (tmp_path / "ag").mkdir()
    config = resolve(load_config(None, ["data=$WHERE_DATA_ARE/ag"]), cuda=False)
    assert config.data == str(tmp_path / "ag")


@pytest.mark.parametrize("key", ["rounds", "training.learning_rate"])
def test_true_is_not_a_number(key: str) -> None:
    assert key in refusal(f"{key}=true")


# Device profiles and the modelled clock

WATCH = """
[clock]
profiles = ["watch", "jetson_tx2"]
[clock.custom.watch]
effective_flops_per_s = 1e10
memory_bytes = 5e8
idle_watts = 0.1
train_watts = 1
download = 1e6
upload = {mean = 1e5, deviation = 1e5, least = 1e4, most = 1e6}
"""


def test_a_custom_profile_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(WATCH)
    config = load_config(path)
    watch = config.clock.custom["watch"]
    assert (watch.step_overhead_s, watch.availability, watch.train_watts) == (0.0, 1.0, 1.0)
    assert (watch.download.mean, watch.download.deviation) == (1e6, 0.0)
    assert (watch.upload.least, watch.upload.most) == (1e4, 1e6)
    path.write_text(to_toml(config))
    assert load_config(path) == config


def test_an_override_changes_a_profile_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(WATCH)
    config = load_config(path, ["clock.custom.watch.availability=0.5"])
    assert config.clock.custom["watch"].availability == 0.5
    assert config.clock.custom["watch"].memory_bytes == 5e8


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("memory_bytes = 5e8", "", "clock.custom.watch.memory_bytes in .*: field required"),
        ("memory_bytes = 5e8", "memory_bytes = 0", "memory_bytes in .*greater than 0, got 0"),
        (
            "memory_bytes =",
            "memory_byts =",
            "clock.custom.watch in .*: memory_byts is not a key of a",
        ),
        ("1e10", '"fast"', "effective_flops_per_s in .*valid number, got 'fast'"),
        ("1e10", "1e10\npeak_flops_per_s = 1e9", "effective_flops_per_s is more than peak_flops"),
        ("1e6\nupload", "0\nupload", "clock.custom.watch.download.mean in .*greater than 0, got 0"),
        (", least = 1e4, most = 1e6", "", "a bandwidth with a deviation needs least and most"),
        ("least = 1e4", "least = 1e7", "watch.upload in .*: least is more than most"),
        ("train_watts = 1", "train_watts = 1\navailability = 2", "less than or equal to 1, got 2"),
    ],
)
def test_a_mistake_in_a_profile_is_one_sentence(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = tmp_path / "run.toml"
    assert old in WATCH
    path.write_text(WATCH.replace(old, new))
    message = refusal(path=path)
    assert re.search(expected, message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("cohort", "factor", "drawn"), [(5, 1.0, 5), (5, 1.3, 7), (10, 1.1, 11), (1, 1.01, 2)]
)
def test_over_selection_is_rounded_up(cohort: int, factor: float, drawn: int) -> None:
    # In floating point, 10 * 1.1 is 11.000000000000002.
    config = load_config(None, [f"cohort_size={cohort}", f"clock.over_selection={factor}"])
    assert config.drawn == drawn


def test_drawing_more_clients_than_exist_is_refused() -> None:
    message = refusal("cohort_size=15", "clock.over_selection=1.5")
    assert "draws 23 clients for a cohort of 15, but there are only 20" in message


@pytest.mark.parametrize(
    "override", ["clock.over_selection=0.9", "clock.deadline_s=0", "clock.profiles=[]"]
)
def test_an_invalid_clock_is_refused(override: str) -> None:
    assert override.partition("=")[0] in refusal(override)
