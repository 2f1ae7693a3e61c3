"""``droppeft estimate``: from overrides to a table, without loading a model."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from droppeft import cli
from droppeft.command_line_exit import FAILED, USER_ERROR
from droppeft.config import Config, build_config, load_config
from droppeft.costs.device_profiles import PROFILES
from droppeft.costs.step_memory import Memory
from droppeft.errors import DroppeftError
from droppeft.resources.device_limits import Limits, limits, parse_bytes
from droppeft.resources.estimate import (
    GRID,
    Option,
    combinations,
    least_savings,
    mean_flops,
    option,
)
from refusals import refused
from tiny import save_tiny_model

ONE = ("training.batch_size=2", "training.max_length=8", "frozen.layers=0", "quantization=none")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model={save_tiny_model(tmp_path_factory.mktemp('tiny'), 6)}"


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``droppeft`` with arguments: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["droppeft", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        code = stop.value.code
        return int(code or 0), shown.out, shown.err

    return run


# Overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("512mb", 512e6), ("2kib", 2048)],
)
def test_a_size_of_memory(text: str, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "8", "GB", "8 apples", "-8GB", "0GB", "8,5GB"])
def test_what_is_not_a_memory_size_is_refused(text: str) -> None:
    with pytest.raises(DroppeftError, match="is not a memory size; write it with its unit, as 8GB"):
        parse_bytes(text)


def test_several_values_make_all_combinations(tiny: str) -> None:
    overrides = [tiny, *ONE, "training.precision=fp32,bf16", "training.checkpointing=true"]
    found = list(combinations(None, [*overrides, "dropout.mean=0, 0.5", "dropout.shape=decay"]))
    pairs = [(one.training.precision, one.dropout.mean) for one in found]
    assert sorted(pairs) == [("bf16", 0), ("bf16", 0.5), ("fp32", 0), ("fp32", 0.5)]
    assert all(one.dropout.shape == "decay" and one.training.checkpointing for one in found)


def test_the_grid_is_tried_by_default(tiny: str) -> None:
    found = list(combinations(None, [tiny]))
    values = {
        "training.batch_size": {4, 16},
        "dropout.mean": {0, 0.25, 0.5, 0.75},
        "frozen.layers": {0, 3},
        "training.precision": {"fp32", "bf16"},
        "quantization": {"none", "8bit", "4bit"},
        "training.checkpointing": {False, True},
    }
    for key, expected in values.items():
        assert {value_of(one, key) for one in found} == expected, key
    assert len(found) == 2 * 4 * 2 * 2 * 3 * 2


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_what_a_file_sets_is_not_varied(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "quantization = '4bit'\n[training]\nbatch_size = 7\nprecision = 'bf16'\n"
        "checkpointing = true\n[dropout]\ncount = 2\n[frozen]\nlayers = 1\n"
    )
    [one] = combinations(path, [tiny])
    assert (one.quantization, one.training.batch_size, one.dropout.count) == ("4bit", 7, 2)
    two = list(combinations(path, [tiny, "training.batch_size=7,8"]))
    assert [one.training.batch_size for one in two] == [7, 8]


def test_a_count_takes_the_place_of_mean_rates(tiny: str) -> None:
    overrides = [tiny, *ONE, "training.precision=fp32", "training.checkpointing=false"]
    [one] = combinations(None, [*overrides, "dropout.count=2"])
    assert (one.dropout.count, one.dropout.mean) == (2, None)
    assert option(one, None).active == 4


# Options


def one_option(tiny: str, *overrides: str) -> Option:
    [config] = combinations(
        None,
        [
            *(tiny, *ONE, "training.precision=fp32", "training.checkpointing=false"),
            *("dropout.mean=0", *overrides),
        ],
    )
    return option(config, PROFILES["jetson_tx2"])


def test_every_saving_saves(tiny: str) -> None:
    plain = one_option(tiny)
    for overrides in (["dropout.mean=0.5"], ["frozen.layers=3"], ["training.checkpointing=true"]):
        assert one_option(tiny, *overrides).memory.stored < plain.memory.stored, overrides
    assert plain.step_s is not None
    for overrides in (["dropout.mean=0.5"], ["frozen.layers=3"]):
        assert (one_option(tiny, *overrides).step_s or 0) < plain.step_s
    frozen = one_option(tiny, "frozen.layers=3").memory
    assert frozen.optimizer < plain.memory.optimizer
    assert frozen.weights == plain.memory.weights
    for kind in ("8bit", "4bit"):
        small = one_option(tiny, f"quantization={kind}")
        assert small.memory.weights < plain.memory.weights
        assert small.memory.stored == plain.memory.stored


def test_larger_tasks_take_more(tiny: str) -> None:
    sizes = [
        one_option(tiny, f"training.batch_size={rows}", f"training.max_length={length}")
        for rows, length in ((1, 8), (2, 8), (2, 16))
    ]
    totals = [one.memory.total for one in sizes]
    assert totals == sorted(totals)
    assert len(set(totals)) == 3


def test_a_schedule_needs_room_for_full_depth(tiny: str) -> None:
    plain = one_option(tiny, "dropout.mean=0.5")
    for schedule in ("recovery", "warm_up"):
        one = one_option(tiny, "dropout.mean=0.5", f"dropout.schedule={schedule}")
        assert (plain.active, one.active) == (3, 6)
        assert one.memory.stored > plain.memory.stored


def test_a_method_that_drops_nothing_needs_full_depth(tiny: str) -> None:
    one = one_option(tiny, "dropout.mean=0.5", "method=fedia3")
    assert one.active == 6
    assert one.step_s == one_option(tiny, "adapter.type=ia3").step_s


def test_frozen_layers_that_are_not_cached_run_forward(tiny: str) -> None:
    cached, again = (
        one_option(tiny, "frozen.layers=3", f"frozen.cache={c}") for c in ("true", "false")
    )
    full = one_option(tiny)
    assert cached.step_s is not None
    assert again.step_s is not None
    assert full.step_s is not None
    assert cached.step_s < again.step_s < full.step_s


def test_rates_are_of_the_layers_after_the_frozen_ones(tiny: str) -> None:
    """Of six layers three are frozen; a third of three is one."""
    one = one_option(tiny, "frozen.layers=3", "dropout.mean=0.33333333333333331")
    assert (one.active, one.num_layers) == (2, 6)


def test_mean_work_is_in_proportion_to_the_rate(tiny: str) -> None:
    full, half = (mean_flops(one_option(tiny, f"dropout.mean={m}").config) for m in (0, 0.5))
    counts_rest = 2 * half - full  # what does not depend on layers
    assert full > half > full / 2.2
    assert mean_flops(one_option(tiny, "dropout.mean=0.25").config) == pytest.approx(
        0.75 * (full - counts_rest) + counts_rest
    )


def test_a_truncated_backward_costs_less(tiny: str) -> None:
    full, half, mixed = (
        one_option(tiny, "dropout.mean=0", f"backward.depths={depths}")
        for depths in ("[1]", "[0.5]", "[1, 0.5]")
    )
    assert (full.active, half.active, mixed.active) == (6, 3, 6)
    assert half.memory.total < full.memory.total == mixed.memory.total
    assert half.memory.weights == full.memory.weights  # all layers run
    flops = [mean_flops(one.config) for one in (full, half, mixed)]
    assert flops[1] < flops[2] == pytest.approx((flops[0] + flops[1]) / 2)
    frozen = one_option(
        tiny, "dropout.mean=0", "frozen.layers=3", "frozen.cache=false", "backward.depths=[1]"
    )
    assert mean_flops(frozen.config) == pytest.approx(flops[1])
    assert frozen.memory.stored == half.memory.stored


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning"])
def test_a_truncated_backward_needs_an_adapter_inside_layers(tiny: str, adapter: str) -> None:
    with refused(f"backward.depths below 1 need an adapter inside layers, but {adapter} is not"):
        one_option(tiny, "dropout.mean=0", f"adapter.type={adapter}", "backward.depths=[1, 0.5]")


@pytest.mark.parametrize(
    "overrides",
    [
        ["frozen.layers=2", "dropout.mean=0.25", "quantization=8bit"],
        ["dropout.every=round", "training.offload=true", "adapter.rank=4", "threads=3"],
        ["adapter.type=oft", "adapter.options.oft_block_size=16"],
        ["dropout.protect_first=0", "seed=3"],
        ["backward.depths=[1, 0.5]", "dropout.mean=0"],
    ],
)
def test_the_overrides_of_an_option_reproduce_it(tiny: str, overrides: list[str]) -> None:
    one = one_option(tiny, *overrides)
    assert load_config(None, one.overrides) == one.config
    assert len(one.overrides) <= len(["method=droppeft", *GRID, *overrides])


def test_rates_of_each_layer_are_overrides_too(tiny: str) -> None:
    overrides = [each for each in ONE if each != "frozen.layers=0"]
    rates = "dropout.rates=[0, 0.5, 0.5, 0.25, 0, 0]"
    fixed = ("training.precision=fp32", "training.checkpointing=false", "frozen.layers=0")
    [config] = combinations(None, [tiny, *overrides, *fixed, rates])
    one = option(config, None)
    assert load_config(None, one.overrides) == config


def test_weights_in_memory_are_those_of_layers_that_local_training_runs(tiny: str) -> None:
    def weights(*overrides: str) -> int:
        return one_option(tiny, *overrides).memory.weights

    half, every = ("dropout.mean=0.5", "dropout.protect_first=0"), "dropout.every=round"
    block = (weights() - weights("training.offload=true", every, *half)) / 3
    assert block > 0
    for overrides, loaded in (
        (("frozen.layers=2",), 4),
        (("frozen.layers=2", *half), 4),
        (("frozen.layers=2", *half, every), 2),
        (("frozen.layers=2", "frozen.cache=false", *half, every), 4),
        ((every,), 6),
    ):
        left = weights() - weights("training.offload=true", *overrides)
        assert left == pytest.approx((6 - loaded) * block), overrides


# What is shown


def made_up(memory: int, **settings: Any) -> Option:
    tree: dict[str, Any] = {
        "method": "droppeft",
        "dropout": {"mean": 0},
        "training": {"precision": "fp32"},
    }
    for key, value in settings.items():
        *tables, name = key.split("__")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
        node[name] = value
    parts = Memory(memory, 0, 0, 0, 0, 0, 0)
    return Option(build_config(tree), 6, 6, parts, None)


def test_the_options_that_save_least_are_shown() -> None:
    plain = made_up(9, training__batch_size=16)
    small = made_up(5, training__batch_size=16, quantization="8bit")
    smaller = made_up(4, training__batch_size=16, quantization="4bit")
    dropped = made_up(6, training__batch_size=16, dropout__mean=0.5)
    both = made_up(3, training__batch_size=16, dropout__mean=0.5, quantization="8bit")
    other = made_up(2, training__batch_size=4, quantization="4bit")
    everything = [both, other, smaller, small, dropped]
    assert least_savings([*everything, plain]) == [plain, other]
    assert least_savings(everything) == [small, dropped, other]
    assert least_savings([both, smaller]) == [smaller, both]


savings = st.tuples(
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([0, 3]),
    st.sampled_from(["fp32", "bf16"]),
    st.sampled_from(["none", "8bit", "4bit"]),
    st.booleans(),
)


@given(st.lists(savings, min_size=1, max_size=20, unique=True))
def test_an_option_that_is_not_shown_saves_more_than_one_that_is(chosen: list[Any]) -> None:
    options = [
        made_up(
            1,
            dropout__mean=mean,
            frozen__layers=frozen,
            training__precision=precision,
            quantization=bits,
            training__checkpointing=checkpointing,
        )
        for mean, frozen, precision, bits, checkpointing in chosen
    ]
    shown = least_savings(options)
    assert shown

    def above(one: Option, other: Option) -> bool:
        return all(a >= b for a, b in zip(one.savings, other.savings, strict=True))

    for one in options:
        assert any(above(one, other) for other in shown)
    assert not any(above(one, other) for one in shown for other in shown if one is not other)


def test_excess_is_of_the_tighter_limit() -> None:
    one = replace(made_up(50), step_s=3.0)
    assert one.excess(Limits(100, None, None)) == 0.5
    assert one.excess(Limits(100, 2.0, None)) == 1.5
    assert one.excess(Limits(20, 2.0, None)) == 2.5


def test_limits_of_a_command_line() -> None:
    assert limits("8GB", None, None, {}) == Limits(8_000_000_000, None, None)
    tx2 = PROFILES["jetson_tx2"]
    assert limits(None, 2.0, "jetson_tx2", {}) == Limits(tx2.memory_bytes, 2.0, tx2)
    assert limits("1GB", None, "mine", {"mine": tx2}) == Limits(1e9, None, tx2)


# The command


def test_estimate_shows_what_fits(command: Command, tiny: str) -> None:
    code, out, _ = command("estimate", "--memory", "2GB", tiny, *ONE, "dropout.mean=0,0.5")
    assert code == 0
    assert "fits 2.0 GB" in out
    assert "8 of 8 combinations fit, shown: 1, with no more savings than necessary" in out
    assert f"droppeft run method=droppeft {tiny} adapter.type=lora training.batch_size=2 " in out


def test_estimate_in_json(command: Command, tiny: str) -> None:
    code, out, _ = command(
        *("estimate", "--memory", "2GB", "--profile", "jetson_tx2", "--seconds", "5", "--json"),
        *(tiny, *ONE, "training.precision=fp32", "dropout.mean=0,0.5,0.9"),
    )
    assert code == 0
    found = json.loads(out)
    assert (found["memory_bytes"], found["step_s"], found["profile"]) == (2e9, 5.0, "jetson_tx2")
    rows = found["combinations"]
    assert len(rows) == 4  # with and without checkpointing
    assert [row["shown"] for row in rows] == [True, False, False, False]
    for row in rows:
        parts = row["memory_bytes"]
        assert parts.pop("total") == sum(parts.values()) == 2e9 - row["headroom_bytes"]
        assert row["fits"]
        assert row["step_modelled_s"] > 0
    [(reason, count)] = found["refused"].items()
    assert "a mean drop rate of 0.9 over 6 layers is impossible" in reason
    assert count == 2


def test_estimate_names_the_nearest_option(command: Command, tiny: str) -> None:
    """The process alone takes more than the limit; the smallest option is named."""
    code, out, _ = command("estimate", "--memory", "100MB", tiny, *ONE, "dropout.mean=0,0.5")
    assert code == FAILED
    assert "None of 8 combinations fits 100.0 MB" in out
    assert "The nearest one needs 50" in out
    assert "dropout.mean=0.5" in out
    assert "training.checkpointing=" in out


def test_estimate_of_a_large_architecture_loads_nothing(command: Command) -> None:
    """13 billion weights in 4 bits, and 160 million of embeddings in 16 bits."""
    code, out, _ = command(
        *("estimate", "--memory", "12GB", "--json", "model=config:llama-13b"),
        *("training.batch_size=1", "quantization=4bit", "frozen.layers=0"),
        *("training.precision=bf16", "training.checkpointing=true", "dropout.mean=0.5"),
    )
    assert code == 0
    [row] = json.loads(out)["combinations"]
    weights = row["memory_bytes"]["weights"]
    linear = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert weights == pytest.approx(linear / 2 * (1 + 1 / 32) + 2 * 32000 * 5120, rel=0.005)
    assert row["fits"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "memory is unknown; give --memory 8GB or --profile jetson_tx2"),
        (["--memory", "much"], "'much' is not a memory size"),
        (
            ["--memory", "1GB", "--seconds", "2"],
            "--seconds needs --profile, which says how fast the device is",
        ),
        (["--profile", "toaster"], "unknown profile 'toaster'; known are jetson_tx2"),
        (["--memory", "1GB", "model=config:nothing"], "config:nothing: unknown architecture"),
        (["--memory", "1GB", "training.batch_size=4,x"], "training.batch_size: input should be"),
        (["--memory", "1GB", "quantization=3bit"], "quantization: input should be 'none'"),
        (["--memory", "1GB", "adapter.typ=lora"], "unknown key adapter.typ"),
        (["--memory", "1GB", "training.max_length=1000", *ONE[2:]], "more than the 512 positions"),
    ],
)
def test_a_mistake_is_one_sentence(command: Command, arguments: list[str], sentence: str) -> None:
    code, out, err = command("estimate", *arguments)
    assert code == USER_ERROR
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_the_commands_of_the_pages_are_valid() -> None:
    """Their overrides are settings that exist."""
    pages = (Path(__file__).parents[2] / "docs").glob("*/*.md")
    lines = [line for page in pages for line in page.read_text("utf-8").splitlines()]
    found = [line.split() for line in lines if line.startswith("droppeft estimate ")]
    assert found
    for line in found:
        overrides = [each for each in line if "=" in each and not each.startswith("-")]
        assert list(combinations(None, overrides))


def test_the_settings_of_the_grid_exist() -> None:
    for key in GRID:
        value_of(load_config(None, ["method=droppeft"]), key)


def test_all_that_fits_can_be_shown(command: Command, tiny: str) -> None:
    _, out, _ = command("estimate", "--memory", "2GB", "--all", tiny, *ONE, "dropout.mean=0,0.5")
    rows = [line for line in out.splitlines() if " GB " in line or " MB " in line]
    assert len(rows) >= 8


def test_no_bar_outside_of_a_terminal(tiny: str) -> None:
    from droppeft.report.show_estimate import consider, show

    console = Console(file=None, record=True, width=120)
    configs = list(combinations(None, [tiny, *ONE, "dropout.mean=0"]))
    answer = consider(configs, Limits(2e9, None, None), None, console)
    assert console.export_text(clear=False) == ""
    show(answer, console, everything=False)
    assert "fits 2.0 GB" in console.export_text()


# Language models


def test_a_language_model_is_estimated(command: Command) -> None:
    """Without weights; what is printed names the task, so that it can be run."""
    options = ("training.batch_size=2", "training.max_length=64", "dropout.mean=0.5")
    more = ("frozen.layers=0", "quantization=none,4bit", "training.checkpointing=false")
    named = ("model=config:llama-1b", "task=causal_lm", *options, *more, "training.precision=bf16")
    code, shown, _ = command("estimate", *named, "--memory", "64GB", "--json", "--all")
    assert code == 0
    found = json.loads(shown)
    assert '"task": "causal_lm"' in json.dumps(found)


def test_weights_in_bf16_take_half(tiny: str) -> None:
    named = ("model=config:llama-1b", "task=causal_lm", *ONE, "dropout.mean=0")
    fixed = (*named, "training.checkpointing=false")
    full, half = (
        option(next(iter(combinations(None, [*fixed, f"training.precision={one}"]))), None).memory
        for one in ("fp32", "bf16")
    )
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
    assert half.trained == full.trained
