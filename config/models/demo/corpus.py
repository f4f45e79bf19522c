"""Makes the text that the demo model is trained on, from Debian packages.

    python3 corpus.py OUT

Packages (`apt-get install bible-kjv debian-handbook developers-reference`). Writes OUT/*.jsonl, a
document {"text": …} per line; README.md lists the licences.
"""

import glob
import html.parser
import json
import pathlib
import re
import subprocess
import sys


def write(out, name, documents):
    kept = [d for d in (re.sub(r"[ \t]+", " ", d).strip() for d in documents) if len(d) >= 200]
    with (out / f"{name}.jsonl").open("w") as file:
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


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write(out, "bible", bible())
    write(out, "handbook", pages("/usr/share/doc/debian-handbook/html/en-US/*.html"))
    write(out, "reference", pages("/usr/share/developers-reference/*.html"))


if __name__ == "__main__":
    main()
