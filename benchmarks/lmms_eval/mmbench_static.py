"""How right MMBench's answers are by lmms-eval's own rules for finding the letter, without a judge."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator


def score(results: list[dict[str, Any]]) -> float:
    """Return the percentage of questions that are right under every order of their options."""
    return 100 * float(MMBench_Evaluator().eval_result(results, eval_method="static")[0])
