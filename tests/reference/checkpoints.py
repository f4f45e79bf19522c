"""Tiny checkpoints in published form, and what transformers computes for them.

A checkpoint is a pure function of its config.json, storage form and seed: every tensor draws from
a generator of its own, seeded by its published name, so adding one changes no other.

What transformers lacks is added here: MTP modules (§4.1 of the specification), `moe_layer_freq`
and layers without shared experts. Ties between experts go to the lower index, as the specification
recommends; torch.topk promises nothing.
"""

import contextlib
import copy
import json
import pathlib
import shutil
import zlib

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer, DeepseekV3MLP, DeepseekV3MoE, DeepseekV3RMSNorm)

import fp8
import spec_forward

# A different answer is certain to be an error only where the reference itself stands clear of a
# tie: F32 sums in another order move scores and logits by about 1e-6.
SMALLEST_GATE_MARGIN = 2e-5
SMALLEST_GREEDY_GAP = 1e-3
NUM_GREEDY = 24

# The order of torch's sums, and with it the last bit, depends on the number of threads.
torch.set_num_threads(1)

QUANTIZED = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
             "gate_proj", "up_proj", "down_proj")


@contextlib.contextmanager
def stable_topk():
    """Lower index first among equals, in the gates of transformers."""
    original = torch.topk, torch.Tensor.topk

    def topk(values, k, dim=-1, largest=True, sorted=True):
        assert largest
        ordered = torch.sort(values, dim=dim, descending=True, stable=True)
        return ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k)

    torch.topk = torch.Tensor.topk = topk
    try:
        yield
    finally:
        torch.topk, torch.Tensor.topk = original


class NoSharedExperts(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class MtpModule(nn.Module):
    """Depth k: the state of row i and the embedding of token i + k to logits of token i + k + 1."""

    def __init__(self, config, layer):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = DeepseekV3RMSNorm(width, eps)
        self.hnorm = DeepseekV3RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = DeepseekV3DecoderLayer(config, layer)
        if not isinstance(self.block.mlp, DeepseekV3MoE):
            self.block.mlp = DeepseekV3MoE(config)
        self.shared_head_norm = DeepseekV3RMSNorm(width, eps)

    def forward(self, state, embedding, rotary):
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(state)], -1))
        rows = x.shape[1]
        mask = torch.full((rows, rows), -torch.inf).triu(1)[None, None]
        positions = rotary(x, torch.arange(rows)[None])
        x = self.block(x, attention_mask=mask, position_embeddings=positions)
        return self.shared_head_norm(x[0] if isinstance(x, tuple) else x)


class Reference:
    """transformers' model of a config.json (a dict), in F32 with eager attention and experts."""

    def __init__(self, config_json):
        self.config_json = config_json
        # transformers writes into the dicts it is given
        fields = copy.deepcopy(config_json)
        self.is_v2 = fields.pop("model_type") == "deepseek_v2"
        fields.pop("quantization_config", None)
        no_shared = fields["n_shared_experts"] is None
        if no_shared:
            fields["n_shared_experts"] = 1
        config = (DeepseekV2Config if self.is_v2 else DeepseekV3Config)(**fields)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        self.model = (DeepseekV2ForCausalLM if self.is_v2 else DeepseekV3ForCausalLM)(config)
        for i, layer in enumerate(self.model.model.layers):
            if i % config_json.get("moe_layer_freq", 1) != 0:
                layer.mlp = (DeepseekV2MLP if self.is_v2 else DeepseekV3MLP)(config)
        layers = config.num_hidden_layers
        self.mtp = nn.ModuleList(MtpModule(config, layers + k)
                                 for k in range(config_json.get("num_nextn_predict_layers", 0)))
        for module in [*self.model.modules(), *self.mtp.modules()]:
            if no_shared and hasattr(module, "shared_experts"):
                module.shared_experts = NoSharedExperts()
        self.model.float().eval()
        self.mtp.float().eval()

    def tensors(self):
        """Published name → the memory of that tensor inside the models."""
        views = {}
        for name, tensor in self.model.state_dict().items():
            views.update(_published(name, tensor))
        first = self.config_json["num_hidden_layers"]
        for k, module in enumerate(self.mtp):
            for name, tensor in module.state_dict().items():
                name = name.removeprefix("block.").replace("shared_head_norm", "shared_head.norm")
                views.update(_published(f"model.layers.{first + k}.{name}", tensor))
        return views

    def copies(self):
        """Tensors a published MTP layer holds again: name → the name of the original."""
        first = self.config_json["num_hidden_layers"]
        names = {}
        for k in range(len(self.mtp)):
            names[f"model.layers.{first + k}.embed_tokens.weight"] = "model.embed_tokens.weight"
            names[f"model.layers.{first + k}.shared_head.head.weight"] = "lm_head.weight"
        return names

    @torch.no_grad()
    def run(self, ids):
        """The tensors that spec_forward.Model.forward describes."""
        ids = torch.as_tensor(ids)[None].long()
        with stable_topk():
            result = self.model(ids, output_hidden_states=True, use_cache=False)
            out = {"logits": result.logits}
            out.update({f"hidden.{i}": h for i, h in enumerate(result.hidden_states)})
            state, embedding = result.hidden_states[-1], result.hidden_states[0]
            for k, module in enumerate(self.mtp, start=1):
                rows = ids.shape[1] - k
                if rows < 1:
                    break
                state = module(state[:, :rows], embedding[:, k:], self.model.model.rotary_emb)
                out[f"mtp{k}.hidden"] = state
                out[f"mtp{k}.logits"] = self.model.lm_head(state)
        return {name: tensor[0].contiguous() for name, tensor in out.items()}

    def greedy(self, prompt):
        """NUM_GREEDY best next tokens, and the smallest lead of a best one over the second, as a
        share of the largest logit."""
        ids, gaps = list(prompt), []
        for _ in range(NUM_GREEDY):
            logits = self.run(ids)["logits"][-1]
            best = logits.sort(descending=True).values
            gaps.append(float((best[0] - best[1]) / logits.abs().max()))
            ids.append(int(logits.argmax()))
        return ids[len(prompt):], min(gaps)


def _published(name, tensor):
    """Experts lie packed in memory, gate rows before up rows, and singly in files."""
    prefix, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        width = tensor.shape[1] // 2
        for e in range(tensor.shape[0]):
            yield f"{prefix}.{e}.gate_proj.weight", tensor[e, :width]
            yield f"{prefix}.{e}.up_proj.weight", tensor[e, width:]
    elif last == "down_proj":
        for e in range(tensor.shape[0]):
            yield f"{prefix}.{e}.down_proj.weight", tensor[e]
    else:
        yield name, tensor


@torch.no_grad()
def randomize(views, seed, tied_experts):
    """Weights with real spread: nearly flat logits would hide errors. `tied_experts` get a router
    row of zeros and one common bias: their scores are equal, exactly."""
    for name, tensor in views.items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(noise * 0.2 - 1.0)
            tensor[list(tied_experts)] = -1.0
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.1 * noise)
        elif name == "model.embed_tokens.weight":
            tensor.copy_(noise)
        else:
            gain = 2.0 if name == "lm_head.weight" else 1.0
            tensor.copy_(noise * gain / tensor.shape[-1] ** 0.5)
            if name.endswith("mlp.gate.weight"):
                tensor[list(tied_experts)] = 0


@torch.no_grad()
def store(reference, storage):
    """The tensors of the files, one dict per shard; the models then hold what these stand for.
    `storage` is f32, bf16, f16 or fp8 (with BF16 for what is not quantized)."""
    half = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "f16": torch.float16}.get(storage)
    shards = [{}, {}] if storage == "fp8" else [{}]
    quantization = reference.config_json.get("quantization_config", {})
    views = reference.tensors()
    for i, (name, tensor) in enumerate(sorted(views.items())):
        shard = shards[i % len(shards)]
        if storage == "fp8" and name.split(".")[-2] in QUANTIZED:
            codes, scales = fp8.quantize_weight(tensor.numpy(),
                                                quantization.get("scale_fmt") == "ue8m0")
            shard[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            # never beside its weight
            shards[(i + 1) % 2][name + "_scale_inv"] = torch.from_numpy(scales)
            by_element = fp8.spread(scales, codes.shape, fp8.WEIGHT_BLOCK, fp8.WEIGHT_BLOCK)
            tensor.copy_(shard[name].float() * torch.from_numpy(by_element))
        elif half is None or name.endswith("e_score_correction_bias"):
            shard[name] = tensor.clone()
        else:
            shard[name] = tensor.to(half)
            tensor.copy_(shard[name].float())
    everything = {name: tensor for shard in shards for name, tensor in shard.items()}
    for i, (name, original) in enumerate(reference.copies().items()):
        shards[i % len(shards)][name] = everything[original].clone()
    return shards


def write(folder, config_json, shards):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    weight_map = {}
    for i, shard in enumerate(shards):
        name = ("model.safetensors" if len(shards) == 1 else
                f"model-{i + 1:05}-of-{len(shards):06}.safetensors")
        save(shard, folder / name)
        weight_map.update({tensor: name for tensor in shard})
    if len(shards) > 1:
        size = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")


def save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def record(reference, folder, seed, num_tokens, prompt_tokens):
    """Writes expected.safetensors; the smallest greedy gap."""
    vocab = reference.config_json["vocab_size"]
    tokens = np.random.default_rng(seed).integers(2, vocab, num_tokens)
    prompt = tokens[:prompt_tokens]
    greedy, gap = reference.greedy(prompt)
    expected = {name: torch.tensor(np.asarray(ids, dtype=np.int32))
                for name, ids in (("tokens", tokens), ("prompt", prompt), ("greedy", greedy))}
    expected.update(reference.run(tokens))
    save(expected, folder / "expected.safetensors")
    return gap


def make(folder, config_json, storage="f32", seed=0, num_tokens=40, prompt_tokens=9,
         tied_experts=(), attempts=40):
    """One checkpoint with its expected outputs, checked against the specification; tries further
    seeds until no gate decision and no greedy token is near a tie. One line about it."""
    folder = pathlib.Path(folder)
    for attempt in range(attempts):
        reference = Reference(config_json)
        randomize(reference.tensors(), seed + 10_000 * attempt, tied_experts)
        write(folder, config_json, store(reference, storage))
        gap = record(reference, folder, seed + 10_000 * attempt, num_tokens, prompt_tokens)
        worst, margin, greedy = spec_forward.check(folder)
        if not worst <= 1e-5:
            raise SystemExit(f"{folder.name}: transformers and the specification differ by {worst}")
        if margin >= SMALLEST_GATE_MARGIN and gap >= SMALLEST_GREEDY_GAP:
            assert greedy
            size = sum(f.stat().st_size for f in folder.iterdir()) / 1024
            return (f"{folder.name:20} {size:5.0f} KiB  from the specification {worst:.1e}  "
                    f"gate margin {margin:.1e}  greedy gap {gap:.1e}  attempt {attempt}")
    raise SystemExit(f"{folder.name}: every seed has a near tie")
