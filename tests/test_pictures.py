"""The pictures of the method in docs/assets are those that their script draws."""

import xml.etree.ElementTree as ET

from scripts import draw_method


def test_pictures_are_those_of_their_script() -> None:
    for name, text in draw_method.pictures().items():
        ET.fromstring(text)
        assert (draw_method.ASSETS / name).read_text(encoding="utf-8") == text, (
            f"{name} is stale: run python scripts/draw_method.py"
        )


def test_slower_devices_get_less_work() -> None:
    """They train fewer layers; for language models in most steps, not in all."""
    work = {
        task: [
            (len(panel.steps), panel.steps[0].count(draw_method.Mode.TRAIN))
            for panel in draw_method.chosen(task)
        ]
        for task in ("classification", "causal_lm")
    }
    assert work == {
        "classification": [(12, 6), (12, 6), (12, 4)],
        "causal_lm": [(12, 12), (12, 12), (12, 4)],
    }
