"""Published figures of the GPUs that kernels are compiled for; occupancy and modelled floors that follow from them."""

from typing import NamedTuple


class Device(NamedTuple):
    name: str
    target: str
    multiprocessors: int
    clock_ghz: float  # the highest
    bandwidth_tb: float  # device memory, 1e12 bytes a second
    cache_mib: int  # the last level before device memory
    source: str


DEVICES = [
    Device("A100 SXM 80GB", "sm_80", 108, 1.410, 2.039, 40, "NVIDIA A100 datasheet; Ampere architecture whitepaper"),
    Device("H100 SXM", "sm_90", 132, 1.980, 3.35, 50, "NVIDIA H100 datasheet (clock: from its 67 TFLOPS); whitepaper"),
    Device("H200", "sm_90", 132, 1.980, 4.8, 50, "NVIDIA H200 datasheet; otherwise as the H100"),
    Device("B200", "sm_100", 148, 1.965, 8.0, 126, "HGX B200 datasheet; SMs, L2: chipsandcheese.com; clock as H200"),
    Device("MI300X", "gfx942", 304, 2.100, 5.3, 256, "AMD MI300X datasheet; cache: the Infinity Cache"),
]
TARGETS = list(dict.fromkeys(device.target for device in DEVICES))

# Thread-instructions and special-function operations that one NVIDIA multiprocessor starts in a clock: 4 schedulers of
# 32 lanes; CUDA C++ Programming Guide, throughput of native arithmetic instructions, 8.0 to 10.0.
LANES = 128
SPECIAL_FUNCTIONS = 16


class Limits(NamedTuple):
    """What one multiprocessor (compute unit) holds."""

    warp_size: int
    warps: int
    blocks: int
    registers: int  # per lane of one of its four parts
    granularity: int  # in which a warp gets registers, per lane
    shared: int  # bytes
    reserved: int  # bytes of it that every block takes by itself


# CUDA C++ Programming Guide, technical specifications per compute capability. gfx942: LLVM, AMDGPU occupancy;
# AMD Instinct MI300 instruction set architecture (vector registers of a SIMD, waves, LDS).
LIMITS = {
    "sm_80": Limits(32, 64, 32, 512, 8, 164 * 1024, 1024),
    "sm_90": Limits(32, 64, 32, 512, 8, 228 * 1024, 1024),
    "sm_100": Limits(32, 64, 32, 512, 8, 228 * 1024, 1024),
    "gfx942": Limits(64, 32, 16, 512, 8, 64 * 1024, 0),
}


def blocks_per_multiprocessor(target: str, warps: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor runs at once, each of `warps` warps, `registers` a thread and `shared` bytes."""
    limits = LIMITS[target]
    allocated = -(-max(registers, 1) // limits.granularity) * limits.granularity
    warps_by_registers = 4 * (limits.registers // allocated)  # a warp stays in one of the four parts
    bytes_per_block = -(-shared // 128) * 128 + limits.reserved
    return min(
        min(limits.warps, warps_by_registers) // warps,
        limits.blocks,
        limits.shared // max(bytes_per_block, 1),
    )


class Floor(NamedTuple):
    """Microseconds per million logits that a device needs at least, by what it is short of."""

    memory: float
    issue: float
    special: float

    @property
    def bound(self) -> str:
        return max(self._fields, key=lambda field: getattr(self, field))


def floor(device: Device, bytes_: float, instructions: float, special_functions: float) -> Floor:
    """From bytes of device memory, thread-instructions and special-function operations per logit, of an NVIDIA GPU."""
    clocks_per_microsecond = device.multiprocessors * device.clock_ghz * 1e3
    return Floor(
        memory=1e6 * bytes_ / (device.bandwidth_tb * 1e6),
        issue=1e6 * instructions / (LANES * clocks_per_microsecond),
        special=1e6 * special_functions / (SPECIAL_FUNCTIONS * clocks_per_microsecond),
    )


def rows_in_flight(device: Device, blocks: int, grid: int) -> int:
    """Programs that the device runs at once, a row each."""
    return min(grid, blocks * device.multiprocessors)


def stay_in_cache(device: Device, rows: int, row_bytes: int) -> bool:
    """Whether so many rows are still in the cache when they are read again: they fill no more than what we count on."""
    from tce_kernels.triton_ops import CACHE_SHARE  # imported late, with triton

    return rows * row_bytes <= device.cache_mib * 2**20 * CACHE_SHARE
