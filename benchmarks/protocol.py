"""What all records have in common: texts, sizes, and how the place they were made at is called."""

import subprocess

STORIES = ("text/tinystories_train_sample.clean.txt", "text/tinystories_valid_a.txt")
BOOKS = (
    "books/george-eliot_middlemarch.txt.gz",
    "books/arthur-conan-doyle_the-adventures-of-sherlock-holmes.txt.gz",
)
OUTSIDE = "text/wikitext2.valid.tokens.txt"  # of another kind than any calibration text

# model: calibration text, and evaluation text of the same kind
TEXTS = {
    "babyllama105": STORIES,
    "stories260K": STORIES,
    "books-llama-6m": BOOKS,
    "books-llama-1m": BOOKS,
}
LENGTH, SAMPLES, WINDOWS = 256, 256, 100  # tokens of a window; calibration and evaluation windows


def commit() -> str:
    """The commit this runs from, marked when files were changed since."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
