"""bAbI's stories without noise, asked in BABILong's form and as a user might: how much hangs on the prompt.

`python benchmarks/other_prompts.py smollm2-135m-longcontext smollm2-135m-instruct` prints percent right, as
BABILong scores. Stories are those of `lawcat eval --tasks babilong_qa1 --lengths 0k`.
"""

from __future__ import annotations

import argparse
import re

import torch

from lawcat.convert.load import load_model
from lawcat.tasks.babilong import BABILONG_QA1, BABILONG_QA2, BABILONG_QA3

FORMS = {
    "BABILong's": None,
    "Question: Answer:": "{story}\nQuestion: {question}\nAnswer:",
    "a page, then the question": "{story}\n\n{question}",
    "question first": "{question} Read this.\n{story}\nAnswer:",
}


def main() -> None:
    """Print a row for each model, task and form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tasks", default="1,2,3", help="of QA1 to QA3, which")
    options = parser.parse_args()
    tasks = {"1": BABILONG_QA1, "2": BABILONG_QA2, "3": BABILONG_QA3}
    for name in options.models:
        loaded = load_model(name)
        for task in map(tasks.__getitem__, options.tasks.split(",")):
            right = dict.fromkeys(FORMS, 0.0)
            for index in range(options.samples):
                sample = task.generate(loaded.tokenizer, 0, index, 0)
                story, question = re.findall(
                    r"<context>\n(.*)\n</context>\n\nQuestion: (.*)", sample.prompt, re.DOTALL
                )[-1]
                for form, template in FORMS.items():
                    text = template.format(story=story, question=question) if template else sample.prompt
                    inputs = loaded.tokenizer(text, return_tensors="pt").to(loaded.model.device)
                    with torch.inference_mode():
                        out = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
                    answer = loaded.tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
                    right[form] += task.score(sample, answer)["accuracy"]
            row = ", ".join(f"{form} {100 * n / options.samples:.0f}" for form, n in right.items())
            print(f"{name}, {task.name}: {row}", flush=True)


if __name__ == "__main__":
    main()
