"""The Triton body, without a GPU: its kernels in Triton's interpreter, and compiled for three generations."""
import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from lib.kernels import operators, plan, routing, torch_body, triton_body  # interpreted: see conftest.py

SIZES = [(12, 1, 3, 1, 12, 2, 1), (3, 2, 2, 2, 5, 1, 2), (17, 1, 1, 1, 16, 3, 1), (5, 3, 1, 2, 5, 1, 1),
         (4, 2, 1, 2, 70, 2, 3), (24, 1, 2, 1, 25, 2, 1), (40, 1, 2, 1, 48, 1, 1), (64, 1, 1, 1, 64, 1, 2)]


@pytest.fixture(autouse=True)
def seed():
    """Experts are chosen in float32 and in float64: the same draws in every run, none of them near a tie."""
    torch.manual_seed(0)


def tensors(sizes, T, E, kind, dtype):
    """x, first, second, router, balance, experts, dy, dlogits: what a call of each kind has, else None."""
    a, b, g, d, e, f, r = sizes
    mixture = kind == "mixture"
    return (torch.randn(T, a * b * g, dtype=dtype), torch.randn(E, g, r * f * d, a, dtype=dtype) / a ** 0.5,
            torch.randn(E, f, e, g * r * b, dtype=dtype) / (g * r * b) ** 0.5,
            torch.randn(E, a * b * g) / 8 if mixture else None, torch.zeros(E) if mixture else None,
            torch.randint(E, (T, 1)) if kind == "experts" else None, torch.randn(T, d * e * f, dtype=dtype),
            torch.randn(T, E) if mixture else None)


def doubled(t):
    return t.double() if t is not None and t.is_floating_point() else t


def run(body, x, first, second, router, balance, experts, dy, dlogits, k, sizes, swapped, chosen=None):
    """(y, logits, chosen), and the gradients (dx, dfirst, dsecond, drouter), of a body."""
    y, logits, choices = body.forward(x, first, second, router, balance, experts, k, sizes, swapped)
    grads = body.backward(dy, dlogits, x, first, second, router, experts, logits,
                          choices if router is not None else None, sizes, swapped)
    return y, logits, choices, grads


def check(sizes, swapped, T, E, k, kind, dtype, bias=0.0):
    """Outputs and gradients are close to the torch body's in float64, and the choices are its choices."""
    made = tensors(sizes, T, E, kind, dtype)
    if kind == "mixture":
        made[4][1] = bias
    y, logits, chosen, grads = run(triton_body, *made, k, sizes, swapped)
    expected, _, choices, expected_grads = run(torch_body, *map(doubled, made), k, sizes, swapped)
    if kind == "mixture":
        assert torch.equal(chosen, choices)
    tolerance = 2e-6 if dtype == torch.float32 else 3e-3
    for actual, truth in zip((y, *grads), (expected, *expected_grads)):
        assert (actual is None) == (truth is None)
        if truth is not None:
            assert (actual - truth).norm() <= tolerance * truth.norm()
    return chosen, grads


@pytest.mark.parametrize("number, dtype", [*((n, torch.float32) for n in range(len(SIZES))),
                                           *((n, torch.float16) for n in (0, 3, 5, 6))])
def test_is_the_torch_body(number, dtype):
    """One matrix, given experts or a mixture; each size in both orders of x and y."""
    swapped = bool(number % 2)
    if number % 4 < 2:
        check(SIZES[number], swapped, 37, 1, 1, "matrix", dtype)
    else:
        check(SIZES[number], swapped, 18, 2, 1, "experts", dtype)
    check(SIZES[number], not swapped, 18, 3, 2, "mixture", dtype)


@pytest.mark.parametrize("T, E, k, bias", [
    (70, 8, 1, 0), (24, 16, 2, 0), (33, 5, 3, 0), (3, 8, 3, 0),
    (60, 3, 1, 100),  # all tokens with one expert
    (60, 3, 2, -100)])  # an expert without tokens
def test_routing(T, E, k, bias):
    chosen, (_, dfirst, dsecond, _) = check((5, 1, 2, 1, 6, 1, 1), False, T, E, k, "mixture", torch.float32,
                                            bias)
    empty = [e for e in range(E) if e not in chosen]
    assert not empty or not dfirst[empty].any() and not dsecond[empty].any()  # exactly zero


def test_given_logits():
    """They take the place of the router, and get its gradient's first half."""
    x, first, second, router, balance, *_ = tensors(SIZES[5], 30, 4, "mixture", torch.float32)
    logits = x @ router.mT
    inputs = [t.requires_grad_() for t in (x, first, second, logits)]
    results = []
    for body in ("triton", "torch"):
        y, given, chosen = operators.einsum(*inputs[:3], SIZES[5], False, logits=logits, balance=balance,
                                            top_k=2, body=body)
        assert given is logits and chosen.shape == (30, 2)
        results.append([y, *torch.autograd.grad((y ** 2).sum(), inputs)])
    for actual, truth in zip(*results):
        assert (actual - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("T, k, E", [(50, 2, 4), (1, 1, 1), (300, 3, 5), (40, 1, 16), (7, 8, 8),
                                     (20, 8, 200)])  # a program has 8 tokens
def test_plan_is_the_plan(T, k, E):
    """The kernels' plan is plan.make_plan's, and its gates are routing.gate_weights'."""
    logits, balance = torch.randn(T, E), torch.randn(E)
    problem = triton_body._problem(T, k, torch.empty(E), True, SIZES[0])
    chosen = torch.empty(T, k, dtype=torch.int64)
    made = triton_body.make_plan(problem, chosen, logits, balance)
    assert torch.equal(chosen, (logits + balance).topk(k).indices)
    truth = plan.make_plan(chosen, E, problem.P)
    torch.testing.assert_close(made.gates, routing.gate_weights(logits, chosen))
    used = int(made.tile_end[-1])
    assert torch.equal(made.tile_expert[:used].long(), truth.tile_expert[:used])
    assert (made.tile_expert[used:] == -1).all()
    assert (truth.row_choice[used * problem.P:] == T * k).all()
    rows = slice(used * problem.P)
    padding = truth.row_choice[rows] == T * k
    assert torch.equal(made.row_token[rows].long(), torch.where(padding, -1, truth.row_token[rows]))
    assert torch.equal(made.place.long(), truth.place)
    gates = torch.cat([made.gates.flatten(), torch.zeros(1)])
    assert torch.equal(made.row_gate[rows], gates[truth.row_choice[rows]])
    again = triton_body.make_plan(problem, chosen, logits, None)  # as in the backward: the choices are given
    assert torch.equal(again.gates, made.gates) and torch.equal(again.place, made.place)


def test_logits_of_nan_choose_an_expert():
    """They must not reach out of the plan: the loss is not finite, and the step is skipped."""
    logits = torch.randn(20, 5)
    logits[3] = float("nan")
    chosen = torch.empty(20, 2, dtype=torch.int64)
    problem = triton_body._problem(20, 2, torch.empty(5), True, SIZES[0])
    made = triton_body.make_plan(problem, chosen, logits, torch.zeros(5))
    assert ((0 <= chosen) & (chosen < 5)).all()
    assert made.place.unique().numel() == 40


def test_runs_are_bitwise_the_same():
    made = tensors(SIZES[1], 20, 3, "mixture", torch.float32)
    first, again = (run(triton_body, *made, 2, SIZES[1], False) for _ in range(2))
    for a, b in zip((*first[:3], *first[3]), (*again[:3], *again[3])):
        assert torch.equal(a, b)


def test_a_gradient_in_many_parts(monkeypatch):
    """An expert's tiles divided among programs, more than there are tiles of some expert."""
    monkeypatch.setattr(triton_body, "tile_rows", lambda *_: 16)
    check((3, 1, 1, 1, 4, 2, 1), False, 90, 3, 2, "mixture", torch.float32)
    check((3, 1, 2, 1, 4, 1, 1), True, 300, 1, 1, "matrix", torch.float32)


def test_operator_with_autograd_and_autocast():
    """Through the operator, with x in float32 and cores in float16: gradients have their inputs' types."""
    x, first, second, router, balance, *_ = tensors(SIZES[0], 30, 4, "mixture", torch.float32)
    inputs = [t.requires_grad_() for t in (x, first, second, router)]
    results = []
    for body, half in (("triton", True), ("torch", False)):
        cores = [core.half() if half else core for core in (first, second)]
        y, logits, _ = operators.einsum(x, *cores, SIZES[0], False, router=router, balance=balance, top_k=2,
                                        body=body)
        loss = (y.float() ** 2).sum() + logits.sum()
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for actual, truth in zip(*results):
        assert (actual.float() - truth).norm() < 5e-3 * truth.norm()
    assert results[0][0].dtype == torch.float16


# ---- Choosing it -------------------------------------------------------------------------------------------

@pytest.fixture
def auto(monkeypatch):
    monkeypatch.setattr(operators, "_kernel", "auto")


def test_auto_is_torch_on_cuda(auto):
    assert operators.body_name("cuda", torch.bfloat16) == "torch"
    assert operators.describe_body("cuda", "bfloat16") == "torch"
    assert operators.body_name("cpu", torch.bfloat16) == "torch"


def test_kernel_of_ones_own_choice(auto):
    operators.use_kernel("triton", "cuda", "bfloat16")
    assert operators.body_name("cuda", torch.bfloat16) == "triton"
    assert operators.body_name("cuda", torch.float64) == "torch"
    operators.use_kernel("torch", "cpu", "float32")
    assert operators.body_name("cpu", torch.float32) == "torch"


@pytest.mark.parametrize("kernel", ["rows_to_z_kernel", "z_to_rows_kernel"])
def test_a_kernel_that_cannot_be_launched_is_refused(auto, kernel, monkeypatch):
    """As where there is no C compiler, which Triton asks for at the first launch."""
    class Unbuilt:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify it via CC")

    operators.use_kernel("triton", "cpu", "float32")
    operators.use_kernel("auto", "cpu", "float32")
    monkeypatch.setattr(triton_body, kernel, Unbuilt())
    with pytest.raises(ValueError, match=r"'triton' does not work here \(Failed to find C compiler.\): "):
        operators.use_kernel("triton", "cpu", "float32")
    assert operators._kernel == "auto"


def test_triton_needs_a_gpu_of_capability_8(auto, monkeypatch):
    monkeypatch.setattr(triton_body, "try_out", lambda *_: None)
    has_tensor_cores = operators._has_tensor_cores.__wrapped__   # without its cache
    monkeypatch.setattr(operators, "_has_tensor_cores", has_tensor_cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    operators.use_kernel("triton", "cuda", "float16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="capability 8.0"):
        operators.use_kernel("triton", "cuda", "float16")


def test_triton_is_not_for_rocm(auto, monkeypatch):
    """Whose GPUs are 'cuda' to torch, with capabilities of another kind."""
    monkeypatch.setattr(triton_body, "try_out", lambda *_: None)
    monkeypatch.setattr(operators, "_has_tensor_cores", operators._has_tensor_cores.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    operators.use_kernel("triton", "cuda", "bfloat16")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert operators.body_name("cuda", torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="does not compute bfloat16 on cuda: it works on NVIDIA GPUs of"):
        operators.use_kernel("triton", "cuda", "bfloat16")
    operators.use_kernel("auto", "cuda", "bfloat16")
    assert operators.body_name("cuda", torch.bfloat16) == "torch"


@pytest.mark.parametrize("kernel, device, dtype", [("triton", "cpu", "float32"), ("c", "cuda", "float32"),
                                                   ("c", "cpu", "bfloat16"), ("cuda", "cuda", "float32")])
def test_kernel_that_cannot_be_had(auto, monkeypatch, kernel, device, dtype):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="kernel") as e:
        operators.use_kernel(kernel, device, dtype)
    assert "\n" not in str(e.value)
    assert operators._kernel == "auto"


# ---- Compiling for GPUs ------------------------------------------------------------------------------------

COMPILE = """
import contextlib, glob, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import structured
from lib.kernels import triton_body

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64"}
cuobjdump = glob.glob(os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump"))[0]


seen = set()  # kernels that were looked at


class Compiled:
    '''Stands for a kernel: a launch compiles it for the arguments of the launch, and runs nothing.'''

    def __init__(self, fn, capability):
        self.fn, self.capability = fn, capability

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        values = dict(zip(self.fn.arg_names, args)) | kwargs
        assert set(values) == set(self.fn.arg_names), self.fn
        constants = {p.name for p in self.fn.params if p.is_constexpr}
        signature, constexprs, attributes = {}, {}, {}
        for i, (name, value) in enumerate(values.items()):
            place = self.fn.arg_names.index(name)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif value is None or name in constants:
                signature[name], constexprs[(place,)] = "constexpr", value
            else:
                signature[name] = "i32"
        ordered = {name: signature[name] for name in self.fn.arg_names}
        kernel = triton.compile(ASTSource(self.fn, ordered, constexprs, attributes),
                                target=GPUTarget("cuda", self.capability, 32))
        if kernel.metadata.hash in seen:
            return
        seen.add(kernel.metadata.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            usage = subprocess.run([cuobjdump, "-res-usage", f.name], capture_output=True, text=True)
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout + usage.stderr))
        print("usage", self.capability, self.fn.__name__, kernel.metadata.shared, numbers["STACK"],
              numbers["LOCAL"])


torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()  # it knows no meta tensors
kernels = {name: getattr(triton_body, name) for name in dir(triton_body) if name.endswith("_kernel")}
all_sizes, large = [768, 1600, 4096], [4096]
# 80 and 89 have the same products, and 90 its own; float32 is TF32 where torch's own products are, as in
# train.py, else exact, without them
checks = {80: ((torch.bfloat16, "ieee", ["matrix", "many", 4096]), (torch.float32, "tf32", large),
                 (torch.float32, "ieee", large)),
          89: ((torch.bfloat16, "ieee", all_sizes),),
          90: ((torch.bfloat16, "ieee", [*all_sizes, "many"]), (torch.float32, "tf32", large))}
cases = {768: [("btt", 768, 768, 8, 2)], 1600: [("btt", 1600, 1600, 16, 2)],
         4096: [("btt", 4096, 16384, 16, 2)], "many": [("btt", 768, 768, 256, 8)],
         "matrix": [("btt", 1600, 1600, 0, 1), ("kronecker", 768, 3072, 0, 1)]}
for capability, (dtype, precision, of_dtype) in [(c, check) for c in checks for check in checks[c]]:
    for name, kernel in kernels.items():
        setattr(triton_body, name, Compiled(kernel, capability))
    torch.backends.cuda.matmul.fp32_precision = precision
    for struct, d_in, d_out, E, k in [case for key in of_dtype for case in cases[key]]:
        sizes = structured.layer_sizes(structured.LayerConfig(struct), E, d_in, d_out)
        swapped, sizes = sizes.order()[0] == "B", sizes.contraction()
        a, b, g, d, e, f, r = sizes
        with torch.device("meta"):
            x, dy = torch.empty(12288, d_in), torch.empty(12288, d_out, dtype=dtype)
            x = x if E else x.to(dtype)
            first = torch.empty(max(1, E), g, r * f * d, a, dtype=dtype)
            second = torch.empty(max(1, E), f, e, g * r * b, dtype=dtype)
            router, balance = (torch.empty(E, d_in), torch.empty(E)) if E else (None, None)
            y, logits, chosen = triton_body.forward(x, first, second, router, balance, None, k, sizes,
                                                    swapped)
            triton_body.backward(dy, logits, x, first, second, router, None, logits, chosen, sizes, swapped)
"""


def test_compiles_without_spills(tmp_path):
    """Everything that the body launches at widths of 768 to 16,384, and with 8 of 256 experts, in at most 99
    KB of shared memory."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True,
                          timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("usage")]
    names = [name for name in dir(triton_body) if name.endswith("_kernel")]
    assert {(c, name) for c, name, *_ in lines} == {*itertools.product(("80", "89", "90"), names)}
    for capability, name, shared, stack, local in lines:
        assert int(shared) <= 99 * 1024 and int(stack) == int(local) == 0, (capability, name)
