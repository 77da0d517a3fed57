"""What tests run in spawned processes, which can import only what lies on the path."""

from pathlib import Path

from firsttoken.cache import ResultCache


def hammer(folder: Path, worker: int) -> int:
    """Writes and reads entries that other workers write too; returns how often something else came back."""
    cache = ResultCache(folder)
    wrong = 0
    for i in range(40):
        key = str(i % 5)
        blobs = {"shared": key.encode() * 2000, f"own{worker}": bytes([worker]) * 100}
        cache.put(key, blobs)
        wrong += cache.get(key, ["shared", f"own{worker}"]) != blobs
    return wrong
