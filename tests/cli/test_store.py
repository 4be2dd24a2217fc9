"""The command that holds the address of runs whose replicas come and go."""

import socket
import time

from lightning_curvadion.cli.main import main


def test_a_store_ends_when_nothing_goes_on(capsys):
    start = time.monotonic()
    assert main(["store", "--port", "0", "--host", "127.0.0.1", "--idle", "0.5"]) == 0
    assert time.monotonic() - start < 5
    assert "store: replicas meet at port" in capsys.readouterr().out


def test_a_port_that_is_taken_is_one_clear_error(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["store", "--port", port, "--host", "127.0.0.1", "--idle", "0.5"]) == 2
    assert f"store: port {port} cannot be had" in capsys.readouterr().err
