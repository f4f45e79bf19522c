"""Compares what the program computed with a recorded reference.

    troupe score FOLDER --compute f32 --tokens "$(python compare.py --tokens FOLDER)" \\
        --logits OUT.safetensors --hidden-states
    python compare.py OUT.safetensors FOLDER

Prints the largest difference over the largest magnitude of each tensor both hold; fails above the
tolerance. Both must hold `logits`; `hidden.i` may be absent (unless --all). Needs only numpy.
"""

import argparse
import math
import pathlib
import sys

import numpy as np

import spec_forward
import tensors

# Two F32 implementations that only sum in another order differ by about 1e-6 here, 1e-5 at worst.
TOLERANCE = 5e-5


def expected_of(path):
    path = pathlib.Path(path)
    return tensors.read_file(path / "expected.safetensors" if path.is_dir() else path)


def order(name):
    """hidden.2 before hidden.10."""
    stem, _, number = name.partition(".")
    return stem, int(number) if number.isdigit() else 0


def compare(actual, expected, tolerance, demand_all, only_failures=False):
    """Prints a line per tensor; the number of failures."""
    failures = 0
    for name in sorted(expected, key=order):
        reference = expected[name]
        if reference.dtype != np.float32 or not (demand_all or name == "logits" or name in actual):
            continue
        if name not in actual:
            failures += 1
            print(f"FAIL {name:14} is missing")
            continue
        if actual[name].shape != reference.shape:
            failures += 1
            print(f"FAIL {name:14} has shape {list(actual[name].shape)}; "
                  f"expected {list(reference.shape)}")
            continue
        difference = spec_forward.difference(actual[name], reference)
        good = difference <= tolerance
        failures += not good
        where = ""
        if not good and math.isfinite(difference):
            rows = np.abs(actual[name].astype(np.float64) - reference).max(axis=1)
            first = int(np.argmax(rows > tolerance * np.abs(reference).max()))
            where = f"  first row {first} of {len(rows)}"
        if not (good and only_failures):
            print(f"{'ok  ' if good else 'FAIL'} {name:14} {difference:.2e}{where}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="ACTUAL EXPECTED",
                        help="EXPECTED may be the checkpoint's folder")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--all", action="store_true", help="demand every tensor of EXPECTED")
    parser.add_argument("--tokens", action="store_true",
                        help="print EXPECTED's input as a list for --tokens and stop")
    parser.add_argument("--prompt", action="store_true", help="the same for the greedy prompt")
    parser.add_argument("--greedy", action="store_true", help="the same for its continuation")
    args = parser.parse_args()
    lists = [name for name in ("tokens", "prompt", "greedy") if getattr(args, name)]
    if lists:
        expected = expected_of(args.files[-1])
        for name in lists:
            print(",".join(map(str, expected[name])))
        return
    if len(args.files) != 2:
        parser.error("needs ACTUAL and EXPECTED")
    actual = tensors.read_file(args.files[0])
    sys.exit(compare(actual, expected_of(args.files[1]), args.tolerance, args.all) != 0)


if __name__ == "__main__":
    main()
