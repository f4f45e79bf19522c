#!/usr/bin/env python3
"""Records what the reference tokenizers do, for tests/config/tokenizer_test.cpp.

Developer tooling: needs the Python packages `tokenizers`, `tiktoken` and `regex`; the tests need neither.

  tokenizer_check.py record            train the two small vocabularies and record their cases
                                       (tests/reference/data/tokenizer/)
  tokenizer_check.py cases FOLDER OUT  cases of the tokenizer.json or tiktoken.model in FOLDER, to
                                       be compared with
      TROUPE_TOKENIZER_DIR=FOLDER TROUPE_TOKENIZER_CASES=OUT test_config -tc='*recorded elsewhere*'
  tokenizer_check.py characters FOLDER OUT   the same with every Unicode character
  tokenizer_check.py speed FOLDER TEXT MB/s of the reference, one thread, on a file

A case is one line of JSON: {"text": …, "special": bool, "ids": […]} or {"decode": […],
"skip_special": bool, "text": …}.
"""
import argparse
import base64
import json
import os
import pathlib
import random
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tiktoken  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data" / "tokenizer"

DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
KIMI = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])
NUM_RESERVED = 256

SNIPPETS = [
    "Hello, world!", "x=1234567+89", "I've got 3 cats.\n\nOK", "你好，世界abc123", "  leading  spaces ",
    "foo_bar(baz)", "a\r\n\tb", "C++20 is .NET", "price: $12.50", "한국어 текст", "カタカナとひらがな",
    "def f(x):\n    return [i**2 for i in range(x)]  # squares\n\n\n", "#include <vector>\n\tint main() {",
    "The quick brown fox jumps over the lazy dog. ", "El niño comió mañana en el jardín. ",
    "Привет, как дела? ", "שלום עולם ", "مرحبا بالعالم ", "नमस्ते दुनिया ", "สวัสดีชาวโลก ", "Ελληνικά ",
    "日本語のテキストです。", "漢字かな交じり文", "中文、English 混排", "👩‍👩‍👧‍👦🏳️‍🌈👍🏽", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "e\u0301a\u0308", "DON'T don't I'LL we'Re",
    "ſ'ſ 'ſ K", "IVXⅣ ½ ² ٣ ४ 万", "!!!???...---", "a.b.c/d\\e", "{\"k\": [1, 2.5e-3]}", "<|im_end|>", "<think>", "\u180e \u200b\u00a0\u3000\u2028",
    "々〆〇〻ㄅㄆ𠀀𰀀\U00031350\U0002EBF0", "\u1c89\u1c8a\ua7cb\U00010d50\U0001ccf0\U00016d40", "ﬁﬀ Ǆǅǆ ǈ", "\x00\x01\x1c\x1f\x7f\x85",
]


def random_char(rng):
    kind = rng.randrange(12)
    if kind < 3:
        return chr(rng.randrange(32, 127))
    if kind == 3:
        return rng.choice(" \t\n\r\x0b\x0c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e")
    if kind == 4:
        return rng.choice("0123456789٠१²½Ⅷ一")
    if kind == 5:
        return chr(rng.randrange(0xA0, 0x800))
    if kind == 6:
        return chr(rng.randrange(0x4E00, 0xA000))
    if kind == 7:
        return chr(rng.randrange(0x3000, 0x3100))
    if kind == 8:
        return chr(rng.randrange(0x1F300, 0x1FB00))
    if kind == 9:
        return chr(rng.randrange(0x800, 0xD800))
    if kind == 10:
        return chr(rng.randrange(0x10000, 0x32000))
    c = rng.randrange(0x110000)
    return chr(c) if not 0xD800 <= c < 0xE000 else "\ufffd"


def random_text(rng, specials):
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(SNIPPETS)
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(60))).decode("utf-8", "replace")
    if kind == 2:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(60))).decode("latin-1")
    if kind == 3:
        return rng.choice(["a", " ", "\n", "0", "=", "é", "中", "ab", " \n", "A", "'s", "  x", "ก"]) * rng.randrange(1, 400)
    if kind in (4, 5):
        return "".join(rng.choice(SNIPPETS + specials) for _ in range(rng.randrange(1, 8)))
    if kind == 6:  # specials cut short and doubled
        cut = [s[: rng.randrange(1, len(s) + 1)] for s in rng.choices(specials or SNIPPETS, k=4)]
        return "".join(c + rng.choice(["", " ", "x", "\n"]) for c in cut)
    if kind == 7:
        return "".join(rng.choice("abcdefgh ABC123.,'\n\t_-()") for _ in range(rng.randrange(200)))
    return "".join(random_char(rng) for _ in range(rng.randrange(1, 50)))


class HuggingFace:
    def __init__(self, folder):
        self.full = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = config["added_tokens"]
        self.specials = [t["content"] for t in added]
        config["added_tokens"] = []
        self.plain = Tokenizer.from_str(json.dumps(config))
        self.ids = sorted(set(config["model"]["vocab"].values()) | {t["id"] for t in added})

    def encode(self, text, special):
        return (self.full if special else self.plain).encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip):
        return self.full.decode(ids, skip_special_tokens=skip)


class Tiktoken:
    def __init__(self, folder):
        lines = (folder / "tiktoken.model").read_bytes().splitlines()
        ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = {int(i): t for i, t in config["added_tokens_decoder"].items()}
        special = {}
        for i in range(len(ranks), len(ranks) + NUM_RESERVED):
            special[named[i]["content"] if i in named else f"<|reserved_token_{i}|>"] = i
        self.not_special = {i for i, t in named.items() if not t["special"]}
        self.first_special = len(ranks)
        self.specials = list(special)[:12]
        self.encoding = tiktoken.Encoding("k", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=special)
        self.ids = list(range(len(ranks) + NUM_RESERVED))

    def encode(self, text, special):
        if special:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids, skip):
        if skip:
            ids = [i for i in ids if i < self.first_special or i in self.not_special]
        return self.encoding.decode(ids)


def reference(folder):
    return HuggingFace(folder) if (folder / "tokenizer.json").exists() else Tiktoken(folder)


def cases(folder, out, count, seed):
    rng = random.Random(seed)
    ref = reference(folder)
    texts = list(SNIPPETS) + [random_text(rng, ref.specials) for _ in range(count)]
    with open(out, "w", encoding="utf-8") as f:
        def put(case):
            f.write(json.dumps(case, ensure_ascii=False) + "\n")
        for i, text in enumerate(texts):
            special = i % 2 == 0
            ids = ref.encode(text, special)
            put({"text": text, "special": special, "ids": ids})
            rng.shuffle(ids)  # broken UTF-8
            extra = rng.choices(ref.ids, k=rng.randrange(6))
            skip = rng.random() < 0.5
            put({"decode": ids + extra, "skip_special": skip, "text": ref.decode(ids + extra, skip)})


def all_characters(folder, out):
    """Every Unicode character between letters, digits, blanks, marks and itself."""
    ref = reference(folder)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    with open(out, "w", encoding="utf-8") as f:
        for i in range(0, len(characters), 2000):
            text = "".join(f"x{c}y {c}Z1{c}. {c}{c}\n" for c in characters[i:i + 2000])
            f.write(json.dumps({"text": text, "special": False, "ids": ref.encode(text, False)},
                               ensure_ascii=False) + "\n")


def corpus():
    rng = random.Random(7)
    return ["".join(rng.choices(SNIPPETS, k=20)) for _ in range(200)]


def train(folder):
    """A vocabulary of 256 bytes, 3 specials and some 400 merges with DeepSeek-V3's splits."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in DEEPSEEK_V3]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits + [byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    trainer = trainers.BpeTrainer(vocab_size=660, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    from tokenizers import AddedToken
    tokenizer.add_special_tokens([AddedToken(f"<｜place▁holder▁no▁{i}｜>", normalized=False) for i in range(2)])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in (
        "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>", "<|EOT|>")])
    tokenizer.add_tokens([AddedToken("[L]", lstrip=True), AddedToken("[R]", rstrip=True, normalized=False),
                          AddedToken("word", single_word=True), AddedToken("[LR]", lstrip=True, rstrip=True)])
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(tokenizer.to_str())
    # The older spelling of merges; the newer one is written by the tests.
    config["model"]["merges"] = [" ".join(m) for m in config["model"]["merges"]]
    text = json.dumps(config, ensure_ascii=False, indent=0, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": specials[0]}, "eos_token": specials[1],
    }, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def train_tiktoken(folder):
    """A rank file with the published pattern; merges learned by counting."""
    import regex
    words = {}
    for text in corpus():
        for piece in regex.findall(KIMI, text, flags=regex.V1):
            key = tuple(bytes([b]) for b in piece.encode())
            words[key] = words.get(key, 0) + 1
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < 600:
        counts = {}
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + n
        best = max(counts, key=lambda p: (counts[p], p))
        ranks.append(best[0] + best[1])
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best:
                    out.append(best[0] + best[1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(t).decode() + f" {i}\n" for i, t in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("".join(lines))
    names = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
             "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
             "<|tool_call_argument_begin|>", "<|tool_call_end|>"]
    decoder = {str(len(ranks) + i): {"content": t, "special": not t.startswith("<|tool")} for i, t in enumerate(names)}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": decoder, "bos_token": "[BOS]", "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer"}, indent=1) + "\n")


def speed(folder, path):
    text = pathlib.Path(path).read_text(encoding="utf-8")
    ref = reference(folder)
    start = time.perf_counter()
    ids = ref.encode(text, True)
    seconds = time.perf_counter() - start
    size = len(text.encode())
    print(f"{size} bytes, {len(ids)} ids, {seconds:.3f} s, {size / seconds / 1e6:.2f} MB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record")
    one = commands.add_parser("cases")
    one.add_argument("folder", type=pathlib.Path)
    one.add_argument("out")
    one.add_argument("--count", type=int, default=5000)
    one.add_argument("--seed", type=int, default=1)
    every = commands.add_parser("characters")
    every.add_argument("folder", type=pathlib.Path)
    every.add_argument("out")
    two = commands.add_parser("speed")
    two.add_argument("folder", type=pathlib.Path)
    two.add_argument("text")
    args = parser.parse_args()
    if args.command == "record":
        for name, make in (("deepseek", train), ("kimi", train_tiktoken)):
            make(DATA / name)
            cases(DATA / name, DATA / name / "cases.jsonl", 150, 1)
    elif args.command == "cases":
        cases(args.folder, args.out, args.count, args.seed)
    elif args.command == "characters":
        all_characters(args.folder, args.out)
    else:
        speed(args.folder, args.text)


if __name__ == "__main__":
    main()
