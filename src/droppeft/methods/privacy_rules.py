"""Settings that a differentially private run refuses. Ours.

What clients send may reach models, ledgers and choices in one way alone: as the noisy sum of
clipped changes. Each client is drawn independently of the others, so that no client may take
another one's place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.federated_method import Method


@dataclass(frozen=True)
class Refusal:
    """Settings that are refused.

    Attributes:
        when: whether a configuration has them.
        setting: the setting as it is; ``{config...}`` is filled in.
        reason: what it does that noise does not cover.
        instead: what to set.
        table: only methods that use this table have the setting; ``None`` for all methods.
    """

    when: Callable[[Config], bool]
    setting: str
    reason: str
    instead: str
    table: str | None = None


REFUSALS = (
    Refusal(
        lambda config: config.configurator.policy != "fixed",
        "configurator.policy={config.configurator.policy}",
        "learns from what single clients measure",
        "configurator.policy=fixed",
        table="configurator",
    ),
    Refusal(
        lambda config: config.sharing.fraction < 1,
        "sharing.fraction={config.sharing.fraction:g}",
        "lets clients send scores of their layers",
        "sharing.fraction=1",
        table="sharing",
    ),
    Refusal(
        lambda config: config.sharing.head == "personal",
        "sharing.head=personal",
        "makes the server remember what each client saved",
        "sharing.head=shared",
        table="sharing",
    ),
    Refusal(
        lambda config: config.evaluation.validation_clients > 0,
        "evaluation.validation_clients={config.evaluation.validation_clients}",
        "chooses the delivered round by losses on clients' rows",
        "evaluation.validation_clients=0",
    ),
    Refusal(
        lambda config: config.evaluation.personalised,
        "evaluation.personalised=true",
        "writes metrics of each client's rows into the result",
        "evaluation.personalised=false",
    ),
    Refusal(
        lambda config: config.quorum > 1,
        "quorum={config.quorum}",
        "merges or not by how many clients replied",
        "quorum=1",
    ),
    Refusal(
        lambda config: config.clock.over_selection > 1,
        "clock.over_selection={config.clock.over_selection:g}",
        "lets a client take another one's place",
        "clock.over_selection=1",
    ),
)


def check_privacy(method: Method, methods: Mapping[str, Method], config: Config) -> None:
    """Refuse settings with which the run would not be differentially private.

    Args:
        method: of the run.
        methods: all methods by name, for the message.
        config: of the run.

    Raises:
        DroppeftError: the method or a setting uses more of what clients send than the sum of
            their changes, ``privacy.delta`` is too large, or the package opacus is missing.
    """
    privacy = config.privacy
    if not privacy.is_on:
        return
    require("privacy", "differential privacy")
    if method.sent is None:
        able = sorted(name for name, one in methods.items() if one.sent is not None)
        raise DroppeftError(
            f"method={method.name} uses more of what clients send than the mean of their changes, "
            f"which noise does not cover; set method to one of {', '.join(able)}, or leave "
            "privacy.* out"
        )
    for refusal in REFUSALS:
        if (refusal.table is None or refusal.table in method.tables) and refusal.when(config):
            raise DroppeftError(
                f"{refusal.setting.format(config=config)} {refusal.reason}, which noise does not "
                f"cover; set {refusal.instead}, or leave privacy.* out"
            )
    if config.clients and privacy.delta is not None and privacy.delta * config.clients >= 1:
        raise DroppeftError(
            f"privacy.delta={privacy.delta:g} is not less than 1/clients="
            f"{1 / config.clients:g}, so that one client's rows could be published; lower it"
        )
