"""VisPruner's selection for one image in plain Python, written from its description and not from the package."""

import math


def vispruner_oracle(features, saliency, visual_token_num, important_ratio=0.5, dedup_step=8):
    """Return the kept indices, ascending. `features` is a list of N rows of floats, `saliency` a list of N floats.

    Every round measures its similarities anew. Python's sort keeps the order of ties, with reverse=True too.
    """
    budget = min(visual_token_num, len(features))
    important_num = int(budget * important_ratio)
    diverse_num = budget - important_num
    order = sorted(range(len(saliency)), key=lambda i: saliency[i], reverse=True)
    important, residual = order[:important_num], order[important_num:]
    if diverse_num == 0:
        return sorted(important)
    while True:
        drop = min(dedup_step, len(residual) - diverse_num, math.ceil(len(residual) / 2))
        if drop <= 0 or len(residual) < 2:
            return sorted(important + residual)
        a, b = residual[0::2], residual[1::2]
        duplication = {i: max(_cosine(features[i], features[j]) for j in b) for i in a}
        most_duplicated_first = sorted(a, key=lambda i: duplication[i], reverse=True)
        residual = most_duplicated_first[drop:] + b


def _cosine(x, y):
    norms = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return math.fsum(v * w for v, w in zip(x, y, strict=True)) / norms if norms else 0.0
