"""Rules about settings: the same sentence by words, by file, in a comparison and from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from droppeft import cli
from droppeft.comparison.grid import Comparison, cells, named_on_the_command_line
from droppeft.config import Config, build_config, load_config, parse_word
from droppeft.errors import DroppeftError
from droppeft.methods import METHODS, Method
from droppeft.methods.rules import NO_EFFECT, check_costly, check_settings, given, without_effect
from droppeft.resources.estimate import combinations
from droppeft.server.run import start_run
from runs import Recorder

THOMPSON = "configurator.policy=budgeted_thompson"
HALF = "sharing.fraction=0.5"

IGNORED = [
    ("method=fedlora dropout.count=2", "dropout.count has no effect with method=fedlora; leave it"),
    ("method=fedra ditto.pull=1", "ditto.pull has no effect with method=fedra; leave it out"),
    (f"method=fedra {THOMPSON}", "configurator.policy has no effect with method=fedra"),
    (f"method=fedra {THOMPSON} dropout.count=1", "configurator.policy has no effect with method="),
    ("method=flexlora server.optimizer=adam", "server.optimizer has no effect with method=flex"),
    ("method=flora frozen.layers=2", "frozen.layers has no effect with method=flora"),
    ("method=ditto frozen.layers=1", "frozen.layers has no effect with method=ditto"),
    ("configurator.refresh=3", "configurator.refresh has no effect with configurator.policy=fixed"),
    (f"{THOMPSON} dropout.count=2", "dropout.count has no effect with configurator.policy=budget"),
    (f"{THOMPSON} dropout.shape=decay", "set configurator.policy=fixed"),
    (
        f"{THOMPSON} configurator.reward_rows=4",
        "configurator.reward_rows has no effect with configurator.reward=agreement, which no ",
    ),
    (
        "sharing.criterion=cka",
        "sharing.criterion has no effect with sharing.fraction=1, where all layers are shared; "
        "leave it out, or set a smaller fraction",
    ),
    ("sharing.hysteresis=0", "sharing.hysteresis has no effect with sharing.fraction=1"),
    (f"{HALF} sharing.score_rows=8", "with sharing.criterion=gradient_norm, which does not run"),
    (
        f"{HALF} sharing.criterion=position sharing.hysteresis=0",
        "sharing.hysteresis has no effect with sharing.criterion=position, which never changes",
    ),
    (
        "server.step_size=0.5",
        "server.step_size has no effect with server.optimizer=none; leave it out, or set another",
    ),
    (
        "method=fedlora server.optimizer=momentum server.tau=0.1",
        "server.tau has no effect with server.optimizer=momentum",
    ),
    ("flower.deadline_s=5", "flower.deadline_s has no effect with transport=in_process; leave"),
]
IMPOSSIBLE = [
    ("method=fedfoo", "method=fedfoo: unknown method; known are droppeft"),
    ("adapter.type=ia3 adapter.rank=4", "adapter.rank: type ia3 has no such setting; leave it out"),
    ("adapter.type=loha quantization=4bit", "adapter.type=loha does not work on weights of 4 bits"),
    ("training.offload=true", "training.offload=true keeps nothing off"),
    ("frozen.layers=1 adapter.type=prompt_tuning", "prompt_tuning is not in a layer; choose"),
    (
        "method=fedsa_lora evaluation.personalised=false",
        "no accuracy but the personalised one; leave out evaluation.personalised=false",
    ),
    ("sharing.head=personal evaluation.personalised=false", "no accuracy but the personalised one"),
    (f"{HALF} adapter.type=prompt_tuning", "adapter.type=prompt_tuning is in no layer"),
    (
        f"{HALF} sharing.criterion=cka sharing.score_rows=3",
        "sharing.criterion=cka compares rows with each other, for which it takes 4; set sharing.",
    ),
    ("sharing.factors=product adapter.type=ia3", "sharing.factors=product is about LoRA's A and B"),
    ("sharing.factors=product sharing.mean=everyone", "set sharing.factors=separate"),
    ("sharing.factors=product server.optimizer=adam", "no gradient for server.optimizer=adam"),
    ("method=fedadapter adapter.type=lora", "adapter.type=lora; set adapter.type=bottleneck"),
    ("method=fedadapter cohort_size=2", "cohort_size=2; set it to 3 or more"),
    ("method=fedadapter frozen.layers=1", "leave frozen.layers=1 out"),
    ("method=fedadapter training.local_epochs=1", "instead of training.local_epochs"),
    ("method=fedadaopt adapter.type=lora", "adapter.type=lora; set adapter.type=bottleneck"),
    ("method=fedhetlora adapter.type=ia3", "adapter.type=ia3; set adapter.type=lora"),
    ("method=fedhetlora adapter.options.use_rslora=true", "leave adapter.options.use_rslora out"),
    ("method=fedra dropout.every=5", "dropout.every=5 is not possible, leave it out"),
    ("method=legend adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
    ("method=fedsa_lora adapter.type=ia3", "adapter.type=ia3 has none, leave it out"),
    ("method=centralised training.local_epochs=2", "set training.local_steps"),
    *(
        (f"method={name} {word}", said)
        for name in ("ffa_lora", "flexlora", "flora", "fedex_lora")
        for word, said in (
            ("adapter.type=ia3", "adapter.type=ia3 has none; set adapter.type=lora"),
            ("adapter.options.use_dora=true", "leave adapter.options.use_dora out"),
        )
    ),
    *(
        (f"method={name} quantization=8bit", f"method={name} adds to the frozen weights")
        for name in ("flora", "fedex_lora")
    ),
    *(
        (f"method={name} adapter.type=lora", "adapter.type=lora; leave it out, or take method=")
        for name in ("fedprompt", "fedptuning", "fedprefix", "fedia3", "fedbitfit")
    ),
]


Told = Callable[..., str]


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Told:
    """What a command says on stderr in an empty folder, which it leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *handler: None)

    def call(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["droppeft", *words])
        before = {*tmp_path.iterdir()}
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == cli.USER_ERROR
        assert {*tmp_path.iterdir()} == before
        return capfd.readouterr().err

    return call


def tree_of(words: list[str]) -> dict[str, Any]:
    """What a file has to hold to say the same as words."""
    tree: dict[str, Any] = {}
    for key, value in map(parse_word, words):
        *tables, leaf = key.split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
        place[leaf] = value
    return tree


@pytest.mark.parametrize(("settings", "sentence"), [*IGNORED, *IMPOSSIBLE])
def test_a_rule_holds_by_every_way_in(
    settings: str, sentence: str, told: Told, tmp_path: Path
) -> None:
    words = settings.split()
    file, comparison = tmp_path / "run.toml", tmp_path / "comparison.toml"
    file.write_text(tomli_w.dumps(tree_of(words)))
    comparison.write_text(tomli_w.dumps({"members": {"plain": [], "odd": words}}))
    said = told("run", *words)
    assert said.startswith("droppeft: ")
    assert said.count("\n") == 1
    assert sentence in said
    assert sentence in told("run", "run.toml")
    in_comparison = told("compare", "comparison.toml")
    assert in_comparison.startswith("droppeft: member 'odd': ")
    assert sentence in in_comparison
    with pytest.raises(DroppeftError) as raised:
        start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert said == f"droppeft: {raised.value}\n"


def test_every_rule_about_effects_has_a_case() -> None:
    found = [without_effect(load_config(None, words.split())) for words, _ in IGNORED]
    seen = {id(rule) for rules in found for rule in rules.values()}
    assert [rule.reason for rule in NO_EFFECT if id(rule) not in seen] == []


def test_every_method_with_rules_has_a_case() -> None:
    named = {build_config(tree_of(words.split())).method for words, _ in IMPOSSIBLE}
    silent = Method.__dataclass_fields__["check"].default
    assert {name for name, one in METHODS.items() if one.check is not silent} <= named


@pytest.mark.parametrize("name", METHODS)
def test_defaults_keep_to_the_rules_of_their_method(name: str) -> None:
    config = load_config(None, [f"method={name}"])
    assert given(config) == {}
    check_settings(config)
    adjusted = METHODS[name].adjust(config)
    check_settings(adjusted)


@pytest.mark.parametrize(
    "words",
    [
        [THOMPSON, "configurator.refresh=3", "dropout.sampling=bernoulli"],
        [THOMPSON, "configurator.reward=loss", "configurator.reward_rows=4"],
        [HALF, "sharing.criterion=cka", "sharing.score_rows=8", "sharing.hysteresis=0"],
        ["server.optimizer=yogi", "server.tau=0.1", "server.step_size=0.5"],
        ["server.optimizer=momentum", "server.momentum=0.5"],
        ["transport=flower", "flower.deadline_s=5"],
        ["method=ditto", "ditto.pull=1"],
        ["method=fedra", "dropout.count=2"],
    ],
)
def test_settings_that_have_an_effect_pass(words: list[str]) -> None:
    check_settings(load_config(None, words))


def test_a_default_that_is_written_is_not_given() -> None:
    check_settings(load_config(None, ["method=fedlora", "dropout.protect_first=1"]))
    check_settings(load_config(None, ["method=fedadapter", "adapter.type=bottleneck"]))


def test_the_configuration_of_a_finished_run_passes(whole_run: Path) -> None:
    check_settings(load_config(whole_run / "config.toml"))


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("examples/*.toml")), ids=str)
def test_an_example_passes(file: Path) -> None:
    check_settings(load_config(file))


# What is set for all members of a comparison


def configs(**tree: Any) -> dict[str, Config]:
    found = cells(Comparison.model_validate({"seeds": [0], **tree}))
    return {cell.variant: cell.config for cell in found}


MEMBERS = {"plain": ["method=fedlora"], "drops": ["method=fedra"], "whole": ["method=droppeft"]}


def test_a_common_setting_is_for_those_who_heed_it() -> None:
    found = configs(variants=MEMBERS, settings=["dropout.count=2", "rounds=3"])
    assert [one.dropout.count for one in found.values()] == [None, 2, 2]
    assert {one.rounds for one in found.values()} == {3}


def test_so_is_one_without_effect_beside_others() -> None:
    variants = {"all": [], "half": [HALF], "arms": [THOMPSON]}
    found = configs(variants=variants, settings=["sharing.criterion=cka", "dropout.count=1"])
    criteria = [one.sharing.criterion for one in found.values()]
    assert criteria == ["gradient_norm", "cka", "gradient_norm"]
    assert [one.dropout.count for one in found.values()] == [1, 1, None]


def test_a_setting_of_one_of_the_data_may_be_heeded_there_alone() -> None:
    tree = {"members": MEMBERS, "data": ["easy", "hard"], "settings": ["sharing.criterion=cka"]}
    [easy, hard] = [
        cell.config
        for cell in cells(
            Comparison.model_validate({**tree, "seeds": [0], "data_settings": {"hard": [HALF]}})
        )
        if cell.variant == "whole"
    ]
    assert (easy.sharing.criterion, hard.sharing.criterion) == ("gradient_norm", "cka")
    with pytest.raises(DroppeftError, match=r"criterion=cka: none of plain, drops, whole heeds it"):
        configs(**tree)
    only = {**tree, "settings": [], "data_settings": {"hard": ["flower.deadline_s=5"]}}
    with pytest.raises(DroppeftError, match=r"flower.deadline_s=5: none of .*transport=in_process"):
        configs(**only)


@pytest.mark.parametrize("by_file", [True, False])
def test_a_common_setting_that_nobody_heeds(told: Told, tmp_path: Path, by_file: bool) -> None:
    variants = {name: [f"method={name}"] for name in ("fedlora", "legend")}
    tree = {"members": variants, "settings": ["rounds=3", "dropout.count=2"]}
    (tmp_path / "c.toml").write_text(tomli_w.dumps(tree))
    words = ["c.toml"] if by_file else ["fedlora", "legend", "rounds=3", "dropout.count=2"]
    assert told("compare", *words) == (
        "droppeft: dropout.count=2: none of fedlora, legend heeds it, it has no effect with "
        "method=fedlora and method=legend; leave it out\n"
    )


def test_methods_on_the_command_line_take_the_settings_that_they_heed() -> None:
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
        ("method=ditto", "whatever the method makes of it; leave method out, and set adapter"),
    ],
)
@pytest.mark.parametrize("command", [["profile"], ["estimate", "--memory", "1GB"]], ids=" ".join)
def test_what_does_not_change_costs_is_refused(
    settings: str, sentence: str, command: list[str], told: Told
) -> None:
    words = ["model=config:bert-base", *settings.split()]
    assert sentence in told(*command, *words)


def test_what_changes_costs_passes() -> None:
    check_costly(["method=fedia3", "training.batch_size=4", "dropout.count=2"])


def test_the_file_of_a_whole_run_can_be_estimated(whole_run: Path) -> None:
    [config] = combinations(whole_run / "config.toml", ["training.batch_size=2"])
    assert config.training.batch_size == 2
