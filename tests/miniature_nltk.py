"""A miniature of the nltk data that CHAIR reads: two models trained on two sentences, and a WordNet of three nouns.

nltk writes its models itself; WordNet's files are in the format of its manual page wndb(5WN).
"""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

SENTENCES = [
    [("two", "CD"), ("puppies", "NNS"), ("chase", "VBP"), ("mice", "NNS"), (".", ".")],
    [("a", "DT"), ("mouse", "NN"), ("hides", "VBZ"), ("under", "IN"), ("the", "DT"), ("table", "NN"), (".", ".")],
]
NOUNS = ("mouse", "puppy", "table")
PLURALS = {"mice": "mouse"}
LEXICOGRAPHERS = ("adj.all\t3", "adj.pert\t3", "adv.all\t4", "noun.Tops\t1")
HEADER = "  1 A miniature in the format of WordNet 3.0\n"


def write_nltk_data(root: Path) -> None:
    """Write all of it below `root`, for the variable NLTK_DATA."""
    import nltk
    from nltk.tag.perceptron import PerceptronTagger
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    text = " ".join(word for sentence in SENTENCES for word, _ in sentence)
    punkt = root / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    tagger = root / "taggers" / "averaged_perceptron_tagger_eng"
    random.seed(0)  # the tagger shuffles
    with patch.object(nltk.data, "path", [str(root)]):  # nltk writes nowhere else
        save_punkt_params(PunktTrainer(text).get_params(), str(punkt))
        PerceptronTagger(load=False).train(SENTENCES, save_loc=str(tagger))
    _write_wordnet(root / "corpora" / "wordnet")


def _write_wordnet(folder: Path) -> None:
    data, index, senses = HEADER, HEADER, ""
    for noun in NOUNS:
        offset = f"{len(data):08}"
        data += f"{offset} 03 n 01 {noun} 0 000 | a {noun}  \n"
        index += f"{noun} n 1 0 1 0 {offset}  \n"
        senses += f"{noun}%1:03:00:: {offset} 1 0\n"
    files = {
        "data.noun": data,
        "index.noun": index,
        "index.sense": senses,
        "noun.exc": "".join(f"{plural} {noun}\n" for plural, noun in PLURALS.items()),
        "lexnames": "".join(f"{number:02}\t{name}\n" for number, name in enumerate(LEXICOGRAPHERS)),
        "cntlist.rev": "",
    }
    for kind in ("adj", "adv", "verb"):
        files |= {f"data.{kind}": HEADER, f"index.{kind}": HEADER, f"{kind}.exc": ""}
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
