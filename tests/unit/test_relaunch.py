"""What a launch straight through the driver hands over; a driver that only writes down what it gets stands in."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from flashtile.backends import relaunch
from flashtile.backends.relaunch import Relaunch, Relaunches

PTX = """
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .u32 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .u64 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .u64 .ptr .global .align 1 kernel_param_5,
	.param .u32 kernel_param_6,
	.param .u64 .ptr .global .align 1 kernel_param_7,
	.param .f32 kernel_param_8,
	.param .u64 .ptr .global .align 1 kernel_param_9,
	.param .u64 .ptr .global .align 1 kernel_param_10
)
.reqntid 128
"""
PARAMETERS = ("128s", "i", "i", "q", "q", "Q", "i", "Q", "f", "Q", "Q")
"""What belongs to it: a descriptor with its sizes, an address, a number, an address, a number, scratch."""


class Rules(NamedTuple):
    size: Any
    option: Any
    ptr: Any


SIGNATURE = {
    "desc": "tensordesc<fp32[2, 4],layout>",
    "ptr": "*fp32",
    "rules": Rules("i32", "constexpr", "*fp32"),
    "scale": "fp32",
    "BLOCK": "constexpr",
}


@dataclass(eq=False)
class Kernel:
    """Stands for a compiled kernel, each its own."""

    asm: dict[str, str]
    src: Any
    metadata: Any
    function: int


class Driver:
    """Keeps what each launch got, and pretends that TMA descriptors are their address and sizes."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.addresses_in_a_map = 1
        self.num_moves = 0
        self.launches: list[tuple[bytes, list[Any], int]] = []

    def encode(self, at: Any, dtype: int, rank: int, address: Any, *_: Any) -> int:
        ctypes.memmove(at.value, struct.pack("<Qii112x", address.value, dtype, rank), 128)
        if self.addresses_in_a_map == 2:
            ctypes.memmove(at.value + 64, struct.pack("<Q", address.value), 8)
        return 0

    def move(self, at: int, address: int) -> int:
        if error := self.errors.pop("map", 0):
            return error
        for place in (at, at + 64):
            ctypes.memmove(place, struct.pack("<Q", address), 8)
        self.num_moves += 1
        return 0

    def launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        """The driver reads as many addresses as the kernel has parameters, and there as many bytes as each has."""
        assert extra is None
        if error := self.errors.pop("launch", 0):
            return error
        addresses = struct.unpack(f"{len(PARAMETERS)}Q", ctypes.string_at(parameters, 8 * len(PARAMETERS)))
        assert addresses[0] % 64 == 0
        found = [
            struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0]
            for code, address in zip(PARAMETERS, addresses, strict=True)
        ]
        self.launches.append((ctypes.string_at(config, 56), found, function))
        return self.errors.get("always", 0)

    def tell(self, _error: int, name: Any) -> int:
        ctypes.cast(name, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_OF_TEST"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    library = SimpleNamespace(
        cuTensorMapEncodeTiled=made.encode,
        cuTensorMapReplaceAddress=made.move,
        cuLaunchKernelEx=made.launch,
        cuGetErrorName=made.tell,
    )
    monkeypatch.setattr(relaunch, "_driver", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0x5EED, raising=False)
    return made


def compiled(**changes: Any) -> Any:
    tiling = {"swizzle": 0, "elem_size": 4, "elem_type": 7, "block_size": [2, 4], "fp4_padded": False}
    metadata = {"shared": 1000, "num_warps": 4, "num_ctas": 1, "tensordesc_meta": [tiling], "global_scratch_size": 0}
    return Kernel(
        asm={"ptx": changes.pop("ptx", PTX)},
        src=SimpleNamespace(signature=changes.pop("signature", SIGNATURE)),
        metadata=SimpleNamespace(**(metadata | changes)),
        function=0xF00D,
    )


def arguments(one: Tensor, other: Tensor) -> tuple[Any, ...]:
    descriptor = SimpleNamespace(base=one, shape=[8, 4], strides=[4, 1], padding="zero")
    return descriptor, one, Rules(5, None, other), 0.25


def made(one: Tensor, other: Tensor, **changes: Any) -> Relaunch | None:
    """As ``Relaunch.of``, whose first question is whether there is a GPU."""
    kernel = compiled(**changes)
    aliases = one.detach(), other.detach()
    parameters = relaunch.parameters_of(kernel, (*arguments(*aliases), 64))
    if parameters is None or not relaunch._is_plain(kernel):
        return None
    found = Relaunch(kernel, (3, 2), 0)
    return found if found._fill(parameters, aliases) else None


def parameters(driver: Driver) -> list[Any]:
    return driver.launches[-1][1]


def test_every_parameter_is_where_the_ptx_says(driver: Driver) -> None:
    one, other = torch.zeros(8, 4), torch.zeros(5)
    launch = made(one, other)
    assert launch is not None
    launch((one, other))
    tensor_map, *numbers = parameters(driver)
    assert struct.unpack("<Qii112x", tensor_map) == (one.data_ptr(), 7, 2)
    assert numbers == [8, 4, 4, 1, one.data_ptr(), 5, other.data_ptr(), 0.25, 0, 0]


def test_the_launch_has_its_grid_threads_memory_and_stream(driver: Driver) -> None:
    tensors = torch.zeros(8, 4), torch.zeros(5)
    launch = made(*tensors)
    assert launch is not None
    launch(tensors)
    config, _, function = driver.launches[-1]
    assert struct.unpack("7I4xQQI4x", config) == (3, 2, 1, 128, 1, 1, 1000, 0x5EED, 0, 0)
    assert function == 0xF00D


@pytest.mark.parametrize("addresses_in_a_map", [1, 2])
def test_only_addresses_change(driver: Driver, addresses_in_a_map: int) -> None:
    """An address that is one word of a descriptor is written there; the driver changes another form of descriptor."""
    driver.addresses_in_a_map = addresses_in_a_map
    launch = made(torch.zeros(8, 4), torch.zeros(5))
    assert launch is not None
    for _ in range(3):
        one, other = torch.zeros(8, 4), torch.zeros(5)
        launch((one, other))
        tensor_map, *numbers = parameters(driver)
        assert struct.unpack("<Q", tensor_map[:8]) == (one.data_ptr(),)
        assert struct.unpack("<Q", tensor_map[64:72]) == (one.data_ptr() if addresses_in_a_map == 2 else 0,)
        assert numbers == [8, 4, 4, 1, one.data_ptr(), 5, other.data_ptr(), 0.25, 0, 0]
    assert driver.num_moves == (0 if addresses_in_a_map == 1 else 3)


def test_a_tensor_that_came_twice_may_come_as_two(driver: Driver) -> None:
    same, other = torch.zeros(8, 4), torch.zeros(8, 4)
    launch = made(same, same)
    assert launch is not None
    launch((same, other))
    numbers = parameters(driver)
    assert numbers[5] == same.data_ptr() and numbers[7] == other.data_ptr()


@pytest.mark.parametrize(
    "changes",
    [
        {"ptx": PTX.replace(".u32 kernel_param_6", ".u64 kernel_param_6")},
        {"ptx": PTX.replace("\t.param .u32 kernel_param_1,\n", "")},
        {"signature": SIGNATURE | {"scale": "fp8"}},
        {"tensordesc_meta": []},
        {"num_ctas": 2},
        {"global_scratch_size": 16},
        {"launch_pdl": True},
    ],
    ids=["another size", "one less", "unknown type", "unknown descriptor", "clusters", "scratch", "overlap"],
)
@pytest.mark.usefixtures("driver")
def test_what_does_not_look_as_expected_is_left_to_triton(changes: dict[str, Any]) -> None:
    assert made(torch.zeros(8, 4), torch.zeros(5), **changes) is None


def test_kernels_that_follow_each_other_get_the_same_tensors(driver: Driver) -> None:
    tensors = torch.zeros(8, 4), torch.zeros(5)
    first, second = made(*tensors, shared=1000), made(*tensors, shared=2000)
    assert first is not None and second is not None
    both = Relaunches(first, second)
    others = torch.zeros(8, 4), torch.zeros(5)
    both(others)
    assert [struct.unpack("7I4xQQI4x", config)[6] for config, _, _ in driver.launches] == [1000, 2000]
    assert all(numbers[5] == others[0].data_ptr() for _, numbers, _ in driver.launches)
    assert not both.is_watched()


def test_no_gpu_no_relaunch() -> None:
    tensors = torch.zeros(8, 4), torch.zeros(5)
    assert Relaunch.of(compiled(), (1,), tensors, arguments, (64,)) is None


def test_an_error_of_the_driver_is_told(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaunch, "_use_cuda", lambda _device: None)
    tensors = torch.zeros(8, 4), torch.zeros(5)
    launch = made(*tensors)
    assert launch is not None
    driver.errors["always"] = 700
    with pytest.raises(RuntimeError, match=r"700 \(CUDA_ERROR_OF_TEST\)"):
        launch(tensors)


@pytest.mark.parametrize("fails_at", ["map", "launch"])
def test_a_thread_without_a_context_gets_one(driver: Driver, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    used: list[int] = []
    monkeypatch.setattr(relaunch, "_use_cuda", used.append)
    driver.addresses_in_a_map = 2
    tensors = torch.zeros(8, 4), torch.zeros(5)
    launch = made(*tensors)
    assert launch is not None
    driver.errors[fails_at] = 201
    launch(tensors)
    assert used == [0] and len(driver.launches) == 1
    assert struct.unpack("<Q", parameters(driver)[0][:8]) == (tensors[0].data_ptr(),)
