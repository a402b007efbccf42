"""Builds moeprof._C. Everything else is in pyproject.toml.

MOEPROF_BLAS=system     link pkg-config's openblas in place of the scipy-openblas32 wheel's
MOEPROF_WERROR=1        warnings are errors (CI)
MOEPROF_SANITIZE=LIST   build with -fsanitize=LIST, e.g. address,undefined
"""

import importlib.util
import os
import subprocess
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError


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


def extension() -> Extension:
    system = os.environ.get("MOEPROF_BLAS") == "system"
    options = system_openblas() if system else wheel_openblas()
    compile_args = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
    compile_args += ["-Wall", "-Wextra"]
    link_args = ["-lm", "-lpthread", "-ldl"]  # separate libraries before glibc 2.34
    if os.environ.get("MOEPROF_WERROR") == "1":
        compile_args.append("-Werror")
    if sanitizers := os.environ.get("MOEPROF_SANITIZE"):
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
        link_args.append(f"-fsanitize={sanitizers}")
    options["include_dirs"] = [*options.get("include_dirs", []), numpy.get_include()]
    options["extra_compile_args"] = compile_args + options.get("extra_compile_args", [])
    options["extra_link_args"] = link_args + options.get("extra_link_args", [])
    return Extension(
        "moeprof._C",
        sources=sorted(glob("csrc/**/*.c", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/*.def")),
        **options,
    )


class BuildExt(build_ext):
    """Says in one line what is missing when there is no working C compiler."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except CompileError as error:
            compiler = self.compiler.compiler[0]
            raise CompileError(
                f"moeprof is written in C and its compilation with '{compiler}' failed: {error}. "
                "If there is no C compiler, install one (Debian: apt install gcc; "
                "macOS: xcode-select --install) and try again."
            ) from error


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
