"""Which device profile a client is assigned, and what is drawn for it in a round."""

from collections import Counter
from statistics import NormalDist

import pytest

from droppeft.config import Bandwidth, ClockConfig
from droppeft.costs.device_profiles import PROFILES, Fleet, make_fleet, profile_named
from droppeft.errors import DroppeftError

JETSONS = ("jetson_tx2", "jetson_xavier_nx", "jetson_agx_xavier")


def fleet_of(*names: str, clients: int = 30, seed: int = 0) -> Fleet:
    return make_fleet(ClockConfig(profiles=names or JETSONS), clients, seed)


@pytest.mark.parametrize("clients", [1, 2, 30, 31, 32])
def test_profiles_have_equal_shares(clients: int) -> None:
    fleet = fleet_of(clients=clients)
    counts = Counter(fleet.names)
    assert sum(counts.values()) == clients
    assert max(counts.values()) - min(counts[name] for name in JETSONS) <= 1


def test_the_assignment_follows_from_the_seed() -> None:
    assert fleet_of(seed=1) == fleet_of(seed=1)
    assert len({fleet_of(seed=seed).names for seed in range(10)}) == 10


def test_a_link_that_does_not_vary_is_its_mean() -> None:
    fleet = fleet_of()
    assert {fleet.download_bytes_per_s(round, 3) for round in range(20)} == {15e6}


def test_upload_of_a_jetson_is_a_clipped_normal() -> None:
    fleet = fleet_of()
    drawn = [
        fleet.upload_bytes_per_s(round, client) for round in range(200) for client in range(20)
    ]
    assert min(drawn) == 1e6
    assert max(drawn) == 3e6
    # N(1, 2.25^2): half the mass is below 1, and 19 % above 3 MB/s.
    above = 1 - NormalDist(1, 2.25).cdf(3)
    assert drawn.count(1e6) / 4000 == pytest.approx(0.5, abs=5 * (0.25 / 4000) ** 0.5)
    assert drawn.count(3e6) / 4000 == pytest.approx(above, abs=5 * (0.16 / 4000) ** 0.5)


def test_a_draw_depends_on_seed_round_and_client_alone() -> None:
    first, again, other = fleet_of(), fleet_of(), fleet_of(seed=1)
    pairs = [(round, client) for round in range(10) for client in range(10)]
    drawn = [first.upload_bytes_per_s(*pair) for pair in pairs]
    in_reverse = [again.upload_bytes_per_s(*pair) for pair in reversed(pairs)]
    assert drawn == in_reverse[::-1]
    assert drawn != [other.upload_bytes_per_s(*pair) for pair in pairs]
    between = [speed for speed in drawn if 1e6 < speed < 3e6]
    assert len(set(between)) == len(between) > 10


def test_availability_is_a_frequency() -> None:
    fleet = fleet_of("phone", "laptop_cpu", clients=20)
    available = Counter(
        fleet.names[client]
        for round in range(200)
        for client in range(20)
        if fleet.is_available(round, client)
    )
    assert available["laptop_cpu"] == 2000
    assert available["phone"] / 2000 == pytest.approx(0.8, abs=5 * (0.16 / 2000) ** 0.5)


def test_a_custom_profile_takes_precedence() -> None:
    custom = PROFILES["phone"].model_copy(update={"memory_bytes": 1e9})
    assert profile_named("phone", {"phone": custom}).memory_bytes == 1e9
    assert profile_named("jetson_tx2", {"phone": custom}) == PROFILES["jetson_tx2"]


def test_an_unknown_profile_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(
        DroppeftError, match=r"'jetson'; known are jetson_tx2, .*, watch; define others"
    ):
        profile_named("jetson", {"watch": PROFILES["phone"]})


def test_a_bandwidth_in_bytes_per_second_is_positive_whatever_is_drawn() -> None:
    for profile in PROFILES.values():
        for link in (profile.download, profile.upload):
            assert link.deviation == 0 or (link.least or 0) > 0


def test_a_bandwidth_is_clipped_to_its_bounds() -> None:
    wide = Bandwidth(mean=1.0, deviation=1e9, least=2.0, most=2.0)
    profile = PROFILES["phone"].model_copy(update={"upload": wide})
    fleet = Fleet(0, ("clipped",), {"clipped": profile})
    assert {fleet.upload_bytes_per_s(round, 0) for round in range(20)} == {2.0}
