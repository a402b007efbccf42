"""Builds moeprof._C, and moeprof._kernels for tests. Everything else is in pyproject.toml.

MOEPROF_BLAS=system     link pkg-config's openblas in place of the scipy-openblas32 wheel's
MOEPROF_WERROR=1        warnings are errors (CI)
MOEPROF_SANITIZE=LIST   build with -fsanitize=LIST, e.g. address,undefined

Where compiler and linker have them: a stack protector, _FORTIFY_SOURCE, and full RELRO, so that
a fault in C ends the process instead of letting it go on with damaged memory.
"""

import copy
import importlib.util
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# (arguments of the compiler, arguments of the linker), each pair kept where both accept it
HARDENING = [
    (["-fstack-protector-strong"], []),
    (["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"], []),  # some compilers define it themselves
    ([], ["-Wl,-z,relro,-z,now"]),  # macOS's linker has no -z
]

# moeprof._kernels: the kernels, what they and their bindings need, and what it has alone
KERNEL_FOLDERS = ["scalar", "x86", "blas"]
FOR_KERNELS = ["cpu", "decode", "formats", "ops", "py_cpu", "pyargs"]
OF_KERNELS = ["kernels_module", "py_kernels"]


def wheel_openblas() -> dict:
    """Compiler arguments for the library that the scipy-openblas32 wheel brings.

    Its folder is found without importing it: the import would load the library for the
    whole process. At run time moeprof/__init__.py loads it, so no rpath is written.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None:
        raise PlatformError("moeprof needs scipy-openblas32 to build (or MOEPROF_BLAS=system)")
    folder = Path(spec.origin).parent
    return {
        "include_dirs": [str(folder / "include")],
        "library_dirs": [str(folder / "lib")],
        "libraries": ["scipy_openblas"],
        "define_macros": [
            ("MP_SGEMM", "scipy_cblas_sgemm"),
            ("MP_SET_BLAS_THREADS", "scipy_openblas_set_num_threads"),
        ],
    }


def system_openblas() -> dict:
    """Compiler arguments for the openblas that pkg-config knows."""

    def flags(kind: str) -> list[str]:
        return subprocess.check_output(["pkg-config", kind, "openblas"], text=True).split()

    return {"extra_compile_args": flags("--cflags"), "extra_link_args": flags("--libs")}


def extensions() -> list[Extension]:
    """moeprof._C, and moeprof._kernels, which has single kernels for tests and benchmarks.

    Each has its own bindings and module file; what both have is compiled once (BuildExt).
    """
    system = os.environ.get("MOEPROF_BLAS") == "system"
    options = system_openblas() if system else wheel_openblas()
    compile_args = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
    compile_args += ["-Wall", "-Wextra", "-Wframe-larger-than=10240"]  # threads of 64 KiB exist
    # Lines for debuggers and profilers. Python's own -g describes variables too, which takes as
    # long as all else of the compilation.
    compile_args.append("-g1")
    link_args = ["-lm", "-lpthread", "-ldl"]  # separate libraries before glibc 2.34
    if os.environ.get("MOEPROF_WERROR") == "1":
        compile_args.append("-Werror")
    if sanitizers := os.environ.get("MOEPROF_SANITIZE"):
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
        link_args.append(f"-fsanitize={sanitizers}")
    options["include_dirs"] = [*options.get("include_dirs", []), numpy.get_include()]
    options["extra_compile_args"] = compile_args + options.get("extra_compile_args", [])
    options["extra_link_args"] = link_args + options.get("extra_link_args", [])
    depends = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/*.def"))
    everything = set(glob("csrc/**/*.c", recursive=True))
    kernels = {source for folder in KERNEL_FOLDERS for source in glob(f"csrc/{folder}/*.c")}
    kernels |= {f"csrc/{name}.c" for name in [*FOR_KERNELS, *OF_KERNELS]}
    parts = {
        "moeprof._C": everything - {f"csrc/{name}.c" for name in OF_KERNELS},
        "moeprof._kernels": kernels,
    }
    return [
        Extension(name, sorted(sources), depends=depends, **copy.deepcopy(options))
        for name, sources in parts.items()
    ]


class BuildExt(build_ext):
    """Hardens what is built, compiles each file once, and says in one line what is missing
    without a C compiler."""

    def accepts(self, compile_args: list[str], link_args: list[str]) -> bool:
        """Whether an empty function can be built into a library with these arguments."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.c"
            source.write_text("int mp_empty(void) { return 0; }\n")
            try:
                objects = self.compiler.compile(
                    [str(source)], folder, extra_preargs=["-O2", "-Werror", *compile_args]
                )
                self.compiler.link_shared_object(
                    objects, str(Path(folder) / "empty.so"), extra_postargs=link_args
                )
            except (CompileError, LinkError):
                return False
        return True

    def build_extensions(self) -> None:
        if not os.environ.get("MOEPROF_SANITIZE"):  # which brings checks of its own
            for compile_args, link_args in HARDENING:
                if self.accepts(compile_args, link_args):
                    for ext in self.extensions:
                        ext.extra_compile_args += compile_args
                        ext.extra_link_args += link_args
        self.compile_once()
        try:
            super().build_extensions()
        except CompileError as error:
            compiler = self.compiler.compiler[0]
            raise CompileError(
                f"moeprof is written in C and its compilation with '{compiler}' failed: {error}. "
                "If there is no C compiler, install one (Debian: apt install gcc; "
                "macOS: xcode-select --install) and try again."
            ) from error

    def compile_once(self) -> None:
        """The second extension takes the objects of the first: their arguments are the same.

        Files are compiled side by side, one on each core.
        """
        compile_all, objects = self.compiler.compile, {}

        def compile_new(sources, **options):
            new = [source for source in sources if source not in objects]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), new)
                objects.update(zip(new, made, strict=True))
            return [path for source in sources for path in objects[source]]

        self.compiler.compile = compile_new


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
