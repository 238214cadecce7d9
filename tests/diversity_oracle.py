"""The selectors of diversity_selectors.py for one image in plain Python, written from their rules, slow and obvious.

Rows of floats in, ascending indices out, as in related_oracle.py.
"""

import math
from fractions import Fraction

import numpy as np
from related_oracle import _cosine


def mmr_oracle(projected, saliency, budget, importance_weight=0.5):
    tokens = range(len(projected))
    near = [[_cosine(x, y) for y in projected] for x in projected]
    lowest, span = min(saliency), max(saliency) - min(saliency)
    importance = [(value - lowest) / span if span else 0.0 for value in saliency]
    picked = [max(tokens, key=lambda i: importance[i])]
    while len(picked) < min(budget, len(projected)):
        rest = [i for i in tokens if i not in picked]
        picked.append(
            max(
                rest,
                key=lambda i: (
                    importance_weight * importance[i] - (1 - importance_weight) * max(near[i][j] for j in picked)
                ),
            )
        )
    return sorted(picked)


def adts_oracle(projected, saliency, budget):
    tokens = range(len(projected))
    far = [[(1 - _cosine(x, y)) * weight for y, weight in zip(projected, saliency, strict=True)] for x in projected]
    picked = [max(tokens, key=lambda j: min([far[i][j] for i in tokens if i != j], default=0))]
    while len(picked) < min(budget, len(projected)):
        rest = [j for j in tokens if j not in picked]
        picked.append(max(rest, key=lambda j: min(far[i][j] for i in picked)))
    return sorted(picked)


def holov_oracle(projected, saliency, budget, strips=16):
    strips = min(strips, len(saliency))
    runs, start = [], 0
    for number in range(strips):
        stop = start + len(saliency) // strips + (number < len(saliency) % strips)
        runs.append(list(range(start, stop)))
        start = stop
    scores = []
    for run in runs:
        attention = math.fsum(saliency[i] for i in run) / len(run)
        variances = []
        for i in run if len(run) > 1 else ():
            near = [0.0 if j == i else _cosine(projected[i], projected[j]) for j in run]
            mean = math.fsum(near) / (len(run) - 1)
            variances.append(math.fsum((c - mean) ** 2 for c in near) / (len(run) - 1))
        variance = math.fsum(variances) / len(run)
        scaled = [v * attention / (variance + 1e-6) for v in variances]
        scores.append(attention + 0.09 * math.fsum(scaled) / len(run))
    total = math.fsum(scores)
    shares = [score / total if total else 0.0 for score in scores]
    counts = [math.floor(share * budget) for share in shares]
    for number in sorted(range(strips), key=lambda n: -shares[n])[: budget - sum(counts)]:
        counts[number] += 1
    kept = []
    for run, count in zip(runs, counts, strict=True):
        kept += sorted(run, key=lambda i: -saliency[i])[:count]
    rest = sorted((i for i in range(len(saliency)) if i not in kept), key=lambda i: -saliency[i])
    return sorted((kept + rest)[:budget])


def prunesid_groups(features, count):
    """The component of the sigmoid of all features, tokens as columns, that each token loads on most."""
    values = 1 / (1 + np.exp(-np.array(features).T))
    _, strength, loadings = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    loadings = np.where(strength[:, None] ** 2 > 1e-12 * max(strength[0] ** 2, 1e-30), np.abs(loadings), 0)
    return loadings[:count].argmax(axis=0).tolist()


def prunesid_quotas(size, stays, budget, kept):
    groups = range(len(size))
    fewest = [min(1, s) for s in size]
    most = [min(5 * math.ceil(budget / 64), size[g], stays[g]) for g in groups]
    while sum(most) < budget:
        most = [min(most[g] + 1, size[g]) for g in groups]
    others, quota, before = kept - sum(fewest), [], 0
    for g in groups:
        until = round(Fraction(sum(stays[: g + 1]) * others, max(1, sum(stays))))
        quota.append(min(fewest[g] + until - before, most[g]))
        before = until
    for g in sorted(groups, key=lambda g: -stays[g]):
        quota[g] += min(most[g] - quota[g], kept - sum(quota))
    return quota


def prunesid_oracle(features, saliency, budget):
    tokens, budget = range(len(features)), min(budget, len(features))
    if budget == len(features):
        return list(tokens)
    count = max(1, min(budget // 4, len(features), len(features[0])))
    group = prunesid_groups(features, count)
    near = [[_cosine(x, y) for y in features] for x in features]
    pairs = [near[i][j] for i in tokens for j in tokens if i < j]
    limit = budget / 32 * math.fsum(pairs) / len(pairs)
    orders, stays = [], []
    for g in range(count):
        rest = sorted((i for i in tokens if group[i] == g), key=lambda i: -saliency[i])
        chosen = []
        for i in rest:
            if saliency[i] > 0 and all(near[i][j] <= limit for j in chosen):
                chosen.append(i)
        orders.append(chosen + [i for i in rest if i not in chosen])
        stays.append(len(chosen))
    quotas = prunesid_quotas([len(order) for order in orders], stays, budget, budget)
    return sorted(i for order, quota in zip(orders, quotas, strict=True) for i in order[:quota])


def otprune_oracle(projected, budget, strength=0.01):
    """Every determinant anew, of all that are kept with each one that might be next."""
    tokens = range(len(projected))
    values = np.array(projected)
    lengths = np.sqrt((values**2).sum(axis=0))
    values = values / np.where(lengths > 0, lengths, 1)
    products = values @ values.T
    matrix = np.eye(len(tokens)) + strength * products @ products.T
    picked = []
    while len(picked) < min(budget, len(tokens)):
        rest = [i for i in tokens if i not in picked]
        picked.append(max(rest, key=lambda i: np.linalg.slogdet(matrix[np.ix_([*picked, i], [*picked, i])])[1]))
    return sorted(picked)


def evs_oracle(frames, saliency, budget):
    """Of one video: rows of each frame, and of each frame its saliency; what each frame keeps."""
    kept = []
    for number, rows in enumerate(frames):
        score = saliency[number]
        if number:
            score = [1 - _cosine(x, y) for x, y in zip(rows, frames[number - 1], strict=True)]
        kept.append(sorted(sorted(range(len(rows)), key=lambda i, s=score: -s[i])[:budget]))
    return kept


def vidcom2_oracle(frames, budget):
    """Of one video, as above."""
    channels = range(len(frames[0][0]))
    rows = [row for frame in frames for row in frame]
    means = [math.fsum(row[c] for row in rows) / len(rows) for c in channels]
    spread = [math.fsum((row[c] - means[c]) ** 2 for row in rows) / len(rows) for c in channels]
    steady = sorted(channels, key=lambda c: spread[c])[: max(1, len(spread) // 2)]
    frames = [[_unit([row[c] for c in steady]) for row in frame] for frame in frames]
    of_video = _mean([row for frame in frames for row in frame])
    kept = []
    for frame in frames:
        of_frame = _mean(frame)
        like = [
            math.fsum(
                math.exp(-math.fsum((x - m) ** 2 for x, m in zip(row, mean, strict=True)) / (2 * 2**power))
                for mean in (of_video, of_frame)
                for power in range(-3, 2)
            )
            for row in frame
        ]
        kept.append(sorted(sorted(range(len(frame)), key=lambda i, s=like: s[i])[:budget]))
    return kept


def _unit(row):
    length = math.sqrt(math.fsum(x * x for x in row))
    return [x / length if length else 0.0 for x in row]


def _mean(rows):
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
