"""English prose of Debian's documentation packages as tokens: `python experiments/gpu/debian_text.py DIRECTORY OUT.xz`.

DIRECTORY holds the packages (`apt-get download NAME ...` in it); `PACKAGES` are those of Debian 12 that gave the text of
`docs/stages_on_text.md`. Paragraphs that are mostly English words are kept, each once. One document of 200 is held out.

OUT.xz is what `stages_at_size.py` reads: 16-bit ids of a byte-pair encoding that is learned on a part of the text, `HELD_OUT`
of held-out text and then the text to train on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import lzma
import random
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = """
ada-reference-manual-2020 anarchism apache2-doc apt-doc aptitude-doc-en autoconf-doc bacula-doc bash-doc bind9-doc
cinder-doc cmake-doc debconf-doc debian-faq debian-handbook debian-history debian-policy debian-reference-en developers-
reference dict-foldoc dict-gcide dict-jargon doc-debian erlang-doc erlang-manpages exim4-doc-html fp-docs-3.2.2 gap-doc
ghc-doc gimp-help-en git-doc glance-doc glibc-doc gnu-standards gnuplot-doc grass-doc gretl-doc harden-doc heat-doc
installation-guide-amd64 ironic-doc keystone-doc krb5-doc libboost1.74-doc libglib2.0-doc libgtk-3-doc libreoffice-help-
en-us lilypond-doc-html linux-doc-6.1 maint-guide manpages-dev manpages maxima-doc neutron-doc nova-doc octave-doc perl-
doc postfix-doc postgis-doc postgresql-doc-15 python-astropy-doc python-biopython-doc python-django-doc python-pandas-
doc python-scipy-doc python-sklearn-doc python-sqlalchemy-doc python-statsmodels-doc python-sympy-doc python3.11-doc
qtbase5-doc-html qtdeclarative5-doc-html r-doc-html racket-doc rust-doc rust-web-doc scheme48-doc shorewall-doc sphinx-
doc sqlite3-doc swift-doc tcl8.6-doc vim-doc zsh-doc
""".split()
HELD_OUT, VOCABULARY, SAMPLE = 200_000, 8192, 12_000_000
LARGEST = 60_000_000  # bytes of a file that is read
LANGUAGES = "ar ca cs da de el eo es fa fi fr gl hr hu id it ja ko lt nb nl nn pl pt ro ru sk sl sr sv tr uk vi zh".split()
_LANGUAGE = rf"({'|'.join(LANGUAGES)}|[a-z]{{2}}[-_][A-Za-z]{{2}})"
FOREIGN = re.compile(rf"/{_LANGUAGE}/|\.{_LANGUAGE}\.")
ENGLISH = re.compile(r"/(en|en[-_]US|en[-_]us)/")
SKIPPED = re.compile(r"changelog|/NEWS|copyright|searchindex|genindex")
READ = re.compile(r"\.(html?|xhtml|txt|rst|xml|pod|dz|[1-9][a-z]*)(\.gz)?$|anarchism", re.IGNORECASE)
HIDDEN = re.compile(r"<(script|style|head|nav|header|footer)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
BLOCK = re.compile(
    r"</?(p|div|li|ul|ol|dl|dt|dd|h[1-6]|tr|table|pre|br|hr|section|article|blockquote|td|th)\b[^>]*>", re.IGNORECASE
)
TAG = re.compile(r"<[^>]*>")
USUAL = set(
    "the of and to a in is that for it as with be this are on by or not from you can an which if will have was at".split()
)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is mostly English words, and long enough to be one."""
    words = paragraph.split()
    letters = sum(c.isalpha() and c.isascii() for c in paragraph)
    if len(paragraph) < 80 or len(words) < 15 or letters < 0.72 * (len(paragraph) - len(words) + 1):
        return False
    return sum(word.lower() in USUAL for word in words) >= 0.2 * len(words)


def paragraphs(name: str, data: bytes) -> list[str]:
    """The paragraphs of a file, by what its name says it is."""
    if name.lower().endswith((".gz", ".dz")):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return []
    name = name.lower().removesuffix(".gz")
    text = data.decode("utf-8", "replace")
    if name.endswith((".html", ".htm", ".xhtml")):
        text = html.unescape(TAG.sub("", BLOCK.sub("\n\n", HIDDEN.sub(" ", text))))
    elif "/man/" in name and re.search(r"\.[1-9][a-z]*$", name):
        text = re.sub(r"^\.(PP|P|LP|TP|IP|SH|SS|HP|RS|RE|br|sp|nf|fi).*$", "\n\n", text, flags=re.MULTILINE)
        text = re.sub(r"^\.(B|I|BR|IR|RB|RI|BI|IB|SM)\s+", "", text, flags=re.MULTILINE)
        text = re.sub(r"^[.'].*$", "", text, flags=re.MULTILINE)
        text = re.sub(r"\\f.|\\&|\\c", "", text).replace("\\-", "-").replace("\\(aq", "'").replace('"', "")
    elif name.endswith(".xml"):
        text = TAG.sub("", text)
    elif not name.endswith((".txt", ".rst", ".dz", ".pod")) and "anarchism" not in name:
        return []
    return re.split(r"\n\s*\n", text)


def documents(packages: Iterable[Path]) -> Iterator[str]:
    """The prose of every file of some packages, a paragraph a line; a paragraph that stood before is left out."""
    seen: set[bytes] = set()
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacked:
            files = tarfile.open(fileobj=unpacked.stdout, mode="r|")
            for file in files:
                is_foreign = FOREIGN.search(file.name) and not ENGLISH.search(file.name)
                if not file.isfile() or file.size > LARGEST or is_foreign:
                    continue
                if SKIPPED.search(file.name) or not READ.search(file.name):
                    continue
                held: Any = files.extractfile(file)
                kept: list[str] = []
                for paragraph in paragraphs(file.name, held.read()):
                    paragraph = " ".join(paragraph.split())
                    digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                    if digest not in seen and is_prose(paragraph):
                        seen.add(digest)
                        kept.append(paragraph)
                if kept:
                    yield "\n".join(kept)


def encoding(texts: Iterable[str]) -> Tokenizer:
    """A byte-pair encoding, learned on the beginnings of some texts."""
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    sample: list[str] = []
    for text in texts:
        sample.append(text[:100_000])
        if sum(map(len, sample)) > SAMPLE:
            break
    made.train_from_iterator(sample, learner)
    return made


def ids(tokenizer: Tokenizer, texts: Iterable[str], most: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The tokens of texts, each ended by token 0, up to some number of tokens."""
    found: list[int] = []
    for text in texts:
        for k in range(0, len(text), 200_000):
            found += tokenizer.encode(text[k : k + 200_000]).ids
        found.append(0)
        if len(found) >= most:
            break
    return np.array(found[:most], dtype=np.uint16)


def main() -> None:
    """Read the packages and write the tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=26_000_000, help="to train on (default: 26 million)")
    args = parser.parse_args()
    texts = list(documents(sorted(args.directory.glob("*.deb"))))
    is_held = [zlib.crc32(text[:200].encode()) % 200 == 0 for text in texts]
    train = [text for text, held in zip(texts, is_held, strict=True) if not held]
    held_out = [text for text, held in zip(texts, is_held, strict=True) if held]
    shuffled = random.Random(0)
    shuffled.shuffle(train)
    shuffled.shuffle(held_out)
    tokenizer = encoding(train)
    held = ids(tokenizer, held_out, HELD_OUT)
    if len(held) < HELD_OUT:
        parser.error(f"{args.directory} gives {len(held)} held-out tokens of {HELD_OUT}; add packages.")
    tokens = np.concatenate([held, ids(tokenizer, train, args.tokens)])
    args.out.write_bytes(lzma.compress(tokens.tobytes(), preset=6))


if __name__ == "__main__":
    main()
