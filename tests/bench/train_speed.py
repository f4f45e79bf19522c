"""Training tokens per second: Troupe beside PyTorch, the same model, dtype and threads, in one run.

    python train_speed.py TROUPE [--compute f32 bf16] [--threads 2] [--steps 6] [--rounds 3]

The peer is transformers' DeepseekV3 with fused AdamW: forward, backward, clipping and update, in
BF16 weights and activations (its AdamW state then is BF16 too, less than Troupe does) or in F32.
The model has 22 M parameters, 16 experts top-4 and no MTP module, which transformers lacks. Rounds
alternate; medians and their ratio are printed. Needs torch, transformers, safetensors.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 4096,
    "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 16,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}


def troupe_rate(program, folder, compute, threads, steps):
    """Median over steps but the first two, which touch memory for the first time."""
    log = folder / "log.jsonl"
    subprocess.run([program, "train", "--init", folder / "config.json", "--tokens",
                    folder / "tokens.safetensors", "--batch", "8", "--micro-batch", "4", "--steps",
                    str(steps + 2), "--compute", compute, "--threads", str(threads), "--log", log,
                    "--init-std", "0.02", "--quiet"], check=True)
    rates = [json.loads(line)["tokens_per_s"] for line in log.read_text().splitlines()]
    return statistics.median(rates[2:])


class Peer:
    def __init__(self, compute, threads, rows):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(**MODEL)
        self.model = transformers.DeepseekV3ForCausalLM(config)
        if compute == "bf16":
            self.model = self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=True)
        self.rows = torch.from_numpy(rows.astype(np.int64))

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        for micro_batch in self.rows.split(4):
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            logits = self.model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1),
                                                     targets.flatten()) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def rate(self, steps):
        times = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - begin)
        tokens = self.rows.shape[0] * (self.rows.shape[1] - 1)
        return tokens / statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("troupe")
    parser.add_argument("--compute", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = np.random.default_rng(1).integers(2, MODEL["vocab_size"], (8, 257), dtype=np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        save_file({"tokens": rows}, folder / "tokens.safetensors")
        for compute in options.compute:
            peer = Peer(compute, options.threads, rows)
            parameters = sum(p.numel() for p in peer.model.parameters())
            ours, theirs = [], []
            for _ in range(options.rounds):
                ours.append(troupe_rate(options.troupe, folder, compute, options.threads,
                                        options.steps))
                theirs.append(peer.rate(options.steps))
            mine, other = statistics.median(ours), statistics.median(theirs)
            print(f"{compute}: {parameters / 1e6:.1f} M parameters, {options.threads} threads: "
                  f"troupe {mine:,.0f} tokens/s, PyTorch {other:,.0f} tokens/s, "
                  f"ratio {mine / other:.2f}", flush=True)


if __name__ == "__main__":
    main()
