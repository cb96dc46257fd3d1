"""What the models read: generated traces and general text, or files, tokenised and labelled token by token.

Start with corpus.py, then puzzles.py.

    files.py               texts and traces in files and data sets
    corpus.py              documents of a pair, with splits and labels
    puzzles.py             the embedded pair's task, its teacher, and what a transcript says
    curriculum.py          general text of the embedded pair
    chat.py                a question, a thought and an answer as token ids
    lexicon.py             labels of real sentences, by rules
    lexicon_agreement.py   how far these labels can be believed
    questions.py           word problems and open questions for real models
    tables.py              words, templates and rules: data/text/*.yaml
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["lexicon"],
    submod_attrs={
        "chat": ["Trace"],
        "corpus": ["Corpus", "Document", "build", "override"],
        "files": ["read_traces"],
        "lexicon_agreement": ["agreement", "labelled_agreement"],
        "puzzles": ["Puzzle", "Teacher"],
        "questions": ["ask"],
    },
)
