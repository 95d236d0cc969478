"""A trained model: texts in, labels out, by encoder, classifier, nearest training points, fused."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.torch
import scipy.sparse as sp
import torch
from tqdm import tqdm

from ngame import metrics
from ngame.arrays import as_pairs
from ngame.config import Config, PredictionConfig
from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.encode import encode
from ngame.encoders.vectors import (
    Vectors,
    core_device,
    pair_products,
    to_device,
    to_numpy,
    torch_device,
    unit,
)
from ngame.files import atomic_folder, atomic_write, write_json, write_tensors
from ngame.prediction import fusion
from ngame.prediction.fusion import Features, Fusion
from ngame.prediction.hnsw import HnswIndex
from ngame.shortlist import drop_pairs, keep_topk, merge
from ngame.topk import ranked_csr, topk_arrays

Scorer = Literal["encoder", "classifier", "neighbours", "fused"]
Scores = dict[Scorer, sp.csr_matrix]

_QUERIES_AT_ONCE = 4096


@dataclass(eq=False)
class Model:
    """All that prediction needs. Make one with `ngame.train`, or from a run's folder with `load`.

    Its vectors are arrays, or, on a GPU with the GPU core, tensors there: what the searches find
    comes to the host, the vectors do not.

    Attributes
    ----------
    encoder : an `Encoder`
    label_texts : list of str, length L
    label_vectors : float32 [L, dim], unit length
    point_vectors : float16 [N, dim], unit length; the training points
    point_labels : csr_matrix [N, L], their labels
    classifier : float32 [L, dim], unit length, or None where that stage was left out
    fusions : the fusion of all scorers ("all"), and of all but the neighbours ("trained")
    config : how many labels are kept, and how the neighbours vote
    threads : of searches; 0 means the CPUs this process may use
    metrics : of each scorer on the data set's test points; empty where there were none
    """

    encoder: torch.nn.Module
    label_texts: list[str]
    label_vectors: Vectors
    point_vectors: Vectors
    point_labels: sp.csr_matrix
    classifier: Vectors | None
    fusions: dict[str, Fusion]
    config: PredictionConfig
    threads: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    _indexes: dict[Scorer, HnswIndex] = field(default_factory=dict, init=False, repr=False)

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """The scorers that this model has."""
        both: tuple[Scorer, ...] = () if self.classifier is None else ("classifier",)
        return ("encoder", *both, "neighbours", "fused")

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, float32 [n, dim], unit length, where the model's vectors are."""
        tokens: Tokens = self.encoder.tokenize(texts)  # type: ignore[operator]
        there = self.label_vectors
        device = there.device if isinstance(there, torch.Tensor) else None
        return unit(encode(self.encoder, tokens, device=device))

    def predict(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        scorer: Scorer = "fused",
        drop: Any = None,
        seen: bool = False,
    ) -> sp.csr_matrix:
        """Find the best labels of every text.

        Parameters
        ----------
        texts : sequence of str, length n
        k : labels a text; the config's if not given
        scorer : "encoder", "classifier", "neighbours" or "fused"
        drop : CSR matrix of shape [n, L] or integer array of shape [p, 2], optional
            (text, label) pairs to leave out.
        seen : the texts are training points: their own copies must not vote, so the neighbours
            are left out

        Returns
        -------
        float32 csr_matrix of shape [n, L]
            k entries a row; fewer where fewer labels are candidates.

        Raises
        ------
        ValueError
            There is no such scorer, or k is not within 1 .. L.
        """
        if scorer not in self.scorers or (seen and scorer == "neighbours"):
            known = [name for name in self.scorers if not (seen and name == "neighbours")]
            raise ValueError(f"scorer is {scorer!r}, expected one of {', '.join(known)}")
        return self.scores(self.encode(texts), k, drop=drop, seen=seen)[scorer]

    def scores(
        self,
        vectors: Vectors,
        k: int | None = None,
        *,
        drop: Any = None,
        seen: bool = False,
    ) -> Scores:
        """The same by every scorer, for texts that are encoded already (see `encode`)."""
        k = min(self.config.k, len(self.label_texts)) if k is None else k
        fused_by = self.fusions["trained" if seen else "all"]
        parts: dict[Scorer, list[sp.csr_matrix]] = {}
        chunks = _chunks(len(vectors), drop, len(self.label_texts))
        total = -(-len(vectors) // _QUERIES_AT_ONCE)
        bar = tqdm(chunks, "predicting", total, disable=None, delay=2, leave=False)
        for rows, left_out in bar:
            single = self.single_scores(vectors[rows], k, drop=left_out, seen=seen)
            fused, features = self.candidates(vectors[rows], single)
            fused.data = fused_by(features)
            single["fused"] = keep_topk(fused, k, threads=self.threads)
            for name, matrix in single.items():
                parts.setdefault(name, []).append(matrix)
        if not parts:
            empty = sp.csr_matrix((0, len(self.label_texts)), dtype=np.float32)
            return {name: empty for name in self.scorers if not (seen and name == "neighbours")}
        return {name: sp.vstack(part, format="csr") for name, part in parts.items()}

    def evaluate(
        self,
        predictions: Mapping[Scorer, sp.csr_matrix] | Mapping[str, sp.csr_matrix],
        truth: sp.csr_matrix,
        *,
        ks: Sequence[int] = (1, 3, 5, 10, 100),
        drop: Any = None,
    ) -> dict[str, dict[str, float]]:
        """P, N, R, PSP and PSN at `ks`, by scorer; propensities are the training points'."""
        weights = metrics.inverse_propensity(self.point_labels)
        return {
            name: metrics.evaluate(
                matrix, truth, ks=ks, inverse_propensity=weights, drop=drop, threads=self.threads
            )
            for name, matrix in predictions.items()
        }

    def candidates(self, vectors: Vectors, single: Scores) -> tuple[sp.csr_matrix, Features]:
        """All pairs that one of the scorers proposes, and what every scorer says of them."""
        pattern = merge([_ones(matrix) for matrix in single.values()], "max", threads=self.threads)
        rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
        pairs = rows, pattern.indices
        features = {"encoder": pair_products(vectors, self.label_vectors, *pairs)}
        if self.classifier is not None:
            features["classifier"] = pair_products(vectors, self.classifier, *pairs)
        if "neighbours" in single:
            # The pattern holds every entry of the votes: what is added to it comes out in order.
            votes = (pattern + single["neighbours"]).tocsr()
            votes.sort_indices()
            features["neighbours"] = votes.data - pattern.data
        return pattern, features

    def single_scores(
        self, vectors: Vectors, k: int, *, drop: Any = None, seen: bool = False
    ) -> Scores:
        """The k best labels by each scorer alone; see `predict` for the arguments."""
        labels = len(self.label_texts)
        drop = _drop_matrix(drop, len(vectors), labels)
        found: Scores = {
            name: ranked_csr(*self._nearest(name, vectors, k, drop), labels)
            for name in self._searched
            if name != "neighbours"
        }
        if not seen:
            votes = self._votes(vectors)
            if drop is not None:
                votes = drop_pairs(votes, drop, threads=self.threads)
            found["neighbours"] = keep_topk(votes, k, threads=self.threads)
        return found

    def _votes(self, vectors: Vectors) -> sp.csr_matrix:
        """Labels of the nearest training points, by a softmax of the similarities."""
        k = min(self.config.neighbours, len(self.point_vectors))
        scores, ids = self._nearest("neighbours", vectors, k)
        weights = np.exp((scores - scores[:, :1]) / self.config.vote_temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        votes = ranked_csr(weights, ids, len(self.point_vectors)) @ self.point_labels
        votes.sort_indices()
        return sp.csr_matrix(votes, dtype=np.float32)

    @property
    def _searched(self) -> dict[Scorer, Vectors]:
        """The vectors that each scorer searches."""
        searched: dict[Scorer, Vectors] = {"encoder": self.label_vectors}
        if self.classifier is not None:
            searched["classifier"] = self.classifier
        return {**searched, "neighbours": self.point_vectors}

    def _nearest(
        self,
        name: Scorer,
        queries: Vectors,
        k: int,
        drop: sp.csr_matrix | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Scores and ids, on the host, of the nearest of the vectors that a scorer searches."""
        if self.config.search == "hnsw":
            return self._index(name).search(to_numpy(queries), k, drop=drop)
        found = topk_arrays(
            queries, self._searched[name], k, metric="dot", drop=drop, threads=self.threads
        )
        return to_numpy(found[0]), to_numpy(found[1])

    def _index(self, name: Scorer) -> HnswIndex:
        """The index of the vectors that a scorer searches, made when it is first asked for."""
        vectors = self._searched[name]
        if name not in self._indexes or self._indexes[name].vectors is not vectors:
            self._indexes[name] = HnswIndex(to_numpy(vectors), threads=self.threads)
        return self._indexes[name]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write all that `load` reads into `folder`, file by file.

        A ``config.toml`` that is there already, as in the folder of a run, stays as it is.
        """
        folder = Path(folder)
        if not (folder / "config.toml").exists():
            Config(threads=self.threads, prediction=self.config).save(folder / "config.toml")
        with atomic_folder(folder / "encoder") as aside:
            self.encoder.save(aside)  # type: ignore[operator]
        with atomic_write(folder / "labels.jsonl") as aside:
            lines = (json.dumps({"title": text}, ensure_ascii=False) for text in self.label_texts)
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf8")
        vectors = {
            "labels": self.label_vectors,
            "points": self.point_vectors,
            "point_labels.indptr": self.point_labels.indptr.astype(np.int64),
            "point_labels.indices": self.point_labels.indices.astype(np.int32),
        }
        write_tensors(
            folder / "vectors.safetensors",
            {name: torch.as_tensor(array) for name, array in vectors.items()},
        )
        classifier = folder / "classifier.safetensors"
        if self.classifier is None:
            classifier.unlink(missing_ok=True)  # that of another model
        else:
            write_tensors(classifier, {"weight": torch.as_tensor(self.classifier)})
        if self.config.search == "hnsw":
            with atomic_folder(folder / "index") as aside:
                for name in self._searched:
                    self._index(name).save(aside / f"{name}.hnsw")
        elif (folder / "index").exists():
            shutil.rmtree(folder / "index")  # that of another model
        if self.metrics:
            write_json(folder / "metrics.json", self.metrics)
        # Last: a folder that holds it holds all the rest.
        fusion.save(self.fusions, folder / "fusion.json")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoder: torch.nn.Module | None = None,
        device: str = "cpu",
    ) -> "Model":
        """Read a run's folder.

        Parameters
        ----------
        folder : where `ngame.train` or ``ngame train`` left a finished run
        encoder : needed only for a run that was trained with a module of the user's own; it stays
            on its device
        device : where to encode and, with the GPU core, to search; "auto" takes a GPU if there is
            one

        Raises
        ------
        FileNotFoundError
            The folder holds no finished run.
        ValueError
            torch cannot use the device.
        """
        place = torch_device(device)
        folder = Path(folder)
        if not (folder / "fusion.json").exists():
            raise FileNotFoundError(f"{folder} holds no finished run: there is no fusion.json")
        config = Config.load(folder / "config.toml")
        with open(folder / "labels.jsonl", encoding="utf8") as lines:
            label_texts = [json.loads(line)["title"] for line in lines]
        core = core_device(place, config.prediction.search)
        vectors = safetensors.torch.load_file(folder / "vectors.safetensors")
        indptr, indices = (
            vectors[f"point_labels.{name}"].numpy() for name in ("indptr", "indices")
        )
        classifier = folder / "classifier.safetensors"
        measured = folder / "metrics.json"
        model = cls(
            encoder=load_encoder(folder / "encoder").to(place) if encoder is None else encoder,
            label_texts=label_texts,
            label_vectors=to_device(vectors["labels"], core),
            point_vectors=to_device(vectors["points"], core),
            point_labels=sp.csr_matrix(
                (np.ones(len(indices), np.float32), indices, indptr),
                shape=(len(vectors["points"]), len(label_texts)),
            ),
            classifier=to_device(safetensors.torch.load_file(classifier)["weight"], core)
            if classifier.exists()
            else None,
            fusions=fusion.load(folder / "fusion.json"),
            config=config.prediction,
            threads=config.threads,
            metrics=json.loads(measured.read_text(encoding="utf8")) if measured.exists() else {},
        )
        if model.config.search == "hnsw" and (folder / "index").exists():
            for name, items in model._searched.items():
                path = folder / "index" / f"{name}.hnsw"
                model._indexes[name] = HnswIndex.load(path, to_numpy(items), threads=model.threads)
        return model


def load_encoder(folder: Path) -> torch.nn.Module:
    """Read an encoder that this library saved, whichever kind it is."""
    if (folder / "modules.json").exists():
        from ngame.encoders.transformer import TransformerEncoder

        return TransformerEncoder.load(folder)
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return BagEncoder.load(folder)
    raise ValueError(f"{folder} holds no encoder of this library: pass yours as encoder=")


def _chunks(rows: int, drop: Any, labels: int) -> Iterator[tuple[slice, sp.csr_matrix | None]]:
    """Slices of the rows, each with its rows of `drop` as a CSR matrix or None."""
    matrix = _drop_matrix(drop, rows, labels)
    for start in range(0, rows, _QUERIES_AT_ONCE):
        part = slice(start, min(rows, start + _QUERIES_AT_ONCE))
        yield part, None if matrix is None else matrix[part]


def _drop_matrix(drop: Any, rows: int, labels: int) -> Any:
    """The pairs to leave out as a CSR matrix, however they were given."""
    return None if drop is None else as_pairs(drop, "drop", (rows, labels))


def _ones(matrix: sp.csr_matrix) -> sp.csr_matrix:
    ones = np.ones(matrix.nnz, np.float32)
    return sp.csr_matrix((ones, matrix.indices, matrix.indptr), shape=matrix.shape)
