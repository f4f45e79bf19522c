"""Writes many small random checkpoints with expected outputs, for stress during development:

    python make_random.py OUT --count 20 --seed 1 [--family v3] [--storage fp8]
    python make_random.py OUT --count 20 --seed 1 --program build/release/troupe

Dimensions are drawn to be awkward: odd head counts, v_head_dim unlike qk_nope_head_dim, latents and
widths that are no multiple of 8 or 128, odd vocabularies. Folder seed-S-n depends on S and n only.
With --program each one is also scored and continued by the program, on a number of ranks and with a
prefill chunk that are drawn too, and compared.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

import checkpoints
import compare
import make_fixtures
import spec_forward
import tensors


class Draw:
    def __init__(self, *seed):
        self.rng = np.random.default_rng(seed)

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def between(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def chance(self, p):
        return bool(self.rng.random() < p)


def rope_fields(draw):
    """Either spelling, with and without YaRN."""
    theta = draw.one(100.0, 10000.0, 50000.0, 1e6)
    if draw.chance(0.3):
        return draw.one(dict(rope_theta=theta, rope_scaling=None),
                        dict(rope_parameters=dict(rope_type="default", rope_theta=theta)))
    # transformers takes an absent or zero mscale_all_dim as "both absent", so draw neither.
    mscale = draw.one(1.0, 0.707, 1.3)
    yarn = make_fixtures.yarn(
        mscale, mscale if draw.chance(0.5) else draw.one(1.0, 0.5, 0.707),
        original=draw.one(16, 64, 4096, 20000), factor=draw.one(1.5, 4, 32, 40),
        beta_fast=draw.one(32, 32, 1, 1000), beta_slow=1)
    kind = yarn.pop("type")
    spelling = draw.between(0, 2)
    if spelling == 0:
        return dict(rope_theta=theta, rope_scaling=dict(type=kind, **yarn))
    if spelling == 1:
        return dict(rope_theta=theta, rope_scaling=dict(rope_type=kind, **yarn))
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **yarn))


def gate_fields(draw, family):
    groups = draw.one(1, 1, 2, 3, 4, 8)
    per_group = draw.between(2, 8)
    kept = draw.between(1, groups)
    fields = dict(n_group=groups, topk_group=kept, n_routed_experts=groups * per_group,
                  num_experts_per_tok=draw.between(1, min(8, kept * per_group)),
                  routed_scaling_factor=draw.one(1.0, 2.5, 16.0))
    if family == "v2":
        method = "greedy" if groups == 1 else "group_limited_greedy"
        return fields | dict(scoring_func="softmax", topk_method=method, norm_topk_prob=False)
    # With a single expert transformers normalizes (to 1) and the specification doesn't.
    normalize = draw.chance(0.8) and fields["num_experts_per_tok"] > 1
    return fields | dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=normalize)


def draw_config(draw, family, storage):
    heads = draw.one(1, 2, 3, 4, 5, 6, 8, 12, 16)
    # beyond 128 where block boundaries matter
    wide = (lambda low, high: draw.between(100, 300)) if storage == "fp8" else draw.between
    layers = draw.between(1, 3)
    fields = dict(
        vocab_size=draw.between(33, 200), hidden_size=wide(17, 90),
        intermediate_size=draw.one(draw.between(9, 90), draw.between(120, 700)),
        moe_intermediate_size=draw.between(5, 40), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
        q_lora_rank=draw.one(None, wide(7, 50)), kv_lora_rank=wide(9, 70),
        qk_nope_head_dim=draw.between(5, 40), qk_rope_head_dim=2 * draw.between(1, 9),
        v_head_dim=draw.between(5, 40), first_k_dense_replace=draw.between(0, layers),
        moe_layer_freq=draw.one(1, 1, 2), n_shared_experts=draw.one(None, 1, 2, 3),
        rms_norm_eps=draw.one(1e-6, 1e-5, 1e-2),
        torch_dtype={"f32": "float32", "f16": "float16"}.get(storage, "bfloat16"))
    fields |= gate_fields(draw, family) | rope_fields(draw)
    if family == "v2":
        # transformers' V2 config demands a multiple of the heads
        fields |= dict(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
                       hidden_size=heads * -(-fields["hidden_size"] // heads))
        # and its rotation, by view_as_complex, even strides
        for name in ("kv_lora_rank", "qk_nope_head_dim"):
            fields[name] += fields[name] % 2
    else:
        fields |= dict(model_type=draw.one("deepseek_v3", "deepseek_v3", "kimi_k2"),
                       rope_interleave=draw.chance(0.8),
                       num_nextn_predict_layers=draw.one(0, 0, 1, 2, 3))
    if storage == "fp8":
        fields["quantization_config"] = make_fixtures.quantization(
            **draw.one({}, dict(scale_fmt="ue8m0")))
    base = dict(make_fixtures.BASE)
    if "rope_parameters" in fields:
        base.pop("rope_theta")
    return base | fields


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def run(program, folder, draw):
    """Scores and continues with the program; the number of failures."""
    expected, config = compare.expected_of(folder), config_of(folder)
    shape = ["--fabric", "loopback", "--threads", "1", "--compute", "f32",
             "--ranks", str(min(draw.between(1, 4), config["n_routed_experts"])),
             "--prefill-chunk", str(draw.one(1, 7, 64, 512)),
             "--placement-seed", str(draw.between(0, 5))]
    ids = {name: ",".join(map(str, expected[name])) for name in ("tokens", "prompt")}
    output = folder / "actual.safetensors"
    answer = None
    for command in (["score", str(folder), "--tokens", ids["tokens"], "--hidden-states",
                     "--logits", str(output)],
                    ["generate", str(folder), "--tokens", ids["prompt"], "--max-tokens",
                     str(checkpoints.NUM_GREEDY), "--ignore-eos", "--json", "--speculate",
                     str(config["num_nextn_predict_layers"])]):
        done = subprocess.run([program, *command, *shape], capture_output=True, text=True,
                              timeout=120)
        if done.returncode != 0:
            print(f"FAIL {command[0]}: {done.stderr.strip().splitlines()[-1:]}  {shape}")
            return 1
        answer = done.stdout
    actual = tensors.read_file(output)
    failures = compare.compare(actual, expected, compare.TOLERANCE, demand_all=False,
                               only_failures=True)
    worst = max(spec_forward.difference(actual[name], expected[name]) for name in actual)
    print(f"{'':20} the program's worst {worst:.1e}  {' '.join(shape[6:])}")
    if json.loads(answer.strip().splitlines()[-1])["tokens"] != expected["greedy"].tolist():
        failures += 1
        print(f"FAIL greedy continuation  {shape}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", choices=("v2", "v3"), help="default: any")
    parser.add_argument("--storage", choices=("f32", "bf16", "f16", "fp8"), help="default: any")
    parser.add_argument("--program", help="path of troupe, to be compared at once")
    args = parser.parse_args()
    failures = 0
    for n in range(args.count):
        draw = Draw(args.seed, n)
        family = args.family or draw.one("v2", "v3", "v3")
        storage = args.storage or draw.one("f32", "f32", "bf16", "f16", "fp8")
        config = draw_config(draw, family, storage)
        tied = draw.rng.choice(config["n_routed_experts"], config["n_routed_experts"] // 2,
                               replace=False) if draw.chance(0.2) else ()
        num_tokens = draw.between(10, 90)
        folder = args.out / f"seed-{args.seed}-{n}"
        print(checkpoints.make(folder, config, storage, seed=args.seed * 1000 + n,
                               num_tokens=num_tokens, prompt_tokens=draw.between(1, num_tokens),
                               tied_experts=tied), flush=True)
        if args.program:
            failures += run(args.program, folder, draw)
    sys.exit(failures != 0)


if __name__ == "__main__":
    main()
