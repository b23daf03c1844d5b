"""lib/device.py: which device and type a program takes, and how fast the device could be."""
import types

import pytest
import torch

from lib import device


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name) -> torch tells of a GPU of this name, but tensors are made on the CPU."""
    def gpu(name, bfloat16=True):
        ones = torch.ones
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    return gpu


def test_the_best_device_there_is(gpu):
    gpu("a GPU")
    assert device.choose_device(None) == device.choose_device("cuda") == ("cuda:0", "cuda")
    assert device.choose_device(None, local_rank=3) == ("cuda:3", "cuda")
    assert device.choose_device("cuda:1") == ("cuda:1", "cuda")
    with pytest.raises(ValueError, match="^device 'cuda:1' is one GPU, .*: use 'cuda'$"):
        device.choose_device("cuda:1", local_rank=3)
    assert device.choose_device("cpu", local_rank=3) == ("cpu", "cpu")


def test_other_gpus_are_not_shared_either(gpu):
    """Intel's have indices, a Mac has one."""
    gpu("a GPU")
    assert device.choose_device("xpu") == ("xpu:0", "xpu") and device.choose_device("mps") == ("mps", "mps")
    assert device.choose_device("xpu", local_rank=3) == ("xpu:3", "xpu")
    assert device.choose_device("mps", local_rank=0) == ("mps", "mps")  # of several machines
    for name, local_rank, instead in (("xpu:0", 0, "xpu"), ("mps", 1, "cpu"), ("mps:0", 1, "cpu")):
        with pytest.raises(ValueError, match=f"^device '{name}' is one GPU, .*: use '{instead}'$"):
            device.choose_device(name, local_rank)


@pytest.mark.parametrize("asked, local_rank", [(None, None), ("cuda", None), ("cuda:1", None), ("cuda", 1)])
def test_a_gpu_can_be_made_the_current_one(asked, local_rank, gpu, monkeypatch):
    """torch.cuda.set_device takes no 'cuda' without an index."""
    made_current = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    gpu("a GPU")
    torch.cuda.set_device(device.choose_device(asked, local_rank)[0])
    assert made_current == [1 if "cuda:1" == asked or local_rank else 0]


@pytest.mark.parametrize("major, expected", [(7, "float32"), (8, "bfloat16")])
def test_bfloat16_is_not_emulated(major, expected, monkeypatch):
    """torch counts GPUs that emulate it among those that have it."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    assert device.choose_dtype(None, "cuda") == expected


def test_tf32_leaves_both_ways_to_ask_for_the_precision(monkeypatch):
    """Inductor's autotuning asks by torch.get_float32_matmul_precision, triton_body by the newer one."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    try:
        device.use_device("cuda:0", tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.choose_device(None) == ("cpu", "cpu")


@pytest.mark.parametrize("name", ["abacus", "cpu:x", "meta"])
def test_a_device_that_cannot_be_used_is_one_sentence(name):
    with pytest.raises(ValueError, match=f"^device '{name}' cannot be used here: ") as error:
        device.choose_device(name)
    assert "\n" not in str(error.value)


def test_of_a_backends_reasons_the_first_is_told(monkeypatch):
    def refuse(*_, device):
        raise NotImplementedError("There is no 'MPS' backend. Operators may be left out. See\nthe list.")
    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(ValueError, match="^device 'mps' cannot be used here: There is no 'MPS' backend$"):
        device.choose_device("mps")


@pytest.mark.parametrize("dtype, device_type, bfloat16, expected", [
    (None, "cpu", True, "float32"), (None, "cuda", True, "bfloat16"), (None, "cuda", False, "float32"),
    ("float16", "cuda", True, "float16"), ("float32", "cuda", True, "float32")])
def test_bfloat16_on_gpus_that_have_it(dtype, device_type, bfloat16, expected, gpu):
    gpu("a GPU", bfloat16)
    assert device.choose_dtype(dtype, device_type) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_computes_in_the_type(dtype):
    x = torch.randn(4, 4)
    with device.autocast("cpu", dtype):
        assert (x @ x).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("asked, name, works, expected", [
    (None, "cuda", True, True), (None, "cuda", False, False), (None, "cpu", True, False),
    (None, "cpu", False, False), (False, "cuda", False, False), (True, "cpu", True, True)])
def test_models_are_compiled_where_that_works(asked, name, works, expected, gpu, monkeypatch, capsys):
    """By default on GPUs; one sentence says where it was tried and did not work."""
    def trial(function):
        assert expected or not works, "tried although nobody wants it"
        return function if works else 1 / 0
    gpu("a GPU")
    monkeypatch.setattr(torch, "compile", trial)
    assert device.choose_compile(asked, name) is expected
    sentence = "torch.compile does not work here (division by zero): the model is not compiled\n"
    assert capsys.readouterr().out == (sentence if (asked, name, works) == (None, "cuda", False) else "")


def test_compiled_code_that_is_asked_for_is_needed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    with pytest.raises(ValueError, match=r"^torch.compile does not work here \(division by zero\)$"):
        device.choose_compile(True, "cpu")


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 NVL", 835e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12)])
def test_peak_of_a_known_gpu_is_that_of_its_data_sheet(name, flops, gpu):
    """The dense bfloat16 FLOP/s that the maker states; a longer name is not taken for a shorter one."""
    gpu(name)
    assert device.peak_flops("cuda", "bfloat16") == (flops, f"{name}'s data sheet")
    assert device.peak_flops("cuda:1", "float16", 8) == (8 * flops, f"{name}'s data sheet")


@pytest.mark.parametrize("name, place, dtype", [
    ("NVIDIA RTX A4000", "cuda", "bfloat16"), ("NVIDIA A1000", "cuda", "bfloat16"),
    ("NVIDIA H100 PCIe", "cuda", "float32"), ("NVIDIA H100 PCIe", "cpu", "bfloat16")])
def test_without_a_data_sheet_there_is_no_peak(name, place, dtype, gpu):
    """The names of the first two hold that of another, A40 or A100, as a part of a word."""
    gpu(name)
    assert device.peak_flops(place, dtype) == (None, None)


def test_a_model_larger_than_the_memory_is_refused():
    device.check_memory(10 ** 6, "cpu")
    with pytest.raises(ValueError, match="a model of 1,000,000,000,000,000 parameters needs .* GB of memory"):
        device.check_memory(10 ** 15, "cpu")
