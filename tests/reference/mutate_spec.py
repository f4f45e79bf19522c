"""Proves that the committed fixtures can tell right from nearly right:

    python mutate_spec.py data

Each mutation below is a mistake an implementation could make. It is written into spec_forward.py's
source, and the mutant must disagree with at least one fixture by more than compare.py's tolerance.
"""

import pathlib
import sys
import types

import compare
import tensors

DEQUANTIZE = 'fp8.dequantize_weight(raw, self.files[name + "_scale_inv"], block)'
SCALES = 'self.files[name + "_scale_inv"]'
MULTIPLIER = 'self.multiplier = ms(scaling.get("mscale", 1)) / ms(all_dim)'
SCALE_FACTOR = "self.scale_factor = ms(all_dim) ** 2"
BIAS = 'scores + self.weight(prefix + "e_score_correction_bias")'
TOP_K = 'np.argsort(-scores, axis=-1, kind="stable")[..., :k]'
TOP_K_LAST = ('scores.shape[-1] - 1 - '
              'np.argsort(-scores[..., ::-1], axis=-1, kind="stable")[..., :k]')
FINAL_NORM = 'x = out[f"hidden.{layers}"] = self.norm('
MAIN_HEAD = 'out["logits"] = x @ head.T'
MTP_NORM = 'x = out[f"mtp{k}.hidden"] = self.norm('
MTP_HEAD = 'out[f"mtp{k}.logits"] = x @ head.T'

# mistake, then pairs of right and wrong text, each right one exactly once in spec_forward.py
MUTATIONS = [
    ("latent norms use rms_norm_eps", "LATENT_EPS = 1e-6", "LATENT_EPS = 1e-2"),
    ("other norms use the latent eps",
     'self.config["rms_norm_eps"] if eps is None else eps', "LATENT_EPS"),
    ("dropped groups masked with 0", "by_group, -np.inf)", "by_group, 0)"),
    ("noaux_tc groups by their maximum", "best[:, :, :2].sum(axis=-1) if", "best[:, :, 0] if"),
    ("group_limited_greedy by a sum", "best[:, :, 0])", "best[:, :, :2].sum(axis=-1))"),
    ("groups ignored", "if groups > 1 and", "if False and"),
    ("weights from biased scores",
     "take_along_axis(scores, chosen", "take_along_axis(choice, chosen"),
    ("bias ignored", BIAS, "scores"),
    ("weights always normalized", 'if c["norm_topk_prob"] and k > 1', "if k > 1"),
    ("weights never normalized", 'if c["norm_topk_prob"] and k > 1', "if False"),
    ("routed_scaling_factor ignored", ' * c["routed_scaling_factor"]', ""),
    ("ties to the higher index", TOP_K, TOP_K_LAST),
    ("shared experts scaled", "out += self.swiglu(", "out += 2.5 * self.swiglu("),
    ("rope always interleaved", 'config.get("rope_interleave", True)', "True"),
    ("rope never interleaved", 'config.get("rope_interleave", True)', "False"),
    ("YaRN cos/sin multiplier ignored", MULTIPLIER, "self.multiplier = 1.0"),
    ("YaRN softmax factor ignored", SCALE_FACTOR, "self.scale_factor = 1.0"),
    ("YaRN softmax factor not squared", SCALE_FACTOR, "self.scale_factor = ms(all_dim)"),
    ("YaRN softmax factor from mscale",
     SCALE_FACTOR, 'self.scale_factor = ms(scaling["mscale"]) ** 2'),
    ("YaRN frequencies ignored",
     "self.frequencies * (1 - ramp) + self.frequencies / factor * ramp", "self.frequencies"),
    ("YaRN bound is d_rope / 2 - 1", "dim - 1)\n", "dim // 2 - 1)\n"),
    ("YaRN without upper bound", "dim - 1)\n", "10**9)\n"),
    ("YaRN without lower bound", '"beta_fast", 32))), 0)', '"beta_fast", 32))), -10**9)'),
    ("YaRN bounds not rounded", "max(math.floor(correction", "max((correction"),
    ("beta_fast ignored", 'scaling.get("beta_fast", 32)', "32"),
    ("beta_slow ignored", 'scaling.get("beta_slow", 1)', "2"),
    ("rope_theta ignored", 'scaling.get("rope_theta", config.get("rope_theta"))', "10000.0"),
    ("rope key normalized too", "self.rope.rotate(kv[:, rank:], positions)",
     "self.rope.rotate(rms_norm(kv[:, rank:], 1, LATENT_EPS), positions)"),
    ("the next token is visible", "np.tri(num_rows, dtype", "np.tri(num_rows, k=1, dtype"),
    ("FP8 scale divides", DEQUANTIZE, DEQUANTIZE.replace(SCALES, "1 / " + SCALES)),
    ("FP8 scales of the first block row",
     DEQUANTIZE, DEQUANTIZE.replace(SCALES, SCALES + "[:1].repeat(9, 0)")),
    ("FP8 scales of the first block column",
     DEQUANTIZE, DEQUANTIZE.replace(SCALES, SCALES + "[:, :1].repeat(9, 1)")),
    ("MTP columns swapped", "x[:rows])], axis=1)", "x[:rows])][::-1], axis=1)"),
    ("MTP takes the state before the final norm",
     FINAL_NORM, FINAL_NORM.removeprefix("x = "),
     MAIN_HEAD, MAIN_HEAD.replace(" x ", ' out[f"hidden.{layers}"] ')),
    ("MTP chained before shared_head.norm",
     MTP_NORM, MTP_NORM.removeprefix("x = "),
     MTP_HEAD, MTP_HEAD.replace(" x ", ' out[f"mtp{k}.hidden"] ')),
    ("MTP embeds its own token", "embedding[k:])", "embedding[:rows])"),
]


def mutant(source, replacements):
    for right, wrong in zip(replacements[::2], replacements[1::2]):
        if source.count(right) != 1:
            raise SystemExit(f"occurs {source.count(right)} times in spec_forward.py: {right}")
        source = source.replace(right, wrong)
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def caught(module, folder):
    expected = tensors.read_file(folder / "expected.safetensors")
    results = module.Model(folder).forward(expected["tokens"])
    return any(not module.difference(expected[name], results[name]) <= compare.TOLERANCE
               for name in results)


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    here = pathlib.Path(__file__).parent
    source = (here / "spec_forward.py").read_text()
    folders = sorted(f.parent for f in pathlib.Path(sys.argv[1]).glob("*/expected.safetensors"))
    missed = 0
    for mistake, *replacements in MUTATIONS:
        module = mutant(source, replacements)
        by = [f.name for f in folders if caught(module, f)]
        missed += not by
        print(f"{'ok  ' if by else 'FAIL'} {mistake:42} {len(by):2} {' '.join(by[:4])}")
    sys.exit(missed != 0)


if __name__ == "__main__":
    main()
