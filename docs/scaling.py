"""Compile the full-size LCD step for devices that need not exist, and print a row of the table in docs/scaling.md.

    python docs/scaling.py --model=sd15 --devices=8 --fsdp=8 --images=2
    python docs/scaling.py --model=sdxl --devices=256 --fsdp=64 --images=1 --platform=cpu

With --platform=tpu the package libtpu compiles for a TPU v5e of 8, 64 or 256 chips, without hardware; with
--platform=cpu XLA compiles for as many host devices. The step is neither run nor given machine code: once the optimized
program and its buffers are there, the compiler is stopped. Full size takes 3 to 10 GB of memory and minutes to an hour.
"""

import argparse
import multiprocessing
import re
import shutil
import tempfile
import time
from pathlib import Path

from lcm_jax import scaling

TOPOLOGIES = {8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}
# Async fusions repeat a collective in each of several fusions, and take a third of the time to compile.
TPU_OPTIONS = {"xla_tpu_enable_async_collective_fusion": False, "exec_time_optimization_effort": -1.0}
PROGRAM = "*after_optimizations_after_buffer_assignment.txt", "*cpu_after_optimizations.txt"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="argument of configs/lcd.py, or another bundled config: shapes")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--images", type=int, default=2, help="for each device")
    parser.add_argument("--frozen", default="sharded", choices=("sharded", "replicated"))
    parser.add_argument("--platform", default="tpu", choices=("tpu", "cpu"))
    parser.add_argument("--keep", default="", help="a file to which the optimized program is copied")
    options = parser.parse_args(arguments)
    if options.platform == "tpu" and options.devices not in TOPOLOGIES:
        parser.error(f"--devices={options.devices} is not supported on tpu; use {', '.join(map(str, TOPOLOGIES))}")
    if options.devices % (options.fsdp * options.tensor):
        parser.error(f"--devices={options.devices} is not a multiple of fsdp x tensor; use divisors of it")
    return options


def compile_step(options: argparse.Namespace, folder: str) -> None:
    """Compile the step; the compiler writes its program to `folder` before it makes machine code."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from lcm_jax import config_files, dry_run
    from lcm_jax.recipes import find_recipe
    from lcm_jax.training import sharding
    from lcm_jax.training.sharded_step import make_sharded_step

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if options.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", options.devices)
        devices, choices = jax.devices(), {"xla_backend_optimization_level": 0}
    else:
        devices = topologies.get_topology_desc(TOPOLOGIES[options.devices], platform="tpu").devices
        choices = TPU_OPTIONS
    sizes = (options.devices // (options.fsdp * options.tensor), options.fsdp, options.tensor)
    mesh = Mesh(np.array(devices).reshape(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    bundled = [name for name, _ in config_files.bundled()]
    config = config_files.load(options.model if options.model in bundled else f"lcd:{options.model}")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.mesh.frozen, config.train.batch_size = options.frozen, options.images * sharding.batch_parts(mesh.shape)
    task = find_recipe(config)(config, Path(), dry_run.open_or_published(config))
    step = make_sharded_step(task, config, mesh)
    lowered = step.jitted.lower(step.state, step.frozen, dict(task.batch))
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*step.*"}
    lowered.compile(choices | dump)


def optimized(options: argparse.Namespace) -> tuple[str, int]:
    """Return (text of the optimized program, bytes that it takes on each device)."""
    folder = Path(tempfile.mkdtemp())
    process = multiprocessing.get_context("spawn").Process(target=compile_step, args=(options, str(folder)))
    process.start()
    try:
        while True:
            time.sleep(2)
            found = [path for pattern in PROGRAM for path in folder.glob(pattern)]
            text = found[0].read_text() if found else ""
            if re.search(r"^ENTRY .*^}\n", text, re.S | re.M):
                report = next(folder.glob("*memory-usage-report.txt")).read_text()
                if options.keep:
                    Path(options.keep).write_text(text)
                return text, int(re.search(r"Total bytes: (\d+)", report)[1])  # pyright: ignore
            if not process.is_alive():
                raise SystemExit("the compiler ended without a program; see its message above")
    finally:
        process.kill()  # the TPU compiler prints a report of other signals
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    options, began = parse(), time.monotonic()
    text, nbytes = optimized(options)
    found = scaling.traffic(scaling.collectives(text))
    print(f"compiled in {time.monotonic() - began:.0f} s")
    cells = [f"{each.count} / {each.nbytes / 1e9:.2f}" for each in (found.get(k, scaling.NONE) for k in scaling.KINDS)]
    mesh = f"{options.devices // options.fsdp // options.tensor} x {options.fsdp} x {options.tensor}"
    largest = found.get("all-gather", scaling.NONE).largest
    row = (options.model, options.devices, mesh, options.images, f"{nbytes / 1e9:.2f}", *cells, f"{largest / 1e6:.0f}")
    print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
