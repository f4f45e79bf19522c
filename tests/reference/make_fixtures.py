"""Makes the tiny checkpoints and expected outputs that tests/kernels/fixtures_test.cpp compares with.

Developer tooling: needs torch, transformers and safetensors; its outputs are committed. The
reference is transformers on the CPU, F32, eager attention. Every fixture is a pure function of its
name and seed:

    python make_fixtures.py data

Settings that tell a right implementation from a lucky one: rms_norm_eps unlike the latent norms'
1e-6, selection biases shifted by -1 (a mask of 0 instead of -inf shows), unequal mscales,
beta_fast == beta_slow, a large original context, odd sizes, FP8 blocks that are ragged and
straddled by heads, and a scale in another shard than its weight.
"""

import copy
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

BASE = dict(
    vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=24,
    kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    first_k_dense_replace=1, moe_layer_freq=1, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, scoring_func="sigmoid",
    topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-2,
    rope_theta=10000.0, max_position_embeddings=4096, hidden_act="silu", attention_bias=False,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)


def yarn(mscale=1.0, mscale_all_dim=1.0, original=64, factor=40, beta_fast=32, beta_slow=1):
    return dict(type="yarn", factor=factor, original_max_position_embeddings=original,
                beta_fast=beta_fast, beta_slow=beta_slow, mscale=mscale,
                mscale_all_dim=mscale_all_dim)


FIXTURES = {
    "v3": dict(rope_scaling=yarn(), num_hidden_layers=3),
    "v3_mscale": dict(rope_scaling=yarn(1.0, 0.707, original=20000), n_shared_experts=2),
    "v3_plain": dict(rope_scaling=None, q_lora_rank=None, n_group=1,
                     topk_group=1, hidden_size=60, v_head_dim=10, num_attention_heads=6),
    "v2": dict(family="v2", rope_scaling=yarn(0.707, 0.707), scoring_func="softmax",
               topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0,
               n_shared_experts=2, num_experts_per_tok=3),
    "v2_lite": dict(family="v2", rope_scaling=yarn(0.707, 0.707), scoring_func="softmax",
                    topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
                    q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1),
    "moonlight": dict(rope_scaling=None, rope_theta=50000.0, rms_norm_eps=1e-5, q_lora_rank=None,
                      n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=2.446),
    "kimi": dict(model_type="kimi_k2", rope_theta=50000.0, n_routed_experts=24, n_group=1,
                 topk_group=1, routed_scaling_factor=2.827,
                 rope_scaling=yarn(beta_fast=1, beta_slow=1, factor=32)),
    "v3_bf16": dict(rope_scaling=yarn(), dtype="bf16"),
    "v3_fp8": dict(rope_scaling=yarn(), dtype="fp8", hidden_size=200,
                   moe_intermediate_size=72, n_routed_experts=8, n_group=2, topk_group=1,
                   num_experts_per_tok=2, intermediate_size=136, qk_nope_head_dim=24,
                   v_head_dim=20, q_lora_rank=136, kv_lora_rank=72, vocab_size=96),
    "v31_ue8m0": dict(rope_scaling=yarn(), dtype="fp8", scale_fmt="ue8m0",
                      hidden_size=136, moe_intermediate_size=40, n_routed_experts=8, n_group=2,
                      topk_group=1, num_experts_per_tok=2, vocab_size=96),
}


def published_names(model, config):
    """The state dict with one tensor per expert, as files have it."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name[: -len("gate_up_proj")]
            for e in range(tensor.shape[0]):
                gate, up = tensor[e].chunk(2, 0)
                state[f"{prefix}{e}.gate_proj.weight"] = gate.clone()
                state[f"{prefix}{e}.up_proj.weight"] = up.clone()
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name[: -len("down_proj")]
            for e in range(tensor.shape[0]):
                state[f"{prefix}{e}.down_proj.weight"] = tensor[e].clone()
        else:
            state[name] = tensor.clone()
    return state


def randomize(model, generator):
    for name, tensor in model.state_dict().items():
        def noise():
            return torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.copy_(noise() * 0.2 - 1.0)
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.1 * noise())
        elif "embed_tokens" in name:
            tensor.copy_(noise())
        else:
            gain = 2.0 if "lm_head" in name else 1.0
            tensor.copy_(noise() * gain / tensor.shape[-1] ** 0.5)


QUANTIZED = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
             "gate_proj", "up_proj", "down_proj")


def quantize(weight, power_of_two):
    """E4M3 codes, scales per 128x128 block, and what they stand for."""
    rows, cols = weight.shape
    blocks = ((rows + 127) // 128, (cols + 127) // 128)
    scales = torch.zeros(blocks)
    codes = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
    value = torch.zeros(rows, cols)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            part = weight[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
            scale = part.abs().max() / 448
            if power_of_two:
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            q = (part / scale).to(torch.float8_e4m3fn)
            scales[i, j] = scale
            codes[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128] = q
            value[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128] = q.float() * scale
    return codes, scales, value


def load_values(model, values):
    """Copies published-name values back into the model."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            p = name[: -len("gate_up_proj")]
            for e in range(tensor.shape[0]):
                tensor[e].copy_(torch.cat([values[f"{p}{e}.gate_proj.weight"],
                                           values[f"{p}{e}.up_proj.weight"]]))
        elif name.endswith("mlp.experts.down_proj"):
            p = name[: -len("down_proj")]
            for e in range(tensor.shape[0]):
                tensor[e].copy_(values[f"{p}{e}.down_proj.weight"])
        else:
            tensor.copy_(values[name])


def write(folder, config_json, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):06}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update({t: name for t in tensors})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def make(name, spec, out, seed):
    spec = {**BASE, **copy.deepcopy(spec)}
    spec["num_key_value_heads"] = spec["num_attention_heads"]
    family = spec.pop("family", "v3")
    dtype = spec.pop("dtype", "f32")
    scale_fmt = spec.pop("scale_fmt", None)
    model_type = spec.pop("model_type", "deepseek_v2" if family == "v2" else "deepseek_v3")
    # transformers writes into the dict it is given
    config_class = DeepseekV2Config if family == "v2" else DeepseekV3Config
    config = config_class(**copy.deepcopy(spec))
    config._attn_implementation = "eager"
    model_class = DeepseekV2ForCausalLM if family == "v2" else DeepseekV3ForCausalLM
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    state = published_names(model, config)

    config_json = {**spec, "model_type": model_type, "architectures": [model_class.__name__],
                   "torch_dtype": "float32" if dtype == "f32" else "bfloat16",
                   "num_nextn_predict_layers": 0}
    files = [{}]
    values = {}
    if dtype == "fp8":
        files.append({})
        config_json["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]}
        if scale_fmt:
            config_json["quantization_config"]["scale_fmt"] = scale_fmt
    for i, (tensor_name, tensor) in enumerate(sorted(state.items())):
        if dtype == "fp8" and any(f".{q}.weight" in tensor_name for q in QUANTIZED):
            codes, scales, value = quantize(tensor, scale_fmt == "ue8m0")
            files[i % 2][tensor_name] = codes
            files[(i + 1) % 2][tensor_name + "_scale_inv"] = scales
            values[tensor_name] = value
        elif dtype == "f32" or "e_score_correction_bias" in tensor_name:
            files[0][tensor_name] = tensor
            values[tensor_name] = tensor
        else:
            files[0][tensor_name] = tensor.bfloat16()
            values[tensor_name] = tensor.bfloat16().float()
    write(out / name, config_json, files)
    load_values(model, values)

    tokens = torch.randint(2, spec["vocab_size"], (1, 80), generator=generator)
    result = model(tokens, output_hidden_states=True)
    expected = {"tokens": tokens[0].int(), "logits": result.logits[0].contiguous()}
    for i, hidden in enumerate(result.hidden_states):
        expected[f"hidden.{i}"] = hidden[0].contiguous()
    ids, gaps = tokens[:, :9], []
    for _ in range(24):
        logits = model(ids).logits[0, -1]
        best = logits.topk(2).values
        gaps.append(((best[0] - best[1]) / logits.abs().max()).item())
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    expected["prompt"] = ids[0, :9].int()
    expected["greedy"] = ids[0, 9:].int()
    save_file(expected, out / name / "expected.safetensors")
    print(f"{name}: smallest greedy gap {min(gaps):.1e} of the largest logit")


def main():
    out = pathlib.Path(sys.argv[1])
    for i, (name, spec) in enumerate(FIXTURES.items()):
        make(name, spec, out, seed=100 + i)


main()
