"""The search that `test_tune` kills; the store is its argument."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    from students import SMALL

    from firsttoken.options import RunOptions
    from firsttoken.subject import subject_of
    from firsttoken.tuning.store import TrialStore
    from firsttoken.tuning.tune import Plan, tune
    from firsttoken_compiler.target.target import Target

    plan, store = Plan("ttft", prompt=48, trials=12, seed=1), TrialStore(Path(sys.argv[1]))
    tune(subject_of(SMALL), Target.load("systolic-128"), RunOptions(), plan, store)
