"""``examples/elastic.py``: replicas of one address are one run. ``test_elastic.py`` kills and adds some."""

import preloaded
from launching import ROOT, environment, free_port
from training import python_path


def test_replicas_of_one_address_are_one_run(tmp_path):
    port = str(free_port())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    variables = {**environment(**address), "PYTHONPATH": python_path(ROOT, ROOT / "tests/helpers")}
    serve = tmp_path / "serve.py"
    serve.write_text("import sys\nfrom lightning_curvadion.cli.main import main\nsys.exit(main(sys.argv[1:]))\n")
    words = ["store", "--port", port, "--host", "127.0.0.1"]
    store = preloaded.start(serve, *words, folder=tmp_path, output=tmp_path / "store", **variables)
    replicas = {
        name: preloaded.start(
            ROOT / "examples/elastic.py",
            *("--train", "--steps", "30", "--name", name),
            folder=tmp_path,
            output=tmp_path / name,
            **variables,
        )
        for name in "AB"
    }
    try:
        for name, replica in replicas.items():
            printed = (tmp_path / name).read_text() if replica.wait(timeout=120) else ""
            assert replica.wait() == 0, printed[-3000:]
    finally:
        for process in (store, *replicas.values()):
            process.kill()
    assert (tmp_path / "store").read_text().splitlines()[0] == f"store: replicas meet at port {port}"
    for name in replicas:
        printed = (tmp_path / name).read_text()
        assert f"{name}, step 0: 2 replicas, 0 lost" in printed and "the run ends after 30 steps" in printed, printed
