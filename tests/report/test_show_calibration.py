"""``droppeft calibrate``: what it prints, what it writes, and what it refuses."""

import json
import shlex
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chats import chat_settings
from droppeft import cli
from droppeft.command_line_exit import USER_ERROR
from droppeft.config import load_config
from droppeft.layer_dropout import Calibration
from droppeft.report import show_calibration as report


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["droppeft", "calibrate", *arguments])
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def settings_of(overrides: list[str]) -> list[str]:
    """Model, data and the settings that the command takes."""
    return [word for word in overrides if word.startswith(("model=", "data=", "training.m"))]


def test_from_the_command_line_to_the_files(
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, out = settings_of(tiny_overrides), tmp_path / "new" / "folder"
    options = ["--rows", "40", "--mean", "0.25", "--out", str(out), "--json"]
    assert run(monkeypatch, *words, *options, "training.precision=fp32") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "calibration.json").read_text()) == result
    assert (out / "calibration.png").stat().st_size > 5000
    assert ET.parse(out / "calibration.svg").getroot().tag.endswith("svg")
    assert (result["rows"], result["head_rows"]) == (20, 20)
    assert [len(result[name]) for name in ("added_loss", "gradient", "rates")] == [4, 4, 4]
    assert sum(result["rates"]) == pytest.approx(1)


def test_a_language_model_and_a_run_with_the_printed_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *settings_of(chat_settings(tmp_path)), "--rows", "12") == 0
    shown = capsys.readouterr().out
    assert "12 rows, " in shown
    [command] = [line for line in shown.splitlines() if line.startswith("  droppeft run ")]
    config = load_config(None, shlex.split(command)[2:])
    assert config.task == "causal_lm"
    assert config.dropout.rates is not None
    assert sum(config.dropout.rates) == pytest.approx(4 / 3, abs=0.002)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rounds=3"], "rounds has no effect on what layers are worth; leave it out"),
        (["--rows", "181"], "has 180 training rows; lower it"),
        (["adapter.type=ia3", "adapter.rank=4"], "adapter.rank: type ia3 has no such setting"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *settings_of(tiny_overrides), *arguments) == USER_ERROR
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1


def content(added_loss: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    layers = len(added_loss)
    found = Calibration(
        added_loss, (0.01,) * layers, (2.0,) * layers, (1.0,) * layers, 2.5, 32, 900, 2000, 0, 61.0
    )
    config = load_config(None, ["accelerator=cpu", "training.precision=fp32"], "droppeft")
    return {**report.content(config, ["model=m", "data=d.csv"], 1 / 3, found), **changes}


def shown(result: dict[str, Any]) -> str:
    console = Console(width=80, record=True)
    report.show(result, console)
    return " ".join(console.export_text().split())


def test_expensive_layers_are_named_and_never_dropped() -> None:
    text = shown(content((8.0, 0.1, 0.2, 0.2, 0.1, 2.0)))
    assert "Expensive to skip: layers 0 (+8.00), 5 (+2.00)." in text
    assert "Each adds more than 4 times the typical 0.200 nats" in text
    assert "32 rows, 900 tokens learnt" in text
    assert "1 min 01 s" in text
    assert "droppeft run method=droppeft model=m data=d.csv 'dropout.rates=[0," in text
    assert "0 8.000 0.010 ━━━━━━━━━━━━ 16.7% ━━━━━━━━━━━━ never" in text


def test_if_no_layer_is_expensive_the_most_expensive_ones_are_named() -> None:
    text = shown(content((0.1, 0.3, 0.2, 0.2)))
    assert "No layer is expensive to skip" in text
    assert "The most: layers 1 (+0.300), 2 (+0.200), 3 (+0.200)." in text


def test_the_figure_has_a_panel_for_each_value() -> None:
    wide = report.figure_of_result(content((8.0, 0.1, 0.2, 0.2, 0.1, 2.0)))
    assert [axis.get_ylabel() for axis in wide.axes] == [
        "added loss, nats",
        "gradient share",
        "drop rate",
    ]
    assert wide.axes[0].get_yscale() == "symlog"
    narrow = report.figure_of_result(content((0.1, 0.3, 0.2, 0.2), rates=None))
    assert len(narrow.axes) == 2
    assert narrow.axes[0].get_yscale() == "linear"
