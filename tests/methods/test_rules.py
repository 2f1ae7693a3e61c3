"""Rules about settings: the same message for overrides, files, comparisons and Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from droppeft import cli, methods
from droppeft.command_line_exit import USER_ERROR
from droppeft.comparison.grid import Comparison, cells, named_on_the_command_line
from droppeft.config import Config, build_config, load_config, parse_override
from droppeft.errors import DroppeftError
from droppeft.methods import METHODS, Method
from droppeft.methods.rules import check_settings
from droppeft.methods.step_settings import check_step_settings
from droppeft.methods.without_effect import NO_EFFECT, given, without_effect
from droppeft.resources.estimate import combinations
from droppeft.server.run import start_run
from runs import Recorder
from tiny import save_tiny_model

THOMPSON = "configurator.policy=budgeted_thompson"
HALF = "sharing.fraction=0.5"

IGNORED = [
    (
        "method=fedlora dropout.count=2",
        "dropout.count has no effect with method=fedlora; leave it out, or set method=droppeft",
    ),
    (
        "method=droppeft dropout.rates=[0.5,0.5] dropout.protect_first=2",
        "dropout.protect_first has no effect with dropout.rates, which has the rate of each layer",
    ),
    (
        "sharing.fraction=0.5",
        "has no effect with method=adaptive; leave it out, or set method=drop",
    ),
    (
        "task=causal_lm training.head_learning_rate=0.5",
        "has no effect with task=causal_lm, whose head is not trained",
    ),
    (
        "task=causal_lm evaluation.mistakes=3",
        "evaluation.mistakes has no effect with task=causal_lm; leave it out",
    ),
    (
        "method=local evaluation.mistakes=3",
        "evaluation.mistakes has no effect with method=local, which gives no global model",
    ),
    (
        "method=adaptive training.local_epochs=1 configurator.steps=[0.5]",
        "configurator.steps has no effect with training.local_epochs=1; they are shares of",
    ),
    (
        f"method=droppeft {THOMPSON} adapter.type=prompt_tuning configurator.depths=[[0.5],[0.25]]",
        "configurator.depths has no effect with adapter.type=prompt_tuning, which is trained",
    ),
    (
        "method=adaptive configurator.policy=layer_values configurator.reward=loss",
        "configurator.reward has no effect with configurator.policy=layer_values, which needs no",
    ),
    ("method=fedia3 training.loraplus_lr_ratio=4", "has no effect with adapter.type=ia3"),
    ("method=fedra ditto.pull=2", "leave it out, or set method=ditto"),
    ("method=fedra ditto.pull=1", "ditto.pull has no effect with method=fedra; leave it out"),
    (f"method=fedra {THOMPSON}", "configurator.policy has no effect with method=fedra"),
    (f"method=fedra {THOMPSON} dropout.count=1", "configurator.policy has no effect with method="),
    ("method=flexlora server.optimizer=adam", "server.optimizer has no effect with method=flex"),
    ("method=flora frozen.layers=2", "frozen.layers has no effect with method=flora"),
    ("method=ditto frozen.layers=1", "frozen.layers has no effect with method=ditto"),
    (
        "method=droppeft configurator.means=[0]",
        "configurator.means has no effect with configurator.policy=fixed",
    ),
    (
        f"method=droppeft {THOMPSON} dropout.count=2",
        "dropout.count has no effect with configurator.policy=budget",
    ),
    (f"method=droppeft {THOMPSON} dropout.schedule=recovery", "set configurator.policy=fixed"),
    (f"method=droppeft {THOMPSON} dropout.rates=[0,0]", "set configurator.policy=fixed"),
    (
        "method=droppeft sharing.criterion=cka",
        "sharing.criterion has no effect with sharing.fraction=1, where all layers are shared; "
        "leave it out, or set a smaller fraction",
    ),
    (
        "method=droppeft sharing.hysteresis=0",
        "sharing.hysteresis has no effect with sharing.fraction=1",
    ),
    (
        f"method=droppeft {HALF} sharing.criterion=position sharing.hysteresis=0",
        "sharing.hysteresis has no effect with sharing.criterion=position, whose scores never",
    ),
    (
        "server.step_size=0.5",
        "server.step_size has no effect with server.optimizer=none; leave it out, or set another",
    ),
    (
        "method=local server.merge=median",
        "server.merge has no effect with method=local, which does not merge the updates of several",
    ),
    (
        "method=centralised server.max_weight_multiple=0",
        "server.max_weight_multiple has no effect with method=centralised",
    ),
    (
        "privacy.epsilon=8 privacy.delta=1e-4 server.merge=median",
        "server.merge has no effect with privacy.epsilon or privacy.noise_multiplier, which clip",
    ),
    (
        "clients=2 server.clip_norm_multiple=5",
        "server.clip_norm_multiple has no effect with cohort_size=2, because fewer than three",
    ),
    (
        "clients=20 cohort_size=19 server.direction_check=false",
        "server.direction_check has no effect with cohort_size=19, because the directions of fewer",
    ),
    (
        "server.merge=median server.malicious_fraction=0.3",
        "server.malicious_fraction has no effect with server.merge=median; leave it out, or set",
    ),
    (
        "training.loss_on=all",
        "training.loss_on has no effect with task=classification; leave it out, or set task=",
    ),
    (
        "evaluation.personalised_generated=2",
        "evaluation.personalised_generated has no effect with task=classification; leave it out",
    ),
    (
        "task=causal_lm evaluation.personalised=false evaluation.personalised_generated=2",
        "evaluation.personalised_generated has no effect with evaluation.personalised=false; leave "
        "one of the two out",
    ),
    (
        "privacy.clip_norm=2",
        "privacy.clip_norm has no effect with neither privacy.epsilon nor privacy.noise_multiplier",
    ),
    ("flower.deadline_s=5", "flower.deadline_s has no effect with transport=in_process; leave"),
    (
        "sites=a.toml,b.toml partition.alpha=0.5",
        "partition.alpha has no effect with partition.kind=sites, where the rows to train on are",
    ),
    ("source.classes=a,b", "source.classes has no effect with task=classification and partition."),
]
IMPOSSIBLE = [
    (
        "clients=2 server.merge=krum",
        "server.merge=krum needs 3 updates in a round, but cohort_size=2; raise cohort_size, or",
    ),
    (
        f"method=droppeft {THOMPSON} server.merge=median",
        "server.merge=median gives all clients the same values, from which configurator.reward=",
    ),
    (
        "method=adaptive configurator.policy=layer_values server.merge=median",
        "server.merge=median gives all clients the same values, from which configurator.policy=la",
    ),
    (
        "method=droppeft configurator.policy=layer_values",
        "configurator.policy=layer_values cannot tell what dropping layers is worth; set conf",
    ),
    (
        "method=flexlora server.merge=trimmed_mean",
        "server.merge=trimmed_mean is not possible with method=flexlora, whose clients have diff",
    ),
    (
        "method=fedadapter server.merge=krum",
        "server.merge=krum takes all clients for one group; leave server.merge out",
    ),
    *(
        (f"sites=a.toml,b.toml {settings}", f"{sentence}, and a site refuses fewer than 4; raise")
        for settings, sentence in (
            (
                "task=causal_lm evaluation.personalised_generated=3",
                "evaluation.personalised_generated=3 asks each site to use 3 rows",
            ),
            (
                "evaluation.rows=6",
                "evaluation.rows=6 for 2 validation clients asks each site to use 3 rows",
            ),
            (
                "training.local_steps=1 training.batch_size=1",
                "training.local_steps=1 with training.batch_size=1 asks each site to use 1 row",
            ),
        )
    ),
    (
        "sites=a.toml,b.toml method=droppeft dropout.shape=calibrated",
        "dropout.shape=calibrated needs training rows on the server, which has none with partition."
        "kind=sites; measure the layers on rows of your own with `droppeft calibrate MODEL DATA`, "
        "and give the dropout.rates that it prints",
    ),
    ("method=fedfoo", "method=fedfoo: unknown method; known are droppeft"),
    ("adapter.type=ia3 adapter.rank=4", "adapter.rank: type ia3 has no such setting; leave it out"),
    ("adapter.type=loha quantization=4bit", "adapter.type=loha does not work with 4-bit weights"),
    ("method=droppeft training.offload=true", "training.offload=true saves no memory"),
    ("frozen.layers=1 adapter.type=prompt_tuning", "prompt_tuning is not in a layer; set"),
    (
        "method=fedsa_lora evaluation.personalised=false",
        "only the clients' own models can be measured; leave out evaluation.personalised=false",
    ),
    (
        "method=droppeft sharing.head=personal evaluation.personalised=false",
        "only the clients' own models can be",
    ),
    (
        f"method=droppeft {HALF} adapter.type=prompt_tuning",
        "adapter.type=prompt_tuning is in no layer",
    ),
    ("method=adaptive configurator.policy=fixed", "leave configurator.policy=fixed out"),
    ("method=adaptive configurator.means=[0.5]", "leave configurator.means out"),
    ("method=fedadapter adapter.type=lora", "adapter.type=lora; set adapter.type=bottleneck"),
    ("method=fedadapter cohort_size=2", "cohort_size=2; set it to 3 or more"),
    ("method=fedadapter frozen.layers=1", "leave frozen.layers=1 out"),
    ("method=fedadapter training.local_epochs=1", "instead of training.local_epochs"),
    ("method=fedhetlora adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
    ("method=fedhetlora adapter.options.use_rslora=true", "leave adapter.options.use_rslora out"),
    ("method=fedhetlora adapter.options.lora_bias=true", "leave adapter.options.lora_bias out"),
    ("method=fedsa_lora adapter.options.use_dora=true", "leave adapter.options.use_dora out"),
    ("method=fedra dropout.every=5", "dropout.every=5 is not possible; leave it out"),
    ("method=legend adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
    ("method=fedsa_lora adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
    ("method=centralised training.local_epochs=2", "set training.local_steps"),
    *(
        (f"method={name} {override}", sentence)
        for name in ("ffa_lora", "flexlora", "flora", "fedex_lora")
        for override, sentence in (
            ("adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
            ("adapter.options.use_dora=true", "leave adapter.options.use_dora out"),
        )
    ),
    *(
        (f"method={name} quantization=8bit", f"method={name} adds to the frozen weights")
        for name in ("flora", "fedex_lora")
    ),
    *(
        (f"method={name} adapter.type=lora", "adapter.type=lora; leave it out, or set method=")
        for name in ("fedprompt", "fedptuning", "fedprefix", "fedia3", "fedbitfit")
    ),
]


MessageOf = Callable[..., str]


@pytest.fixture
def message_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> MessageOf:
    """Returns a command's error message; the command is run in a folder that it may not change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *handler: None)

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["droppeft", *arguments])
        before = {*tmp_path.iterdir()}
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == USER_ERROR
        assert {*tmp_path.iterdir()} == before
        return capfd.readouterr().err

    return call


def tree_of(overrides: list[str]) -> dict[str, Any]:
    """The content of a file that says the same as these overrides."""
    tree: dict[str, Any] = {}
    for key, value in map(parse_override, overrides):
        *tables, leaf = key.split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
        place[leaf] = value
    return tree


@pytest.mark.parametrize(("settings", "sentence"), [*IGNORED, *IMPOSSIBLE])
def test_a_rule_holds_for_every_kind_of_input(
    settings: str, sentence: str, message_of: MessageOf, tmp_path: Path
) -> None:
    overrides = settings.split()
    file, comparison = tmp_path / "run.toml", tmp_path / "comparison.toml"
    file.write_text(tomli_w.dumps(tree_of(overrides)))
    comparison.write_text(tomli_w.dumps({"variants": {"plain": [], "odd": overrides}}))
    message = message_of("run", *overrides)
    assert message.startswith("droppeft: ")
    assert message.count("\n") == 1
    assert sentence in message
    assert sentence in message_of("run", "run.toml")
    in_comparison = message_of("compare", "comparison.toml")
    assert in_comparison.startswith("droppeft: variant 'odd': ")
    assert sentence in in_comparison
    with pytest.raises(DroppeftError) as raised:
        start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    assert message == f"droppeft: {raised.value}\n"


def test_every_rule_about_effects_has_a_case() -> None:
    found = [without_effect(load_config(None, overrides.split())) for overrides, _ in IGNORED]
    seen = {id(rule) for rules in found for rule in rules.values()}
    assert [rule.reason for rule in NO_EFFECT if id(rule) not in seen] == []


def test_a_method_that_computes_with_factors_says_which_options_it_knows() -> None:
    files = {name: Path(methods.__file__).with_name(f"{name}.py") for name in METHODS}
    computing = {
        name
        for name, file in files.items()
        if file.exists() and any(word in file.read_text() for word in ("sharing.factors", "LORA_"))
    }
    assert {"ffa_lora", "fedhetlora", "fedsa_lora", "flora"} <= computing
    undeclared = [name for name in computing if METHODS[name].lora_options is None]
    assert undeclared == []


def test_every_method_with_rules_has_a_case() -> None:
    named = {build_config(tree_of(overrides.split())).method for overrides, _ in IMPOSSIBLE}
    default = Method.__dataclass_fields__["check"].default
    assert {name for name, method in METHODS.items() if method.check is not default} <= named


@pytest.mark.parametrize("name", METHODS)
def test_defaults_satisfy_the_rules_of_their_method(name: str) -> None:
    config = load_config(None, [f"method={name}"])
    assert given(config) == {}
    check_settings(config)
    adjusted = METHODS[name].adjust(config)
    check_settings(adjusted)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=droppeft", THOMPSON, "configurator.means=[0]", "dropout.sampling=bernoulli"],
        [THOMPSON, "configurator.reward=loss"],
        ["method=droppeft", HALF, "sharing.criterion=cka", "sharing.hysteresis=0"],
        ["server.optimizer=yogi", "server.step_size=0.5"],
        ["server.optimizer=momentum"],
        ["method=flora", "server.merge=trimmed_mean", "server.malicious_fraction=0.3"],
        ["method=fedhetlora", "server.merge=multi_krum", "server.clip_norm_multiple=1"],
        ["transport=flower", "flower.deadline_s=5"],
        ["sites=a.toml,b.toml", "source.classes=a,b"],
        ["partition.kind=sites", "clients=3", "task=causal_lm"],
        ["method=ditto", "ditto.pull=1"],
        ["method=fedra", "dropout.count=2"],
    ],
)
def test_settings_that_have_an_effect_pass(overrides: list[str]) -> None:
    check_settings(load_config(None, overrides))


def test_a_setting_with_its_default_value_does_not_count_as_given() -> None:
    check_settings(load_config(None, ["method=fedlora", "dropout.protect_first=1"]))
    check_settings(load_config(None, ["method=fedadapter", "adapter.type=bottleneck"]))
    natural = load_config(None, ["partition.kind=natural", "partition.key=package"])
    assert given(natural).keys() >= {"partition.kind", "partition.key"}
    assert "partition.small" not in given(natural)


def test_the_configuration_of_a_finished_run_passes(whole_run: Path) -> None:
    check_settings(load_config(whole_run / "config.toml"))


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("examples/*.toml")), ids=str)
def test_an_example_passes(file: Path) -> None:
    check_settings(load_config(file))


# Settings of all variants of a comparison


def configs(**tree: Any) -> dict[str, Config]:
    found = cells(Comparison.model_validate({"seeds": [0], **tree}))
    return {cell.variant: cell.config for cell in found}


VARIANTS = {"plain": ["method=fedlora"], "drops": ["method=fedra"], "whole": ["method=droppeft"]}


def test_a_common_setting_is_for_the_variants_that_use_it() -> None:
    found = configs(variants=VARIANTS, settings=["dropout.count=2", "rounds=3"])
    assert [config.dropout.count for config in found.values()] == [None, 2, 2]
    assert {config.rounds for config in found.values()} == {3}


def test_a_common_setting_is_left_out_where_it_has_no_effect() -> None:
    variants = {"all": [], "half": [HALF], "arms": [THOMPSON]}
    common = ["method=droppeft", "sharing.criterion=cka", "dropout.count=1"]
    found = configs(variants=variants, settings=common)
    criteria = [config.sharing.criterion for config in found.values()]
    assert criteria == ["gradient_norm", "cka", "gradient_norm"]
    assert [config.dropout.count for config in found.values()] == [1, 1, None]


def test_a_common_setting_may_have_an_effect_on_one_data_set_only() -> None:
    tree = {"variants": VARIANTS, "data": ["easy", "hard"], "settings": ["sharing.criterion=cka"]}
    [easy, hard] = [
        cell.config
        for cell in cells(
            Comparison.model_validate({**tree, "seeds": [0], "data_settings": {"hard": [HALF]}})
        )
        if cell.variant == "whole"
    ]
    assert (easy.sharing.criterion, hard.sharing.criterion) == ("gradient_norm", "cka")
    with pytest.raises(
        DroppeftError, match=r"criterion=cka has no effect on any of the variants pl"
    ):
        configs(**tree)
    only = {**tree, "settings": [], "data_settings": {"hard": ["flower.deadline_s=5"]}}
    with pytest.raises(DroppeftError, match=r"flower.deadline_s=5 has no .*transport=in_process"):
        configs(**only)


@pytest.mark.parametrize("by_file", [True, False])
def test_a_common_setting_that_no_variant_uses_is_refused(
    message_of: MessageOf, tmp_path: Path, by_file: bool
) -> None:
    variants = {name: [f"method={name}"] for name in ("fedlora", "legend")}
    tree = {"variants": variants, "settings": ["rounds=3", "dropout.count=2"]}
    (tmp_path / "c.toml").write_text(tomli_w.dumps(tree))
    arguments = ["c.toml"] if by_file else ["fedlora", "legend", "rounds=3", "dropout.count=2"]
    assert message_of("compare", *arguments) == (
        "droppeft: dropout.count=2 has no effect on any of the variants fedlora, legend "
        "(with method=fedlora and method=legend); leave it out\n"
    )


def test_methods_on_the_command_line_take_the_settings_that_they_use() -> None:
    found = named_on_the_command_line(["fedlora", "fedra"], ["rounds=5", "dropout.count=2"], [3])
    [plain, drops] = [cell.config for cell in cells(found)]
    assert (plain.rounds, plain.dropout.count, plain.seed) == (5, None, 3)
    assert (drops.rounds, drops.dropout.count, drops.seed) == (5, 2, 3)
    with pytest.raises(DroppeftError, match="method=fedfoo: unknown method"):
        named_on_the_command_line(["fedfoo"], [])


# What a step costs


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("rounds=3", "rounds has no effect on what a step costs; leave it out"),
        ("training.local_epochs=1", "training.local_epochs has no effect on what a step costs"),
        (
            "method=ditto",
            "method=ditto has no effect on what a step of the configured adapter costs; leave it",
        ),
    ],
)
@pytest.mark.parametrize("command", [["profile"], ["estimate", "--memory", "1GB"]], ids=" ".join)
def test_what_does_not_change_costs_is_refused(
    settings: str, sentence: str, command: list[str], message_of: MessageOf
) -> None:
    overrides = ["model=config:bert-base", *settings.split()]
    assert sentence in message_of(*command, *overrides)


def test_what_changes_costs_passes() -> None:
    check_step_settings(["method=fedia3", "training.batch_size=4", "dropout.count=2"])


def test_the_file_of_a_whole_run_can_be_estimated(whole_run: Path) -> None:
    [config] = combinations(whole_run / "config.toml", ["training.batch_size=2"])
    assert config.training.batch_size == 2


@pytest.mark.parametrize("method", ["adaptive", "fedlora", "fedia3"])
def test_a_step_is_estimated_whatever_the_method_of_the_file(method: str, tmp_path: Path) -> None:
    model = f"model={save_tiny_model(tmp_path / 'model')}"
    (tmp_path / "run.toml").write_text(f'method = "{method}"\nrounds = 2\n')
    found = list(combinations(tmp_path / "run.toml", [model, "frozen.layers=0"]))
    assert {config.adapter.type for config in found} == {"ia3" if method == "fedia3" else "lora"}
    for config in found:
        check_settings(config)
