"""The command line, ``ngame COMMAND``; ``ngame --help`` lists the commands."""

import argparse
import errno
import io
import json
import os
import platform
import shlex
import sys
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import scipy.sparse as sp
from safetensors import SafetensorError

import ngame
from ngame import metrics
from ngame.arrays import as_threads, text_fault, widened
from ngame.config import PRESETS, SCORERS, sets_of
from ngame.data.dataset import Points, test_points
from ngame.data.formats import read_matrices
from ngame.data.predictions import (
    SUFFIXES,
    OtherTextsError,
    as_jsonl,
    best_first,
    read_predictions,
    write_predictions,
)
from ngame.data.self_pairs import without_self_pairs
from ngame.files import DamagedFileError, atomic_write, reading, removed_on_signals
from ngame.progress import Progress, say

# What the user can put right, in arguments or files.
_MISTAKES = (ValueError, TypeError, IndexError, SafetensorError)
_COUNTED = "; --self-pairs keep counts it"
_SHOWN = ("P@1", "P@3", "P@5", "N@5", "PSP@1", "PSP@5", "R@10", "R@100")
_OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how idle OpenMP threads wait."""
_TEXTS_AT_ONCE = 1 << 16
"""Texts that are encoded before their vectors are written."""
_PRINTED_AT_ONCE = 1 << 12
"""Texts that are predicted before their labels are printed."""
_WIDTH = 100
"""Columns that a table may take."""

_STATUS = """\
exit status:
  0    done
  1    an error of ngame's own, with a traceback
  2    wrong arguments or settings
  3    an input file that is missing, malformed, or does not fit the others
  4    the disk or the memory is full, or an output cannot be written
  5    another process of several has ended
  129  stopped by SIGHUP, as where an ssh connection ends
  130  stopped by Ctrl-C
  141  the reader of the output went away, as `head` does
  143  stopped by SIGTERM, as batch systems do
"""
_TRAIN_EXAMPLE = """\
example:
  ngame train DATA -o RUN --set encoder.dim=512 --set encoder_stage.cluster_size=8

`ngame config` lists every setting with its default and its meaning. Some that are not given are
chosen by the size of the data; RUN/config.toml holds those that were used.
"""


class _InputError(ValueError):
    """Something is wrong with an input file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (see `_STATUS`)."""
    if sys.stderr is None:  # closed: bars and warnings would fail
        sys.stderr = _nowhere()
    # A terminal's encoding may lack what is printed. PYTHONIOENCODING may ask for something else.
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):
        _set_output(errors="replace")
    options = _parser().parse_args(arguments)
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if getattr(options, "preset", None):
        options.set = [*PRESETS[options.preset], *options.set]
    _let_openmp_sleep()
    try:
        with removed_on_signals(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # PyTorch warns that its sparse format may change.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support")
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        say("ngame: stopped")
        return 130
    except SystemExit as stopped:
        say("ngame: stopped")
        return int(stopped.code or 0)
    except (*_MISTAKES, ImportError, OSError, MemoryError) as error:
        say(f"ngame: error: {_message(error)}")
        if isinstance(error, _InputError | DamagedFileError | FileNotFoundError):
            return 3
        if isinstance(error, ConnectionError):
            return 5
        usage = isinstance(error, FileExistsError | BlockingIOError)
        return 4 if isinstance(error, OSError | MemoryError) and not usage else 2
    return 0


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf8")


def _set_output(*, encoding: str | None = None, errors: str | None = None) -> None:
    """Set the encoding of standard output, or what becomes of characters that it lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # else something that takes any text
        sys.stdout.reconfigure(encoding=encoding, errors=errors)


def _let_openmp_sleep() -> None:
    """Let idle OpenMP threads of torch sleep instead of spin, unless the user has chosen.

    When other programs use the CPUs, spinning threads keep the working ones from running. OpenMP
    reads the environment once, when torch loads it.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _OPENMP_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"


@contextmanager
def _reading() -> Iterator[None]:
    """Turn errors within into errors of the input files."""
    try:
        yield
    except ConnectionError:  # to another process
        raise
    except (*_MISTAKES, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # of temporary files
        raise _InputError(_message(error)) from error


def _message(error: BaseException) -> str:
    """What went wrong, without the number that an error of the system has."""
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror[0].lower() + error.strerror[1:]
        return what if error.filename is None else f"{error.filename}: {what}"
    return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ngame",
        description=ngame.__doc__,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ngame {ngame.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, epilog: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    train = command(
        "train", _train, "Train on a data set and evaluate on its test points.", _TRAIN_EXAMPLE
    )
    train.add_argument(
        "data",
        metavar="DATA",
        help="folder of trn, tst and lbl files, or a .jsonl file of texts with labels",
    )
    train.add_argument(
        "-o", "--output", type=_folder, required=True, metavar="RUN", help="folder of the run"
    )
    train.add_argument("--config", metavar="FILE", help="TOML file of settings")
    _settings(train)
    train.add_argument(
        "--resume", action="store_true", help="continue the run in RUN, with its settings"
    )

    predict = command("predict", _predict, "Predict labels of texts.")
    predict.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="a text; may be given several times")
    source.add_argument(
        "--texts",
        metavar="FILE",
        help="one text a line, - for standard input, which is read to its end first; blank lines "
        "get no labels",
    )
    source.add_argument(
        "--data",
        metavar="DATA",
        help="the test points of a data set; of a .jsonl that is not the run's own data, all rows",
    )
    predict.add_argument(
        "-k",
        type=int,
        help="labels a text (default: 10; in a .npz, or with --threshold, as many as the run "
        "keeps, 100 by default)",
    )
    predict.add_argument(
        "--scorer",
        default="fused",
        choices=[*SCORERS, "fused"],
        help="who scores: labels' embeddings, their classifier vectors, the nearest training "
        "points, labels or training points by TF-IDF, or all of them fused (default: %(default)s)",
    )
    predict.add_argument(
        "--probabilities",
        action="store_true",
        help="say how likely each label is right, calibrated on held-out points, instead of the "
        "fused score, which only ranks the labels of one text",
    )
    predict.add_argument(
        "--threshold",
        type=_share,
        metavar="P",
        help="keep only labels with a probability of at least P; needs --probabilities",
    )
    predict.add_argument(
        "-o",
        "--output",
        type=_output,
        metavar="FILE",
        help="write a file instead of printing: .jsonl (a text a line, labels best first), .tsv "
        "(a label a line) or .npz (a CSR matrix); - writes JSON lines to standard output",
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "Evaluate predictions, or a run, on test points: P, N, R, PSP and PSN in percent.",
    )
    evaluate.add_argument(
        "predictions",
        metavar="RUN|FILE",
        help="folder of a run, or predictions of the test points: .jsonl, .tsv or .npz, as `ngame "
        "predict --data DATA -o FILE` writes them, a .npz of arrays ids and scores, or a .txt of "
        "sparse text",
    )
    evaluate.add_argument(
        "data",
        metavar="DATA",
        help="data set whose test points are the truth; for a run also a .jsonl of other points, "
        "all of which are scored, and for a file a folder of trn_X_Y.txt and tst_X_Y.txt alone",
    )
    evaluate.add_argument(
        "-k",
        type=_count,
        nargs="+",
        default=[1, 3, 5, 10, 100],
        metavar="K",
        help="cut-offs (default: 1 3 5 10 100)",
    )
    evaluate.add_argument(
        "--propensity",
        type=_positive,
        nargs=2,
        default=[0.55, 1.5],
        metavar=("A", "B"),
        help="of PSP and PSN (default: 0.55 1.5; usual are 0.6 2.6 for Amazon products and 0.5 0.4 "
        "for Wikipedia)",
    )
    evaluate.add_argument(
        "--self-pairs",
        choices=("drop", "keep"),
        help="where points are labels: leave each point's own label out, or treat it as any other "
        "(default: as the run was told to; drop for a file)",
    )

    encode = command("encode", _encode, "Encode texts with the encoder of a run.")
    encode.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    encode.add_argument(
        "texts",
        metavar="FILE",
        help="one text a line, - for standard input; the vector of a blank line is 0",
    )
    encode.add_argument(
        "-o",
        "--output",
        type=_ending_in(".npy"),
        required=True,
        metavar="FILE.npy",
        help="array [n, dim], written as it is made",
    )
    encode.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="(default: float32)"
    )

    export = command(
        "export",
        _export,
        "Write the label vectors of a run as NumPy files, for faiss, hnswlib or an index of yours.",
    )
    export.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    export.add_argument(
        "output",
        type=_folder,
        metavar="OUT",
        help="folder that gets labels.npy, classifier.npy and the texts, labels.jsonl",
    )
    export.add_argument(
        "--onnx", action="store_true", help="also encoder.onnx, with its tokenizer.json"
    )

    cluster = command("cluster", _cluster, "Cluster vectors into clusters of equal size.")
    cluster.add_argument("vectors", metavar="FILE.npy", help="float32 or float16 [n, d]")
    sizes = cluster.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--size", type=_count, help="rows a cluster")
    sizes.add_argument("--clusters", type=_count, help="number of clusters")
    cluster.add_argument("--seed", type=int, default=0, help="any integer (default: 0)")
    cluster.add_argument("--threads", type=int, default=0, help="0: the CPUs this process may use")
    cluster.add_argument(
        "--memory",
        type=_byte_count,
        metavar="BYTES",
        help="memory to take, such as 3500M or 12G; FILE.npy is clustered in parts where it does "
        "not fit, by way of temporary files as large as itself in TMPDIR",
    )
    cluster.add_argument(
        "-o",
        "--output",
        type=_ending_in(".npz"),
        required=True,
        metavar="FILE.npz",
        help="arrays `order` (row ids, cluster after cluster) and `offsets`; each of several "
        "processes of torchrun writes its part of the clusters, FILE-00000-of-00002.npz and so on",
    )

    report = command(
        "report", _report, "Say what happened in a run, or compare runs, in one HTML file."
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, finished or not")
    report.add_argument(
        "--data", metavar="DATA", help="the runs' data (default: where the first run read them)"
    )
    report.add_argument(
        "-o",
        "--output",
        metavar="FILE.html",
        help="(default: report.html in the folder of RUN, comparison.html for several)",
    )

    command("config", _config, "List every setting with its default and meaning, as TOML.")

    demo = command("demo", _demo, "Train on the docstrings of numpy and scipy: no download.")
    demo.add_argument(
        "-o",
        "--output",
        type=_folder,
        default="ngame-demo",
        metavar="RUN",
        help="(default: %(default)s)",
    )
    _settings(demo)

    command("info", _info, "Say what this installation is and can use.")
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting, such as encoder.dim=512; may be given several times",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings for better scores in more time: quality is "
        f"{' '.join(PRESETS['quality'])}; --set comes after them",
    )


def _train(options: argparse.Namespace) -> None:
    from ngame.config import Config
    from ngame.ranks import started
    from ngame.training.run import check_folder

    begun = Path(options.output) / "config.toml"
    resuming = options.resume and begun.exists()
    # Settings and the folder come before the data, which can take long: mistakes show at once.
    if resuming:  # with its own settings; those given, if any, must be the same
        given = sets_of(options.config) if options.config else []
        config = Config.load(begun, [*given, *options.set], whole=True)
    else:
        config = Config.load(options.config, options.set)
    with started() as ranks:
        if ranks.rank > 0:  # rank 0 speaks for all; errors of any rank still show
            sys.stdout = _nowhere()
            warnings.simplefilter("ignore")
        else:
            check_folder(Path(options.output), options.resume)
        dataset = _dataset(options.data)
        print(dataset, flush=True)
        if not resuming:
            points, labels = dataset.train_labels.shape
            config = Config.load(options.config, options.set, points=points, labels=labels)
        dataset = without_self_pairs(dataset, config.self_pairs)
        if options.resume and not begun.exists() and ranks.rank == 0:
            say(f"ngame: {options.output} holds no run yet: training begins anew")
        again = "ngame", "train", options.data, "-o", options.output, "--resume"
        with _naming_resume(options.output, *again):
            model, seconds = _timed(
                ngame.train, dataset, config, folder=options.output, resume=options.resume
            )
        if ranks.rank > 0:
            return
    print(f"trained in {seconds:.0f} s, the run is in {options.output}")
    if model.metrics:
        _print_table(model.metrics)


@contextmanager
def _naming_resume(folder: str, *command: str) -> Iterator[None]:
    """If training is stopped, or fails for want of space or memory, say how it goes on.

    Not where the folder holds no run yet: a resumed one would have the default settings.
    """
    try:
        yield
    except (
        FileExistsError,
        BlockingIOError,
        FileNotFoundError,
        NotADirectoryError,
        ConnectionError,
    ):
        raise  # nothing has begun, or another process speaks
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError):
        if (Path(folder) / "config.toml").exists():
            say(f"ngame: to go on: {shlex.join(command)}")
        raise


def _predict(options: argparse.Namespace) -> None:
    if options.threshold is not None and not options.probabilities:
        raise ValueError("--threshold is a probability: it needs --probabilities")
    model = _model(options.run_folder)
    drop = None
    if options.data:
        from ngame.training.unseen import unseen_points

        with _reading():
            points = unseen_points(options.data, model, Path(options.run_folder))
        texts, drop = points.texts, points.predictable(len(model.label_texts))
    elif options.texts:
        texts = _read_lines(options.texts)
    else:
        texts = options.text
        if not all(text.strip() for text in texts):
            raise ValueError("--text is empty")
        for text in texts:
            if text_fault(text):  # Python reads arguments so that each byte can be told
                raise ValueError(f"--text {text!a} is not UTF-8")
    if options.output not in (None, "-"):
        found = _labels_of(texts, drop, model, options)
        write_predictions(options.output, texts, found, model.label_texts)
        print(f"{found.shape[0]} rows, {found.nnz} predictions: {options.output}")
        return
    if options.output == "-":
        _set_output(encoding="utf8")
    for start in _blocks("predicting", len(texts), _PRINTED_AT_ONCE):  # the first show at once
        part = texts[start : start + _PRINTED_AT_ONCE]
        if drop is not None:
            here = (drop[:, 0] >= start) & (drop[:, 0] < start + len(part))
        found = _labels_of(part, None if drop is None else drop[here] - [start, 0], model, options)
        if options.output is None:
            _print_predictions(model, part, found)
        else:
            sys.stdout.writelines(as_jsonl(part, found, model.label_texts))


def _labels_of(
    texts: Sequence[str], drop: Any, model: Any, options: argparse.Namespace
) -> sp.csr_matrix:
    """Predictions of texts; blank lines of a file get none."""
    k = options.k
    if k is None and options.threshold is None and not (options.output or "").endswith(".npz"):
        k = 10
    rows = [row for row, text in enumerate(texts) if text or options.data]
    found = model.predict(
        [texts[row] for row in rows],
        k,
        scorer=options.scorer,
        drop=drop,
        probabilities=options.probabilities,
        threshold=options.threshold,
    )
    if len(rows) == len(texts):
        return found
    counts = np.zeros(len(texts), np.int64)
    counts[rows] = np.diff(found.indptr)
    offsets = np.append(0, np.cumsum(counts))
    return sp.csr_matrix((found.data, found.indices, offsets), (len(texts), found.shape[1]))


def _blocks(what: str, count: int, size: int) -> Iterator[int]:
    """Starts of blocks, with progress; on a terminal the labels that are printed show it."""
    starts = range(0, count, size)
    if len(starts) < 2 or (what == "predicting" and sys.stdout.isatty()):
        return iter(starts)
    return Progress(what, len(starts), "block").over(starts)


def _evaluate(options: argparse.Namespace) -> None:
    path = Path(options.predictions)
    if path.is_dir():
        from ngame.training.unseen import unseen_points

        model = _model(path)
        with _reading():
            points = unseen_points(options.data, model, path, options.self_pairs, _COUNTED)
        drop = points.predictable(len(model.label_texts))
        scores = model.scores(points.texts, max(options.k), drop=drop)
        scored = metrics.evaluate_each(
            {name: widened(found, points.truth.shape[1]) for name, found in scores.items()},
            points.truth,
            model.point_labels,
            ks=options.k,
            propensity=options.propensity,
            drop=points.drop,
            threads=model.threads,
        )
        _print_table(scored, every=True)
        return
    with _reading():
        matrices = read_matrices(options.data)
        label_texts: Sequence[str | None]
        if matrices is None:
            data = _dataset(options.data)
            dataset = without_self_pairs(data, options.self_pairs or "drop", _COUNTED)
            points, label_texts = test_points(dataset), dataset.label_texts
            labelled, drop = dataset.train_labels, dataset.drop_train
        else:
            labelled, truth, drop, drop_test = matrices
            points = Points([None] * truth.shape[0], truth, drop_test)
            label_texts = [None] * truth.shape[1]
        try:
            found = read_predictions(path, points.texts, label_texts)
        except OtherTextsError as error:
            if matrices is not None or Path(options.data).is_dir():
                raise
            raise OtherTextsError(
                f"{error}; the {len(points.texts)} test points of {options.data} are a part of its "
                "rows: `ngame evaluate RUN` scores a run on all rows that it was not trained on"
            ) from error
        # As training does: of points that have a label left, the only ones that it keeps.
        if drop is not None:
            labelled = ngame.drop_pairs(labelled, drop)
        labelled = labelled[np.diff(labelled.indptr) > 0]
        scored = metrics.evaluate_each(
            {path.name: found},
            points.truth,
            labelled,
            ks=options.k,
            propensity=options.propensity,
            drop=points.drop,
        )
    most = int(np.diff(found.indptr).max())
    beyond = [str(k) for k in sorted({*options.k}) if min(k, found.shape[1]) > most]
    if beyond:
        warnings.warn(
            f"no row of {path.name} has more than {most} predictions: scores at "
            f"{', '.join(beyond)} count the missing ones as wrong",
            stacklevel=2,
        )
    _print_table(scored, every=True)


def _encode(options: argparse.Namespace) -> None:
    from ngame.encoders.vectors import to_numpy

    model = _model(options.run_folder)
    texts = _read_lines(options.texts)
    shape, dtype = (len(texts), model.label_vectors.shape[1]), np.dtype(options.dtype)
    about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with atomic_write(options.output) as aside, open(aside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for begin in _blocks("encoding", len(texts), _TEXTS_AT_ONCE):
            part = texts[begin : begin + _TEXTS_AT_ONCE]
            rows = [row for row, text in enumerate(part) if text]
            vectors = np.zeros((len(part), shape[1]), dtype)
            if rows:
                vectors[rows] = to_numpy(model.encode([part[row] for row in rows]))
            file.write(vectors.tobytes())  # `tofile` takes a signal's exception for its own
    print(f"{shape[0]} vectors of width {shape[1]}: {options.output}")


def _export(options: argparse.Namespace) -> None:
    model = _model(options.run_folder)
    model.export(options.output)
    if options.onnx:
        from ngame.adapters import onnx

        onnx.export(model.encoder, options.output)
    labels, dim = model.label_vectors.shape
    print(f"{labels} labels, vectors of width {dim}: {options.output}")


def _cluster(options: argparse.Namespace) -> None:
    threads = as_threads(options.threads)
    with _reading():
        vectors = _load(
            Path(options.vectors),
            partial(np.lib.format.open_memmap, mode="r"),
            b"\x93NUMPY",
            "a .npy file of vectors, such as `ngame encode` writes",
        )
        rank, ranks, group = 0, 1, None
        with ExitStack() as stack:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # else torch need not be loaded
                from ngame.ranks import started

                together = stack.enter_context(started())
                rank, ranks, group = together.rank, together.size, together.group
            share = slice(rank * len(vectors) // ranks, (rank + 1) * len(vectors) // ranks)
            clusters, seconds = _timed(
                ngame.balanced_clusters,
                vectors[share],
                size=options.size,
                n_clusters=options.clusters,
                seed=options.seed,
                threads=threads,
                memory=options.memory,
                group=group,
            )
    clusters.save(options.output, rank, ranks)
    if rank > 0:
        return
    sizes = np.diff(clusters.offsets)
    line = f"{len(vectors)} rows in {len(clusters)} clusters of {sizes.min()} to {sizes.max()}"
    if options.memory is None:  # what follows reads rows one by one
        line += f", coherence {clusters.coherence(vectors):.4f}"
        line += f", NN10 {clusters.neighbour_share(vectors):.4f}"
    print(f"{line}, {seconds:.2f} s: {options.output}")


def _demo(options: argparse.Namespace) -> None:
    from ngame.config import Config
    from ngame.demo.see_also import see_also_dataset

    print("The task: from the docstring of a numpy or scipy function to its See Also section.")
    dataset = see_also_dataset()
    print(dataset, flush=True)
    points, labels = dataset.train_labels.shape
    config = Config.load(None, options.set, points=points, labels=labels)
    # A demo that was stopped resumes when it is called again.
    with _naming_resume(options.output, "ngame", "demo", "-o", options.output):
        model, seconds = _timed(ngame.train, dataset, config, folder=options.output, resume=True)
    print(f"trained in {seconds:.0f} s, the run is in {options.output}\n")
    texts, truth, drop = test_points(dataset)
    _print_table(model.metrics)
    print()
    chosen = [row * len(texts) // 3 for row in range(3)]
    found = model.predict(texts, 5, drop=drop)[chosen]
    _print_predictions(model, [texts[row] for row in chosen], found, truth[chosen])
    print(f'Ask it: ngame predict {options.output} --text "solve a linear system"')


def _report(options: argparse.Namespace) -> None:
    from ngame.report.page import write_report

    file = "report.html" if len(options.runs) == 1 else "comparison.html"
    output = options.output or str(Path(options.runs[0]) / file)
    dataset = _data_of(Path(options.runs[0])) if options.data is None else _dataset(options.data)
    try:
        write_report(options.runs, output, dataset)
    except (*_MISTAKES, FileNotFoundError) as error:
        raise _InputError(str(error)) from error
    print(f"report: {output}")


def _data_of(run: Path) -> ngame.Dataset | None:
    """The data of a run, if they are still where it read them, or are those of the demo."""
    from ngame.report.measures import read_about

    with _reading():
        data = read_about(run).get("data", {"name": "", "path": ""})
    if data["path"] and Path(data["path"]).exists():
        return _dataset(data["path"])
    from ngame.demo import see_also

    return see_also.see_also_dataset() if data["name"] == see_also.NAME else None


def _config(_: argparse.Namespace) -> None:
    from ngame.config import described

    print(
        "# The settings of `ngame train` with their defaults. Edit a copy and pass it as --config\n"
        "# FILE, or pass a single setting as --set encoder.dim=512. Some that are not given are\n"
        "# chosen by the size of the data instead: epochs, batch size, dropout, losses.\n"
    )
    print(described(), end="")


def _info(_: argparse.Namespace) -> None:
    from ngame import _core

    rows = {
        "ngame": ngame.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "SIMD": f"{_core.simd_level()} (of {', '.join(_core.simd_levels())})",
        "threads": str(_core.usable_cpus()),
    }
    try:
        import torch
    except ImportError:
        rows["torch"] = "not installed"
    else:
        rows["torch"] = torch.__version__
        settings = [f"{k}={os.environ[k]}" for k in _OPENMP_SETTINGS if k in os.environ]
        rows["OpenMP"] = ", ".join(settings) or "idle threads spin"
        rows["CUDA"] = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else "no device that torch sees"
        )
        from ngame import cuda

        rows["GPU core"] = cuda.describe()
    for name, value in rows.items():
        print(f"{name:8} {value}")


def _folder(path: str) -> str:
    if not path.strip():  # such as "$RUN" where RUN is not set; it would be the current folder
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return path


def _output(path: str) -> str:
    if path == "-" and sys.stdout is None:
        raise argparse.ArgumentTypeError("standard output is closed")
    if path != "-" and not path.endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    return path


def _ending_in(ending: str) -> Callable[[str], str]:
    def check(path: str) -> str:
        if not path.endswith(ending):
            raise argparse.ArgumentTypeError(f"{path} does not end in {ending}")
        return path

    return check


def _byte_count(text: str) -> int:
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    digits, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "")
    try:
        count = round(float(digits) * units.get(unit, 1))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes, such as 3500M")
    return count


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number: {text!r}") from None


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def _model(folder: Any) -> Any:
    with _reading():
        return ngame.Model.load(folder, device="auto")


def _dataset(path: str) -> ngame.Dataset:
    with _reading():
        return ngame.load_dataset(path)


def _read_lines(path: str) -> list[str]:
    """The lines of a file, or of standard input for "-", without the space around them.

    Refuses JSON lines and tables: each line would be read as a text, braces and all.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise _InputError(
            f"{path} is a table, expected plain text, one a line: write its column of texts to a "
            f".txt file (docs/formats.md says how), or give every line as it is, by - < {path}"
        )
    with _reading():
        if path == "-" and sys.stdin is None:
            raise OSError("standard input is closed")
        file = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    *lines, last = file.removeprefix(BOM_UTF8).split(b"\n")
    if last:
        lines.append(last)
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf8").strip())
        except UnicodeDecodeError as error:
            raise _InputError(f"{path}:{number}: not UTF-8 at byte {error.start + 1}") from None
    first = next(filter(None, texts), "")
    if first.startswith("{") and first.endswith("}"):
        fields = None
        with suppress(ValueError, RecursionError):
            fields = ", ".join(json.loads(first))
        if fields is not None:
            raise _InputError(
                f"{path} has JSON lines (of {fields}), expected plain text, one a line; `predict "
                "--data` takes the test points of a data set"
            )
    return texts


def _load(path: Path, reader: Callable[[Path], Any], magic: bytes, expected: str) -> Any:
    """Read a file of NumPy arrays with `reader`; it begins with `magic`."""
    with open(path, "rb") as file:
        if file.read(len(magic)) != magic:
            raise _InputError(f"{path} cannot be read: it is not {expected}")
    with reading(path, f"cannot be read as {expected}"):
        return reader(path)


def _print_table(rows: Mapping[str, Mapping[str, float]], *, every: bool = False) -> None:
    """Print metrics in percent, a scorer a row, in as many tables as the width needs."""
    first = next(iter(rows.values()))
    names = list(first) if every else [name for name in _SHOWN if name in first]
    width = min(36, max(len(name) for name in rows))
    fitting = (_WIDTH - width) // 8
    family = sum(name.startswith("P@") for name in names)
    if family <= fitting:  # a table holds whole families: P at every k, N at every k
        fitting -= fitting % family
    for start in range(0, len(names), fitting):
        columns = names[start : start + fitting]
        if start:
            print()
        print(" " * width, *(f"{name:>7}" for name in columns))
        for name, values in rows.items():
            scores = (f"{100 * values[column]:7.2f}" for column in columns)
            print(f"{_short(name, width):{width}}", *scores)


def _print_predictions(
    model: Any, texts: Sequence[str], found: sp.csr_matrix, truth: sp.csr_matrix | None = None
) -> None:
    """Print the labels of each text, best first; correct ones get a star if `truth` is given."""
    for row, text in enumerate(texts):
        print(_short(text))
        right = set() if truth is None else set(truth[row].indices)
        for label, score in best_first(found[row]):
            mark = "*" if label in right else " "
            print(f"  {mark} {score:7.3f}  {_short(model.label_texts[label])}")
        print()


def _short(text: str, length: int = 96) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _timed(function: Any, *arguments: Any, **named: Any) -> tuple[Any, float]:
    from time import perf_counter

    start = perf_counter()
    return function(*arguments, **named), perf_counter() - start


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"ngame: warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
