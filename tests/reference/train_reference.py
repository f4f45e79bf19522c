"""What autograd and AdamW make of a checkpoint: losses, gradients and ten optimizer steps.

    python train_reference.py FOLDER [--rows FILE] [--out FILE] [--steps 10] [--batch 4] …

Reads the checkpoint in FOLDER (F32 arithmetic whatever it is stored in) and rows of T + 1 tokens
from --rows, or makes some up. Writes FOLDER/training.safetensors (README.md lists the tensors).
Conventions where the report is silent are those of §5.7 of the specification.

A gate decision near a tie may fall the other way in another program; rows are drawn again until
none is near, unless they were given.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from torch.nn import functional

import checkpoints
import tensors

SMALLEST_MARGIN = 1e-4


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    reference = checkpoints.Reference(config)
    stored = tensors.read_checkpoint(folder)
    with torch.no_grad():
        for name, view in reference.tensors().items():
            view.copy_(torch.from_numpy(np.array(stored[name], dtype=np.float32)))
    for parameter in [*reference.model.parameters(), *reference.mtp.parameters()]:
        parameter.requires_grad_(True)
    return reference


class Routers:
    """Sees what the gates of one forward pass say, in the order of the layers, MTP's last."""

    def __init__(self, reference):
        config = reference.config_json
        blocks = [*reference.model.model.layers, *(m.block for m in reference.mtp)]
        self.layers = [i for i, b in enumerate(blocks) if hasattr(b.mlp, "gate")]
        self.gates = [blocks[i].mlp.gate for i in self.layers]
        self.top_k, self.experts = config["num_experts_per_tok"], config["n_routed_experts"]
        self.groups, self.kept = config["n_group"], config["topk_group"]
        self.seen = {}
        for layer, gate in zip(self.layers, self.gates):
            gate.register_forward_hook(lambda _, __, out, layer=layer: self.see(layer, out))

    def see(self, layer, out):
        self.seen[layer] = out[0], out[2]

    def balance_loss(self, sequences):
        """Σ over layers of the mean over sequences of Σ f P, without α."""
        total = 0.0
        for layer in self.layers:
            logits, chosen = self.seen[layer]
            rows = logits.shape[0] // sequences
            scores = logits.sigmoid()
            share = (scores / scores.sum(-1, keepdim=True)).view(sequences, rows, -1).mean(1)
            hits = functional.one_hot(chosen, self.experts).sum(1).view(sequences, rows, -1)
            frequency = hits.sum(1) * self.experts / (self.top_k * rows)
            total = total + (frequency.float() * share).sum(-1).mean()
        return total

    def counts(self):
        return torch.stack([torch.bincount(self.seen[layer][1].flatten(), minlength=self.experts)
                            for layer in self.layers])

    @torch.no_grad()
    def margin(self):
        """How near the closest decision of any gate is to going the other way."""
        nearest = np.inf
        for layer, gate in zip(self.layers, self.gates):
            biased = self.seen[layer][0].sigmoid() + gate.e_score_correction_bias
            groups = biased.view(len(biased), self.groups, -1)
            if self.kept < self.groups:
                best = groups.topk(2, -1)[0].sum(-1).sort(-1, descending=True)
                values = best.values
                nearest = min(nearest, float((values[:, self.kept - 1] - values[:, self.kept]).min()))
                dropped = torch.ones(len(biased), self.groups, dtype=torch.bool)
                dropped.scatter_(1, best.indices[:, :self.kept], False)
                groups = groups.masked_fill(dropped[..., None], -torch.inf)
            values = groups.flatten(1).sort(-1, descending=True).values
            nearest = min(nearest, float((values[:, self.top_k - 1] - values[:, self.top_k]).min()))
        return nearest


def losses(reference, routers, rows, options):
    """main, mtp, balance and total loss of one batch of rows [sequences, T + 1]."""
    inputs, length = rows[:, :-1], rows.shape[1] - 1
    with checkpoints.stable_topk():
        result = reference.model(inputs, output_hidden_states=True, use_cache=False)
        main = functional.cross_entropy(result.logits.flatten(0, 1), rows[:, 1:].flatten())
        state, embedding = result.hidden_states[-1], result.hidden_states[0]
        mtp = torch.zeros(())
        for k, module in enumerate(reference.mtp, start=1):
            state = module(state[:, :length - k], embedding[:, k:],
                           reference.model.model.rotary_emb)
            logits = reference.model.lm_head(state)
            mtp = mtp + functional.cross_entropy(
                logits.flatten(0, 1), rows[:, k + 1:].flatten(),
                reduction="sum") / (length * len(rows))
    balance = options.balance_alpha * routers.balance_loss(len(rows))
    depth = max(len(reference.mtp), 1)
    return torch.stack([main, mtp, balance, main + options.mtp_lambda / depth * mtp + balance])


def gradients(reference):
    """Published name → gradient, in F32."""
    views = {}
    for prefix, module in (("", reference.model), ("mtp", reference.mtp)):
        for name, parameter in module.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if prefix:
                k, _, rest = name.partition(".")
                layer = reference.config_json["num_hidden_layers"] + int(k)
                rest = rest.removeprefix("block.").replace("shared_head_norm", "shared_head.norm")
                name = f"model.layers.{layer}.{rest}"
            views.update(checkpoints._published(name, gradient))
    return views


def train(folder, rows, options):
    reference = load(folder)
    routers = Routers(reference)
    parameters = [*reference.model.parameters(), *reference.mtp.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    out = {"rows": rows.int(), "settings": torch.tensor(
        [options.batch, options.lr, options.weight_decay, options.clip, options.mtp_lambda,
         options.balance_alpha, options.bias_gamma], dtype=torch.float64)}
    recorded = {"losses": [], "grad_norm": [], "counts": [], "biases": []}
    nearest = np.inf
    for step in range(options.steps):
        which = [(step * options.batch + i) % len(rows) for i in range(options.batch)]
        loss = losses(reference, routers, rows[which].long(), options)
        nearest = min(nearest, routers.margin())
        optimizer.zero_grad()
        loss[3].backward()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if step == 0:
            out.update({f"grad.{name}": g.clone() for name, g in gradients(reference).items()})
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in parameters))
        scale = min(1.0, options.clip / float(norm)) if options.clip > 0 else 1.0
        for p in parameters:
            p.grad.mul_(scale)
        optimizer.step()
        counts = routers.counts()
        with torch.no_grad():
            for gate, c in zip(routers.gates, counts.float()):
                gate.e_score_correction_bias += options.bias_gamma * torch.sign(c.mean() - c)
        recorded["losses"].append(loss.detach())
        recorded["grad_norm"].append(norm.float())
        recorded["counts"].append(counts.int())
        recorded["biases"].append(torch.stack(
            [g.e_score_correction_bias.detach().clone() for g in routers.gates]))
    out.update({name: torch.stack(values) for name, values in recorded.items()})
    return out, nearest


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rows", type=pathlib.Path, help="file with tokens I32 [rows, T + 1]")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=24, help="T of rows that are made up")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--mtp-lambda", type=float, default=0.3)
    # Larger than in earnest, so that an error in its gradient shows.
    parser.add_argument("--balance-alpha", type=float, default=0.05)
    parser.add_argument("--bias-gamma", type=float, default=0.01)
    options = parser.parse_args()
    vocab = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    for seed in range(200):
        if options.rows:
            rows = torch.from_numpy(tensors.read_file(options.rows)["tokens"].copy())
        else:
            rows = torch.from_numpy(np.random.default_rng(seed).integers(
                2, vocab, (2 * options.batch, options.length + 1)).astype(np.int32))
        out, nearest = train(options.folder, rows, options)
        if options.rows or nearest >= SMALLEST_MARGIN:
            break
    else:
        raise SystemExit("every seed has a gate decision near a tie")
    path = options.out or options.folder / "training.safetensors"
    checkpoints.save({name: t.contiguous() for name, t in out.items()}, path)
    first, last = out["losses"][0], out["losses"][-1]
    print(f"{options.folder.name:20} {path.stat().st_size / 1024:5.0f} KiB  losses {first.tolist()} "
          f"to {last.tolist()}  gate margin {nearest:.1e}  seed {seed}")


if __name__ == "__main__":
    main()
