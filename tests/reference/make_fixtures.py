"""Writes the committed checkpoints and expected outputs (see README.md):

    python make_fixtures.py data [name …]

Settings that tell a right implementation from a lucky one: rms_norm_eps unlike the latent norms'
1e-6, selection biases shifted by -1 (a mask of 0 instead of -inf shows), unequal mscales,
beta_fast == beta_slow, a large original context, odd sizes, FP8 blocks that are ragged and
straddled by heads, and a scale in another shard than its weight.
"""

import pathlib
import sys

import numpy as np

import checkpoints
import fp8
import tensors

BASE = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", torch_dtype="float32",
    vocab_size=128, hidden_size=48, intermediate_size=96, moe_intermediate_size=12,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24,
    kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    first_k_dense_replace=1, moe_layer_freq=1, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, scoring_func="sigmoid",
    topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-2,
    rope_theta=10000.0, max_position_embeddings=4096, hidden_act="silu", attention_bias=False,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=0)


def yarn(mscale=1.0, mscale_all_dim=1.0, original=64, factor=40, beta_fast=32, beta_slow=1):
    return dict(type="yarn", factor=factor, original_max_position_embeddings=original,
                beta_fast=beta_fast, beta_slow=beta_slow, mscale=mscale,
                mscale_all_dim=mscale_all_dim)


def quantization(**more):
    return dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                weight_block_size=[128, 128], **more)


EIGHT_HEADS = dict(num_attention_heads=8, num_key_value_heads=8)
V2 = dict(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
          rope_scaling=yarn(0.707, 0.707), scoring_func="softmax", norm_topk_prob=False,
          n_shared_experts=2, rms_norm_eps=1e-2)
NO_GROUPS = dict(n_group=1, topk_group=1)

# name → changes to BASE, and arguments of checkpoints.make
FIXTURES = {
    # 264 dense columns are three granules, the last one short; 80 tokens and a prompt of 52 cross
    # a page of 64.
    "v3": (dict(rope_scaling=yarn(), num_hidden_layers=3, intermediate_size=264, **EIGHT_HEADS),
           dict(num_tokens=80, prompt_tokens=52)),
    "v3_mscale": (dict(rope_scaling=yarn(1.0, 0.707), n_shared_experts=2), {}),
    # YaRN's correction range ends at 4, beyond the last of the 4 pairs: it must not be cut to 3.
    "v3_long_context": (dict(rope_scaling=yarn(original=20000), max_position_embeddings=163840),
                        dict(num_tokens=80)),
    "v3_plain": (dict(rope_scaling=None, q_lora_rank=None, hidden_size=60, v_head_dim=10,
                      num_attention_heads=6, num_key_value_heads=6, **NO_GROUPS), {}),
    # The newer spelling, rope channels already permuted, and a correction range that would end at
    # 8 without the bound of d_rope - 1.
    "v3_rope_parameters": (dict(rope_interleave=False, rope_theta=None, rope_parameters=dict(
        rope_type="yarn", rope_theta=100.0, factor=40.0, original_max_position_embeddings=20000,
        beta_fast=2000.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)), {}),
    # Two whole groups and an expert of each other one always score the same.
    "v3_ties": (dict(rope_scaling=yarn()), dict(tied_experts=(2, 4, 5, 6, 7, 8, 9, 10, 11, 13))),
    "v2": (V2 | dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0,
                     num_experts_per_tok=3), {}),
    "v2_lite": (V2 | dict(topk_method="greedy", routed_scaling_factor=1.0, q_lora_rank=None,
                          **NO_GROUPS), {}),
    "moonlight": (dict(rope_scaling=None, rope_theta=50000.0, rms_norm_eps=1e-5, q_lora_rank=None,
                       n_shared_experts=2, routed_scaling_factor=2.446, **NO_GROUPS), {}),
    "kimi": (dict(model_type="kimi_k2", rope_theta=50000.0, n_routed_experts=24,
                  routed_scaling_factor=2.827,
                  rope_scaling=yarn(beta_fast=1, beta_slow=1, factor=32, original=4096),
                  **NO_GROUPS, **EIGHT_HEADS), {}),
    "v3_bf16": (dict(rope_scaling=yarn(), torch_dtype="bfloat16", **EIGHT_HEADS),
                dict(storage="bf16")),
    # Every quantized matrix but the experts' has a short last block in both directions or more
    # than one block; kv_b_proj's heads of 42 rows straddle block boundaries.
    "v3_fp8": (dict(rope_scaling=yarn(), torch_dtype="bfloat16", vocab_size=64, hidden_size=160,
                    moe_intermediate_size=40, intermediate_size=264, n_routed_experts=8,
                    num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=136,
                    kv_lora_rank=132, qk_nope_head_dim=22, v_head_dim=20,
                    quantization_config=quantization(), **EIGHT_HEADS), dict(storage="fp8")),
    "v31_ue8m0": (dict(rope_scaling=yarn(), torch_dtype="bfloat16", vocab_size=64,
                       hidden_size=136, moe_intermediate_size=24, intermediate_size=136,
                       n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
                       quantization_config=quantization(scale_fmt="ue8m0")), dict(storage="fp8")),
    "v3_mtp": (dict(rope_scaling=yarn(), num_nextn_predict_layers=1), {}),
    "v3_mtp2": (dict(rope_scaling=yarn(1.0, 0.707), torch_dtype="bfloat16", n_shared_experts=2,
                     num_nextn_predict_layers=2, **EIGHT_HEADS), dict(storage="bf16")),
}


def fp8_linear(path):
    """One linear layer with quantized activations (§5.5), all sums in float64. [5, 300] x
    [200, 300]: two blocks of rows and three of columns, the last ones short. Row 1 has a tile of
    zeros and row 2 one below the clamp of 1e-4."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((5, 300)) * np.exp(rng.standard_normal((5, 1)))
        x[1, 128:256] = 0
        x[2, 256:] *= 1e-6
        x_bits = tensors.bf16_bits(x)
        x = (x_bits.astype(np.uint32) << 16).view(np.float32)
        weight = (rng.standard_normal((200, 300)) / 300**0.5).astype(np.float32)
        out = {"x": ("BF16", x_bits)}
        nearest = []
        for suffix, power_of_two in (("", False), ("_ue8m0", True)):
            w_codes, w_scales = fp8.quantize_weight(weight, power_of_two)
            codes, scales, quotients = fp8.quantize_activations(x, power_of_two)
            # A power of two divides exactly, so ties are no danger there.
            nearest += [] if power_of_two else [fp8.distance_to_tie(quotients)]
            y = fp8.linear_w8a8(codes, scales, w_codes, w_scales)
            out[f"weight{suffix}"] = ("F8_E4M3", w_codes)
            out[f"weight{suffix}_scale_inv"] = ("F32", w_scales)
            out[f"x_codes{suffix}"] = ("F8_E4M3", codes)
            out[f"x_scales{suffix}"] = ("F32", scales)
            out[f"y{suffix}"] = ("F32", y.astype(np.float32))
            exact = x.astype(np.float64) @ fp8.dequantize_weight(w_codes, w_scales).T
            out[f"y_weight_only{suffix}"] = ("F32", exact.astype(np.float32))
        if min(nearest) > 1e-6:  # a reciprocal instead of a division can't change a code
            tensors.write_file(path, out)
            effect = np.abs(y - exact).max() / np.abs(exact).max()
            print(f"{path.name:20} {path.stat().st_size / 1024:5.0f} KiB  activations' effect "
                  f"{effect:.1e}  nearest tie {min(nearest):.1e}  attempt {seed}")
            return
    raise SystemExit("fp8_linear: every seed has a code near a tie")


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    unknown = set(names) - set(FIXTURES) - {"fp8_linear"}
    if unknown:
        raise SystemExit(f"no such fixture: {', '.join(sorted(unknown))}")
    for i, (name, (changes, arguments)) in enumerate(FIXTURES.items()):
        if not names or name in names:
            config = {k: v for k, v in {**BASE, **changes}.items()
                      if k != "rope_theta" or v is not None}
            print(checkpoints.make(out / name, config, seed=100 + i, **arguments), flush=True)
    if not names or "fp8_linear" in names:
        fp8_linear(out / "fp8_linear.safetensors")


if __name__ == "__main__":
    main()
