"""How the functions of the hot loops are compiled.

Compiling takes numba seconds, so each function is compiled once: for one set of argument types, and without what lets
Python call it. Numba counts a constant as a type of its own, `-1` as well as `True`; where one is passed on, or a loop
variable starts with one, it is written `int(-1)` or `bool(True)`.
"""

from typing import Any, Final

INNER: Final[dict[str, Any]] = {
    "_nrt": False, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
"""Functions that only compiled ones call. Tests call their plain twins, `py_func`."""
INLINED: Final[dict[str, Any]] = {**INNER, "forceinline": True}
"""Functions that become part of their callers, by LLVM: copying them into the callers' source takes numba longer."""
