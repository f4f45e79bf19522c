"""Makes text to train on from Debian packages.

    python3 corpus.py OUT [--more] [--page CHARACTERS]

Packages (`apt-get install bible-kjv debian-handbook developers-reference`, for --more python3-doc
and wordnet-base too). Writes OUT/*.jsonl, a document {"text": …} per line; README.md lists the
licences. --page cuts documents at the last line's end or space within so many characters, so that
few documents held out have the mixture of all.
"""

import argparse
import glob
import html.parser
import json
import pathlib
import re
import subprocess
import sys


def cut(document, page):
    while page and len(document) > page:
        end = document.rfind("\n", 0, page) + 1 or document.rfind(" ", 0, page) + 1 or page
        yield document[:end]
        document = document[end:]
    yield document


def write(options, name, documents):
    kept = [d for d in (re.sub(r"[ \t]+", " ", d).strip() for d in documents) if len(d) >= 200]
    kept = [piece for document in kept for piece in cut(document, options.page)]
    with (options.out / f"{name}.jsonl").open("w") as file:
        for document in kept:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    size = sum(map(len, kept))
    print(f"{name}: {len(kept)} documents, {size / 1e6:.1f} million characters")
    if not kept:
        sys.exit(f"{name}: nothing found; is its package installed?")


def bible():
    """A chapter is a document; verses run on as prose."""
    printed = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], stdout=subprocess.PIPE, text=True,
                             check=True).stdout
    chapters = {}
    for line in printed.splitlines():
        place, _, verse = line.partition(" ")
        if match := re.fullmatch(r"(\S+?\d+):\d+", place):
            chapters.setdefault(match[1], []).append(verse.strip())
    return [" ".join(verses) for verses in chapters.values()]


class Paragraphs(html.parser.HTMLParser):
    """The running text of a page: what stands in p, li and headings."""

    TAKEN = {"p", "li", "h1", "h2", "h3", "dd"}
    LEFT = {"pre", "script", "style", "table", "nav", "footer"}

    def __init__(self):
        super().__init__()
        self.paragraphs, self.text, self.left = [], "", 0

    def handle_starttag(self, tag, attributes):
        if tag in self.LEFT:
            self.left += 1
        elif tag in self.TAKEN or dict(attributes).get("class") == "para":
            self.flush()

    def handle_endtag(self, tag):
        if tag in self.LEFT:
            self.left -= 1
        elif tag in self.TAKEN or tag == "div":
            self.flush()

    def handle_data(self, data):
        if self.left == 0:
            self.text += data

    def flush(self):
        text = re.sub(r"\s+", " ", self.text).strip()
        if len(text) > 40 and text[-1] in ".:!?)\"”":
            self.paragraphs.append(text)
        self.text = ""


def pages(pattern):
    for path in sorted(glob.glob(pattern)):
        parser = Paragraphs()
        parser.feed(pathlib.Path(path).read_text(errors="ignore"))
        parser.flush()
        yield "\n\n".join(parser.paragraphs)


def sections(pattern):
    """Prose of reStructuredText: paragraphs that are whole sentences, without markup."""
    for path in sorted(glob.glob(pattern, recursive=True)):
        kept = []
        for paragraph in re.split(r"\n\s*\n", pathlib.Path(path).read_text(errors="ignore")):
            if paragraph.startswith((" ", "..", "\t")) or re.search(r"^[=\-~^*+#]{3,}$", paragraph, re.M):
                continue
            text = re.sub(r"\s+", " ", paragraph)
            text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
            text = re.sub(r"`([^`<]*?)(?:\s*<[^`]*>)?`_{0,2}", r"\1", text)
            text = text.replace("``", "").replace("**", "").replace("*", "").strip()
            if len(text) > 40 and text[-1] in ".:!?)":
                kept.append(re.sub(r"::$", ":", text))
        yield "\n\n".join(kept)


def glosses():
    """Words, what they mean, and how they are used; sixteen entries a document."""
    entries = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in pathlib.Path(f"/usr/share/wordnet/data.{kind}").read_text().splitlines():
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition(" | ")
            word = re.sub(r"\(.*\)", "", head.split()[4]).replace("_", " ")
            meaning = re.split(r'; "', gloss.strip())
            used = [u.strip('" ;') for u in meaning[1:]]
            text = f"{word[:1].upper()}{word[1:]}: {meaning[0].strip(' ;')}."
            entries.append(" ".join([text, *(f"“{u[:1].upper()}{u[1:]}.”" for u in used if u)]))
    return ["\n".join(entries[i:i + 16]) for i in range(0, len(entries), 16)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--page", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write(options, "bible", bible())
    write(options, "handbook", pages("/usr/share/doc/debian-handbook/html/en-US/*.html"))
    write(options, "reference", pages("/usr/share/developers-reference/*.html"))
    if options.more:
        write(options, "python", sections("/usr/share/doc/python3-doc/html/_sources/**/*.rst.txt"))
        write(options, "wordnet", glosses())


if __name__ == "__main__":
    main()
