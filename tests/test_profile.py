"""Profiles: the work of operations read from programs, traces of a GPU and of a CPU, and the command."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.profiler import ProfileData

from lcm_jax import cost, peaks, profile, sample
from lcm_jax.benchmarks import ours, runner
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.sides import SideError
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.profiling import hlo, trace
from lcm_jax.recipes.diffusion import SCHEDULE

# As XLA writes programs for a GPU: library calls with their sizes in backend_config, fusions, a loop.
FORWARD = (
    'backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","8","1024","1024"]}}}'
)
GEMM = (
    'backend_config={"operation_queue_id":"0","gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"epilogue":"BIAS"}}'
)
SCOPE = 'metadata={op_name="jit(generate)/while/body/UNet2DCondition/'
PROGRAM = f"""HloModule jit_generate, is_scheduled=true, entry_computation_layout={{(bf16[2,64,64,32]{{0}})->f32[]}}

FileNames
1 "unet.py"

%fused_norm (param_0.1: bf16[2,64,64,32], param_1.1: f32[32]) -> bf16[2,64,64,32] {{
  %param_0.1 = bf16[2,64,64,32]{{3,2,1,0}} parameter(0)
  %param_1.1 = f32[32]{{0}} parameter(1)
  %wide.1 = f32[2,64,64,32]{{3,2,1,0}} convert(%param_0.1)
  %scale.1 = f32[2,64,64,32]{{3,2,1,0}} broadcast(%param_1.1), dimensions={{3}}
  %product.1 = f32[2,64,64,32]{{3,2,1,0}} multiply(%wide.1, %scale.1)
  ROOT %narrow.1 = bf16[2,64,64,32]{{3,2,1,0}} convert(%product.1)
}}

%fused_row (param_0.2: s32[4,1000], param_1.2: s32[]) -> s32[1,1000] {{
  %param_0.2 = s32[4,1000]{{1,0}} parameter(0)
  %param_1.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %row.2 = s32[1,1000]{{1,0}} dynamic-slice(%param_0.2, %param_1.2, %zero.2), dynamic_slice_sizes={{1,1000}}
}}

%fused_update (param_0.3: f32[4,1000], param_1.3: f32[1,1000], param_2.3: s32[]) -> f32[4,1000] {{
  %param_0.3 = f32[4,1000]{{1,0}} parameter(0)
  %param_1.3 = f32[1,1000]{{1,0}} parameter(1)
  %param_2.3 = s32[] parameter(2)
  %zero.3 = s32[] constant(0)
  ROOT %updated.3 = f32[4,1000]{{1,0}} dynamic-update-slice(%param_0.3, %param_1.3, %param_2.3, %zero.3)
}}

%fused_triton (param_0.4: bf16[4,8,77,64], param_1.4: bf16[4,8,77,64]) -> bf16[4,8,77,77] {{
  %param_0.4 = bf16[4,8,77,64]{{3,2,1,0}} parameter(0)
  %param_1.4 = bf16[4,8,77,64]{{3,2,1,0}} parameter(1)
  ROOT %dot.4 = bf16[4,8,77,77]{{3,2,1,0}} dot(%param_0.4, %param_1.4), lhs_batch_dims={{0,1}}, \
lhs_contracting_dims={{3}}, rhs_batch_dims={{0,1}}, rhs_contracting_dims={{3}}
}}

%fused_layout (param_0.5: bf16[8,4]) -> f32[4,8] {{
  %param_0.5 = bf16[8,4]{{1,0}} parameter(0)
  %turned.5 = bf16[4,8]{{1,0}} transpose(%param_0.5), dimensions={{1,0}}
  ROOT %wide.5 = f32[4,8]{{1,0}} convert(%turned.5)
}}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %state = (s32[], bf16[8,4]{{1,0}}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %kernel = bf16[8,4]{{1,0}} get-tuple-element(%state), index=1
  %convert.6 = f32[8,4]{{1,0}} convert(%kernel), {SCOPE}conv_in/convert_element_type"}}
  %float_product = f32[8,8]{{1,0}} custom-call(%convert.6, %layout), custom_call_target="__cublas$lt$matmul", {GEMM}
  %layout = f32[4,8]{{1,0}} fusion(%kernel), kind=kInput, calls=%fused_layout
  ROOT %next = (s32[], bf16[8,4]{{1,0}}) tuple(%step, %kernel)
}}

%condition (state.1: (s32[], bf16[8,4])) -> pred[] {{
  %state.1 = (s32[], bf16[8,4]{{1,0}}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  %steps = s32[] constant(4)
  ROOT %less = pred[] compare(%step.1, %steps), direction=LT
}}

ENTRY %main (x: bf16[2,64,64,32], w: bf16[64,3,3,32], q: bf16[2,1024,8,40], t: bf16[4,8,77,64], \
/*index=4*/g: bf16[8,4], s: f32[32], i: s32[], rows: s32[4,1000], last: f32[1,1000], all: f32[4,1000]) -> f32[] {{
  %x = bf16[2,64,64,32]{{3,2,1,0}} parameter(0)
  %w = bf16[64,3,3,32]{{3,2,1,0}} parameter(1)
  %q = bf16[2,1024,8,40]{{3,2,1,0}} parameter(2)
  %t = bf16[4,8,77,64]{{3,2,1,0}} parameter(3)
  %g = bf16[8,4]{{1,0}} parameter(4)
  %s = f32[32]{{0}} parameter(5)
  %i = s32[] parameter(6)
  %rows = s32[4,1000]{{1,0}} parameter(7)
  %last = f32[1,1000]{{1,0}} parameter(8)
  %all = f32[4,1000]{{1,0}} parameter(9)
  %norm = bf16[2,64,64,32]{{3,2,1,0}} fusion(%x, %s), kind=kLoop, calls=%fused_norm, {SCOPE}resnets_0/norm1/mul"}}
  %conv = (bf16[2,32,32,64]{{3,2,1,0}}, u8[4096]{{0}}) custom-call(%norm, %w), \
window={{size=3x3 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", {SCOPE}conv_in/conv_general_dilated"}}
  %y = bf16[2,32,32,64]{{3,2,1,0}} get-tuple-element(%conv), index=0
  %input_gradient = (bf16[2,64,64,32]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%y, %w), \
window={{size=3x3 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %kernel_gradient = (bf16[64,3,3,32]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %y), \
window={{size=3x3 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %fused_attention = (bf16[2,1024,8,40]{{3,2,1,0}}, u8[16]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", {SCOPE}attn1/jit(wrapper)/call", {FORWARD}
  %attention_gradient = (bf16[2,1024,8,40]{{3,2,1,0}}, bf16[2,1024,8,40]{{3,2,1,0}}, bf16[2,1024,8,40]{{3,2,1,0}}, \
u8[16]{{0}}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", {FORWARD}
  %scores = bf16[4,8,77,77]{{3,2,1,0}} fusion(%t, %t), kind=kCustom, calls=%fused_triton, \
{SCOPE}attn2/bnhd,bmhd->bhnm/dot_general"}}
  %row = s32[1,1000]{{1,0}} fusion(%rows, %i), kind=kLoop, calls=%fused_row
  %updated = f32[4,1000]{{1,0}} fusion(%all, %last, %i), kind=kLoop, calls=%fused_update
  %turned = bf16[4,8]{{0,1:T(8,128)(2,1)}} transpose(%g), dimensions={{1,0}}
  %start = (s32[], bf16[8,4]{{1,0}}) tuple(%i, %g)
  %while.1 = (s32[], bf16[8,4]{{1,0}}) while(%start), condition=%condition, body=%body
  ROOT %sum = f32[] constant(0)
}}
"""
SCHEDULER = SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
CONV = 2 * (2 * 32 * 32 * 64) * 9 * 32  # of each of the three products of a strided convolution
SCORES = 2 * 8 * 1024 * 1024 * 40


def test_the_work_of_the_operations_of_a_gpu():
    kernels = hlo.Program(PROGRAM).kernels
    attention = 2 * 1024 * 8 * 40 * 2
    assert {name: (kernel.kind, kernel.flops, kernel.nbytes) for name, kernel in kernels.items()} == {
        "norm": (hlo.NORM, 0, 2 * 2 * 64 * 64 * 32 * 2 + 4 * 32),
        "conv": (hlo.CONVOLUTION, CONV, 2 * (2 * 64 * 64 * 32 + 64 * 9 * 32 + 2 * 32 * 32 * 64)),
        "input_gradient": (hlo.CONVOLUTION, CONV, 2 * (2 * 64 * 64 * 32 + 64 * 9 * 32 + 2 * 32 * 32 * 64)),
        "kernel_gradient": (hlo.CONVOLUTION, CONV, 2 * (2 * 64 * 64 * 32 + 64 * 9 * 32 + 2 * 32 * 32 * 64)),
        "fused_attention": (hlo.ATTENTION, 2 * 2 * SCORES, 2 * attention),
        "attention_gradient": (hlo.ATTENTION, 5 * 2 * SCORES, 4 * attention),
        "scores": (hlo.ATTENTION, 2 * 4 * 8 * 77 * 77 * 64, 2 * 2 * 4 * 8 * 77 * 64 + 2 * 4 * 8 * 77 * 77),
        "row": (hlo.ELEMENTWISE, 0, 4000 + 4 + 4000),
        "updated": (hlo.ELEMENTWISE, 0, 4000 + 4 + 4000),
        "turned": (hlo.COPY, 0, 2 * 64),
        "convert.6": (hlo.CONVERT, 0, 32 * (2 + 4)),
        "float_product": (hlo.MATRIX, 2 * 8 * 8 * 4, 4 * (32 + 32 + 64)),
        "layout": (hlo.COPY, 0, 32 * (2 + 4)),
        "less": (hlo.ELEMENTWISE, 0, 9),
    }
    assert {name for name, kernel in kernels.items() if kernel.looped} == {
        "convert.6",
        "float_product",
        "layout",
        "less",
    }
    assert [kernels[name].dtype for name in ("conv", "scores", "float_product", "norm")] == [
        "bfloat16",
        "bfloat16",
        "float32",
        "",
    ]


def test_the_flops_of_a_compiled_network_are_those_of_its_jaxpr():
    text = tiny_model.TEXT | {"vocab_size": 30, "eos_token_id": 1}
    configs = {"unet": tiny_model.SHALLOW, "vae": tiny_model.VAE, "text_encoder": text, "scheduler": SCHEDULER}
    model = StableDiffusion.from_configs(configs)
    params = model.abstract_params()
    z = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    prompt = jax.eval_shape(model.encode_prompt, params, jax.ShapeDtypeStruct((2, 20), jnp.int32))
    traced = jax.jit(model.denoise).trace(params["unet"], z, jax.ShapeDtypeStruct((2,), jnp.int32), prompt)
    program = hlo.Program(traced.lower().compile().as_text() or "")
    assert sum(kernel.flops for kernel in program.kernels.values()) == cost.count_flops(traced.jaxpr.jaxpr)


def test_limits():
    device = peaks.Peaks({"float32": 1e12, "bfloat16": 4e12}, 1e11)
    assert device.limit(4e9, 1e6, "float32") == 4e-3 and device.limit(4e9, 1e6, "bfloat16") == 1e-3
    assert device.limit(4e9, 1e9, "bfloat16") == 1e-2 and device.limit(4e9, 0, "s8") == 1e-3
    assert device.limit(0, 1e9, "") == 1e-2


def write_gpu_profile(folder: Path, **record: object) -> Path:
    """Write a profile of two runs of PROGRAM, as an NVIDIA GPU's, with times in microseconds."""
    names = ["conv_kernel", "sum_kernel", "transpose", "MemcpyD2H", "hlo_op", "hlo_module", "program_id"]
    ops = ["conv", "turned", "convert.6", "float_product", "jit_generate"]
    number = {name: i for i, name in enumerate(names + ops, 1)}

    def event(name: str, op: str | None, start: int, length: int) -> str:
        stats = (
            ""
            if op is None
            else (
                f"stats {{ metadata_id: {number['hlo_op']} ref_value: {number[op]} }} "
                f"stats {{ metadata_id: {number['hlo_module']} ref_value: {number['jit_generate']} }} "
                f"stats {{ metadata_id: {number['program_id']} int64_value: 7 }} "
            )
        )
        return f"events {{ metadata_id: {number[name]} offset_ps: {start}000000 duration_ps: {length}000000 {stats}}}"

    main_stream, copies = [], []
    for begin in (0, 1000):
        main_stream += [
            event("conv_kernel", "conv", begin, 300),
            event("sum_kernel", "conv", begin + 300, 100),  # the second kernel of the same operation
            event("transpose", "turned", begin + 400, 50),
            event("transpose", "convert.6", begin + 450, 20),
            event("sum_kernel", "float_product", begin + 470, 30),
        ]
        copies.append(event("MemcpyD2H", None, begin + 250, 100))  # 50 beside each kernel of the convolution
    named = lambda kind: "".join(  # noqa: E731
        f'{kind} {{ key: {i} value {{ id: {i} name: "{name}" }} }} ' for name, i in number.items()
    )
    line = lambda i, name, events: f'lines {{ id: {i} name: "{name}" {" ".join(events)} }} '  # noqa: E731
    text = (
        f'planes {{ name: "/device:GPU:0" {line(1, "Stream #13(Compute)", main_stream)}'
        f"{line(2, 'Stream #14(MemcpyD2H)', copies)}{line(3, 'XLA Modules', main_stream)}"
        f"{named('event_metadata')}{named('stat_metadata')} }}"
    )
    (folder / "hlo").mkdir(parents=True)
    (folder / "plugins" / "profile" / "now").mkdir(parents=True)
    data = ProfileData.text_proto_to_serialized_xspace(text)
    (folder / "plugins" / "profile" / "now" / "host.xplane.pb").write_bytes(data)
    (folder / "hlo" / "jit_generate.7.txt").write_text(PROGRAM)
    values = {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "runs": 2, "seconds": 0.002}
    values |= {"peak_flops": {"bfloat16": 1e12, "float32": 1e11}, "peak_bandwidth": 1e12}
    (folder / "profile.json").write_text(json.dumps(values | record))
    return folder


def test_a_profile_of_a_gpu(tmp_path, capsys):
    summary = profile.summarize(trace.open_profile(write_gpu_profile(tmp_path / "profile")))
    assert (
        summary["wall_ms"] == 1
        and summary["busy_ms"] == pytest.approx(0.5)
        and summary["idle_ms"] == pytest.approx(0.5)
    )
    conv, *others = summary["kernels"]
    assert (conv["op"], conv["kind"], conv["runs"]) == ("conv", hlo.CONVOLUTION, 1), "two kernels are one operation"
    np.testing.assert_allclose([conv["ms"], conv["share"]], [0.35, 0.7], rtol=1e-6)
    np.testing.assert_allclose(conv["x_limit"], 0.35e-3 / (CONV / 1e12), rtol=1e-6)
    assert [each["op"] for each in others] == ["turned", "float_product", "convert.6"]
    assert summary["unattributed"]["names"] == ["MemcpyD2H"]
    np.testing.assert_allclose(summary["unattributed"]["ms"], 0.05, rtol=1e-6)
    (program,) = summary["programs"]
    assert [program[name]["kernels"] for name in ("copies", "converts_in_loops", "wide_products")] == [1, 1, 1]
    np.testing.assert_allclose(program["wide_products"]["flops_share"], 512 / (512 + CONV))

    profile.show(summary, top=2)
    printed = capsys.readouterr().out
    assert "2 runs of 1.00 ms each: busy 0.50 ms (50.0%), idle 0.50 ms (50.0%)" in printed
    assert "turned" in printed and "convert.6" not in printed, "--top=2"
    assert "not attributed to an operation of a program: 0.050 ms, 10.0% (MemcpyD2H)" in printed
    assert "1 copies and transposes (0.05 ms), 1 converts in loops (0.02 ms), 1 float32 products and conv" in printed


def test_overlapping_kernels_share_their_time():
    runs = [trace.Run(("m", 0), "a", "a", start, end) for start, end in [(0, 4e9), (2e9, 3e9), (6e9, 7e9), (5e9, 5e9)]]
    assert trace.exclusive_seconds(runs) == [3.5, 0.5, 1.0, 0.0]


def damage(name, content):
    def act(folder: Path) -> None:
        path = next(folder.glob(name))
        path.unlink() if content is None else path.write_bytes(content)

    return act


@pytest.mark.parametrize(
    "act, message",
    [
        (damage("plugins/*/*/*", None), "has no trace; record a new one with --profile=FOLDER"),
        (
            damage("plugins/*/*/*", b"\xff\x00"),
            r"xplane.pb is not part of a profile \(RuntimeError: .*\); record a new",
        ),
        (damage("plugins/*/*/*", b""), "host.xplane.pb has no kernels; record a new one"),
        (damage("profile.json", None), "has a trace but no profile.json; record a new one"),
        (damage("profile.json", b"{"), r"profile.json is not part of a profile \(JSONDecodeError: .*\); record a new"),
        (damage("profile.json", b"[1]"), r"profile.json is not part of a profile \(TypeError: .*\); record a new one"),
        (damage("profile.json", b"[" * 100000), r"profile.json is not part of a profile \(.*\); record a new one"),
        (
            damage("hlo/*", b"hello"),
            r"jit_generate.7.txt is not part of a profile \(ValueError: it does not begin with",
        ),
        (damage("hlo/*", b"HloModule a\n"), r"jit_generate.7.txt is not part of .* \(ValueError: it has no ENTRY"),
        (damage("hlo/*", PROGRAM.replace("%fused_row (", "%other (").encode()), r"7.txt is not part .*\(KeyError: "),
        (damage("hlo/*", PROGRAM.replace("transpose(%g)", "transpose(%g").encode()), "7.txt is not part of a profile"),
    ],
)
def test_a_damaged_profile_is_an_error_of_one_line(tmp_path, act, message):
    folder = write_gpu_profile(tmp_path / "profile")
    act(folder)
    with pytest.raises(ValueError, match=message) as error:
        trace.open_profile(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("record", [{"runs": 0}, {"seconds": float("nan")}, {"peak_flops": {}}, {"runs": "2"}])
def test_a_record_of_wrong_values_is_an_error(tmp_path, record):
    with pytest.raises(ValueError, match="profile.json is not part of a profile"):
        trace.open_profile(write_gpu_profile(tmp_path / "profile", **record))


def test_a_profile_goes_to_a_new_folder(tmp_path):
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"--profile={taken} is not an empty folder; use a new one"):
            trace.check_new(taken)
    trace.check_new(tmp_path / "new")


def test_the_sample_command_records_a_profile_that_the_command_prints(tmp_path, monkeypatch, capsys):
    model = tiny_model.write(tmp_path / "model", unet=tiny_model.SHALLOW)
    folder, figures = tmp_path / "profile", tmp_path / "figures.json"
    monkeypatch.setattr(peaks, "CPU_SIDE", 256)
    monkeypatch.setattr(peaks, "NBYTES", 2**20)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which the command adds to

    def run(command, *arguments: object) -> str:
        for name in command.FLAGS:
            command.FLAGS[name].unparse()
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        command.run()
        return capsys.readouterr().out

    images = f"--output={tmp_path / 'images'}"
    flags = (f"--model={model}", "--prompt=a red circle", "--num_inference_steps=2", images, f"--profile={folder}")
    printed = run(sample, *flags)
    assert printed.endswith(f"a profile is in {folder}; python -m lcm_jax.profile {folder} prints it\n")
    with pytest.raises(SystemExit, match=f"error: --profile={folder} is not an empty folder; use a new one"):
        run(sample, *flags, "--overwrite")

    printed = run(profile, folder, f"--json={figures}", "--top=3")
    assert "the 3 most expensive kernels" in printed and "jit_generate, " in printed
    summary = json.loads(figures.read_text())
    assert summary["unattributed"] is None or summary["unattributed"]["share"] < 0.05
    assert 0.2 < summary["busy_ms"] / summary["wall_ms"] <= 1.001, "events last until their threads have finished"
    assert sum(each["share"] for each in summary["kernels"]) == pytest.approx(1, abs=0.05)
    assert all(0 < each["x_limit"] for each in summary["kernels"] if each["x_limit"] is not None)
    assert {hlo.CONVOLUTION, hlo.MATRIX, hlo.NORM} <= {each["kind"] for each in summary["kinds"]}


def test_the_benchmark_writes_a_profile_of_a_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "measure", lambda dtypes: peaks.Peaks(dict.fromkeys(dtypes, 1e12), 1e11))
    case = Case(suite="peak", model="sd15", batch=1, steps=0, size=64, dtype="float32", part="matmul")

    class Side:
        closed = False

        def ask(self, request: str, deadline: float) -> None:
            name, _, folder = request.partition(" ")
            assert name == "profile" and Path(folder).is_absolute()
            if Path(folder).exists():
                raise SideError("no space left")
            prepared = ours.prepare(case, tmp_path)
            assert prepared.profile is not None
            prepared.profile(Path(folder))

        def close(self) -> None:
            self.closed = True

    side = Side()
    sides: dict = {runner.OURS: side}
    runner.write_profile(case, sides, tmp_path / "profiles", 0)
    folder = tmp_path / "profiles" / "matmul-64-x-64"
    assert f"a profile is in {folder}; python -m lcm_jax.profile {folder} prints it" in capsys.readouterr().out
    kernels = profile.summarize(trace.open_profile(folder))["kernels"]
    assert [(each["kind"], each["result"]) for each in kernels if each["gflops"]] == [(hlo.MATRIX, "f32[64,64]")]
    assert sides and not side.closed
    runner.write_profile(case, sides, tmp_path / "profiles", 0)
    assert "matmul 64 x 64: no profile was written: no space left" in capsys.readouterr().out
    assert not sides and side.closed, "the next case starts another process"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "the folder is missing; use python -m lcm_jax.profile FOLDER"),
        (("nowhere",), "nowhere is not a folder; use one that --profile=FOLDER has written"),
    ],
)
def test_a_missing_profile_is_an_error(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["profile", *arguments])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        profile.run()
