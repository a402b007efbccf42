"""Kernels on a CPU that isn't there: what AVX-512, VNNI and bfloat16 need, emulated by Bochs.

    pip install bochscpu-python
    python tests/bochs.py tests/test_kernels.py tests/test_experts.py -k "avx512 or 48k"

runs pytest in a process in which both extensions believe that the CPU has these instructions. Each
kernel that needs them begins with a jump to Python, which has Bochs run the kernel's own code: it
reads the memory of this process at the same addresses. What runs is what was compiled; how fast it
is on a CPU can't be told. Linux on x86-64 alone. AMX is not emulated.
"""

import ctypes
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PAGE = 4096
MODEL = "sapphire_rapids"  # as Bochs names it

# What mp_cpu_features() tells besides, as csrc/cpu.h numbers it: AVX2, AVX-VNNI, AVX-512, its VNNI
# and BF16, and that with 48 KB of L1.
FEATURES = 0b1111110
LEVELS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "avx512bf16_48k")

# The arguments of each kernel (csrc/kernels.h): words, and where a double is among them.
WORDS = {
    "linear": 8, "gemm": 10, "transposed": 8, "pack": 5, "glu": 5, "softmax": 3, "logprob": 3,
    "p_table": 4, "p_normal": 4, "order": 4, "step_up": 2, "quantize": 3, "encode": 3,
}  # fmt: skip
DOUBLE_AT = {"softmax": 2, "step_up": 2}


def word(address):
    return ctypes.c_uint64.from_address(address)


def symbols(library, dynamic=False):
    """{name: offset} of a library."""
    command = ["nm", *(["-D"] if dynamic else []), "--defined-only", library]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(at, 16) for at, _, name in (line.split() for line in lines)}


def base_of(library):
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(library)):
            return int(line.partition("-")[0], 16)
    raise OSError(f"{library} is not loaded")


def write_code(address, code):
    """Over what stands there, in this process."""
    first = address & -PAGE
    length = ctypes.c_size_t(address + len(code) - first)
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), length, 7):
        raise OSError("mprotect refuses code that can be written")
    ctypes.memmove(address, code, len(code))


class Emulator:
    """One CPU, whose memory is this process's: a page is known to it once it asks."""

    # At the start of its own page: the end of a call (hlt); what comes first in one with a double
    # (movq xmm0, rax; jmp r11); what is done where a page is missing (push rax; mov rax, cr2;
    # invlpg [rax], which is told to `page_fault`; pop rax; add rsp, 8; iretq).
    END, WITH_DOUBLE, FAULT = 0, 16, 32
    CODE = (
        b"\xf4".ljust(16, b"\x90")
        + b"\x66\x48\x0f\x6e\xc0\x41\xff\xe3".ljust(16, b"\x90")
        + b"\x50\x0f\x20\xd0\x0f\x01\x38\x58\x48\x83\xc4\x08\x48\xcf"
    )
    GDT, TASK, IDT, PAGE_FAULT = 256, 512, 1024, 14
    STACK_PAGES = 256

    def __init__(self):
        import bochscpu
        import bochscpu.cpu
        import bochscpu.memory

        self.bochs = bochscpu
        self.choose_model()
        self.kept, self.host, self.known, self.copies = [], {}, set(), {}
        self.tables = self.insert(self.new_page())
        self.stack, self.thread = self.new_page(self.STACK_PAGES), self.new_page()
        self.system = self.new_page()
        handler = self.system + self.FAULT
        gate = struct.pack(
            "<HHBBHII", handler & 0xFFFF, 0x08, 1, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0
        )
        segments = struct.pack("<3Q", 0, 0x00209B0000000000, 0x00CF93000000FFFF)  # none, code, data
        for at, content in (
            (0, self.CODE),
            (self.GDT, segments),
            (self.IDT + self.PAGE_FAULT * 16, gate),
            # A stack of its own: below that of the function lies what the function still needs.
            (self.TASK + 36, struct.pack("<Q", self.stack + 100 * PAGE)),
        ):
            ctypes.memmove(self.system + at, content, len(content))
        for first, pages in ((self.stack, self.STACK_PAGES), (self.thread, 1), (self.system, 1)):
            for page in range(pages):
                self.map(first + page * PAGE)
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self.stop
        self.hook = bochscpu.Hook()
        self.hook.hlt = lambda *_: self.stop("done")
        self.hook.tlb_cntrl = self.page_fault
        self.hook.exception = self.exception
        self.lock = threading.Lock()

    def choose_model(self):
        """Bochs makes the CPU that it was built for; here each of them becomes MODEL."""
        library = next(Path(self.bochs.__file__).parent.glob("_bochscpu*.so"))
        base, made = base_of(library), re.compile(r"_Z\d+create_(\w+)_cpuidP8BX_CPU_C")
        at = {
            m[1]: base + to
            for name, to in symbols(library, True).items()
            if (m := made.match(name))
        }
        for model in at.keys() - {MODEL}:
            write_code(at[model], b"\xe9" + struct.pack("<i", at[MODEL] - at[model] - 5))

    def new_page(self, pages=1):
        self.kept.append(mmap.mmap(-1, pages * PAGE))
        return ctypes.addressof(ctypes.c_char.from_buffer(self.kept[-1]))

    def insert(self, page):
        """A page of this process: where it lies in the physical memory of the CPU."""
        at = (len(self.host) + 1) * PAGE
        self.bochs.memory.page_insert(at, page)
        self.host[at] = page
        return at

    def map(self, address):
        """Gives the CPU the page at `address`, or its copy; whether it had not got it before."""
        page = address & -PAGE
        if page in self.known:
            return False
        table = self.tables
        for shift in (39, 30, 21):
            entry = word(self.host[table] + (page >> shift & 511) * 8)
            if not entry.value & 1:
                entry.value = self.insert(self.new_page()) | 7
            table = entry.value & -PAGE
        at = self.insert(self.copies.get(page, page))
        word(self.host[table] + (page >> 12 & 511) * 8).value = at | 7
        self.known.add(page)
        return True

    def keep(self, address):
        """The page at `address` stays for the CPU what it is now."""
        page = address & -PAGE
        if page not in self.copies:
            self.copies[page] = self.new_page()
            ctypes.memmove(self.copies[page], page, PAGE)

    def stop(self, why):
        self.why = why
        self.session.stop()

    def page_fault(self, _session, _cpu, what, _address):
        if what == self.bochs.TlbControlType.INSTR_INVLPG.value:
            address = self.session.cpu.state.cr2
            if not self.map(address):
                self.stop(f"no access to {address:#x}")

    def exception(self, _session, _cpu, vector, _code):
        if int(vector) != self.PAGE_FAULT:
            self.stop(f"exception {vector}")

    def segment(self, base, attributes, selector):
        segment = self.bochs.Segment()
        segment.base, segment.limit, segment.selector = base, 0xFFFFFFFF, selector
        segment.attr, segment.present = attributes, True
        return segment

    def table(self, base, limit):
        table = self.bochs.GlobalSegment()
        table.base, table.limit = base, limit
        return table

    def started(self, address, words, double):
        """The CPU in long mode with all vectors on, at the call of a function."""
        cpu, state = self.bochs.cpu, self.bochs.State()
        cpu.set_long_mode(state)
        state.cr0, state.cr3 = cpu.ControlRegister(0x80010033), self.tables
        state.cr4, state.xcr0 = cpu.ControlRegister(0x406A0), cpu.ControlRegister(0x600E7)
        state.rflags, state.mxcsr, state.mxcsr_mask = cpu.FlagRegister(2), 0x1F80, 0xFFFF
        state.cs = self.segment(0, 0x209B, 0x08)
        state.ds = state.es = state.ss = state.gs = self.segment(0, 0xC93, 0x10)
        state.fs = self.segment(self.thread, 0xC93, 0x10)
        state.tr = self.segment(self.system + self.TASK, 0x8B, 0x18)
        state.gdtr = self.table(self.system + self.GDT, 23)
        state.idtr = self.table(self.system + self.IDT, 15 * 16 - 1)
        for register, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), words, strict=False):
            setattr(state, register, value)
        state.rsp = self.stack + 200 * PAGE - 8
        for i, value in enumerate([self.system + self.END, *words[6:]]):
            word(state.rsp + 8 * i).value = value
        state.rip = address
        if double is not None:
            state.rax, state.r11 = struct.unpack("<Q", struct.pack("<d", double))[0], address
            state.rip = self.system + self.WITH_DOUBLE
        return state

    def call(self, address, words, double=None):
        """What the function returns in rax."""
        with self.lock:
            self.session.cpu.state = self.started(address, words, double)
            self.why = None
            self.session.run([self.hook])
            if self.why != "done":
                raise RuntimeError(f"{self.why}, at {self.session.cpu.state.rip:#x}")
            return self.session.cpu.state.rax


def contract_of(kernel):
    """'linear' of 'linear_bf16'."""
    return next(name for name in sorted(WORDS, key=len, reverse=True) if kernel.startswith(name))


def stand_in(emulator, kernel, address):
    """A function of C that has the emulator run the kernel at `address`."""
    contract = contract_of(kernel)
    types = [ctypes.c_uint64] * WORDS[contract]
    at = DOUBLE_AT.get(contract)
    if at is not None:
        types.insert(at, ctypes.c_double)

    def run(*arguments):
        try:
            words = [value for i, value in enumerate(arguments) if i != at]
            return emulator.call(address, words, None if at is None else arguments[at])
        except BaseException as error:  # nothing above could catch it
            print(f"{kernel}: {error!r}", file=sys.__stderr__, flush=True)
            os._exit(1)

    return ctypes.CFUNCTYPE(ctypes.c_uint64, *types)(run)


def pretend(emulator, module):
    """From now on the module's kernels believe in FEATURES, which the emulator has."""
    base, at = base_of(module.__file__), symbols(module.__file__)
    place = {
        (kernel, variant): base + at[f"mp_{kernel}_{variant}"]
        for kernel, variant, has, _ in module.variants()
        if not has and "amx" not in variant
    }
    for address in place.values():
        emulator.keep(address)
    kept = []
    for (kernel, _), address in place.items():
        assert address % 16 == 0, "a jump has to fit in before the next function"
        kept.append(stand_in(emulator, kernel, address))
        target = ctypes.cast(kept[-1], ctypes.c_void_p).value
        write_code(address, b"\xff\x25\0\0\0\0" + struct.pack("<Q", target))
    static = next(name for name in at if re.fullmatch(r"features\.\d+", name))
    ctypes.c_uint.from_address(base + at[static]).value |= FEATURES
    module.limit_cpu(None)
    assert set(LEVELS) <= set(module.cpu_features()), "FEATURES are not as csrc/cpu.h has them"
    return kept


def pytest_configure(config):
    from moeprof import _C, _kernels

    emulator = Emulator()
    config.stash_of_bochs = emulator, [pretend(emulator, module) for module in (_C, _kernels)]


# What bochscpu's wheel wants of a C library that is newer than some systems'.
NEWER = """#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
unsigned long long __isoc23_strtoull(const char *at, char **end, int base)
{
    return strtoull(at, end, base);
}
int __isoc23_sscanf(const char *from, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    const int result = vsscanf(from, format, list);
    va_end(list);
    return result;
}
"""


def main(arguments):
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "newer.c"), Path(folder, "newer.so")
        source.write_text(NEWER)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "LD_BIND_NOW": "1",  # what binds functions late is not for an emulated CPU
            "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-p", "bochs", "-p", "no:cacheprovider"]
        return subprocess.run([*command, *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
