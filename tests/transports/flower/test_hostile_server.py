"""A site does what its node file allows, whatever a server asks for, and sends no secret."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from droppeft.transports.flower import client_runtime
from hostile_server import FILE, NO_MODEL, PROBES, Probe, Site
from runs import prepared_run

EXPECTED = {
    (case["group"], case["asks"]): case["result"]
    for case in json.loads(FILE.read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def site(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield Site.of(prepared_run(*tiny_overrides), tmp_path_factory.mktemp("site"))
    client_runtime._client.cache_clear()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.what.replace(" ", "_"))
def test_what_a_server_can_ask_for(
    probe: Probe, site: Site, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run python tests/hostile_server.py to update docs/hostile_server.json."""
    monkeypatch.setenv("SECRET", "canaryvar")
    assert site.outcome(probe) == EXPECTED[probe.group, probe.what]


def test_all_probes_are_in_the_documentation() -> None:
    assert list(EXPECTED) == [(probe.group, probe.what) for probe in PROBES]


def test_every_probe_is_refused_unless_it_only_names_what_a_site_never_reads() -> None:
    read = {what for (_, what), result in EXPECTED.items() if not result.startswith("refused: ")}
    assert len(read) == 5
    assert read <= {probe.what for probe in PROBES if probe.group == "files and settings"}
    assert not read & {probe.what for probe in PROBES if probe.node == NO_MODEL}
