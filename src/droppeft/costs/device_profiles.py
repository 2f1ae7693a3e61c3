"""Device profiles by name, and which one each client of a run is assigned.

Sources: data sheets of the Jetsons; their effective speed is fitted to published step times by
``benchmarks/clock_calibration``. Values marked as assumptions are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean

from droppeft import seeds
from droppeft.config import Bandwidth, ClockConfig, DeviceProfile
from droppeft.errors import DroppeftError

GIB = float(2**30)
DRAWS = 1000

# Of the test bed with those step times: upload N(1, 2.25^2) clipped to 1-3 MB/s, download 15 MB/s.
_DOWNLOAD = Bandwidth(mean=15e6)
_UPLOAD = Bandwidth(mean=1e6, deviation=2.25e6, least=1e6, most=3e6)
_FITTED = "peak, memory and watts: data sheet; effective speed: fitted; idle watts: assumption"

PROFILES: dict[str, DeviceProfile] = {
    "jetson_tx2": DeviceProfile(
        peak_flops_per_s=1.33e12,
        effective_flops_per_s=4.11e11,
        memory_bytes=8 * GIB,
        idle_watts=3.0,
        train_watts=15.0,
        download=_DOWNLOAD,
        upload=_UPLOAD,
        source=_FITTED,
    ),
    "jetson_xavier_nx": DeviceProfile(
        peak_flops_per_s=6e12,
        effective_flops_per_s=7.87e11,
        memory_bytes=8 * GIB,
        idle_watts=4.0,
        train_watts=20.0,
        download=_DOWNLOAD,
        upload=_UPLOAD,
        source=_FITTED,
    ),
    "jetson_agx_xavier": DeviceProfile(
        peak_flops_per_s=11e12,
        effective_flops_per_s=1.18e12,
        memory_bytes=32 * GIB,
        idle_watts=7.0,
        train_watts=30.0,
        download=_DOWNLOAD,
        upload=_UPLOAD,
        source=_FITTED,
    ),
    "phone": DeviceProfile(
        peak_flops_per_s=1e12,
        effective_flops_per_s=1.5e11,
        step_overhead_s=0.05,
        memory_bytes=3 * GIB,
        idle_watts=1.0,
        train_watts=5.0,
        download=Bandwidth(mean=5e6, deviation=3e6, least=1e6, most=12e6),
        upload=Bandwidth(mean=1.5e6, deviation=1e6, least=0.25e6, most=4e6),
        availability=0.8,
        source="assumption: a graphics unit of 1 TFLOP/s in half precision, of which training "
        "reaches 15 %; 3 of 8 GiB are left to it; on a mobile network",
    ),
    "laptop_cpu": DeviceProfile(
        peak_flops_per_s=7.7e11,
        effective_flops_per_s=3e11,
        step_overhead_s=0.02,
        memory_bytes=16 * GIB,
        idle_watts=5.0,
        train_watts=28.0,
        download=Bandwidth(mean=12.5e6),
        upload=Bandwidth(mean=2.5e6),
        source="assumption: 8 cores of 32 FLOPs per cycle at 3 GHz in fp32, of which training "
        "reaches 40 %; 100 and 20 Mbit/s",
    ),
    "datacentre_gpu": DeviceProfile(
        peak_flops_per_s=3.12e14,
        effective_flops_per_s=1e14,
        step_overhead_s=0.03,
        memory_bytes=80 * GIB,
        idle_watts=60.0,
        train_watts=400.0,
        download=Bandwidth(mean=1.25e9),
        upload=Bandwidth(mean=1.25e9),
        source="peak, memory and watts: data sheet of an A100 in bf16; assumption: training "
        "reaches a third; 10 Gbit/s",
    ),
}
"""The built-in profiles. A configuration defines more in tables ``[clock.custom.NAME]``."""


@dataclass(frozen=True)
class Fleet:
    """The device profile of each client of a run. Every draw follows from (seed, round, client).

    Attributes:
        seed: of the run.
        names: name of each client's profile.
        profiles: these profiles by name.
    """

    seed: int
    names: tuple[str, ...]
    profiles: Mapping[str, DeviceProfile]

    def profile(self, client: int) -> DeviceProfile:
        """The profile that is assigned to a client."""
        return self.profiles[self.names[client]]

    def is_available(self, round: int, client: int) -> bool:
        """Whether the client can take part in a round."""
        rng = seeds.python_generator(self.seed, purpose="presence", round=round, client=client)
        return rng.random() < self.profile(client).availability

    def download_bytes_per_s(self, round: int, client: int) -> float:
        """Download bandwidth of a client in a round."""
        return self._drawn(self.profile(client).download, "download", round, client)

    def upload_bytes_per_s(self, round: int, client: int) -> float:
        """Upload bandwidth of a client in a round."""
        return self._drawn(self.profile(client).upload, "upload", round, client)

    def _drawn(self, link: Bandwidth, purpose: str, round: int, client: int) -> float:
        rng = seeds.python_generator(self.seed, purpose=purpose, round=round, client=client)
        drawn = rng.gauss(link.mean, link.deviation)
        return min(max(drawn, link.least or drawn), link.most or drawn)


@cache
def seconds_per_byte(link: Bandwidth) -> float:
    """Mean over rounds of 1 / bandwidth, where the bandwidth is drawn and clipped in each round.

    This differs from 1 / (mean bandwidth).
    """
    if not link.deviation:
        return 1 / link.mean
    normal = NormalDist(link.mean, link.deviation)
    drawn = [normal.inv_cdf((index + 0.5) / DRAWS) for index in range(DRAWS)]
    return fmean(1 / min(max(speed, link.least or speed), link.most or speed) for speed in drawn)


def make_fleet(settings: ClockConfig, clients: int, seed: int) -> Fleet:
    """Assign each client one of the configured profiles, in shares that are as equal as possible.

    Raises:
        DroppeftError: a profile is neither built in nor defined in the configuration.
    """
    profiles = {name: profile_named(name, settings.custom) for name in settings.profiles}
    order = seeds.numpy_generator(seed, purpose="profiles").permutation(clients)
    names = tuple(settings.profiles[number % len(settings.profiles)] for number in order)
    return Fleet(seed, names, profiles)


def profile_named(name: str, custom: Mapping[str, DeviceProfile]) -> DeviceProfile:
    """Look up a profile; a custom profile takes precedence over a built-in one of the same name.

    Raises:
        DroppeftError: there is no such profile; the message lists the known ones.
    """
    known = {**PROFILES, **custom}
    if name not in known:
        raise DroppeftError(
            f"unknown profile {name!r}; known are {', '.join(known)}; "
            f"define others in tables [clock.custom.NAME]"
        )
    return known[name]
