"""`python scripts/two_nodes.py [--submit] [RECIPE] [--OPTION=VALUE ...]`: a run on two Ray nodes of this machine.

Shows what two machines would do: `ray start --head` on one, `ray start --address` on the other, and a recipe whose
`cluster.address` names the head. With `--submit` the run is handed to Ray as a job instead (`ray job submit`). Says
which actors ran on which node, and ends exactly the two nodes that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
START_SECONDS = 60
NOT_SENT = ["/.[a-z]*", "/runs"]
"""What of the working directory a job has no need of; Ray takes 100 MB at most."""
WATCH_SECONDS = 2.0


def main() -> int:
    """The run's exit code; 1 as well when the actors were not on both nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/tiny_v4_fast.yaml")
    parser.add_argument("--submit", action="store_true", help="by `ray job submit`")
    known, options = parser.parse_known_args()
    # A cluster that others could reach needs a secret; every process of this one inherits it.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    gcs, dashboard = free_port(), free_port()
    head = ["--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    with node(*head, "--node-name=one"):
        wait_for_nodes(gcs, 1)
        with node(f"--address=127.0.0.1:{gcs}", "--num-cpus=2", "--node-name=two"):
            wait_for_nodes(gcs, 2)
            return run(known.recipe, options, gcs, dashboard if known.submit else None)


def run(recipe: str, options: list[str], gcs: int, dashboard: int | None) -> int:
    """Run the recipe on the cluster; print where its actors were."""
    places: dict[str, set[str]] = defaultdict(set)
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(gcs, places, over))
    watcher.start()
    address = f"127.0.0.1:{gcs}" if dashboard is None else "auto"
    command = ["posttrain", "run", recipe, "--set", f"cluster.address={address}", *options]
    if dashboard is not None:
        environment = json.dumps({"working_dir": str(Path.cwd()), "excludes": NOT_SENT})
        submit = ["job", "submit", f"--address=http://127.0.0.1:{dashboard}", f"--runtime-env-json={environment}", "--"]
        command = ["ray", *submit, str(BIN / "posttrain"), *command[1:]]
    code = subprocess.call([str(BIN / command[0]), *command[1:]])
    over.set()
    watcher.join()
    for name, actors in sorted(places.items()):
        print(f"node {name}: {', '.join(sorted(actors))}")
    if len(places) != 2:
        print("error: the actors were not on both nodes", file=sys.stderr)
    return code if len(places) == 2 else code or 1


def watch(gcs: int, places: dict[str, set[str]], over: threading.Event) -> None:
    """Note the actors of each node, by their classes."""
    from ray.util.state import list_actors, list_nodes

    while not over.wait(WATCH_SECONDS):
        try:
            names = {found.node_id: found.node_name for found in list_nodes(address=f"127.0.0.1:{gcs}")}
            for actor in list_actors(address=f"127.0.0.1:{gcs}", filters=[("state", "=", "ALIVE")]):
                places[names[actor.node_id]].add(actor.class_name)
        except (ConnectionError, KeyError):
            continue


@contextmanager
def node(*arguments: str) -> Iterator[None]:
    """A node of a cluster, as long as the block."""
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_for_nodes(gcs: int, count: int) -> None:
    """Until so many nodes are there."""
    import ray

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            ray.init(address=f"127.0.0.1:{gcs}", log_to_driver=False, configure_logging=False)
            if sum(found["Alive"] for found in ray.nodes()) == count:
                return
        except ConnectionError:
            pass
        finally:
            ray.shutdown()
        time.sleep(1)
    raise SystemExit(f"error: no cluster of {count} nodes after {START_SECONDS} s")


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
