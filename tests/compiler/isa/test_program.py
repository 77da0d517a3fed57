"""Program files and listings: inverse to each other, the same bytes every time, and one ProgramError for any other."""

import contextlib
import io
import json
import tracemalloc
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import program as program_file
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.program import OpInfo, Packing, Program, Tensor, parse_listing
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel

LISTING = """\
.kernel 0 mul(s0, s1)
.kernel 1 max<- abs(s0)
core0.dma_in load op=0 n0=1 n1=4 bytes=64 flags=0 dst=spad:i8@0x0+0,64,0 src=dram:i8@0x40+0,128,0 signal
core0.matrix matmul op=1 m=4 n=16 k=64 flags=0 acc=acc:i32@0x0+64,0,0 a=spad:i8@0x0+64,0,0 w=spad:i4@0x100+0,8,16 \
wait=core0.dma_in>=1 signal
core0.vector vector op=1 n0=1 n1=4 n2=16 flags=2 dst=spad:f16@0x400+0,32,2 s0=acc:i32@0x0+0,64,4 wait=core0.matrix>=1
"""
PACKING = Packing("model.w", "panels", 64, 16, 16, 4, 32, True)
HOSTS = (
    HostCall(
        "host.0", ("/erf/Erf", "/erf/Cast"), "no NPU operator for Erf",
        (HostValue("x", 1, (2, 3, 4), Dtype.F16, (12, 4, 1)), HostValue("m", 9, (), Dtype.BOOL, ())),
        (HostValue("y", 11, (2, 3, 4), Dtype.F64, (12, 4, 1)),), 24, 1 << 40, b"\x08\x0a",
    ),
    HostCall("host.1", (), "", (), (), 0, 0),
)  # fmt: skip


def program() -> Program:
    code, kernels = parse_listing(LISTING)
    return Program(
        code=code,
        kernels=kernels,
        tensors=(
            Tensor("x", "input", Space.DRAM, 0, 1024, Dtype.I8, (16, 64)),
            Tensor("w", "weight", Space.DRAM, 1024, 512, Dtype.I4, (64, 16), PACKING),
            Tensor("table", "constant", Space.DRAM, 1536, 64, Dtype.F16, (4, 8)),
        ),
        ops=(
            OpInfo("embed", "gather", ("/embed/Gather",), "", 0, 1),
            OpInfo("q", "linear", ("/q/MatMul", "/q/Add"), "layers.0", 1, 3, 4, 16, 64, 1, 4, 8, 4096, "4x16x64"),
        ),
        constants={"table": np.arange(64, dtype=np.uint8), "empty": np.zeros(0, np.uint8)},
        dram_bytes=1600, spad_bytes=2048, acc_bytes=256, cores=2,
        meta={"student": "tiny", "options": {"weights": "int4"}, "energy": 1.5}, hosts=HOSTS,
    )  # fmt: skip


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_document(**changes: Any) -> bytes:
    """A program file whose document has other values; a value of None removes the field."""
    parts = members(program().encode())
    document = {**json.loads(parts["program.json"]), **changes}
    document = {key: value for key, value in document.items() if value is not None}
    return archived({**parts, "program.json": json.dumps(document).encode()})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def rejected(data: bytes) -> str:
    with pytest.raises(ProgramError) as caught:
        Program.decode(data)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def test_decode_gives_every_field_back() -> None:
    before = program()
    after = Program.decode(before.encode())
    for declared in fields(Program):
        if declared.name not in ("code", "constants"):
            assert getattr(after, declared.name) == getattr(before, declared.name), declared.name
    np.testing.assert_array_equal(after.code, before.code)
    assert after.code.dtype == np.int64
    assert after.code.flags.writeable
    assert set(after.constants) == set(before.constants)
    for name, data in before.constants.items():
        np.testing.assert_array_equal(after.constants[name], data)
    assert after.encode() == before.encode()


def test_equal_programs_have_equal_bytes() -> None:
    one = program()
    meta = dict(reversed(one.meta.items()))
    constants = dict(reversed(one.constants.items()))
    other = replace(one, code=np.asfortranarray(one.code), meta=meta, constants=constants)
    assert one.encode() == other.encode()
    assert one.encode() != replace(one, cores=1).encode()


def test_listing_is_inverse_to_text() -> None:
    assert str(program()) == LISTING
    code, kernels = parse_listing(str(program()))
    np.testing.assert_array_equal(code, program().code)
    assert kernels == (VectorKernel.parse("mul(s0, s1)"), VectorKernel.parse("max<- abs(s0)"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2]), max_size=12), st.integers(0, 2**40))
def test_programs_of_any_length_round_trip(rows: list[int], dram_bytes: int) -> None:
    code = program().code[rows] if rows else np.zeros((0, word.WIDTH), np.int64)
    before = replace(program(), code=code, dram_bytes=dram_bytes)
    after = Program.decode(before.encode())
    np.testing.assert_array_equal(after.code, code)
    np.testing.assert_array_equal(parse_listing(str(after))[0], code)
    assert len(after) == len(rows)
    assert after.dram_bytes == dram_bytes


def test_listing_skips_comments_and_blank_lines_and_numbers_its_errors() -> None:
    commented = "# a program\n\n" + LISTING.replace(" signal", " signal  # done")
    np.testing.assert_array_equal(parse_listing(commented)[0], program().code)
    with pytest.raises(ProgramError, match=r"line 3: cannot parse .*'mang'"):
        parse_listing(LISTING.replace("n0=1", "n0=mang", 1))
    with pytest.raises(ProgramError, match=r"line 1: unknown vector operation 'mull'"):
        parse_listing(LISTING.replace("mul(", "mull("))
    with pytest.raises(ProgramError, match=r"line 1:"):
        parse_listing(".kernel\n")
    with pytest.raises(ProgramError, match=r"line 1: .*nests deeper than 64"):
        parse_listing(".kernel 0 " + "abs(" * 5000 + "s0" + ")" * 5000)
    with pytest.raises(ProgramError, match=r"line 4: .*does not fit in 64 bits"):
        parse_listing(LISTING.replace("k=64", f"k={10**30}"))


def test_lookups() -> None:
    assert program().tensor("w").packing == PACKING
    assert [t.name for t in program().of_kind("constant")] == ["table"]
    with pytest.raises(ProgramError, match="no tensor 'v'"):
        program().tensor("v")
    assert [i.MNEMONIC for i in program().instructions()] == ["load", "matmul", "vector"]
    assert len(program().with_code(program().code[:1])) == 1


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "student.npu"
    program().save(path)
    assert Program.load(path).encode() == program().encode() == path.read_bytes()
    with pytest.raises(ProgramError, match=r"no such program file: .*absent\.npu"):
        Program.load(tmp_path / "absent.npu")
    with pytest.raises(ProgramError, match="no such program file"):
        Program.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ProgramError, match="not a program file"):
        Program.load(path)


def test_every_truncation_is_refused() -> None:
    data = program().encode()
    for end in range(0, len(data), 7):
        assert "not a program file" in rejected(data[:end])


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(program().encode()) - 1), st.integers(0, 255), st.booleans())
def test_any_damaged_byte_is_refused_or_harmless(at: int, value: int, remove: bool) -> None:
    data = program().encode()
    damaged = data[:at] + (b"" if remove else bytes([value])) + data[at + 1 :]
    with contextlib.suppress(ProgramError):
        Program.decode(damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "format 'firsttoken-program' version 1; this release reads 'firsttoken-program' version 3"),
        ({"version": 4}, "format 'firsttoken-program' version 4"),
        ({"format": "elf"}, "format 'elf'"),
        ({"format": None}, "format None"),
        ({"tensors": None}, "'tensors'"),
        ({"cores": None}, "'cores'"),
        ({"meta": None}, "'meta'"),
        ({"kernels": ["mul(s0"]}, "vector kernel"),
        ({"kernels": [7]}, "not a program file"),
        ({"kernels": 7}, "kernels is a int"),
        ({"tensors": {}}, "tensors is a dict, expected a list"),
        ({"tensors": [{"name": "x"}]}, "'packing'"),
        ({"tensors": ["x"]}, "not a program file"),
        ({"ops": [{"onnx_nodes": []}]}, "not a program file"),
        ({"ops": [{"onnx_nodes": [], "surprise": 1}]}, "surprise"),
        ({"constants": ["table", "empty", "third"]}, "constant2.npy"),
        ({"constants": "x"}, "constants is a str, expected a list"),
        ({"hosts": None}, "'hosts'"),
        ({"hosts": {}}, "hosts is a dict, expected a list"),
        ({"hosts": [7]}, "not a program file"),
        ({"hosts": [{}]}, "'inputs'"),
        ({"hosts": [json.loads(members(program().encode())["program.json"])["hosts"][0]] * 3}, "host2.onnx"),
        ({"cores": "2"}, "Program has cores '2', expected int"),
        ({"cores": True}, "Program has cores True, expected int"),
        ({"dram_bytes": 1.5}, "Program has dram_bytes 1.5, expected int"),
        ({"meta": []}, r"Program has meta []"),
    ],
)
def test_each_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in rejected(with_document(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": 9}, "9 is not a valid Space"),
        ({"dtype": "f16"}, "'f16' is not a valid Dtype"),
        ({"kind": "spare"}, "tensor 'x' is of kind 'spare'; known: input, output"),
        ({"first": 1.5}, "Tensor has first 1.5, expected int"),
        ({"address": "0"}, "Tensor has address '0', expected int"),
        ({"shape": [1, "2"]}, "Tensor has shape (1, '2'), expected tuple[int, ...]"),
        ({"shape": 3}, "not a program file"),
        ({"packing": {"source": "w"}}, "not a program file"),
        ({"packing": 5}, "not a program file"),
    ],
)
def test_each_wrong_field_of_a_tensor_is_named(change: dict[str, Any], message: str) -> None:
    document = json.loads(members(program().encode())["program.json"])
    document["tensors"][0].update(change)
    assert message in rejected(with_document(tensors=document["tensors"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": 1.5}, "HostCall has flops 1.5, expected int"),
        ({"nbytes": "1"}, "HostCall has nbytes '1', expected int"),
        ({"name": 3}, "HostCall has name 3, expected str"),
        ({"reason": None}, "HostCall has reason None, expected str"),
        ({"nodes": [1]}, "HostCall has nodes (1,), expected tuple[str, ...]"),
        ({"nodes": 5}, "not a program file"),
        ({"inputs": 5}, "not a program file"),
        ({"outputs": ["y"]}, "not a program file"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_each_wrong_field_of_a_call_of_the_host_is_named(change: dict[str, Any], message: str) -> None:
    document = json.loads(members(program().encode())["program.json"])
    document["hosts"][0].update(change)
    assert message in rejected(with_document(hosts=document["hosts"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 99}, "99 is not a valid Dtype"),
        ({"shape": [2, 3.5]}, "HostValue has shape (2, 3.5), expected tuple[int, ...]"),
        ({"strides": [True]}, "HostValue has strides (True,), expected tuple[int, ...]"),
        ({"strides": None}, "not a program file"),
        ({"elem_type": "1"}, "HostValue has elem_type '1', expected int"),
        ({"name": None}, "HostValue has name None, expected str"),
    ],
)
def test_each_wrong_field_of_a_value_of_the_host_is_named(change: dict[str, Any], message: str) -> None:
    for side in ("inputs", "outputs"):
        document = json.loads(members(program().encode())["program.json"])
        document["hosts"][0][side][0].update(change)
        assert message in rejected(with_document(hosts=document["hosts"]))


def test_subgraphs_are_members_of_the_file_as_they_are() -> None:
    """The document does not repeat them, and calls are told apart by position."""
    parts = members(program().encode())
    assert (parts["host0.onnx"], parts["host1.onnx"]) == (b"\x08\x0a", b"")
    assert [call["model"] for call in json.loads(parts["program.json"])["hosts"]] == ["", ""]
    swapped = archived({**parts, "host0.onnx": parts["host1.onnx"], "host1.onnx": parts["host0.onnx"]})
    assert [call.model for call in Program.decode(swapped).hosts] == [b"", b"\x08\x0a"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (np.zeros((2, word.WIDTH - 1), np.int64), f"shape (2, {word.WIDTH - 1}), expected int64 [n, {word.WIDTH}]"),
        (np.zeros(word.WIDTH, np.int64), f"shape ({word.WIDTH},)"),
        (np.zeros((2, word.WIDTH), np.int32), "type int32"),
        (np.zeros((2, word.WIDTH), ">i8"), "type >i8"),
        (np.zeros((2, word.WIDTH)), "not a row-major array of integers"),
        (np.zeros((2, word.WIDTH), np.int64, order="F"), "not a row-major array of integers"),
    ],
)
def test_code_of_another_shape_is_refused(code: np.ndarray, message: str) -> None:
    assert message in rejected(archived({**members(program().encode()), "code.npy": npy(code)}))


def test_constants_are_bytes() -> None:
    parts = members(program().encode())
    assert "constant 'table' has type int64" in rejected(archived({**parts, "constant1.npy": npy(np.arange(8))}))


@pytest.mark.parametrize("name", ["program.json", "code.npy", "constant0.npy", "host0.onnx"])
def test_every_member_is_needed(name: str) -> None:
    parts = members(program().encode())
    del parts[name]
    assert name in rejected(archived(parts))
    if name == "host0.onnx":
        return  # its content is the host's business, see tests/simulator/test_host.py
    parts[name] = b""
    assert "not a program file" in rejected(archived(parts))


def test_json_that_is_no_document_is_refused() -> None:
    parts = members(program().encode())
    for text in (b"[]", b"3", b"null", b"{", b"\xff\xfe", b"[" * 100_000):
        assert "not a program file" in rejected(archived({**parts, "program.json": text}))


def test_a_shape_that_is_not_there_reserves_nothing() -> None:
    parts = members(program().encode())
    for shape in (f"({10**9}, {word.WIDTH})", f"({2**62}, {word.WIDTH})", f"(-1, {word.WIDTH})", "(2**70,)"):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header = header.ljust(118) + b"\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8 * word.WIDTH)
        bad = archived({**parts, "code.npy": data})
        tracemalloc.start()
        rejected(bad)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_pickles_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    rejected(archived({**members(program().encode()), "code.npy": buffer.getvalue()}))


def test_a_bomb_that_declares_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_file, "MAX_FILE_BYTES", 1 << 20)
    data = archived({**members(program().encode()), "padding": bytes(2 << 20)})
    assert "the limit is 1048576" in rejected(data)


def test_a_bomb_that_declares_less_does_not_unpack() -> None:
    data = bytearray(archived({**members(program().encode()), "code.npy": bytes((32 << 20) + 0x010203)}))
    size = ((32 << 20) + 0x010203).to_bytes(4, "little")
    assert data.count(size) == 2  # the local header and the directory
    data = bytearray(bytes(data).replace(size, (100).to_bytes(4, "little")))
    tracemalloc.start()
    rejected(bytes(data))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
