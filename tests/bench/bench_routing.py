"""Records data/hybrid_routing.csv: short questions answered by SmolLM2 135M here and by a better model on `llmlab serve`.

    python tests/bench/bench_routing.py BETTER.gguf        # all of it anew; 10 minutes on two cores
"""

import argparse
import csv
import random
import re
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

import llmlab
from llmlab.endpoints.curves import RECORDED, Recorded, recorded_curve
from llmlab.endpoints.near import near_of
from llmlab.endpoints.signals import signal_of

TOP = Path(__file__).resolve().parents[2]
TOKENS = 16
SAYS = "Answer with one word or number only. "
FACTS = """What is the capital of France?|paris
What is the capital of Japan?|tokyo
What is the capital of Kenya?|nairobi
What is the capital of Peru?|lima
What is the capital of Norway?|oslo
What is the capital of Hungary?|budapest
What is the capital of Mongolia?|ulaanbaatar,ulan bator
What is the capital of Portugal?|lisbon
What is the capital of Egypt?|cairo
What is the capital of Canada?|ottawa
What is the capital of Australia?|canberra
What is the capital of Poland?|warsaw
Which planet is closest to the Sun?|mercury
Which planet is the largest in the Solar System?|jupiter
What is the chemical symbol of gold?|au
What is the chemical symbol of iron?|fe
What is the chemical symbol of sodium?|na
Which gas do plants take in from the air?|carbon dioxide,co2
How many legs does a spider have?|8,eight
How many days are there in a leap year?|366
How many continents are there?|7,seven
How many minutes are there in three hours?|180
Which ocean is the largest?|pacific
What colour do you get from blue and yellow?|green
What is the opposite of "hot"?|cold
What is the opposite of "ancient"?|modern,new,recent
What is the plural of "child"?|children
What is the past tense of "go"?|went
What is the past tense of "swim"?|swam
Who wrote "Romeo and Juliet"?|shakespeare
Who wrote "1984"?|orwell
Who painted the Mona Lisa?|leonardo,vinci
In which country is the city of Milan?|italy
In which country is the city of Kyoto?|japan
What do bees make?|honey
What is frozen water called?|ice
Which animal is known as the king of the jungle?|lion
Which language is spoken in Brazil?|portuguese
What is the largest mammal?|whale
What is the first letter of the Greek alphabet?|alpha
Which Python keyword defines a function?|def
Which Python keyword begins a loop over a list?|for
Which Python function gives the length of a list?|len
What does HTML tag <a> make, in one word?|link,hyperlink,anchor
Which data structure is last in, first out?|stack
What is binary 101 in decimal?|5,five
What is hexadecimal FF in decimal?|255
What is the file extension of Python files?|py"""


def questions() -> list[tuple[str, str, list[str]]]:
    """(task, question, what is right): facts, and sums from easy to hard, drawn from a seed."""
    found = [("facts", line.split("|")[0], line.split("|")[1].split(",")) for line in FACTS.splitlines()]
    draw = random.Random(0)
    for most in (9, 20, 99):
        for sign in "+-*":
            for _ in range(6):
                a, b = sorted((draw.randint(2, most), draw.randint(2, most)), reverse=True)
                found.append(("sums", f"What is {a} {sign} {b}?", [str(eval(f"{a}{sign}{b}"))]))
    return found


def right(text: str, answers: list[str]) -> float:
    """Whether one of the answers stands in it; of a number, as the last number of its first line."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    if answers[0].lstrip("-").isdigit() and len(answers) == 1:
        numbers = re.findall(r"-?\d+", line.replace(",", ""))
        return float(bool(numbers) and numbers[-1] == answers[0])
    said = re.sub(r"[^\w ]", " ", line.casefold())
    return float(any(re.search(rf"\b{re.escape(one)}\b", said) for one in answers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("better", type=Path)
    given = parser.parse_args()
    local, end = near_of(llmlab.fetch("smollm2-135m"))
    rows = []
    with llmlab.serve(given.better, port=0, background=True, name="better", context=512) as server:
        remote = llmlab.Endpoint(server.base_url, "better", timeout=120)
        for task, question, answers in questions():
            asked = SAYS + question
            here, entropy = signal_of("entropy").answered(local, _messages(asked), {"max_tokens": TOKENS})
            logprob = -sum(one.logprob for one in here.chances) / max(len(here.chances), 1)
            _, unlike = signal_of("agreement").answered(local, _messages(asked), {"max_tokens": TOKENS})
            there = remote.chat(asked, max_tokens=TOKENS)
            rows.append(Recorded(question, task, right(here.text, answers), right(there.text, answers), round(entropy, 4),
                                 round(logprob, 4), round(unlike, 4), there.prompt_tokens, there.completion_tokens))
            print(f"{rows[-1].local:g} {rows[-1].remote:g} {entropy:.3f} {question} | {here.text[:40]!r} | {there.text[:40]!r}",
                  file=sys.stderr, flush=True)
    end()
    with open(TOP / "data" / RECORDED, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "source"], lineterminator="\n")
        writer.writeheader()
        source = f"tests/bench/bench_routing.py, {date.today()}, {given.better.name}"
        writer.writerows({**asdict(one), "source": source} for one in rows)
    for signal in ("entropy", "logprob", "agreement"):
        print(recorded_curve(signal, rows=rows).answer)


def _messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


if __name__ == "__main__":
    main()
