"""The selectors of related work for one image in plain Python, written from their rules and not from the package.

Rows of floats in, ascending indices out. Python's sort keeps the order of ties, with reverse=True too, and max() and
min() return the first of several.
"""

import math


def vtc_cls_oracle(layer_saliency, budget):
    score = [math.fsum(column) for column in zip(*layer_saliency, strict=True)]
    return _top(score, budget)


def gprune_oracle(projected, budget, similarity_threshold=0.5, temperature=0.03, iterations=5):
    tokens = range(len(projected))
    edges = []
    for i in tokens:
        cosines = {j: _cosine(projected[i], projected[j]) for j in tokens}
        edges.append({j: c for j, c in cosines.items() if j == i or c >= similarity_threshold})
    held = [_norm(row) for row in projected]
    for _ in range(iterations):
        passed = [0.0] * len(projected)
        for i in tokens:
            highest = max(edges[i].values())
            share = {j: math.exp((c - highest) / temperature) for j, c in edges[i].items()}
            for j, part in share.items():
                passed[j] += held[i] * part / math.fsum(share.values())
        held = passed
    return _top([held[j] / len(edges[j]) for j in tokens], budget)


def codebook_oracle(projected, codebook, budget):
    score = [max(_cosine(row, prototype) for prototype in codebook) for row in projected]
    return sorted(sorted(range(len(score)), key=lambda i: score[i])[:budget])


def divprune_oracle(projected, budget):
    tokens = range(len(projected))
    near = [[_cosine(x, y) for y in projected] for x in projected]
    picked = [min(tokens, key=lambda i: max([near[i][j] for j in tokens if j != i], default=0))]
    while len(picked) < min(budget, len(projected)):
        rest = [i for i in tokens if i not in picked]
        picked.append(min(rest, key=lambda i: max(near[i][j] for j in picked)))
    return sorted(picked)


def hiprune_oracle(middle, late, columns, budget, anchor_share=0.1):
    last, budget = len(middle) - 1, min(budget, len(middle))
    anchors = sorted(range(len(middle)), key=lambda i: middle[i], reverse=True)[: round(budget * anchor_share / 5)]
    around = {min(max(i + step, 0), last) for i in anchors for step in (-1, 1, -columns, columns)} - set(anchors)
    by_late = sorted(range(len(late)), key=lambda i: late[i], reverse=True)
    first = anchors + [i for i in by_late if i in around]
    return sorted((first + [i for i in by_late if i not in first])[:budget])


def hiprune_twice_oracle(middle, late, columns, budget, anchor_share=0.1):
    """As the authors' code for Qwen2.5-VL: a token may be picked for two reasons, so fewer than the budget stay."""
    last = len(middle) - 1
    anchors = sorted(range(len(middle)), key=lambda i: middle[i], reverse=True)[: round(budget * anchor_share / 5)]
    first = {min(max(i + step, 0), last) for i in anchors for step in (0, -1, 1, -columns, columns)}
    # Their attention is summed over the queries, so 1 on average, when they lower it by 1.
    lowered = [value * len(late) - (i in first) for i, value in enumerate(late)]
    return sorted(first.union(_top(lowered, budget - len(first))))


def scope_oracle(features, saliency, budget, exponent=1.0):
    tokens = range(len(features))
    near = [[_cosine(x, y) for y in features] for x in features]
    covered, picked = [0.0] * len(features), []
    while len(picked) < min(budget, len(features)):
        rest = [i for i in tokens if i not in picked]
        picked.append(
            max(rest, key=lambda i: saliency[i] ** exponent * sum(max(0.0, near[i][n] - covered[n]) for n in tokens))
        )
        covered = [max(covered[n], near[picked[-1]][n]) for n in tokens]
    return sorted(picked)


def _top(score, budget):
    return sorted(sorted(range(len(score)), key=lambda i: score[i], reverse=True)[:budget])


def _norm(row):
    return math.sqrt(math.fsum(v * v for v in row))


def _cosine(x, y):
    norms = _norm(x) * _norm(y)
    return math.fsum(v * w for v, w in zip(x, y, strict=True)) / norms if norms else 0.0
