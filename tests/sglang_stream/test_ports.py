from __future__ import annotations

import socket

import pytest

from sglang_stream.errors import InvalidRequest
from sglang_stream.ports import choose_port, reachable_url, require_free_port


def test_a_port_in_use_is_refused_by_the_name_of_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=rf"--port {port} .*in use") as caught:
            require_free_port("127.0.0.1", port)
    assert caught.value.param == "--port"
    require_free_port("127.0.0.1", port)


def test_an_unknown_host_is_refused_by_the_name_of_its_flag() -> None:
    with pytest.raises(InvalidRequest, match=r"--host no\.such\.host\.invalid"):
        require_free_port("no.such.host.invalid", 80)


def test_a_chosen_port_can_be_used_and_is_no_outgoing_one() -> None:
    port = choose_port()
    assert 20000 <= port < 30000
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_addresses_are_shown_as_a_client_can_use_them(host: str, url: str) -> None:
    assert reachable_url(host, 80) == url
