"""TVM's meta_schedule, which nothing that compiles needs: it takes its time to import."""

from __future__ import annotations

from firsttoken_compiler.tvm.api import tvm

# isort: split
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule

HOST = tvm.target.Target({"kind": "llvm", "num-cores": 1})
"""What meta_schedule is told that it tunes for; no code is generated for it."""

__all__ = ["HOST", "derived_object", "meta_schedule"]
