"""Prompts about texts, from a model's own dialogues: summarise, translate, answer from a passage.

    python examples/pair/text_tasks.py own.jsonl --out tasks.jsonl [--number 1500] [--also FILE N ...]

A model that writes its own user turns hardly ever pastes a text into one, but users do. The passages are answers that it wrote
(`vllm-eagle regenerate --self`), the instructions are below; `vllm-eagle regenerate --data tasks.jsonl` then writes the answers.
With --also N questions of a file of dialogues are drawn and put among them.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

SUMMARISE = (
    "Summarize the following text:\n\n{text}",
    "Give me a short summary of this passage.\n\n{text}",
    "{text}\n\nSum this up in two sentences.",
    "What are the key points of this text?\n\n{text}",
    "Write a one-paragraph summary of the text below.\n\nText: {text}",
    "tl;dr please:\n{text}",
)
TRANSLATE = (
    "Translate into {language}: {text}",
    "How do you say this in {language}?\n\n{text}",
    'Please translate the sentence "{text}" to {language}.',
    "{text}\n\nTranslate the above to {language}.",
    "Give the {language} translation of this sentence: {text}",
)
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
ASK = (
    "Read the passage and answer the question.\n\nPassage: {text}\n\nQuestion: What is the passage mainly about?",
    "{text}\n\nAccording to the text above, what should one do first?",
    "Context: {text}\n\nUsing only the context, list the most important facts.",
    "Here is a text:\n{text}\n\nWhich reasons does it give?",
    "Answer from the text only. What does it say about {word}?\n\n{text}",
    "Question: Why does {word} matter here?\n\nText: {text}\n\nAnswer with a quote from the text.",
    "Based on the following paragraph, what is {word}?\n\n{text}",
)


def tasks(answers: list[str], number: int, seed: int = 0) -> list[str]:
    """So many prompts, the three kinds in turns."""
    chance = random.Random(seed)
    passages = [text for answer in answers if (text := _cut(answer))]
    sentences = [part for text in passages for part in re.findall(r"[A-Z][^.!?\n]{25,160}[.!?]", text)]
    prompts = []
    for turn in range(number):
        text = chance.choice(passages)
        if turn % 3 == 0:
            prompts.append(chance.choice(SUMMARISE).format(text=text))
        elif turn % 3 == 1:
            prompts.append(chance.choice(TRANSLATE).format(text=chance.choice(sentences), language=chance.choice(LANGUAGES)))
        else:
            words = re.findall(r"\b[a-z]{6,}\b", text) or ["it"]
            prompts.append(chance.choice(ASK).format(text=text, word=chance.choice(words)))
    return list(dict.fromkeys(prompts))


def questions(path: Path, number: int, chance: random.Random) -> list[str]:
    """So many first turns of a file of dialogues, of at most 900 characters."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    first = [json.loads(line)["messages"][0]["content"] for line in text.split("\n") if line]
    return chance.sample([question for question in first if len(question) < 900], number)


def _cut(answer: str) -> str | None:
    """The first 60 to 200 words, up to the end of a sentence."""
    text = " ".join(answer.split()[:200])
    text = text[: text.rfind(".") + 1]
    return text if len(text.split()) >= 60 else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", type=Path, help="what `vllm-eagle regenerate --self` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--number", type=int, default=1500)
    parser.add_argument("--also", nargs=2, action="append", default=[], metavar=("FILE", "N"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.own.read_text().split("\n") if line]
    answers = [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]
    chance = random.Random(0)
    prompts = tasks(answers, args.number)
    for file, number in args.also:
        prompts += questions(Path(file), int(number), chance)
    chance.shuffle(prompts)
    lines = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in prompts]
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
