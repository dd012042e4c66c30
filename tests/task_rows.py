"""Questions with the columns that data sets have on the hub: two for every task that users ask."""

import json

COPA = [
    {
        "premise": "The man turned on the faucet.",
        "choice1": "The toilet filled with water.",
        "choice2": "Water flowed from the spout.",
        "question": "effect",
        "idx": 0,
        "label": 1,
    },
    {
        "premise": "The girl found a bug in her cereal.",
        "choice1": "She poured milk in the bowl.",
        "choice2": "She lost her appetite.",
        "question": "effect",
        "idx": 1,
        "label": 1,
    },
    {
        "premise": "The woman retired.",
        "choice1": "She received her pension.",
        "choice2": "She paid off her mortgage.",
        "question": "cause",
        "idx": 2,
        "label": 0,
    },
]


def _arc(number, count):
    texts = ["the sun", "the moon", "a lamp", "a fire", "ice"][:count]
    return {
        "id": f"q{number}",
        "question": f"What is warm on day {number}?",
        "choices": {"text": texts, "label": list("ABCDE")[:count]},
        "answerKey": "A",
    }


ARC = [_arc(0, 4), _arc(1, 5)]
GSM8K = [
    {
        "question": f"A man has {n} hens and buys {n}. How many?",
        "answer": f"So {n + n}.\n#### {2 * n}",
    }
    for n in range(1, 4)
]
TRUTH = [
    {
        "question": f"Is {n} more than {n + 1}?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["No.", "It is not.", "Yes."], "labels": [1, 1, 0]},
    }
    for n in range(2)
]
ROWS = {  # task: name of its file, rows
    "arc_easy": ("ai2_arc_ARC-Easy.test.jsonl", ARC),
    "arc_challenge": ("ai2_arc_ARC-Challenge.test.jsonl", ARC),
    "copa": ("super_glue_copa.validation.jsonl", COPA),
    "gsm8k": ("gsm8k_main.test.jsonl", GSM8K),
    "hellaswag": (
        "hellaswag.validation.jsonl",
        [
            {
                "ind": n,
                "activity_label": "Cooking",
                "ctx_a": "A man cuts bread.",
                "ctx_b": "he",
                "ctx": "A man cuts bread. he",
                "endings": ["eats it.", "flies.", "sings [title] loud.", "is a pot."],
                "source_id": "a",
                "split": "val",
                "split_type": "indomain",
                "label": "0",
            }
            for n in range(2)
        ],
    ),
    "mathqa": (
        "math_qa.test.jsonl",
        [
            {
                "Problem": f"what is {n} + 1 ?",
                "Rationale": "add",
                "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) none of these",
                "correct": "ab"[n],
                "annotated_formula": "add",
                "linear_formula": "add",
                "category": "general",
            }
            for n in range(2)
        ],
    ),
    "openbookqa": (
        "openbookqa_main.test.jsonl",
        [{**row, "question_stem": row["question"]} for row in ARC],
    ),
    "piqa": (
        "piqa.validation.jsonl",
        [
            {"goal": f"Boil {n} eggs.", "sol1": "Use water.", "sol2": "Use a tree.", "label": n % 2}
            for n in range(2)
        ],
    ),
    "truthfulqa_mc1": ("truthful_qa_multiple_choice.validation.jsonl", TRUTH),
    "truthfulqa_mc2": ("truthful_qa_multiple_choice.validation.jsonl", TRUTH),
    "winogrande": (
        "winogrande_winogrande_xl.validation.jsonl",
        [
            {
                "sentence": f"Ann helped Eve {n} times, so _ was glad.",
                "option1": "Ann",
                "option2": "Eve",
                "answer": str(1 + n),
            }
            for n in range(2)
        ],
    ),
}


def write_rows(folder, name, rows):
    """Write rows as JSON lines; returns the file."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_all(folder):
    """Files for all tasks of ``ROWS``; returns the folder."""
    for name, rows in ROWS.values():
        write_rows(folder, name, rows)
    return folder
