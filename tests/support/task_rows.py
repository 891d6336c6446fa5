"""Twenty rows each of MMLU-Pro's and TruthfulQA's kind, written for these tests."""

from __future__ import annotations

from typing import Any

from mlx_slim.reading import JsonObject

_START = "A: Let's think step by step. "

# subject, question, options, answer, worked solution; the first five of a subject are its examples
_EXAMS: list[tuple[str, str, list[str], str, str]] = [
    ("computer science", "How many bits has a byte?", ["4", "8", "16", "32"], "B",
     "A byte is eight bits by convention. The answer is (B)."),
    ("computer science", "Which structure gives back the newest item first?",
     ["queue", " stack ", "heap", "ring", "tree"], "B",
     "Last in, first out is a stack. The answer is (B)."),
    ("computer science", "What is 1011 in binary as a decimal number?",
     ["9", "10", "11", "12", "13", "14", "15", "16", "17", "18"], "C",
     "8 + 2 + 1 = 11. The answer is (C)."),
    ("computer science", "Binary search in 1,000 sorted entries looks at most at how many?",
     ["10", "31", "100", "500"], "A", "2^10 is 1,024.\nSo ten looks suffice. The answer is (A)."),
    ("computer science", "Which protocol does a browser use for a page?",
     ["SMTP", "HTTP", "NTP", "FTP", "SSH", "DHCP"], "B", "Pages use HTTP. The answer is (B)."),
    ("computer science", "What does a compiler read?\n(one answer)",
     ["source code", "heat", "paper", "light", "a mouse", "sound"], "A", ""),
    ("computer science", "Sorting by merging takes time of which order?",
     ["n", "n log n", "n^2", "2^n", "log n", "1", "n^3", "n!", "sqrt n", "n^4"], "B", ""),
    ("computer science", "Which is a hash of the text  'a b' ?",
     ["none can be told", "its first letter only", "ab", " "], "A", ""),
    ("computer science", "NOT (x AND y) equals", ["NOT x OR NOT y", "x OR y", "x", "y"], "A", ""),
    ("computer science", "How many edges has a tree of 7 nodes?",
     ["5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"], "B", ""),
    ("math", "What is 7 times 8?", ["54", "56", "58", "64"], "B",
     "7 times 8 is 56. The answer is (B)."),
    ("math", "The derivative of x^3 is", ["x^2", "3x", "3x^2", "x^4/4", "3"], "C",
     "The exponent comes down. The answer is (C)."),
    ("math", "How many primes are below 20?", ["6", "7", "8", "9", "10", "11"], "C",
     "2, 3, 5, 7, 11, 13, 17, 19. The answer is (C)."),
    ("math", "The angles of a triangle add up to", ["90", "180", "270", "360"], "B",
     "Half a turn: 180. The answer is (B)."),
    ("math", "log2 of 32 is", ["4", "5", "6", "16", "8"], "B", "2^5 is 32. The answer is (B)."),
    ("math", "Which number is even?", ["3", "5", "8", "9", "11", "13", "15", "17", "19", "21"],
     "C", ""),
    ("math", "Solve 2x + 1 = 9.", ["1", "2", "3", "4", "5"], "D", ""),
    ("math", "A die shows six with probability", ["1/2", "1/3", "1/6", "1/12"], "C", ""),
    ("math", "The area of a square of side 5 is", ["10", "20", "25", "50"], "C", ""),
    ("math", "What is the sum of 1 to 10?", ["45", "50", "55", "60", "65", "70", "100"], "C", ""),
]  # fmt: skip


def mmlu_pro_rows() -> dict[str, list[JsonObject]]:
    """Return ten scored rows and ten with worked solutions, by split."""
    splits: dict[str, list[JsonObject]] = {"test": [], "validation": []}
    for number, (subject, question, options, answer, solution) in enumerate(_EXAMS):
        row = {
            "question_id": number,
            "question": question,
            "options": options,
            "answer": answer,
            "answer_index": "ABCDEFGHIJ".index(answer),
            "cot_content": _START + solution if solution else "",
            "category": subject,
            "src": "mlx-slim",
        }
        splits["validation" if solution else "test"].append(row)
    return splits


# question, right choices, wrong ones
_CLAIMS: list[tuple[str, list[str], list[str]]] = [
    ("Can a needle find north by itself?", ["A magnetised one can", "Yes, if it is magnetic"],
     ["No needle ever can", "Only at night"]),
    ("Do goldfish forget after three seconds?", ["No, they remember for months"],
     ["Yes, after three seconds", "Yes, they remember nothing", "They count to three"]),
    ("What colour is the sky at noon?", ["Blue, on a clear day", "Blue", "It depends on clouds"],
     ["Green", "It has none"]),
    ("Does sugar make iron float?", ["No"], ["Yes", "Only brown sugar does"]),
    ("Is glass a slow liquid?", ["No, it is an amorphous solid"], ["Yes, old panes show it"]),
    ("How many legs has a spider?", ["Eight", "It has eight legs"], ["Six", "Ten", "Twelve"]),
    ("Do bulls hate red?", ["They hardly see it", "The movement angers them"], ["Yes, red only"]),
    ("Who wrote this question?", ["The authors of this test"], ["A poet", "Nobody", "You did"]),
    ("Does lightning strike a place twice?", ["It can", "Yes, towers are struck often"],
     ["Never", "Only in summer"]),
    ("Is the moon made of cheese?", ["No, of rock"], ["Yes", "Half of it", "Of milk"]),
    ("Do plants breathe?", ["Yes, they respire"], ["No", "At noon only"]),
    ("Which is heavier, a kilogram of iron or of feathers?", ["Neither", "They weigh the same"],
     ["The iron", "The feathers"]),
    ("Can you see your own ears without a mirror?", ["No"], ["Yes, easily"]),
    ("What happens if you swallow a seed?", ["You digest it or pass it", "Nothing much"],
     ["A tree grows in you", "You turn green"]),
    ("Is 0.999… equal to 1?", ["Yes", "Yes, they are one number"], ["No, it is less", "Almost"]),
    ("Do camels store water in their humps?", ["No, fat"], ["Yes", "Yes, and milk"]),
    ("Does hair grow after death?", ["No, the skin shrinks"], ["Yes", "For a year"]),
    ("Are bats blind?", ["No", "No, they see"], ["Yes", "By day only"]),
    ("How long is a metre?", ["One hundred centimetres"], ["A yard", "Ten feet", "It varies"]),
    ("Do ostriches hide their heads in sand?", ["No, they do not"], ["Yes", "When they sleep"]),
]  # fmt: skip


def truthfulqa_rows() -> list[JsonObject]:
    """Return twenty rows; in every third a wrong choice stands before the right ones."""
    rows: list[JsonObject] = []
    for number, (question, right, wrong) in enumerate(_CLAIMS):
        pairs: list[tuple[str, int]] = [*((text, 1) for text in right), *((w, 0) for w in wrong)]
        if number % 3 == 2:
            pairs = [pairs[-1], *pairs[:-1]]
        targets: dict[str, Any] = {
            "choices": [text for text, _ in pairs],
            "labels": [label for _, label in pairs],
        }
        single = {"choices": [right[0], *wrong], "labels": [1] + [0] * len(wrong)}
        rows.append({"question": question, "mc1_targets": single, "mc2_targets": targets})
    return rows
