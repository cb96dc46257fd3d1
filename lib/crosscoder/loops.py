"""The compiled loops of ``sparse``, for a CPU, and the threads that they take."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
import torch

THREAD_WORK = 1 << 20  # multiplications that are worth a thread

_loops = numba.njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
_loop = numba.njit(cache=True, nogil=True)


@cache
def _start_threads() -> None:
    """Start numba's threads. That sets OpenMP's number of threads to all cores, which is torch's number too:
    it is put back, or a run told to take one thread would take them all, and end with other bits."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(threads)


@contextmanager
def threads(work: int) -> Iterator[None]:
    """At most torch's threads in the compiled loops, and none for less than THREAD_WORK multiplications."""
    _start_threads()
    most = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(max(1, min(torch.get_num_threads(), most, work // THREAD_WORK)))
    try:
        yield
    finally:
        numba.set_num_threads(most)


@_loops
def screen_loop(bits, shift, offset, per_unit, low, found, values, counts):
    F, room = bits.shape[1], found.shape[1]
    whole = F // 16 * 16
    for b in numba.prange(bits.shape[0]):
        row, places, kept = bits[b], found[b], values[b]
        raw, v = np.empty(F, dtype=np.int32), np.empty(F, dtype=np.float32)
        f = raw.view(np.float32)
        for i in range(F):
            raw[i] = np.int32(row[i]) << shift
        for i in range(F):
            f[i] += offset[i]
            v[i] = f[i] * per_unit[i]
        least, n = max(low[b], np.float32(1e-30)), 0
        for start in range(0, whole, 16):  # most stretches hold nothing: they are passed over at a glance
            highest = v[start]
            for i in range(16):
                highest = max(highest, v[start + i])
            if highest >= least:
                for i in range(start, start + 16):
                    if v[i] >= least:
                        if n < room:
                            places[n], kept[n] = i, f[i]
                        n += 1
        for i in range(whole, F):
            if v[i] >= least:
                if n < room:
                    places[n], kept[n] = i, f[i]
                n += 1
        counts[b] = n


@_loop
def flatten_loop(counts, found, values, indptr, features, flat_values):
    for b in range(len(counts)):
        start, n = indptr[b], counts[b]
        indptr[b + 1] = start + n
        features[start : start + n] = found[b, :n]
        flat_values[start : start + n] = values[b, :n]


@_loop
def where_loop(kept, indptr, features, values, new_indptr, new_features, new_values):
    n = 0
    new_indptr[0] = 0
    for b in range(len(indptr) - 1):
        for j in range(indptr[b], indptr[b + 1]):
            if kept[j]:
                new_features[n], new_values[n] = features[j], values[j]
                n += 1
        new_indptr[b + 1] = n


@_loops
def row_floors_loop(bits, shift, offset, per_unit, k, floors):
    F = bits.shape[1]
    for b in numba.prange(bits.shape[0]):
        row, raw = bits[b], np.empty(F, dtype=np.int32)
        v, high = raw.view(np.float32), np.float32(0)
        for i in range(F):
            raw[i] = np.int32(row[i]) << shift
        for i in range(F):
            v[i] = (v[i] + offset[i]) * per_unit[i]
        for i in range(F):
            high = max(high, v[i])
        low = np.float32(0)  # at least k reach low, or low is 0; fewer than k reach high
        for _ in range(40):
            middle = np.float32(0.5) * (low + high)
            count = 0
            for i in range(F):
                count += v[i] >= middle
            if count >= k:
                low = middle
                if count <= k + k // 4:
                    break
            else:
                high = middle
        floors[b] = low


@_loops
def sums_loop(indptr, features, values, W, out):
    for b in numba.prange(out.shape[0]):
        total, j, end = out[b], indptr[b], indptr[b + 1]
        total[:] = 0
        while j + 3 < end:  # four rows in one pass over the sum
            f0, f1, f2, f3 = values[j], values[j + 1], values[j + 2], values[j + 3]
            w0, w1, w2, w3 = W[features[j]], W[features[j + 1]], W[features[j + 2]], W[features[j + 3]]
            for d in range(len(total)):
                total[d] += f0 * w0[d] + f1 * w1[d] + f2 * w2[d] + f3 * w3[d]
            j += 4
        while j < end:
            f, w = values[j], W[features[j]]
            for d in range(len(total)):
                total[d] += f * w[d]
            j += 1


@_loops
def dots_loop(indptr, features, x, W, out):
    for b in numba.prange(len(indptr) - 1):
        row = x[b]
        for j in range(indptr[b], indptr[b + 1]):
            w, total = W[features[j]], np.float32(0)
            for d in range(len(row)):
                total += row[d] * w[d]
            out[j] = total


@_loop
def by_feature_loop(indptr, features, columns, order, rows):
    """Counting sort of the entries by feature: where each feature's begin, their order and rows."""
    columns[:] = 0
    for i in features:
        columns[i + 1] += 1
    for i in range(len(columns) - 1):
        columns[i + 1] += columns[i]
    place = columns.copy()
    for b in range(len(indptr) - 1):
        for j in range(indptr[b], indptr[b + 1]):
            at = place[features[j]]
            order[at], rows[at] = j, b
            place[features[j]] = at + 1


@_loops
def weight_gradients_loop(columns, rows, f, at_code, x, at_sums, enc, bias, dec):
    for i in numba.prange(len(columns) - 1):
        e, d, b = enc[i], dec[i], np.float32(0)
        j, end = columns[i], columns[i + 1]
        e[:] = 0
        d[:] = 0
        while j + 1 < end:
            b += at_code[j] + at_code[j + 1]
            x0, x1, p0, p1 = x[rows[j]], x[rows[j + 1]], at_code[j], at_code[j + 1]
            for c in range(len(e)):
                e[c] += p0 * x0[c] + p1 * x1[c]
            g0, g1, f0, f1 = at_sums[rows[j]], at_sums[rows[j + 1]], f[j], f[j + 1]
            for c in range(len(d)):
                d[c] += f0 * g0[c] + f1 * g1[c]
            j += 2
        if j < end:
            b += at_code[j]
            x0, p0, g0, f0 = x[rows[j]], at_code[j], at_sums[rows[j]], f[j]
            for c in range(len(e)):
                e[c] += p0 * x0[c]
            for c in range(len(d)):
                d[c] += f0 * g0[c]
        bias[i] = b
