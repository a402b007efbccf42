"""Kernels compiled by themselves, with emulated instructions, and called through ctypes."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
FLAGS = "-std=gnu11 -O3 -ffp-contract=off -Wall -Wextra -Werror -shared -fPIC".split()


class Rows(ctypes.Structure):
    """mp_rows."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_ssize_t),
        ("index", ctypes.c_void_p),
        ("count", ctypes.c_ssize_t),
    ]


class Matrix(ctypes.Structure):
    """mp_matrix; these kernels ask for no more than the address."""

    _fields_ = [
        ("format", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("row_bytes", ctypes.c_ssize_t),
    ]


def library(folder, emulation, files, flags=()):
    """These sources of csrc and tests as a library; each includes `emulation`, of tests, first."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if not shutil.which(compiler[0]):
        pytest.skip(f"there is no C compiler {compiler[0]!r}")
    path = folder / "kernels.so"
    command = [*compiler, *FLAGS, *flags, "-include", TESTS / emulation, *files]
    done = subprocess.run([*command, "-o", path, "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(path)
