"""CoCoSoDa (ICSE 2023, arXiv 2204.03293): from a doc comment to its function, in four streams.

    python examples/seeds/cocosoda.py DATA [SEEDS]

Batches have one language each, drawn in proportion to n ** 0.7. A text or a function is compared
with those of the batch and with queues of earlier ones, encoded by a copy of the encoder that
follows slowly. Soft masking hides, by turns, tokens at random or all tokens of one type; there are
four terms, text to code, to masked code, code to text, to masked text. Packages are for training or
for the test as a whole. The table has the MRR among the test functions of the same language.

DATA: a folder of installed packages, such as `site-packages`: the functions of its Python, Cython
and C++ files, the latter being headers. Pairs are made from the files at every start.
"""

import ast
import copy
import re
import sys
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
import scipy.sparse as sp
import torch
from common import Updates, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.data.tokens import Tokens
from ngame.negatives import Candidates, ContrastiveLoss, EmaEncoder, NegativeQueue
from ngame.prediction.lexical import Tfidf

MOST, BATCH, EPOCHS, QUEUE, DIM = 4000, 64, 4, 512, 128
LANGUAGES = {"Python": (".py",), "Cython": (".pyx",), "C++": (".h", ".hpp")}
ARMS = ["TF-IDF", "mixed batches", "pure batches", "queues", "queues, soft masking"]
WORD = re.compile(r"(?P<literal>\"[^\"]*\"|'[^']*'|\b\d[\w.]*)|(?P<name>\w+)|(?P<sign>[^\w\s])")
KEYWORDS = """
    auto bool break case cdef char class const continue cpdef def double elif else except
    false for float from if import in inline int is lambda long namespace not or and pass
    private public raise return self static std struct template this throw true try typename
    using virtual void while with yield None True False
    """


def documented(path, language):
    """Doc comments and functions of a file, as pairs of texts."""
    source = path.read_text(encoding="utf8", errors="ignore")
    if language == "Python":
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError):
            return
        lines = source.splitlines()
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                body = lines[node.body[0].end_lineno : node.end_lineno]
                yield doc, "\n".join([*lines[node.lineno - 1 : node.body[0].lineno - 1], *body])
    elif language == "Cython":
        for found in re.finditer(
            r'^( *)c?p?def [^\n(]*\([^)]*\)[^\n:]*:\s*r?"""([^"]*)"""', source, re.M
        ):
            rest = re.match(rf"(\n*({found[1]} .*)?$)*", source[found.end() :], re.M)
            yield found[2], found[0].partition('"""')[0] + rest[0]
    else:
        comment = r"((?:^ *///.*\n)+|^ */\*\*(?:[^*]|\*(?!/))*\*/\n)"
        for found in re.finditer(
            comment + r"[^/;{}#]{8,400}\([^;{}]*(?:;|\{.*\n(?:.+\n)*)", source, re.M
        ):
            doc = re.sub(r"^ *(///?!?|/?\*+/?)|\\\w+|@\w+", " ", found[1], flags=re.M)
            yield doc, found[0][len(found[1]) :]


class Pairs:
    """Texts, functions, their languages, and which are for the test; no text or function twice."""

    def __init__(self, folder):
        found, seen = [], set()
        for number, (language, endings) in enumerate(LANGUAGES.items()):
            paths = [path for ending in endings for path in Path(folder).rglob(f"*{ending}")]
            left = MOST
            for path in sorted(paths, key=lambda path: crc32(bytes(path.relative_to(folder)))):
                parts = path.relative_to(folder).parts
                package = parts[parts.index("include") + 1 if "include" in parts[:-1] else 0]
                is_test = crc32(f"{language} {package}".encode()) % 4 == 0
                for doc, code in documented(path, language) if left else ():
                    text, code = " ".join(doc.partition("\n\n")[0].split()), code[:1000]
                    if len(text.split()) >= 4 and len(code) >= 30 and not {text, code} & seen:
                        seen |= {text, code}
                        found.append((text, code, number, is_test))
                        left = max(left - 1, 0)
        self.texts, self.codes, languages, is_test = zip(*found, strict=True)
        self.languages = np.array(languages)
        self.train, self.test = np.flatnonzero(~np.array(is_test)), np.flatnonzero(is_test)


def by_type(code):
    """The words of a function by their type: literals, keywords, names, signs."""
    words = {"literal": [], "keyword": [], "name": [], "sign": []}
    for match in WORD.finditer(code):
        keyword = match.lastgroup == "name" and match[0] in KEYWORDS.split()
        words["keyword" if keyword else match.lastgroup].append(match[0])
    return [
        " ".join(re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", w) for w in part) for part in words.values()
    ]


class Streams:
    """Tokens of texts and of functions, whole or masked; a function is four texts, one a type."""

    def __init__(self, encoder, texts, codes):
        self.texts = encoder.tokenize(texts)
        self.codes = encoder.tokenize([part for code in codes for part in by_type(code)])

    def take(self, name, rows, rng=None):
        """Of these rows; with a generator masked, at random or, of code, by a type."""
        hidden = None if rng is None else rng.integers(5)
        if name == "text":
            tokens = self.texts.take(rows)
        else:
            kept = [part for part in range(4) if part != hidden]
            tokens = self.codes.take((rows[:, None] * 4 + kept).ravel())
            tokens = Tokens(tokens.ids, tokens.offsets[:: len(kept)])
        if rng is not None and (name == "text" or hidden == 4):
            keep = rng.random(len(tokens.ids)) >= 0.15
            before = np.append(0, np.cumsum(keep))
            tokens = Tokens(tokens.ids[keep], before[tokens.offsets])
        return tokens


@lru_cache(1)  # every arm of a seed starts from the same
def untrained(pairs, seed):
    texts = [part[row] for part in (pairs.texts, pairs.codes) for row in pairs.train]
    encoder = ngame.BagEncoder.fit(texts, dim=DIM, vocab_size=8000, seed=seed)
    return encoder, Streams(encoder, pairs.texts, pairs.codes)


def train(pairs, arm, seed):
    torch.manual_seed(seed)
    encoder, streams = untrained(pairs, seed)
    encoder, n_rows = copy.deepcopy(encoder), len(pairs.train)
    if arm == "mixed batches":
        batches = ngame.ClusterBatchSampler(
            n_rows, BATCH, cluster_size=1, drop_last=True, seed=seed
        )
    else:
        batches = ngame.GroupBatchSampler(pairs.languages[pairs.train], BATCH, alpha=0.7, seed=seed)
    loss = ContrastiveLoss(temperature=0.05)
    follower, queues = EmaEncoder(encoder, 0.99), {}
    terms = [("text", "code", False), ("code", "text", False)]
    if "masking" in arm:
        terms += [("text", "code", True), ("code", "text", True)]
    updates = Updates([encoder], EPOCHS * len(batches))
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for rows in batches:
            rows = pairs.train[rows]
            whole = {
                name: normalize(encoder(streams.take(name, rows)), dim=1)
                for name in ("text", "code")
            }
            total, pushed = 0.0, []
            for anchor, other, masked in terms:
                z = whole[other]
                if masked:
                    tokens = streams.take(other, rows, rng)
                    z = normalize(encoder(tokens), dim=1)
                queue = queues.setdefault((other, masked), NegativeQueue(QUEUE, DIM))
                offered = [queue.offer()] if "queues" in arm else []
                total = total + loss(
                    Candidates(rows, whole[anchor]), Candidates(rows, z), sources=offered
                )
                tokens = tokens if masked else streams.take(other, rows)
                pushed.append((queue, tokens))
            total.backward()
            updates.step()
            if "queues" in arm:
                follower.update(encoder)
                for queue, tokens in pushed:
                    queue.push(rows, normalize(follower(tokens), dim=1))
    return encoder


def vectors(encoder, streams, name, rows):
    return ngame.encode_rows(
        lambda some: encoder(streams.take(name, rows[some])), len(rows), model=encoder
    )


def run(pairs, arm, seed):
    if arm == "TF-IDF":
        names = [by_type(code)[2] for code in pairs.codes]
        tfidf, _ = Tfidf.fit([*pairs.texts, *names])
        x, z = (tfidf([part[row] for row in pairs.test]) for part in (pairs.texts, names))
    else:
        encoder, (_, streams) = train(pairs, arm, seed), untrained(pairs, seed)
        x, z = (vectors(encoder, streams, name, pairs.test) for name in ("text", "code"))
    scores = {}
    for number, language in enumerate(LANGUAGES):
        rows = np.flatnonzero(pairs.languages[pairs.test] == number)
        if len(rows) < 2:
            continue
        search = ngame.sparse_topk if sp.issparse(x) else ngame.topk
        ranked = search(x[rows], z[rows], min(1000, len(rows)))
        truth = sp.identity(len(rows), np.float32, "csr")
        scores[language] = ngame.metrics.evaluate(ranked, truth, ks=[1000])["MRR@1000"]
    return {**scores, "mean": float(np.mean(list(scores.values())))}


def main(folder, seeds=3, arms=ARMS):
    pairs = Pairs(folder)
    for number, language in enumerate(LANGUAGES):
        train, test = (
            (pairs.languages[rows] == number).sum() for rows in (pairs.train, pairs.test)
        )
        print(f"{language}: {train} pairs in training, {test} in the test")
    print(table(compare(arms, lambda arm, seed: run(pairs, arm, seed), seeds)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
