"""Prints what tests/studies/run compares, and exits with 1 where a study missed its mark.

    python3 compare.py FOLDER
"""

import json
import pathlib
import sys

TAIL = 0.2  # of the steps, whose mean is compared: single steps are noisy
BALANCED = 0.10  # MaxVio
NOISE = 0.25  # %


def read(folder, name):
    with (folder / f"{name}.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    steps = [row for row in rows if not row.get("evaluated")]
    tail = [row["main_loss"] for row in steps[round(len(steps) * (1 - TAIL)):]]
    return {"loss": sum(tail) / len(tail), "held": [row for row in rows if row.get("evaluated")][-1]}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    auxiliary = [f"auxiliary-{alpha}" for alpha in ("0.001", "0.01", "0.03")]
    runs = {name: read(folder, name) for name in ["controller", "none", *auxiliary, "fp8"]}
    print(f"{'':16} {'loss, last 20 %':>16} {'held-out loss':>14}   MaxVio of each MoE layer, held-out")
    for name, run in runs.items():
        vio = " ".join(f"{v:6.3f}" for v in run["held"]["max_vio"])
        print(f"{name:16} {run['loss']:16.4f} {run['held']['main_loss']:14.4f}   {vio}")

    controller, fp8 = runs["controller"], runs["fp8"]
    # The weakest auxiliary loss that balances; where none does, the strongest.
    balanced = [n for n in auxiliary if max(runs[n]["held"]["max_vio"]) <= BALANCED]
    peer = (balanced or auxiliary[-1:])[0]
    above = 100 * (controller["loss"] / runs[peer]["loss"] - 1)
    fp8_above = 100 * (fp8["loss"] / controller["loss"] - 1)
    marks = {
        f"MaxVio at most {BALANCED} in every layer with the controller":
            max(controller["held"]["max_vio"]) <= BALANCED,
        "MaxVio above 1 in every layer without": min(runs["none"]["held"]["max_vio"]) > 1,
        f"the controller's loss no worse than that of {peer}: {above:+.2f} %": above <= 0,
        f"FP8's loss within {NOISE} % of BF16's: {fp8_above:+.2f} %": abs(fp8_above) <= NOISE,
    }
    for mark, reached in marks.items():
        print(f"{'yes' if reached else 'NO':3} {mark}")
    sys.exit(not all(marks.values()))


if __name__ == "__main__":
    main()
