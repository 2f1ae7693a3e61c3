"""A SuperLink serves its own machine, and nodes whose keys are registered, and nobody else."""

import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from droppeft.report.show_keys import superlink_command
from droppeft.transports.flower.keys import make_federation
from flower_example import example

HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"
"""Source addresses of a client; for the SuperLink the second is another machine."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Keys of one client, and the port of a running SuperLink."""
    folder = tmp_path_factory.mktemp("federation") / "keys"
    make_federation(folder, [HERE], 1)
    [port] = example.free_ports(1)
    command = superlink_command(folder / "server", "0.0.0.0", port)
    assert "--enable-supernode-auth" not in command  # it is so anyway
    words = [sys.executable, "-m", *example.words(command)]
    quiet = example.environment(folder)
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(words, env=quiet, stdout=log, stderr=log) as process,
    ):
        example.wait_for(port)
        yield folder, port
        process.kill()  # it would wait for the connections of the tests


def connected(kind: Any, federation: tuple[Path, int], source: str, *interceptors: Any) -> Any:
    """One of Flower's clients that has the public certificate and connects from an address."""
    folder, port = federation
    authority = folder / "client-0" / "ca.crt"
    client = kind.from_server_address(f"{HERE}:{port}", False, authority.read_bytes(), interceptors)
    trust = ssl.create_default_context(cafile=str(authority))
    client._client = httpx.Client(transport=httpx.HTTPTransport(verify=trust, local_address=source))
    return client


def status_of(call: Any, request: Any) -> int:
    """HTTP status of a call of Flower's API."""
    try:
        call(request)
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def node(federation: tuple[Path, int], key: ec.EllipticCurvePrivateKey) -> tuple[Any, bytes]:
    public = key.public_key()
    signed = NodeAuthHttpInterceptor(key, public)
    return connected(FleetHttpClient, federation, ELSEWHERE, signed), public_key_to_bytes(public)


def test_a_stranger_with_the_public_certificate_is_kept_out(federation: tuple[Path, int]) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    fleet, public = node(federation, key)
    control = connected(ControlHttpClient, federation, ELSEWHERE)
    runtime = connected(RuntimeHttpClient, federation, ELSEWHERE)
    register = RegisterNodeRequest(public_key=public)
    assert status_of(control.RegisterNode, register) == 403
    assert status_of(control.StartRun, StartRunRequest()) == 403
    assert status_of(control.ListNodes, ListNodesRequest()) == 403
    assert status_of(runtime.AcquireTask, AcquireTaskRequest()) == 403
    assert status_of(fleet.RegisterNode, RegisterNodeFleetRequest(public_key=public)) >= 400
    activate = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    assert status_of(fleet.ActivateNode, activate) >= 400
    for path in ("/docs", "/openapi.json", "/v1/fleet/../control/list-nodes", "//v1/control/"):
        assert control._client.get(f"{control._base_url}{path}").status_code in (403, 404)


def test_what_a_proxy_on_the_own_machine_hands_on_is_from_elsewhere(
    federation: tuple[Path, int],
) -> None:
    control = connected(ControlHttpClient, federation, HERE)
    for header in ({"X-Forwarded-For": HERE}, {"Forwarded": f"for={HERE}"}):
        control._client.headers = header
        assert status_of(control.ListNodes, ListNodesRequest()) == 403


def test_the_own_machine_registers_a_node_which_connects_from_elsewhere(
    federation: tuple[Path, int],
) -> None:
    folder, _ = federation
    key = load_ssh_private_key((folder / "client-0" / "client-0.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    fleet, public = node(federation, key)
    activate = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    assert status_of(fleet.ActivateNode, activate) >= 400
    control = connected(ControlHttpClient, federation, HERE)
    sent = try_load_public_key(folder / "server" / "clients" / "client-0.pub")
    assert status_of(control.RegisterNode, RegisterNodeRequest(public_key=sent)) == 200
    assert status_of(fleet.ActivateNode, activate) == 200
    runtime = connected(RuntimeHttpClient, federation, HERE)
    assert status_of(runtime.AcquireTask, AcquireTaskRequest()) == 401  # without the secret
