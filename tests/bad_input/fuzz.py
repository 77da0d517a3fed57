"""Damages models at random and gives them to the whole compiler, which must refuse them or make a program.

    python tests/bad_input/fuzz.py [--seconds 600] [--seed 0] [--keep FOLDER]

Files go to a worker process one by one, so that whatever one of them does is seen from outside. What goes wrong for
a new reason is kept.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import making
import mutate
import numpy as np
from onnx import ModelProto, TensorProto

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S, START_S, ROOM_BYTES = 20.0, 300.0, 2 << 30
PER_WORKER = 400
"""Files per process; a fresh one forgets what TVM keeps."""
OUTSIDE_BYTES = 256
"""Weights above this size are taken out of the files, as damage to them is dull."""


def corpus() -> list[bytes]:
    """Small whole models: exports of torch, students, quantised products, control flow, functions, and bad files."""
    from firsttoken_models.onnx_graph import build_graph

    sys.path.insert(0, str(ROOT / "tests"))
    import onnx
    from students import LLAMA

    found = [onnx.load(path) for path in sorted((ROOT / "tests/fixtures/torch").glob("*.onnx"))]
    found += [build_graph(LLAMA, tokens=3, past=0), build_graph(LLAMA, tokens=1, past=4)]
    found += [making.product(), making.nbits(), making.nbits(k=48), making.loop(3), making.scan(4)]
    found += [making.dequantised(np.ones(32, np.float32)), making.functions({"f": ["g", "Relu"], "g": ["Sigmoid"]})]
    found += [making.written(body, **arrays) for body, arrays in WRITTEN]
    return [_lean(model).SerializeToString() for model in found]


_S, _I = np.array([4, 32]), np.array([0])
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("a = Reshape(x, s) b = Transpose<perm=[1, 0]>(a) c = MatMul(a, b) d = Softmax(c) e = MatMul(d, a) "
     "y = Reshape(e, t)",
     {"s": _S, "t": np.array([1, 4, 32])}),
    ("s = Shape(x) r = ReduceProd(s) f = ConstantOfShape(s) g = Add(f, x) y = Mul(g, g)", {}),
    ("q, s, z = DynamicQuantizeLinear(x) m = MatMulInteger(q, w, z) c = Cast<to=1>(m) y = Mul(c, s)",
     {"w": np.ones((32, 32), np.uint8)}),
    ("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = MatMul(d, w) a = Add(m, b) y = Erf(a)",
     {"s": np.float32(0.1), "z": np.uint8(128), "w": making.weight(32, 32), "b": making.weight(32)}),
    ("u = Unsqueeze(x, i) c = Conv<pads=[1, 1, 1, 1]>(u, w) p = MaxPool<kernel_shape=[1, 1]>(c) y = Squeeze(p, i)",
     {"i": _I + 1, "w": making.weight(1, 1, 3, 3)}),
    ("l = LayerNormalization(x, g, b) h, k = Split<axis=2, num_outputs=2>(l) y = Concat<axis=2>(k, h)",
     {"g": making.weight(32), "b": making.weight(32)}),
    ("c = CumSum(x, i) e = Greater(c, x) y = Where(e, c, x)", {"i": np.array(1)}),
    ("t = Tile(o, r) p = Pad(t, k) l = Slice(p, b, e) n = Range(z, f, o2) g = Gather<axis=2>(x, n) a = Add(g, l) "
     "y = Relu(a)",
     {"o": making.weight(1), "r": np.array([32]), "k": np.array([1, 1]), "b": _I + 1, "e": _I + 33,
      "z": np.array(0), "f": np.array(32), "o2": np.array(1)}),
    ("y = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)", {"g": making.weight(32)}),
]  # fmt: skip


def _lean(model: ModelProto) -> ModelProto:
    """The model with its larger float weights outside: nobody reads them."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) > OUTSIDE_BYTES:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="absent.bin")
    return model


def worker() -> None:
    """Reads names of files, writes what became of each, as one line of JSON."""
    import warnings

    warnings.simplefilter("ignore")
    from firsttoken import api
    from firsttoken.options import RunOptions

    faulthandler.register(signal.SIGUSR1)
    options = RunOptions(weights_absent=True)
    out, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:  # loads what is heavy before memory is limited
        api.compile(making.save(making.loop(2), Path(folder)), "systolic-128", options=options)
        program = api.compile(making.save(making.product(), Path(folder)), "systolic-128", options=options)
        api.simulate(program, "systolic-128")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_try(Path(line.strip()), api, options)), file=out, flush=True)


def _try(path: Path, api: Any, options: Any) -> dict[str, str]:
    from firsttoken_compiler.errors import FirsttokenError

    try:
        program = api.compile(path, "systolic-128", options=options)
        api.simulate(program, "systolic-128")
    except FirsttokenError as error:
        return {"end": "refused" if len(str(error)) < 5000 else "endless message", "why": str(error)[:300]}
    except BaseException as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if "/firsttoken" in frame.filename] or frames
        where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
        return {"end": f"{type(error).__name__} at {where}", "why": str(error)[-400:]}
    return {"end": "compiled", "why": ""}


class Worker:
    """The process that tries the files."""

    def __init__(self) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1
        )
        if self._line(START_S) != "ready\n":
            raise RuntimeError(f"the process that tries files does not start: {self.stop()[-2000:]}")

    def attempt(self, path: Path) -> dict[str, str]:
        """What became of a file."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
        line = self._line(LIMIT_S)
        if line:
            return dict(json.loads(line))
        hangs = self.process.poll() is None and line is None
        if hangs:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        said = self.stop()
        if not hangs:
            return {"end": f"crash {self.process.returncode}", "why": said[-600:]}
        frames = re.findall(r'File ".*/(.*?)", line (\d+)', said[said.rfind("most recent call first") :])
        return {"end": f"hang at {':'.join(frames[0]) if frames else 'unknown'}", "why": said[-3000:]}

    def _line(self, seconds: float) -> str | None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    @property
    def alive(self) -> bool:
        """Whether it can take another file."""
        return self.process.poll() is None

    def stop(self) -> str:
        """Ends the process; what it wrote to stderr."""
        if self.errors.closed:
            return ""
        self.process.kill()
        with self.process, self.errors:
            self.process.wait()
            self.errors.seek(0)
            return self.errors.read().decode(errors="replace")


def fuzz(seconds: float, seed: int, keep: Path | None) -> Counter[str]:
    """How many files ended how; prints the first of each way that is not allowed."""
    chance, ends = random.Random(seed), Counter[str]()
    models = corpus()
    started, process = time.monotonic(), Worker()
    with tempfile.TemporaryDirectory() as folder:
        path, tried = Path(folder, "fuzzed.onnx"), 0
        while time.monotonic() - started < seconds:
            if not process.alive or tried >= PER_WORKER:
                process.stop()
                process, tried = Worker(), 0
            data = mutate.damaged(chance.choice(models), chance)
            path.write_bytes(data)
            result = process.attempt(path)
            tried += 1
            new = result["end"] not in ends
            ends[result["end"]] += 1
            if new and result["end"] not in ("refused", "compiled"):
                print(f"{time.monotonic() - started:.0f} s: {result['end']}: {result['why']}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    name = hashlib.sha256(data).hexdigest()[:12]
                    (keep / f"{name}.onnx").write_bytes(data)
                    (keep / f"{name}.txt").write_text(f"{result['end']}\n{result['why']}\n")
    process.stop()
    return ends


def main() -> int:
    """Exit code 1 when anything but refusals and programs came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="folder for files that were not refused as they should")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return 0
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    ends = fuzz(arguments.seconds, seed, arguments.keep)
    total = sum(ends.values())
    print(f"seed {seed}: {total} files: " + ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    return int(set(ends) - {"refused", "compiled"} != set())


if __name__ == "__main__":
    sys.exit(main())
