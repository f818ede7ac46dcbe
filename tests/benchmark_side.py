"""A side of the benchmark without networks, for tests of its runner: it behaves as FAKE_SIDE in its environment says.

The first side to prepare a case is ours, and takes half the time of the other.
"""

import os
import time

import numpy as np

from lcm_jax.benchmarks import worker


def prepare(case, folder):
    behavior = dict(item.split("=") for item in os.environ["FAKE_SIDE"].split(",") if item)
    ours = not (folder / "draws.npz").exists()
    if behavior.get("fail") == "prepare":
        raise ValueError("there are no weights")
    if ours:
        worker.write_draws(folder, noise=np.zeros(1))

    def run():
        time.sleep(float(behavior.get("sleep", 0.02)) * (1 if ours else 2))
        if behavior.get("fail") == "run" and not ours:
            raise MemoryError("too large")

    def outputs():
        time.sleep(0.1)
        return {"images": np.linspace(0.0, 1.0 if ours else float(behavior.get("output", 1.0)), 100)}

    facts = {"device": "cpu", "versions": {"fake": "1.0"}, "mode": "eager"} | ({"flops": 10**9} if ours else {})
    return worker.Prepared(run, outputs, facts, lambda: 10**9)


if __name__ == "__main__":
    worker.serve(prepare)
