"""Rows and columns of the paper's table: its benchmarks, as lmms-eval has them, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    tasks      of lmms-eval; the figure is the mean of theirs
    metric     the name that lmms-eval gives it
    scale      times what lmms-eval says, it is in the paper's unit
    questions  about how many there are, for the estimate
    differs    how that is not what the paper did
    """

    tasks: tuple[str, ...]
    metric: str
    scale: float
    questions: int
    differs: str

    def figure(self, cell: Mapping[str, Any]) -> float | None:
        """Return the figure of a stored cell; None where lmms-eval gave none."""
        figures = []
        for task in self.tasks:
            found = cell["tasks"][task]
            if self.metric not in found["metrics"]:
                return None
            # lmms-eval divides OCRBench's right answers by 1000, however many questions were asked.
            share = 1000 / found["questions"] if self.metric == "ocrbench_accuracy" else 1
            figures.append(share * found["metrics"][self.metric])
        return self.scale * sum(figures) / len(figures)


@dataclass(frozen=True)
class Row:
    """A repo: the stock model, or a method that keeps `budget` visual tokens of each picture or tile."""

    method: str | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        return "stock" if self.method is None else f"{self.method}-{self.budget}"


POPE = ("pope_adv", "pope_pop", "pope_random")
PAPER = {
    "VQAv2": Benchmark(("vqav2_val",), "exact_match", 100, 214_000, "validation set; the paper: test-dev, a server's"),
    "GQA": Benchmark(("gqa",), "exact_match", 100, 12_600, "the same questions; the answer must be the very string"),
    "VizWiz": Benchmark(("vizwiz_vqa_val",), "exact_match", 100, 4_300, "validation set; the paper: test, a server's"),
    "SQA-I": Benchmark(("scienceqa_img",), "exact_match", 100, 2_000, "the test split of the same name"),
    "TextVQA": Benchmark(
        ("textvqa_val_ocr",), "exact_match", 100, 5_000, "with OCR tokens, as in the paper; not lmms-eval's default"
    ),
    "POPE": Benchmark(
        POPE, "pope_f1_score", 100, 9_000, "mean F1 of the three sets, as in the paper; only a bare yes or no counts"
    ),
    "MME": Benchmark(
        ("mme",), "mme_perception_score", 1, 2_400, "perception; questions are pairs, so --limit must be even"
    ),
    "MMB": Benchmark(
        ("mmbench_en_dev_static",), "gpt_eval_score", 1, 4_300, "letters found by rules; the paper: MMBench's server"
    ),
    "MMB-CN": Benchmark(
        ("mmbench_cn_dev_static",), "gpt_eval_score", 1, 4_300, "letters found by rules; the paper: MMBench's server"
    ),
    "MM-Vet": Benchmark(
        ("mmvet_plain",),
        "gpt_eval_score",
        1,
        218,
        "your judge, without lmms-eval's 'step by step'; the paper: MM-Vet's server",
    ),
}
FURTHER = {
    "DocVQA": Benchmark(("docvqa_val",), "anls", 100, 5_300, "not in the paper: dense text, the hardest for pruning"),
    "ChartQA": Benchmark(("chartqa",), "relaxed_overall", 100, 2_500, "not in the paper"),
    "OCRBench": Benchmark(("ocrbench",), "ocrbench_accuracy", 100, 1_000, "not in the paper; percent"),
    "RefCOCO": Benchmark(
        ("refcoco_bbox_rec_val",),
        "refcoco_ACC@0.5",
        100,
        26_000,
        "not in the paper; boxes count from the picture's corner, not the padded square's",
    ),
    "CHAIR-S": Benchmark(("coco_cap_chair",), "coco_cap_chair_s", 1, 500, "not in the paper; less is better"),
    "CHAIR-I": Benchmark(("coco_cap_chair",), "coco_cap_chair_i", 1, 500, "not in the paper; less is better"),
}
BENCHMARKS = PAPER | FURTHER

# Figures of the benchmarks of PAPER, in its order, by budget; None is the stock model.
AUTHORS = "VisPruner's project page, table of LLaVA-1.5-7B (arXiv 2412.01818)"
PUBLISHED = {
    "llava-1.5-7b": {
        None: (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 31.1),
        128: (75.8, 58.2, 52.7, 69.1, 57.0, 84.6, 1461.4, 62.7, 57.3, 33.7),
        64: (72.7, 55.4, 53.3, 69.1, 55.8, 80.4, 1369.9, 61.3, 55.1, 32.3),
        32: (67.7, 52.2, 53.0, 69.2, 53.9, 72.7, 1271.0, 58.4, 52.7, 28.8),
    }
}
# Averages in percent of the stock model's, each over the benchmarks of its source, by method and budget per picture
# (of LLaVA-NeXT: per tile, of five). One method differs by 3 to 8 points between sources.
AVERAGES: dict[str, dict[str, dict[str, dict[int, float]]]] = {
    "llava-1.5-7b": {
        "FSR's table, github.com/ILOT-code/FSR, pics/llava_1.5_7b.png (9 benchmarks)": {
            "vispruner": {192: 98.2, 128: 96.7, 64: 93.5},
            "cdpruner": {192: 98.5, 128: 97.6, 64: 95.7},
            "divprune": {128: 96.2, 64: 93.3},
            "visionzip": {128: 96.2, 64: 92.7},
            "holov": {192: 96.5, 128: 96.1, 64: 92.9},
            "dart": {192: 97.8, 128: 95.2, 64: 90.8},
            "sparsevlm": {192: 95.2, 128: 95.6, 64: 86.0},
            "fastv": {192: 88.0, 128: 89.6, 64: 72.0},
        },
        "AgilePruner's table, github.com/cvsp-lab/AgilePruner, docs/images (9 benchmarks)": {
            "vispruner": {128: 98.01, 64: 95.07, 32: 90.75},
            "divprune": {128: 97.25, 64: 95.02, 32: 92.16},
            "visionzip": {128: 97.19, 64: 94.46, 32: 89.41},
            "prumerge_plus": {128: 95.64, 64: 92.76, 32: 87.01},
        },
        "PIO-FVLM's README, github.com/ocy1/PIO-FVLM (8 benchmarks)": {
            "holov": {192: 98.7, 128: 97.2, 64: 94.4},
            "scope": {192: 98.3, 128: 97.5, 64: 95.4},
            "visionzip": {192: 97.8, 128: 96.4, 64: 93.0},
            "dart": {192: 98.3, 128: 97.0, 64: 92.8},
            "pyramiddrop": {192: 96.2, 128: 94.0, 64: 74.4},
            "sparsevlm": {192: 97.6, 128: 95.2, 64: 90.6},
            "fastv": {192: 89.0, 128: 83.2, 64: 74.0},
        },
        "PriorTR's README, github.com/CodeChildCZJ/PriorTR (12 benchmarks)": {
            "vispruner": {192: 98.5, 128: 96.6, 64: 91.7}
        },
    },
    "llava-v1.6-vicuna-7b": {
        "VisPruner's project page, LLaVA-NeXT-7B (arXiv 2412.01818)": {"vispruner": {128: 98.6, 64: 93.3, 32: 86.7}},
        "FSR's table of LLaVA-NeXT-7B, github.com/ILOT-code/FSR (9 benchmarks)": {
            "vispruner": {192: 99.2, 128: 98.5, 64: 95.2},
            "cdpruner": {192: 99.4, 128: 99.3, 64: 97.3},
            "holov": {192: 91.7, 128: 97.0, 64: 96.0},
            "divprune": {128: 97.7, 64: 95.2},
            "fastv": {128: 94.4, 64: 74.9},
        },
    },
}
