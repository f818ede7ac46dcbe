"""A page in the browser that draws while one types, on this machine's own address only, unless --host says otherwise.

Besides the page it serves /api/generate (JSON to PNG), /healthz and /metrics (Prometheus). It needs the extra `app`:
pip install 'lcm_jax[app]'.
"""

import os
import re
import sys
from typing import Any

from absl import flags

from lcm_jax import command
from lcm_jax.errors import check_devices

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
MODEL = flags.DEFINE_string(
    "model",
    "shapes-lcm",
    "Folder in diffusers layout, hub id, bundled name (shapes, shapes-lcm), .safetensors or .ckpt file, workdir of a "
    "run, or orbax model.",
    **OWN,
)
BASE = flags.DEFINE_string(
    "base", None, "Model in diffusers layout that supplies what a file lacks: the tokenizer, networks.", **OWN
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16", "int8", "fp8"],
    "Data type of the computation; int8 and fp8 are quantized, and need the extra `quantized`.",
    **OWN,
)
TEACHER = flags.DEFINE_string(
    "teacher",
    None,
    "Model to compare with; defaults to shapes for shapes-lcm, and to none for others. 'none' is none.",
    **OWN,
)
TEACHER_STEPS = flags.DEFINE_integer(
    "teacher_steps", None, "Steps of the teacher; defaults to its preset.", lower_bound=1, **OWN
)
LORA = flags.DEFINE_multi_string(
    "lora", [], "LoRAs to load, each with a slider: LORA or LORA:WEIGHT; repeat it, or use commas, for more.", **OWN
)
SAMPLER = flags.DEFINE_multi_string(
    "sampler", [], "Samplers to choose from, the default first; defaults to all that fit the model.", **OWN
)
SIZE = flags.DEFINE_multi_string(
    "size", [], "Sizes to choose from, HEIGHTxWIDTH, the default first; defaults to the model's.", **OWN
)
PROMPT = flags.DEFINE_string("prompt", "", "Prompt that the page begins with.", **OWN)
STEPS = flags.DEFINE_integer(
    "num_inference_steps",
    None,
    "Steps that the page begins with; defaults to the model's preset.",
    lower_bound=1,
    **OWN,
)
GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    None,
    "Guidance scale that the page begins with; defaults to the model's preset.",
    lower_bound=1,
    **OWN,
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is every network.", **OWN)
PORT = flags.DEFINE_integer(
    "port", 7860, "Port to listen on; 0 is any free one.", lower_bound=0, upper_bound=65535, **OWN
)
MAX_STEPS = flags.DEFINE_integer("max_steps", 50, "Largest number of steps of a request.", lower_bound=1, **OWN)
MAX_BATCH = flags.DEFINE_integer("max_batch", 4, "Largest number of images of a request.", lower_bound=1, **OWN)
MAX_PROMPT = flags.DEFINE_integer("max_prompt_chars", 1000, "Longest prompt, in characters.", lower_bound=1, **OWN)
QUEUE = flags.DEFINE_integer("queue_size", 64, "Largest number of requests that wait.", lower_bound=1, **OWN)
TIMEOUT = flags.DEFINE_float(
    "timeout_s", 30.0, "Longest time that a request waits, in seconds.", lower_bound=0.1, **OWN
)

EXAMPLE = """Example:

    python -m lcm_jax.app --model=shapes-lcm --port=7860
    python -m lcm_jax.app --model=shapes --lora=shapes-lcm-lora
    python -m lcm_jax.app --model=path/to/an/lcm --teacher=path/to/its/teacher --dtype=bfloat16 --size=512x512"""


def read_sizes(given: list[str], default: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each --size, or the default. Raises ValueError for anything else."""
    for each in given:
        if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", each, re.ASCII):
            raise ValueError(f"--size={each} is not supported; use HEIGHTxWIDTH, such as 512x512")
    height_width = (tuple(map(int, each.split("x"))) for each in given)
    return tuple(dict.fromkeys((height, width) for height, width in height_width)) or (default,)


def serve() -> None:
    """Read the flags, load the models and serve the page. Raises ValueError or OSError in one line."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    try:
        from lcm_jax.page import server
        from lcm_jax.page.metrics import Metrics
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs {error.name}, which is not installed; pip install 'lcm_jax[app]'") from error
    from lcm_jax.page.layout import Defaults
    from lcm_jax.page.requests import Limits
    from lcm_jax.page.service import Service, supported_samplers

    bound = server.bind(HOST.value, PORT.value)
    command.configure_jax()
    check_devices()
    from lcm_jax.pipeline import Pipeline
    from lcm_jax.sampling import arguments
    from lcm_jax.weights import lora as loras

    pipe = Pipeline.from_pretrained(MODEL.value, DTYPE.value, base=BASE.value)
    if pipe.model.inpaints:
        raise ValueError(f"{MODEL.value} is an inpainting model, which the page cannot use; use lcm_jax.sample")
    for path, weight in loras.files_and_weights(LORA.value):
        pipe.load_lora(path, weight)
    name = TEACHER.value or ("shapes" if MODEL.value == "shapes-lcm" else "none")
    teacher = None if name == "none" else Pipeline.from_pretrained(name, DTYPE.value)

    samplers = supported_samplers(pipe)
    chosen = tuple(arguments.choice("--sampler", sampler, samplers) for sampler in dict.fromkeys(SAMPLER.value))
    own = arguments.size(pipe.model, None, None, pipe.configs["unet"].get("sample_size") or 64)
    sizes = tuple(arguments.size(pipe.model, *size, own) for size in read_sizes(SIZE.value, own))
    limits = Limits(
        sizes=sizes,
        max_steps=MAX_STEPS.value,
        max_batch=MAX_BATCH.value,
        max_prompt_chars=MAX_PROMPT.value,
        queue_size=QUEUE.value,
        timeout_s=TIMEOUT.value,
    )
    teacher_steps = TEACHER_STEPS.value or (1 if teacher is None else teacher.preset.num_inference_steps)
    service = Service(pipe, limits, Metrics(), chosen or samplers, teacher, teacher_steps)
    most = service.max_steps[service.samplers[0]]
    if STEPS.value is not None and STEPS.value > most:
        raise ValueError(f"--num_inference_steps={STEPS.value} is not supported; use 1 to {most}")
    defaults = Defaults(
        prompt=PROMPT.value,
        num_inference_steps=STEPS.value or min(pipe.preset.num_inference_steps, most),
        guidance_scale=GUIDANCE.value or pipe.preset.guidance_scale,
    )
    print(f"warming up: {sum(1 for _ in service.programs())} programs")
    server.serve(service, defaults, bound)


def run() -> None:
    """Run the command; exits as `command.run` does."""
    command.run(
        serve,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}\n{EXAMPLE}",
        "use fewer --size, a smaller --max_batch or --dtype=bfloat16",
    )


if __name__ == "__main__":
    run()
