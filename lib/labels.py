"""The names of what is labelled: categories of sentences, kinds of text, splits, arrays of labels."""

CATEGORIES = ("reflection", "deduction", "alternative", "contrast")  # the paper's four, in its order
REDUNDANT = "verification"
# what a token's sentence can be; "general": not a trace
LABELS = ("general", "other", *CATEGORIES, REDUNDANT)

KINDS = ("general", "trace")
SPLITS = ("train", "choose", "report")  # to train on; to choose features and strengths on; to report on
LABEL_ARRAYS = ("label", "starts", "ends", "next_label", "error", "kind", "mode")
DETECTED = (*CATEGORIES, REDUNDANT)  # the paper's four, and our redundant fifth
