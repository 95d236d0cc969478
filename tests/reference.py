"""Every function of the core again, in slow and obvious NumPy: the specification.

Sparse matrices are taken apart into dense ones, sums are taken in float64, and rows are worked on
one by one. Speed is no concern here.
"""

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

from ngame import _core


def stored(matrix):
    """Where a sparse matrix has an entry, its value being of no matter."""
    coo = matrix.tocoo()
    mask = np.zeros(matrix.shape, bool)
    mask[coo.row, coo.col] = True
    return mask


def unit(x):
    """Rows scaled to length 1; zero rows stay zero."""
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def topk(queries, items, k, metric="cosine", drop=None):
    """Scores and ids of the best k items a query, best first, ties by lower id.

    A score is rounded once, to float32, and compared as such.
    """
    queries, items = np.asarray(queries, np.float64), np.asarray(items, np.float64)
    products = queries @ items.T
    if metric == "cosine":
        norms = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(items, axis=1))
        products = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    scores = products.astype(np.float32)
    best_scores = np.full((len(scores), k), -np.inf, np.float32)
    best_ids = np.full((len(scores), k), -1)
    for row, values in enumerate(scores):
        there = [i for i in range(len(values)) if drop is None or not drop[row, i]]
        best = sorted(there, key=lambda i: (-values[i], i))[:k]
        best_scores[row, : len(best)] = values[best]
        best_ids[row, : len(best)] = best
    return best_scores, best_ids


def sparse_topk(queries, items, k, drop=None):
    """Per row the k largest scores other than 0, ties by lower id.

    A score is rounded once, to float32, and compared as such.
    """
    queries, items = entries(queries), entries(items)
    rows = []
    for number, query in enumerate(queries):
        scores = {}
        for i, item in enumerate(items):
            if drop is not None and drop[number, i]:
                continue
            products = [query[c] * item[c] for c in sorted(query.keys() & item.keys())]
            score = float(np.float32(sum(products)))
            if score != 0:
                scores[i] = score
        rows.append({i: scores[i] for i in sorted(scores, key=lambda i: (-scores[i], i))[:k]})
    return rows


def hard_negatives(
    queries,
    items,
    known,
    first,
    stop,
    low=None,
    high=None,
    margin=None,
    relative=None,
    metric="dot",
):
    """What each query may take as a negative: (score, id) of what the bounds leave, best first."""
    if metric == "cosine":
        queries, items = unit(queries), unit(items)
    scores = np.asarray(queries, np.float64) @ np.asarray(items, np.float64).T
    allowed = []
    for values, positive in zip(scores, known, strict=True):
        ranked = sorted(np.flatnonzero(~positive), key=lambda i: (-values[i], i))[first:stop]
        if low is not None:
            ranked = [i for i in ranked if values[i] >= low]
        if high is not None:
            ranked = [i for i in ranked if values[i] <= high]
        for s in values[positive]:  # below every positive
            if margin is not None:
                ranked = [i for i in ranked if values[i] < s - margin]
            if relative is not None:
                ranked = [i for i in ranked if values[i] < s - relative * abs(s)]
        allowed.append([(values[i], i) for i in ranked])
    return allowed


def adam_rows(weight, mean, square, rows, gradient, first, second, rate, epsilon):
    """Adam on some rows of a table, in float32, in place."""
    first, second, rate, epsilon = np.float32([first, second, rate, epsilon])
    mean[rows] += (gradient - mean[rows]) * (1 - first)
    square[rows] += (gradient * gradient - square[rows]) * (1 - second)
    weight[rows] -= rate * (mean[rows] / (np.sqrt(square[rows]) + epsilon))


def linear_weights(x, own, others, cost):
    """The best weights of one label's classifier, by a general method; `ngame` uses the dual."""
    y = np.concatenate([x[own], x[np.setdiff1d(others, own)]])
    positive = np.arange(len(y)) < len(own)

    def loss(w):
        scores = y @ w
        excess = np.where(positive, np.minimum(scores - 1, 0), np.maximum(scores, 0))
        return 0.5 * w @ w + cost * excess @ excess, w + 2 * cost * y.T @ excess

    start = np.zeros(x.shape[1])
    return minimize(loss, start, jac=True, options={"gtol": 1e-9, "maxiter": 5000}).x


def in_batch_positives(labels, rows, columns):
    """The mask of the known positives of a batch, dense."""
    return stored(labels)[np.ix_(rows, columns)]


def label_pool(labels, rows):
    """The labels of a batch, and its positives among them, dense."""
    mask = stored(labels)[rows]
    pool = np.flatnonzero(mask.any(axis=0))
    return pool, mask[:, pool]


def groups_of(vectors, size):
    """Groups of so many vectors, the last may be smaller: balanced clusters."""
    offsets = np.append(np.arange(0, len(vectors), size), len(vectors))
    order = _core.balanced_clusters(vectors.astype(np.float32), offsets, 0, 5, 2, 1)
    return np.split(order, offsets[1:-1])


def middles_of(vectors, groups):
    """The direction of each group of unit vectors."""
    return unit(np.array([vectors[group].sum(axis=0) for group in groups]))


def listed(vectors, some, among, count):
    """For each of some vectors, itself and the count - 1 nearest of others, in the order of ids."""
    among = np.sort(among)
    lists = {}
    for one, products in zip(some, vectors[some] @ vectors[among].T, strict=True):
        near = among[np.lexsort([among, -products])]
        lists[one] = [one, *sorted(near[near != one][: count - 1])]
    return lists


def near_to_each(vectors, count, compared):
    """For each vector, itself and the count - 1 nearest to it, of many an estimate.

    Of more than `compared` vectors, groups of four are made, and a vector's list is sought in the
    groups nearest to its own: half of `compared` vectors, or two groups more than are listed.
    Near groups are found in the same way.
    """
    everyone = np.arange(len(vectors))
    if len(vectors) <= compared:
        return listed(vectors, everyone, everyone, count)
    groups = groups_of(vectors, 4)
    searched = min(max(compared // 2, count + 8) // 4, len(groups))
    near = near_to_each(middles_of(vectors, groups), searched, compared)
    return searched_lists(vectors, groups, near, count)


def searched_lists(vectors, groups, near, count):
    """The lists of vectors, sought among the members of groups near to their own."""
    lists = {}
    for number, group in enumerate(groups):
        among = np.concatenate([groups[one] for one in near[number]])
        lists |= listed(vectors, group, among, count)
    return lists


def near_clusters(means, rows, compared):
    """For each cluster, itself and the 63 whose means are nearest to its own, in order.

    They are sought among 32 for each row of a cluster, but 256 at least and 1,024 at most. Where
    there are more, clusters are divided into groups of 16, and the nearest groups searched.
    """
    count = min(64, len(means))
    searched = min(max(32 * rows // len(means), 256), 1024)
    if len(means) <= searched:
        return listed(means, np.arange(len(means)), np.arange(len(means)), count)
    groups = groups_of(means, 16)
    near = near_to_each(middles_of(means, groups), searched // 16, compared)
    return searched_lists(means, groups, near, count)


def refined(x, clusters, compared=4096):
    """The assignment after one round of refinement: a stable matching of rows and near clusters.

    A row lists the clusters near to its own, of which up to `compared` groups are compared. It
    scores them by its cosine to the mean, that of its own cluster without the row; a row moves for
    a gain of 3e-5 or more. It asks the best 8 from the best down, of equal ones its own first,
    then the lower id. A cluster keeps the best that ask, of equal ones the lower id. Rows refused
    by all 8, by cluster and id, take the places left in the order of the clusters. A round that
    does not raise the coherence is undone.
    """
    x = unit(x)
    home = clusters.assignment
    room = np.diff(clusters.offsets)
    sums = np.array([x[ids].sum(axis=0) for ids in clusters])
    means = unit(sums)
    asks = []  # of each row: (-score, cluster), the next to ask first
    lists = near_clusters(means, len(x), compared)
    for row, own in zip(x, home, strict=True):
        rest = unit([sums[own] - row])[0] if room[own] > 1 else np.zeros_like(row)
        scores = [rest @ row + 3e-5, *(means[lists[own][1:]] @ row)]
        scored = list(zip(scores, lists[own], strict=True))
        asks.append(sorted(scored, key=lambda pair: -pair[0])[:8])
    held = [[] for _ in room]
    free = list(range(len(x)))
    rest = []
    while free:
        row = free.pop()
        if not asks[row]:
            rest.append(row)
            continue
        score, cluster = asks[row].pop(0)
        held[cluster] = sorted([*held[cluster], (-score, row)])
        free.extend(refused for _, refused in held[cluster][room[cluster] :])
        held[cluster] = held[cluster][: room[cluster]]
    rest.sort(key=lambda row: (home[row], row))
    found = np.empty(len(x), np.int32)
    for cluster, rows in enumerate(held):
        found[[row for _, row in rows]] = cluster
        for _ in range(room[cluster] - len(rows)):
            found[rest.pop(0)] = cluster
    tighter = coherence(x, [found == c for c in range(len(room))]) > coherence(x, clusters)
    return found if tighter else home


def neighbour_share(x, clusters, k=10):
    """Mean over the rows of the share of their k nearest that lie in their own cluster."""
    x = unit(x)
    products = (x @ x.T).astype(np.float32)
    shares = []
    for row, values in enumerate(products):
        others = [i for i in range(len(x)) if i != row]
        near = sorted(others, key=lambda i: (-values[i], i))[:k]
        shares.append(np.mean(clusters.assignment[near] == clusters.assignment[row]))
    return np.mean(shares)


def cluster_shortlist(labels, clusters, limit=None):
    """Per row {label: how many of the row's cluster mates have it}, its own labels left out."""
    mask = stored(labels)
    result = [{} for _ in range(len(mask))]
    for cluster in clusters:
        for row in cluster:
            counts = {
                label: int(mask[cluster, label].sum())
                for label in range(mask.shape[1])
                if not mask[row, label] and mask[cluster, label].any()
            }
            frequent = sorted(counts, key=lambda label: (-counts[label], label))[:limit]
            result[row] = {label: counts[label] for label in frequent}
    return result


def entries(matrix):
    """Per row {column: value} of a sparse matrix, stored zeros included."""
    matrix = sp.csr_matrix(matrix)
    rows = []
    for row in range(matrix.shape[0]):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        rows.append(
            dict(zip(matrix.indices[part].tolist(), matrix.data[part].tolist(), strict=True))
        )
    return rows


def keep_topk(matrix, k):
    """Per row the k largest entries, ties by lower column."""
    return [
        {column: row[column] for column in sorted(row, key=lambda c: (-row[c], c))[:k]}
        for row in entries(matrix)
    ]


def merge(matrices, how):
    """Per row the entries of all matrices, their sum or the largest of them."""
    combine = {"sum": sum, "max": max}[how]
    return [
        {
            column: combine([row[column] for row in rows if column in row])
            for column in set().union(*rows)
        }
        for rows in zip(*map(entries, matrices), strict=True)
    ]


def drop_pairs(matrix, pairs):
    """Per row the entries that are not among the pairs."""
    pairs = {(int(row), int(column)) for row, column in pairs}
    return [
        {column: value for column, value in row.items() if (index, column) not in pairs}
        for index, row in enumerate(entries(matrix))
    ]


def inverse_propensity(labels, a=0.55, b=1.5):
    """1 + C (n_l + b)^-a with C = (ln n - 1) (b + 1)^a."""
    dense = labels.toarray() != 0
    scale = (np.log(dense.shape[0]) - 1) * (b + 1) ** a
    return 1 + scale * (dense.sum(axis=0) + b) ** -a


def evaluate(predictions, truth, ks, weights=None, drop=()):
    """All metrics at k, PSP and PSN only with weights: the definitions of the docs."""
    drop = {(int(row), int(column)) for row, column in drop}
    truth = truth.toarray() != 0
    count = len(truth)
    gains = {}
    predictions = sp.csr_matrix(predictions)
    for row in range(count):
        part = slice(predictions.indptr[row], predictions.indptr[row + 1])
        scores, columns = predictions.data[part].tolist(), predictions.indices[part].tolist()
        ranked = [column for _, column in sorted(zip([-s for s in scores], columns, strict=True))]
        ranked = [column for column in ranked if (row, column) not in drop]
        # A column stored twice keeps both its ranks, and counts at the first of them.
        ranked = [c if c not in ranked[:rank] else None for rank, c in enumerate(ranked)]
        positives = [c for c in np.flatnonzero(truth[row]) if (row, c) not in drop]
        for k in ks:
            discount = [1 / np.log2(rank + 2) for rank in range(k)]
            hits = [rank for rank, column in enumerate(ranked[:k]) if column in positives]
            ideal = sum(discount[: len(positives)])
            row_gains = {
                "P": len(hits) / k,
                "N": sum(discount[rank] for rank in hits) / ideal if positives else 0,
                "R": len(hits) / len(positives) if positives else 0,
                "MRR": 1 / (hits[0] + 1) if hits else 0,
                "MAP": sum((found + 1) / (rank + 1) for found, rank in enumerate(hits))
                / (min(k, len(positives)) or 1),
                "HR": float(len(hits) > 0),
            }
            if weights is not None:
                best = sorted((weights[c] for c in positives), reverse=True)[:k]
                row_gains |= {
                    "PSP": sum(weights[ranked[rank]] for rank in hits) / k,
                    "best PSP": sum(best) / k,
                    "PSN": sum(weights[ranked[rank]] * discount[rank] for rank in hits)
                    / (ideal or 1),
                    "best PSN": sum(np.multiply(best, discount[: len(best)])) / (ideal or 1),
                }
            for name, gain in row_gains.items():
                gains[name, k] = gains.get((name, k), 0) + gain / count
    result = {}
    names = ["P", "N", "R", "MRR", "MAP", "HR"]
    for name in names if weights is None else [*names, "PSP", "PSN"]:
        for k in ks:
            best = gains[f"best {name}", k] if name in ("PSP", "PSN") else 1
            result[f"{name}@{k}"] = gains[name, k] / best if best else 0.0
    return result


def coherence(x, clusters):
    """Mean squared norm of the clusters' means of unit vectors."""
    x = unit(x)
    return float(np.mean([np.sum(x[ids].mean(axis=0) ** 2) for ids in clusters]))


def balanced_clusters(x, sizes, seed=0, rounds=20):
    """Recursive balanced 2-means on the unit sphere, started at two random rows.

    The specification of the sizes and a bar for the quality; the core finds other clusters, as
    good or better.
    """
    x = unit(x)
    rng = np.random.default_rng(seed)

    def split(ids, sizes):
        if len(sizes) == 1:
            return [np.sort(ids)]
        half = len(sizes) // 2
        left = sum(sizes[:half])
        centres = x[rng.choice(ids, 2, replace=False)]
        before = None
        for _ in range(rounds):
            ids = np.sort(ids)
            ids = ids[np.argsort(x[ids] @ (centres[1] - centres[0]), kind="stable")]
            if before is not None and set(before) == set(ids[:left]):
                break
            before = ids[:left]
            centres = unit([x[ids[:left]].sum(axis=0), x[ids[left:]].sum(axis=0)])
        return split(ids[:left], sizes[:half]) + split(ids[left:], sizes[half:])

    return split(np.arange(len(x)), list(sizes))


def reachable(counts, batch_size):
    """How many rows fit into batches of `batch_size` when row i has one key, of counts[key] rows.

    m full batches take at most m rows of a key each: possible where sum min(count, m) is m
    batches. A further batch, not full, takes one row of every key that is left.
    """
    full = 0
    while np.minimum(counts, full + 1).sum() >= (full + 1) * batch_size:
        full += 1
    return int(np.minimum(counts, full + 1).sum())


class Random:
    """The splitmix64 generator of the core."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = value = (self.state + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def draw(self, values, count):
        values = list(values)
        for slot in range(count):
            other = slot + (self.next() * (len(values) - slot) >> 64)
            values[slot], values[other] = values[other], values[slot]
        return values[:count]


def cluster_order(clusters, sequence, seed):
    """The clusters in the order of `sequence`, the rows of each shuffled."""
    random = Random(seed)
    return [row for c in sequence for row in random.draw(clusters[c], len(clusters[c]))]


def neighbour_order(neighbours, nearest, drawn, batch_size, random_rows, keys, seed):
    """Rows as Sample4Geo visits them, nothing following the last `random_rows` rows of a batch.

    keys[row] is the set of a row's keys.
    """
    random = Random(seed)
    seeds = random.draw(range(len(neighbours)), len(neighbours))
    order, batch = [], []

    def place(row):
        if row in order or any(keys[row] & keys[other] for other in batch):
            return
        order.append(row)
        batch.append(row)

    for _ in range(2):
        for seed_row in seeds:
            if seed_row in order:
                continue
            place(seed_row)
            if seed_row not in order:
                continue
            row = list(neighbours[seed_row])
            for one in row[:nearest]:
                if len(batch) < batch_size - random_rows and one >= 0:
                    place(one)
            if len(batch) < batch_size - random_rows:
                others = [one for one in row[nearest:] if one >= 0]
                for one in random.draw(others, min(drawn, len(others))):
                    if len(batch) < batch_size - random_rows:
                        place(one)
            if len(batch) == batch_size:
                batch.clear()
    return order + [row for row in seeds if row not in order]


def haversine(latitude, longitude):
    """Great-circle distances of all pairs, in radians."""
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    half = np.sin((latitude[:, None] - latitude) / 2) ** 2
    parallels = np.cos(latitude[:, None]) * np.cos(latitude)
    half += parallels * np.sin((longitude[:, None] - longitude) / 2) ** 2
    return 2 * np.arcsin(np.sqrt(np.minimum(half, 1)))


def check_csr(matrix, dtype, shape):
    assert isinstance(matrix, sp.csr_matrix)
    assert matrix.dtype == dtype
    assert matrix.shape == shape
    fresh = sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape)
    assert fresh.has_canonical_format
