"""Compare dtypes of the computation by speed, memory, and the distance of their images from those in float32.

    python -m lcm_jax.compare_dtypes --model=shapes-lcm --batch=16

A row for each dtype: the bytes of the parameters, the seconds of the first call (compilation included), the fastest
of the later calls, which take turns, and the mean absolute difference and the PSNR of 8-bit pixels. int8 and fp8 need
the extra `quantized`.
"""

import sys
import time
from typing import Any

from absl import flags

from lcm_jax import command

FLAGS = flags.FlagValues()
OWN: dict[str, Any] = {"flag_values": FLAGS}
MODEL = flags.DEFINE_string("model", "shapes-lcm", "Model in any format, as in lcm_jax.sample.", **OWN)
DTYPES = flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16", "int8", "fp8"], "Dtypes; the first is what images are compared with.", **OWN
)
BATCH = flags.DEFINE_integer("batch", 1, "Images of a call.", lower_bound=1, **OWN)
STEPS = flags.DEFINE_integer("steps", 4, "Sampling steps.", lower_bound=1, **OWN)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each dtype.", lower_bound=1, **OWN)
PROMPT = flags.DEFINE_string("prompt", "a red circle above a blue square", "Text prompt.", **OWN)


def compare() -> None:
    """Read the flags, time the dtypes, and print the table. Raises ValueError or ModelError."""
    command.configure_jax()
    # Imported late, so that --help and a mistyped option answer at once.
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from lcm_jax.errors import check_devices
    from lcm_jax.pipeline import Pipeline

    check_devices()
    if len(set(DTYPES.value)) != len(DTYPES.value) or not DTYPES.value:
        raise ValueError(f"--dtypes {','.join(DTYPES.value)!r} is not supported; use at least one, each once")
    pipes = {dtype: Pipeline.from_pretrained(MODEL.value, dtype=dtype) for dtype in DTYPES.value}
    images, first, fastest = {}, {}, dict.fromkeys(pipes, float("inf"))
    for repeat in range(REPEATS.value + 1):
        for dtype, pipe in pipes.items():
            begin = time.perf_counter()
            output = pipe(PROMPT.value, STEPS.value, num_images_per_prompt=BATCH.value, output_type="np")
            seconds = time.perf_counter() - begin
            if repeat == 0:
                images[dtype], first[dtype] = output.images * 255, seconds
            else:
                fastest[dtype] = min(fastest[dtype], seconds)
    device = jax.devices()[0].device_kind
    table = Table(title=f"{MODEL.value}, {STEPS.value} steps, batch {BATCH.value}; {device}, JAX {jax.__version__}")
    for name in ("dtype", "parameters", "first call", "call", "images/s", "difference", "PSNR"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, pipe in pipes.items():
        difference = images[dtype] - images[DTYPES.value[0]]
        error = np.square(difference).mean()
        table.add_row(
            dtype,
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)) / 1e6:.1f} MB",
            f"{first[dtype]:.1f} s",
            f"{fastest[dtype] * 1e3:.1f} ms",
            f"{BATCH.value / fastest[dtype]:.1f}",
            f"{np.abs(difference).mean():.2f} of 255",
            f"{10 * np.log10(255**2 / error):.1f} dB" if error else "equal",
        )
    Console().print(table)


def run() -> None:
    """The command; exits as `command.run` does."""
    command.run(
        compare,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}",
        "use fewer --dtypes or a smaller --batch",
    )


if __name__ == "__main__":
    run()
