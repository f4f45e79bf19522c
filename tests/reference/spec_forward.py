"""The forward pass of the specification in float64 numpy, independent of torch and transformers.

    python spec_forward.py data/*/        # checks every folder that has an expected.safetensors

It exists to check the recorded references: an error in a transformers version, in how we build a
model for it, or in the files we write shows as a disagreement. It reads the same files as the
program does. Formulas: §1.2 (blocks), §2 (attention, naive form), §3.2 (gates), §4.1 (MTP).
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np

import fp8
import tensors

LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def top_k(scores, k):
    """Indices of the k largest, larger first, the lower index where they tie."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


class Rope:
    """Angles per position and the factor on the softmax scale; None or "default" is plain RoPE."""

    def __init__(self, config):
        scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        dim = config["qk_rope_head_dim"]
        index = np.arange(dim // 2)
        self.frequencies = theta ** (-2.0 * index / dim)
        self.multiplier = 1.0
        self.scale_factor = 1.0
        self.interleaved = config.get("rope_interleave", True)
        if kind == "default":
            return
        assert kind == "yarn", kind
        factor = scaling["factor"]
        original = scaling["original_max_position_embeddings"]

        def correction(rotations):
            return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

        low = max(math.floor(correction(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(correction(scaling.get("beta_slow", 1))), dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((index - low) / (high - low), 0, 1)
        self.frequencies = self.frequencies * (1 - ramp) + self.frequencies / factor * ramp

        def ms(x):
            return 1.0 if factor <= 1 else 0.1 * x * math.log(factor) + 1.0

        all_dim = scaling.get("mscale_all_dim", 0)
        self.multiplier = ms(scaling.get("mscale", 1)) / ms(all_dim)
        if all_dim:
            self.scale_factor = ms(all_dim) ** 2

    def rotate(self, x, positions):
        """x [T, ..., d_rope]; the result keeps the order of its channels."""
        angles = positions[:, None] * self.frequencies
        angles = angles.reshape(len(positions), *[1] * (x.ndim - 2), -1)
        cos, sin = np.cos(angles) * self.multiplier, np.sin(angles) * self.multiplier
        half = x.shape[-1] // 2
        first, second = ((slice(0, None, 2), slice(1, None, 2)) if self.interleaved else
                         (slice(0, half), slice(half, None)))
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


class Model:
    """A checkpoint folder. `margins` collects, for every top-k of every gate that ran, the gap
    between the last score taken and the first one left (0 for an exact tie)."""

    def __init__(self, folder):
        self.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        self.files = tensors.read_checkpoint(folder)
        self.rope = Rope(self.config)
        self.margins = []
        self.cache = {}

    def weight(self, name):
        if name not in self.cache:
            raw = self.files[name]
            if raw.dtype == np.uint8:
                block = self.config["quantization_config"]["weight_block_size"]
                value = fp8.dequantize_weight(raw, self.files[name + "_scale_inv"], block)
            else:
                value = raw.astype(np.float64)
            self.cache[name] = value
        return self.cache[name]

    def norm(self, name, x, eps=None):
        return rms_norm(x, self.weight(name), self.config["rms_norm_eps"] if eps is None else eps)

    def attention(self, prefix, x, positions):
        c = self.config
        heads, nope = c["num_attention_heads"], c["qk_nope_head_dim"]
        rank, num_rows = c["kv_lora_rank"], x.shape[0]
        if c.get("q_lora_rank"):
            latent = self.norm(prefix + "q_a_layernorm.weight",
                               x @ self.weight(prefix + "q_a_proj.weight").T, LATENT_EPS)
            q = latent @ self.weight(prefix + "q_b_proj.weight").T
        else:
            q = x @ self.weight(prefix + "q_proj.weight").T
        q = q.reshape(num_rows, heads, -1)
        kv = x @ self.weight(prefix + "kv_a_proj_with_mqa.weight").T
        latent = self.norm(prefix + "kv_a_layernorm.weight", kv[:, :rank], LATENT_EPS)
        key_rope = self.rope.rotate(kv[:, rank:], positions)
        query_rope = self.rope.rotate(q[:, :, nope:], positions)
        kv = (latent @ self.weight(prefix + "kv_b_proj.weight").T).reshape(num_rows, heads, -1)
        scores = (np.einsum("thd,jhd->htj", q[:, :, :nope], kv[:, :, :nope]) +
                  np.einsum("thd,jd->htj", query_rope, key_rope))
        scores *= (nope + c["qk_rope_head_dim"]) ** -0.5 * self.rope.scale_factor
        scores = np.where(np.tri(num_rows, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        out = np.einsum("htj,jhd->thd", p, kv[:, :, nope:]).reshape(num_rows, -1)
        return out @ self.weight(prefix + "o_proj.weight").T

    def swiglu(self, prefix, x):
        gate = silu(x @ self.weight(prefix + "gate_proj.weight").T)
        up = x @ self.weight(prefix + "up_proj.weight").T
        return (gate * up) @ self.weight(prefix + "down_proj.weight").T

    def choose(self, scores, k):
        """top_k that also notes how near the choice was."""
        if k < scores.shape[-1]:
            ordered = -np.sort(-scores, axis=-1)
            gap = ordered[:, k - 1] - ordered[:, k]
            self.margins.extend(gap[np.isfinite(gap)])
        return top_k(scores, k)

    def gate(self, prefix, x):
        """Chosen experts and their weights, each [T, K]."""
        c = self.config
        logits = x @ self.weight(prefix + "weight").T
        groups, kept, k = c.get("n_group") or 1, c.get("topk_group") or 1, c["num_experts_per_tok"]
        if c["scoring_func"] == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + self.weight(prefix + "e_score_correction_bias")
        else:
            e = np.exp(logits - logits.max(axis=-1, keepdims=True))
            scores = choice = e / e.sum(axis=-1, keepdims=True)
        if groups > 1 and c["topk_method"] != "greedy":
            by_group = choice.reshape(len(x), groups, -1)
            best = -np.sort(-by_group, axis=-1)
            group_scores = (best[:, :, :2].sum(axis=-1) if c["topk_method"] == "noaux_tc" else
                            best[:, :, 0])
            keep = np.zeros((len(x), groups), dtype=bool)
            np.put_along_axis(keep, self.choose(group_scores, kept), True, axis=1)
            choice = np.where(keep[:, :, None], by_group, -np.inf).reshape(choice.shape)
        chosen = self.choose(choice, k)
        weights = np.take_along_axis(scores, chosen, axis=1)
        if c["norm_topk_prob"] and k > 1:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return chosen, weights * c["routed_scaling_factor"]

    def moe(self, prefix, x):
        chosen, weights = self.gate(prefix + "gate.", x)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            rows, slots = np.nonzero(chosen == expert)
            out[rows] += (weights[rows, slots, None] *
                          self.swiglu(f"{prefix}experts.{expert}.", x[rows]))
        if self.config.get("n_shared_experts"):
            out += self.swiglu(prefix + "shared_experts.", x)
        return out

    def block(self, layer, x, positions, is_moe):
        prefix = f"model.layers.{layer}."
        normed = self.norm(prefix + "input_layernorm.weight", x)
        x = x + self.attention(prefix + "self_attn.", normed, positions)
        normed = self.norm(prefix + "post_attention_layernorm.weight", x)
        return x + (self.moe if is_moe else self.swiglu)(prefix + "mlp.", normed)

    def is_moe(self, layer):
        return (layer >= self.config["first_k_dense_replace"] and
                layer % self.config.get("moe_layer_freq", 1) == 0)

    def forward(self, ids):
        """logits, hidden.0 … hidden.L (before each layer, the last after the final norm), and for
        each MTP module k mtp{k}.hidden (after shared_head.norm) and mtp{k}.logits, T - k rows."""
        ids = np.asarray(ids)
        positions = np.arange(len(ids), dtype=np.float64)
        layers = self.config["num_hidden_layers"]
        embedding = self.weight("model.embed_tokens.weight")[ids]
        head = self.weight("lm_head.weight")
        out, x = {}, embedding
        for layer in range(layers):
            out[f"hidden.{layer}"] = x
            x = self.block(layer, x, positions, self.is_moe(layer))
        x = out[f"hidden.{layers}"] = self.norm("model.norm.weight", x)
        out["logits"] = x @ head.T
        for k in range(1, self.config.get("num_nextn_predict_layers", 0) + 1):
            prefix = f"model.layers.{layers + k - 1}."
            rows = len(ids) - k
            pair = np.concatenate([self.norm(prefix + "enorm.weight", embedding[k:]),
                                   self.norm(prefix + "hnorm.weight", x[:rows])], axis=1)
            x = pair @ self.weight(prefix + "eh_proj.weight").T
            x = self.block(layers + k - 1, x, positions[:rows], True)
            x = out[f"mtp{k}.hidden"] = self.norm(prefix + "shared_head.norm.weight", x)
            out[f"mtp{k}.logits"] = x @ head.T
        return out


def difference(got, reference):
    """Largest difference over the reference's largest magnitude; infinite where shapes differ."""
    if got.shape != reference.shape:
        return math.inf
    worst = np.abs(got.astype(np.float64) - reference).max() / np.abs(reference).max()
    return float(worst) if np.isfinite(worst) else math.inf


def check(folder):
    """Worst difference of any recorded tensor, the smallest gate margin that is no exact tie, and
    whether every recorded greedy token is this model's argmax."""
    expected = tensors.read_file(pathlib.Path(folder) / "expected.safetensors")
    model = Model(folder)
    results = model.forward(expected["tokens"])
    missing = [name for name in results if name not in expected]
    assert not missing, f"{folder}: expected.safetensors lacks {missing}"
    worst = max(difference(expected[name], results[name]) for name in results)
    answer = model.forward(np.concatenate([expected["prompt"], expected["greedy"][:-1]]))["logits"]
    greedy = answer[len(expected["prompt"]) - 1:].argmax(axis=1)
    margin = min((m for m in model.margins if m != 0), default=math.inf)
    return worst, margin, bool((greedy == expected["greedy"]).all())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tolerance", type=float, default=1e-5,
                        help="largest difference over largest magnitude, any tensor")
    args = parser.parse_args()
    checked, failed = 0, 0
    for folder in args.folders:
        if not (pathlib.Path(folder) / "expected.safetensors").exists():
            continue
        worst, margin, greedy = check(folder)
        good = worst <= args.tolerance and greedy
        checked, failed = checked + 1, failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {pathlib.Path(folder).name:20} worst {worst:.1e}  "
              f"gate margin {margin:.1e}  greedy {'equal' if greedy else 'DIFFERS'}")
    if not checked:
        sys.exit("no folder with an expected.safetensors")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
